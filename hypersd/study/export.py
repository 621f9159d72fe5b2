"""A study as a folder that can be published: the formats asked for, every raw vote, and a card that says what it is."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from hypersd import __version__
from hypersd.records import InputError, Problem
from hypersd.study import quality
from hypersd.study.definition import Study
from hypersd.study.formats import FORMATS, WITH_PATHS, raw_votes
from hypersd.study.pairs import SPLITS, Votes, gather, pairs
from hypersd.study.votes import Store


def export(
    store: Store, study: Study, images: Path, out: Path, names: Sequence[str] = (), *, ties: bool = False
) -> dict[str, int]:
    """Write the formats `names`, all by default, into the new folder `out`; how many bytes each file has.

    Args:
        images: folder of the study's pictures, each <sha256 of its pixels>.png.

    Raises:
        InputError: there is no such format, `out` is there already, or a picture is missing or not the one shown.
        Problem: there is no vote yet, or the folder cannot be written.
    """
    if unknown := [name for name in names if name not in FORMATS]:
        raise InputError(f"there is no format {unknown[0]!r}; choose from {', '.join(FORMATS)}")
    if out.exists():
        raise InputError(f"{out} is there already; name a new folder")
    votes = gather(store, study)
    shown = {item.image_sha256 for one in votes.compared for item in (one.left, one.right)}
    pictures = {sha: read_picture(images, sha) for sha in sorted(shown)}
    return _write(out, _files(votes, pictures, names or tuple(FORMATS), ties))


def _files(votes: Votes, images: Mapping[str, bytes], names: Sequence[str], ties: bool) -> Iterator[tuple[str, bytes]]:
    for name in names:
        yield from FORMATS[name](votes, images, ties)
    if WITH_PATHS & set(names):
        yield from ((f"images/{sha}.png", content) for sha, content in images.items())
    yield "votes.csv", raw_votes(votes)
    yield "study.json", (votes.study.definition + "\n").encode()
    yield "README.md", card(votes, names, ties).encode()


def _write(out: Path, files: Iterable[tuple[str, bytes]]) -> dict[str, int]:
    """All files or none: they are written beside `out`, which appears when they are on disk."""
    partial = out.with_name(f"{out.name}.partial")
    sizes = {}
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was interrupted
        for name, content in files:
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            sizes[name] = len(content)
        partial.rename(out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise Problem(f"the export {out} cannot be written: {error.strerror or error}") from None
    return sizes


def read_picture(folder: Path, sha256: str) -> bytes:
    """A PNG file of the pool, checked to hold the pixels that were shown and nothing that names their method."""
    from PIL import Image

    path = folder / f"{sha256}.png"
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as picture:
            pixels, told = picture.convert("RGB").tobytes(), dict(picture.info)
    except OSError as error:
        raise InputError(f"the picture {path} cannot be read: {error.strerror or error}") from None
    if hashlib.sha256(pixels).hexdigest() != sha256 or told:
        raise InputError(f"the picture {path} is not the one that was shown; draw the pool again")
    return content


def card(votes: Votes, names: Sequence[str], ties: bool) -> str:
    """The data card: what this is, how it came about, how far it can be trusted."""
    study, table = votes.study, votes.table
    kept = table.where(quality.used(table, list(votes.judged)))
    made = pairs(votes, ties=ties)
    by_split = ", ".join(f"{name} {sum(pair.split == name for pair in made)}" for name, _ in SPLITS)
    out = [one for one in votes.judged if one.reasons]
    repeats, repeated = quality.consistency(kept)
    ceiling, judged = quality.ceiling(kept)
    rows = {
        "votes cast": f"{len(votes.cast)} by {len(votes.judged)} annotators",
        f"left out by filter version {quality.FILTER_VERSION}": f"{len(table) - len(kept)} by {len(out)} annotators",
        "votes that compare arms": str(len(votes.compared)),
        "pairs of pictures": f"{len(made)} ({by_split})",
        "ties": "as pairs of equal rank" if ties else "left out",
        "agreement, Krippendorff's alpha": _share(quality.alpha(kept)),
        "human ceiling": f"{_share(ceiling)} of {judged} votes agree with the majority of the others",
        "own consistency": f"{_share(repeats)} of {repeated} repeated pairs",
        "study": f"sha256 {study.sha256}",
        "licence of the votes": study.licence,
    }
    return "\n".join(
        [
            "---",
            f"license: {study.licence.lower()}",
            f"pretty_name: {_quoted(study.name)}",
            "tags: [human-feedback, preference, text-to-image]",
            *_configs(names),
            "---",
            "",
            f"# {study.name}",
            "",
            "Blind votes on pairs of pictures that were drawn from the same prompt and the same noise.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows.items()),
            "",
            "`votes.csv` has every vote that was not taken back, with the probability with which its ballot was chosen"
            ' and whether the filter uses it; `study.json` is what was asked. Splits are by prompt. "Both bad" is a'
            " choice in `votes.csv` and never a preference. A pair's margin is (votes for - votes against) / votes.",
            "",
            f"Written by hypersd {__version__}. Annotators agreed to this text:",
            "",
            *(f"> {line}" for line in study.consent.splitlines()),
            "",
        ]
    )


def _configs(names: Sequence[str]) -> list[str]:
    """So that `load_dataset` finds the parquet files by name."""
    found = [name for name in names if name in ("pickapic", "preference")]
    return ["configs:"] * bool(found) + [
        f"- config_name: {name}\n  data_files:\n"
        + "\n".join(f"  - split: {split}\n    path: {name}/{split}.parquet" for split, _ in SPLITS)
        for name in found
    ]


def _share(value: float | None) -> str:
    return "not known" if value is None else f"{value:.3f}"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
