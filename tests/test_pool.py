"""The study's pictures: all drawn before the first question, in idle moments, nothing inside but pixels."""

from __future__ import annotations

import io
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from booth import small
from fake import Painter, eventually, paint
from PIL import Image
from rows import METHODS, Row

from hypersd import pool
from hypersd.pool import Missing, Pool, Shared
from hypersd.records import InputError, Panel, Request
from hypersd.study.ballots import items_of
from hypersd.study.schema import event


def test_a_full_pool_opens_and_its_files_hold_nothing_but_pixels(ram: Path) -> None:
    full = small(ram)
    assert (full.problem, full.lacking(), full.size) == ("", [], 4 * 4 * 2)
    assert full.desk is not None
    for one in items_of(full.store).values():
        content = full.read(one.image_sha256)
        with Image.open(io.BytesIO(content)) as picture:
            assert (picture.format, picture.info) == ("PNG", {})
            assert picture.tobytes() == paint(Request(one.prompt, one.seed, one.steps), one.method).pixels


def test_a_second_start_draws_one_picture_an_arm(ram: Path) -> None:
    calls: list[str] = []

    def painter(request: Request, method: str) -> Panel:
        calls.append(f"{method}@{request.steps}")
        return paint(request, method)

    small(ram, painter)
    assert len(calls) == 32 + 4 - 4, "the first picture of each arm is drawn once"
    calls.clear()
    small(ram, painter)
    assert sorted(calls) == ["base@1", "base@4", "base@8", "lcm@4"]


def test_other_weights_draw_everything_again_and_old_pictures_are_in_no_pair(ram: Path) -> None:
    old = set(items_of(small(ram).store))
    again = small(ram, lambda request, method: replace(paint(request, method), base_sha256="f" * 64))
    assert again.desk is not None and again.lacking() == []
    again.desk.consent("a" * 32)
    asked = again.desk.next("a" * 32)
    assert not {asked.left, asked.right} & old  # type: ignore[union-attr]


def test_a_lost_picture_is_drawn_again(ram: Path) -> None:
    full = small(ram)
    next(iter(full.folder.glob("*.png"))).unlink()
    assert full.lacking()
    assert small(ram).lacking() == []


@pytest.mark.parametrize(
    ("arms", "able"),
    [(["base@8", "base@4", "nope@4"], True), (["base@8", "tcd@1", "nope@4"], False), (["base@8", "lcm@25"], False)],
)
def test_arms_that_cannot_draw_are_left_out_while_two_can(arms: list[str], able: bool, ram: Path) -> None:
    found = small(ram, arms=arms)
    assert (found.desk is not None) == able
    assert able or found.problem.startswith("the study needs two arms that can draw, and")


def test_a_painter_that_fails_is_told_and_nothing_opens(ram: Path) -> None:
    def painter(request: Request, method: str) -> Panel:
        raise InputError("the weights are missing; fetch them")

    found = small(ram, painter)
    assert (found.desk, found.problem) == (None, "the weights are missing; fetch them")


def test_an_arm_of_another_size_does_not_take_part(ram: Path) -> None:
    methods = {**METHODS, "turbo": Row("turbo", "Turbo", smaller=2)}
    shared, study = Shared(Painter()), ram / "study.yaml"
    study.write_text(pool.FILE.read_text().replace("lcm@", "turbo@"))
    found = pool.prepare(shared, methods, study, ram)
    assert isinstance(found, Pool)
    assert any(arm.startswith("turbo@") for arm in found.study.arms)
    assert not any(arm.startswith("turbo@") for arm in found.arms)


def test_a_missing_study_says_which_file(ram: Path) -> None:
    found = pool.prepare(Shared(Painter()), METHODS, ram / "study.yaml", ram)
    assert isinstance(found, Missing) and "study.yaml cannot be read" in found.problem
    found.fill()


def test_votes_lie_where_database_url_says(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", str(ram / "elsewhere.db"))
    found = pool.prepare(Shared(Painter()), METHODS, folder=ram)
    assert isinstance(found, Pool) and (ram / "elsewhere.db").exists()
    assert f"{ram}/elsewhere.db" in found.where


def test_the_pool_gives_way_to_visitors() -> None:
    painter, drawn = Painter(0.05), threading.Event()
    shared = Shared(painter, quiet=0.3)

    def idle() -> None:
        shared.in_idle(Request("a cat", 1, 8), "base")
        drawn.set()

    threading.Thread(target=idle, daemon=True).start()
    eventually(lambda: painter.steps >= 2)
    shared(Request("a dog", 1, 1), "base")
    assert painter.stops, "given up in the middle"
    assert not drawn.wait(0.2), "and not taken up at once"
    assert drawn.wait(5)
    assert painter.calls == ["base 8", "base 1", "base 8"]


def test_rows_of_the_mirror_are_there_before_the_study_opens_and_new_ones_leave_at_the_end(
    ram: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, annotator = ram / "mirror", "a" * 32
    monkeypatch.setenv("HYPERSD_MIRROR", str(place))
    monkeypatch.delenv("DATABASE_URL", raising=False)
    shared = Shared(Painter())

    def consented(folder: Path, agree: bool) -> bool:
        study = pool.prepare(shared, METHODS, folder=folder)
        assert isinstance(study, Pool) and study.notice == ""
        store = study.store
        if agree:
            store.note("consent", annotator, study.study.sha256)
        known = store.read(lambda c: c.scalar(sa.select(event.c.annotator))) == annotator
        study.close()
        study.store.close()
        return known

    assert consented(ram / "first", agree=True)
    assert list(place.glob("*.jsonl")), "sent when the app ended"
    assert consented(ram / "wiped", agree=False), "a new disk, the same people"
    monkeypatch.setenv("HYPERSD_MIRROR", str(ram / "another"))
    assert not consented(ram / "stranger", agree=False)


def test_a_mirror_that_cannot_be_reached_is_told_and_stops_nothing(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = ram / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("HYPERSD_MIRROR", str(blocked))
    study = pool.prepare(Shared(Painter()), METHODS, folder=ram / "study")
    assert isinstance(study, Pool)
    study.store.note("consent", "a" * 32, study.study.sha256)
    study.close()
    assert "The mirror is delayed" in study.notice
    study.store.close()


def test_a_space_that_will_forget_says_so(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYPERSD_MIRROR", raising=False)
    monkeypatch.delenv("DATABASE_URL", raising=False)
    full = small(ram)
    monkeypatch.delenv("SPACE_ID", raising=False)
    assert full.notice == ""
    monkeypatch.setenv("SPACE_ID", "you/hypersd")
    assert "set HYPERSD_MIRROR" in full.notice
    monkeypatch.setenv("DATABASE_URL", "postgresql+psycopg://votes")
    assert full.notice == ""
