"""The mirror: whatever the other side does, each row is there once, or waits here; what comes back is exact."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hub import Hub
from voting import ANN, BOB, MINUTE, STUDY, Clock, issue, store

from hypersd.study import mirror
from hypersd.study.mirror import Folder, HubDataset, Mirror, NotMirrored
from hypersd.study.schema import TABLES, vote
from hypersd.study.votes import Store


@pytest.fixture
def kept(ram: Path) -> Iterator[Store]:
    """Three votes of one person, two of another, an undo and a consent."""
    opened = store(ram / "study.db", Clock())
    cast(opened, ANN, 3)
    cast(opened, BOB, 2)
    opened.note("consent", ANN, STUDY)
    opened.note("undo", ANN, STUDY, cast(opened, ANN, 1)[0])
    yield opened
    opened.close()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    opened = Hub()
    yield opened
    opened.close()


def cast(into: Store, annotator: str, count: int) -> list[str]:
    asked = [issue(into, annotator) for _ in range(count)]
    assert {into.vote(one, annotator, "left").kind for one in asked} == {"saved"}
    return asked


def rows(of: Store) -> dict[str, set[tuple[Any, ...]]]:
    """Everything that a copy has to have."""

    def read(connection: sa.Connection) -> dict[str, set[tuple[Any, ...]]]:
        kept = {t.name: [c for c in t.c if c.name not in mirror.KEPT_HERE] for t in TABLES}
        return {name: {tuple(row) for row in connection.execute(sa.select(*c))} for name, c in kept.items()}

    return of.read(read)


def test_an_empty_machine_gets_the_exact_rows_back(kept: Store, ram: Path) -> None:
    place = Folder(ram / "mirror")
    assert mirror.flush(kept, place) > 10
    assert (mirror.waiting(kept), mirror.flush(kept, place)) == (0, 0)
    fresh = Store(ram / "fresh.db", clock=Clock())
    counted = mirror.pull(fresh, place)
    assert counted == {name: len(found) for name, found in rows(kept).items()}
    assert rows(fresh) == rows(kept)
    assert mirror.waiting(fresh) == 0, "what came from there need not go there"
    assert set(mirror.pull(fresh, place).values()) == {0}
    assert fresh.vote(issue(fresh), ANN, "tie").kind == "saved"
    fresh.close()


def test_every_segment_is_named_by_its_content_and_never_changed(kept: Store, ram: Path) -> None:
    place = Folder(ram / "mirror")
    mirror.flush(kept, place)
    before = {path.name: path.read_bytes() for path in place.path.iterdir()}
    cast(kept, ANN, 1)
    mirror.flush(kept, place)
    assert len(place.names()) == len(before) + 1
    for path in place.path.iterdir():
        assert path.name == f"{hashlib.sha256(path.read_bytes()).hexdigest()}.jsonl"
        assert before.get(path.name, path.read_bytes()) == path.read_bytes()


def test_many_rows_are_many_segments(kept: Store, ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "SEGMENT_ROWS", 2)
    place, fresh = Folder(ram / "mirror"), Store(ram / "fresh.db")
    mirror.flush(kept, place)
    assert len(place.names()) >= 3
    mirror.pull(fresh, place)
    assert rows(fresh) == rows(kept)
    fresh.close()


class Failing(Folder):
    """Takes the segment or not, and says no either way."""

    takes = False

    def write(self, files: Any, gone: Any = ()) -> None:
        if self.takes:
            super().write(files, gone)
        raise NotMirrored("no")


@pytest.mark.parametrize("takes", [False, True])
def test_rows_are_marked_only_when_they_are_known_to_be_there(takes: bool, kept: Store, ram: Path) -> None:
    place, fresh = Failing(ram / "mirror"), Store(ram / "fresh.db")
    place.takes, before = takes, mirror.waiting(kept)
    with pytest.raises(NotMirrored):
        mirror.flush(kept, place)
    assert mirror.waiting(kept) == before > 0
    cast(kept, BOB, 1)
    mirror.flush(kept, Folder(ram / "mirror"))
    mirror.pull(fresh, Folder(ram / "mirror"))
    assert rows(fresh) == rows(kept), "each once, though some were sent twice"
    fresh.close()


@pytest.mark.parametrize("how", ["cut", "other"])
def test_a_damaged_segment_is_refused_and_nothing_is_brought_back(how: str, kept: Store, ram: Path) -> None:
    place, fresh = Folder(ram / "mirror"), Store(ram / "fresh.db")
    mirror.flush(kept, place)
    (path,) = place.path.iterdir()
    path.write_bytes(path.read_bytes()[:-40] if how == "cut" else path.read_bytes().replace(b"left", b"tie "))
    with pytest.raises(NotMirrored, match="is damaged"):
        mirror.pull(fresh, place)
    assert not any(rows(fresh).values())
    fresh.close()


def test_who_withdrew_is_gone_everywhere_and_stays_gone(kept: Store, ram: Path) -> None:
    place = Folder(ram / "mirror")
    mirror.flush(kept, place)
    copies = {path.name: path.read_bytes() for path in place.path.iterdir()}
    assert any(ANN.encode() in content for content in copies.values())
    assert kept.withdraw(ANN) == 4
    mirror.flush(kept, place)
    left = b"".join(path.read_bytes() for path in place.path.iterdir())
    assert left.count(ANN.encode()) == 2, "id and annotator of the row that says so"
    fresh = Store(ram / "fresh.db")
    mirror.pull(fresh, place)
    assert rows(fresh) == rows(kept)
    for name, content in copies.items():  # somebody brings the old segments back
        (place.path / name).write_bytes(content)
    mirror.pull(fresh, place)
    mirror.pull(kept, place)
    assert rows(fresh) == rows(kept)
    fresh.close()


def test_a_withdrawal_reaches_another_machine(kept: Store, ram: Path) -> None:
    place, other = Folder(ram / "mirror"), Store(ram / "other.db")
    mirror.flush(kept, place)
    mirror.pull(other, place)
    kept.withdraw(BOB)
    mirror.flush(kept, place)
    mirror.pull(other, place)
    assert rows(other) == rows(kept)
    other.close()


def test_the_hub_gives_back_what_it_got(kept: Store, hub: Hub, ram: Path) -> None:
    place = HubDataset("a/b", "hf_x", hub.endpoint)
    mirror.flush(kept, place)
    kept.withdraw(BOB)
    mirror.flush(kept, place)
    assert all(name.startswith("segments/") for name in hub.files)
    assert b"".join(hub.files.values()).count(BOB.encode()) == 2
    fresh = Store(ram / "fresh.db")
    mirror.pull(fresh, place)
    assert rows(fresh) == rows(kept)
    fresh.close()


@pytest.mark.parametrize("fault", [412, 429, 500, 401, "half"])
def test_whatever_the_hub_answers_no_row_is_lost_or_doubled(fault: int | str, kept: Store, hub: Hub, ram: Path) -> None:
    place = HubDataset("a/b", "hf_x", hub.endpoint)
    before = mirror.waiting(kept)
    hub.faults = [fault] * 20
    with pytest.raises(NotMirrored, match="the mirror a/b did not answer as it should"):
        mirror.flush(kept, place)
    assert mirror.waiting(kept) == before
    assert kept.vote(issue(kept), ANN, "left").kind == "saved", "voting goes on meanwhile"
    hub.faults = []
    mirror.flush(kept, place)
    fresh = Store(ram / "fresh.db")
    mirror.pull(fresh, place)
    assert rows(fresh) == rows(kept)
    fresh.close()


def test_in_the_background_it_says_when_it_is_late_and_when_it_is_not(kept: Store, ram: Path) -> None:
    late = Mirror(kept, Failing(ram / "mirror"), every=0.01)
    late.start()
    while not late.banner():
        pass
    assert "The mirror is delayed since" in late.banner() and "rows are waiting" in late.banner()
    assert not late.stop()
    fine = Mirror(kept, Folder(ram / "mirror"), every=3600)
    fine.start()
    assert fine.stop(), "what waits is sent at the end"
    assert (fine.banner(), mirror.waiting(kept)) == ("", 0)


def test_votes_come_back_in_their_order(kept: Store, ram: Path) -> None:
    clock = kept.clock
    assert isinstance(clock, Clock)
    for _ in range(3):
        clock.now += MINUTE
        cast(kept, BOB, 1)
    place, fresh = Folder(ram / "mirror"), Store(ram / "fresh.db")
    mirror.flush(kept, place)
    mirror.pull(fresh, place)
    times = fresh.read(lambda c: list(c.scalars(sa.select(vote.c.at_us).order_by(vote.c.seq))))
    assert times == sorted(times)
    fresh.close()
