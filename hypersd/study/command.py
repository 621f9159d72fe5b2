"""python -m hypersd study: what only the owner of a study may do, so there is no button for any of it.

An action is one row in ACTIONS; each returns the lines to print. What an action needs is imported when it runs.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hypersd.records import InputError, Problem, real_number, whole_number

if TYPE_CHECKING:
    from hypersd.study.definition import Study
    from hypersd.study.mirror import Place
    from hypersd.study.table import Table
    from hypersd.study.votes import Store

FOLDER = Path("runs/study")
Lines = Iterator[str]


class Action(NamedTuple):
    help: str
    run: Callable[[argparse.Namespace], Lines]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "actions:\n" + "".join(f"  {name:<10} {action.help}\n" for name, action in ACTIONS.items())
    parser.add_argument("action", choices=ACTIONS, help="what to do")
    parser.add_argument("receipt", nargs="?", help="withdraw: the code that the annotator was given")
    parser.add_argument("--database", help=f"file or URL (default: DATABASE_URL, else {FOLDER}/study.db)")
    parser.add_argument("--study", help="the study's definition (default: HYPERSD_STUDY, else assets/study.yaml)")
    parser.add_argument("--images", default=FOLDER / "images", type=Path, help="its pictures (default: %(default)s)")
    parser.add_argument(
        "--mirror",
        default=os.environ.get("HYPERSD_MIRROR"),
        help="a folder, or hf://datasets/owner/name with HF_TOKEN set (default: HYPERSD_MIRROR)",
    )
    parser.add_argument("--out", default=FOLDER / "export", type=Path, help="export: new folder (default: %(default)s)")
    parser.add_argument("--format", action="append", default=[], help="export: one of the six; all when not given")
    parser.add_argument("--ties", action="store_true", help="export: ties too, as pairs of equal rank")
    parser.add_argument("--annotators", default=24, help="simulate: how many (default: %(default)s)")
    parser.add_argument("--spammers", default=0.1, help="simulate: share who do not look (default: %(default)s)")
    parser.add_argument("--seed", default=0, help="simulate: of everything random (default: %(default)s)")


def run(given: argparse.Namespace) -> Lines:
    """The lines to print, one by one, as they come about. Raises Problem and InputError."""
    if given.receipt and given.action != "withdraw":
        raise InputError(f"study {given.action} takes no receipt")
    return ACTIONS[given.action].run(given)


# The actions


def status(given: argparse.Namespace) -> Lines:
    from hypersd.study import mirror, quality
    from hypersd.study.ballots import items_of, missing
    from hypersd.study.statistics import drop_to_flip
    from hypersd.study.table import read

    store, study = _open(given), _study(given)
    table = read(store, study)
    judged = quality.annotators(table, study.anchor) if len(table) else []
    kept = table.where(quality.used(table, judged))
    lacking = missing(study, items_of(store))
    yield f"study       {study.name} ({study.sha256[:12]}), {'closed' if _frozen(store, study) else 'open'}"
    yield f"database    {store.url.render_as_string(hide_password=True)}"
    yield f"pictures    {len(lacking)} missing" if lacking else "pictures    all there"
    yield f"votes       {len(table)} by {len(table.annotators)} annotators, {len(kept)} used"
    yield f"mirror      {mirror.waiting(store)} rows not mirrored"
    for one in judged:
        if one.reasons:
            yield f"left out    annotator {one.number}, {one.votes} votes: {', '.join(one.reasons)}"
    if not len(kept):
        return
    yield from _ratings(kept, study)
    same, asked = quality.consistency(kept)
    alpha, (circles, triples) = quality.alpha(kept), quality.cycles(kept)
    dropped, share = drop_to_flip(kept, study.anchor)
    yield f"agreement   alpha {_figure(alpha)}; repeats answered alike {_figure(same)} of {asked}"
    yield f"circles     {circles} of {triples} triples of arms"
    yield f"first place {f'falls without {dropped} votes ({share:.1%})' if dropped else 'does not fall'}"


def _ratings(kept: Table, study: Study) -> Lines:
    from hypersd.study.statistics import results

    for found in results(kept, study.anchor):
        odds, low, high = found.left
        yield f"\n{found.name}: {found.votes} votes; left side times {odds:.2f} [{low:.2f}, {high:.2f}]"
        yield f"{'arm':<16} {'rating':>7} {'95 % interval':>16} {'votes':>6} {'both bad':>9}"
        for row in found.ratings:
            interval = f"[{row.low:.0f}, {row.high:.0f}]"
            yield f"{row.arm:<16} {row.rating:>7.0f} {interval:>16} {row.votes:>6} {row.both_bad:>9.1%}"
        for gap in found.differences:
            needed = f", {gap.votes_needed:,} more votes to show it" if gap.votes_needed else ""
            interval = f"[{gap.low:.0f}, {gap.high:.0f}]"
            yield f"{gap.arm} - {gap.other}: {gap.gap:.0f} {interval}, p {gap.p_holm:.3f} (Holm){needed}"
    yield ""


def export(given: argparse.Namespace) -> Lines:
    from hypersd.study.export import export as write

    for name, size in write(
        _open(given), _study(given), given.images, given.out, given.format, ties=given.ties
    ).items():
        if not name.endswith(".png"):
            yield f"{given.out / name}  {size:,} bytes"


def withdraw(given: argparse.Namespace) -> Lines:
    from hypersd.study import mirror
    from hypersd.study.people import annotator_of

    if not given.receipt:
        raise InputError("name the receipt: python -m hypersd study withdraw K7QM-2XVD-R3AB-76TC-LWPF")
    annotator, store, place = annotator_of(given.receipt), _open(given), _place(given)
    yield f"erased {store.withdraw(annotator)} votes and everything else under this receipt"
    if place:
        mirror.flush(store, place)
        yield "erased from the mirror too"


def freeze(given: argparse.Namespace) -> Lines:
    store, study = _open(given), _study(given)
    new = store.note("freeze", "", study.sha256)
    yield f"the study {study.name} is closed{'' if new else ' already'}: no vote is taken any more, none can be undone"


def restore(given: argparse.Namespace) -> Lines:
    """Bring the rows of the mirror into the database; beside a damaged one that was kept aside, into a new file."""
    from hypersd.study import mirror
    from hypersd.study.votes import Store

    place, store = _place(given), Store(_address(given))
    if place is None:
        raise InputError("name where the rows are: --mirror FOLDER, or --mirror hf://datasets/owner/name")
    if not store.paused:
        counted = mirror.pull(store, place)
    elif store.file is None or store.file.exists():
        raise Problem(store.paused)
    else:
        # Under another name until it is whole: an empty file would be taken for the study.
        file = store.file.with_name(f"{store.file.name}.restoring")
        file.unlink(missing_ok=True)
        fresh = Store(file)
        counted = mirror.pull(fresh, place)
        fresh.close()
        file.rename(store.file)
        yield store.paused.replace("voting is paused, the database is", "the old database stays: it was")
    store.close()
    yield "restored " + ", ".join(f"{count} {name}s" for name, count in counted.items())


def simulate(given: argparse.Namespace) -> Lines:
    """A study that nobody voted in, for rehearsal; its name says so wherever it goes."""
    from hypersd.study import simulate as simulated

    address = given.database or FOLDER / "simulated.db"
    count = whole_number(given.annotators, "annotators", 1, 10_000)
    spammers, seed = real_number(given.spammers, "spammers", 0.0, 1.0), whole_number(given.seed, "seed", 0, 2**32 - 1)
    stored = simulated.rehearse(address, _study(given, simulated=True), given.images, count, spammers, seed)
    again = f"--database {address} --images {given.images} --study {_file(given)}"
    yield f"{stored} simulated votes by {count} annotators; look at them with"
    yield f"python -m hypersd study status {again}"


ACTIONS = {
    "status": Action("who voted, ratings with intervals, how far to trust them", status),
    "export": Action("write the votes in six formats, with a data card", export),
    "withdraw": Action("erase an annotator's votes, by their receipt", withdraw),
    "freeze": Action("close the study for good", freeze),
    "restore": Action("bring back what the mirror holds", restore),
    "simulate": Action("fill a database of its own with simulated votes", simulate),
}


# What they share


def opened(given: argparse.Namespace) -> tuple[Store, Study]:
    """The votes and the study that the options name. Raises Problem and InputError."""
    return _open(given), _study(given)


def _address(given: argparse.Namespace) -> str | Path:
    return given.database or os.environ.get("DATABASE_URL") or FOLDER / "study.db"


def _open(given: argparse.Namespace) -> Store:
    from hypersd.study.schema import parse_url
    from hypersd.study.votes import Store

    url = parse_url(_address(given))
    store = Store(_address(given)) if url.drivername != "sqlite" or _known(Path(url.database or "")) else None
    if store is None:
        raise InputError(f"there is no database {url.database}; name it with --database, or begin with study simulate")
    if store.paused:
        raise Problem(store.paused)
    return store


def _known(file: Path) -> bool:
    return file.exists() or any(file.parent.glob(f"{file.name}.damaged-*"))


def _file(given: argparse.Namespace) -> Path:
    from hypersd.study.definition import FILE

    return Path(given.study or os.environ.get("HYPERSD_STUDY") or FILE)


def _study(given: argparse.Namespace, simulated: bool = False) -> Study:
    """The study of the file; its simulated twin where the database holds that one."""
    from hypersd.study.definition import load
    from hypersd.study.simulate import twin

    study = load(_file(given))
    return twin(study) if simulated or _holds_twin(given, twin(study)) else study


def _holds_twin(given: argparse.Namespace, twin: Study) -> bool:
    import sqlalchemy as sa

    from hypersd.study.schema import study

    if given.action == "simulate":
        return False
    found = sa.select(study.c.seq).where(study.c.sha256 == twin.sha256)
    store = _open(given)
    try:
        return store.read(lambda c: c.scalar(found)) is not None
    finally:
        store.close()


def _place(given: argparse.Namespace) -> Place | None:
    from hypersd.study.mirror import place_of

    return place_of(given.mirror) if given.mirror else None


def _frozen(store: Store, study: Study) -> bool:
    import sqlalchemy as sa

    from hypersd.study.votes import is_frozen

    return bool(store.read(lambda c: c.scalar(sa.select(is_frozen(study.sha256)))))


def _figure(value: float | None) -> str:
    return "not known" if value is None else f"{value:.3f}"
