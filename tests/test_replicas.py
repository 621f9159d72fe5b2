"""Two processes of the app on one PostgreSQL: whichever answers, an annotator is one person and a vote is one vote."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import postgres
import pytest
import sqlalchemy as sa
from test_study_crash import App

from hypersd.study import schema
from hypersd.study.votes import Store

pytestmark = pytest.mark.skipif(not postgres.PROGRAMS, reason="no PostgreSQL here")


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as above:
        os.chmod(above, 0o755)
        yield Path(above)


@pytest.fixture(scope="module")
def database(place: Path) -> Iterator[str]:
    with postgres.running(place / "server") as url:
        yield url


@pytest.fixture(scope="module")
def replicas(place: Path, database: str) -> Iterator[list[App]]:
    """Two servers, each with pictures of its own folder: the same ones, since they are drawn from the same seeds."""
    apps = [App(place / name, database) for name in "ab"]
    with ExitStack() as stack:
        for app in apps:
            app.folder.mkdir()
            stack.enter_context(app.alive())
        yield apps


def rows(database: str) -> list[tuple[Any, ...]]:
    store = Store(database)
    try:
        return [tuple(r) for r in store.read(lambda c: c.execute(sa.select(schema.vote.c.ballot)).all())]
    finally:
        store.close()


def said(told: dict[str, Any] | None) -> dict[str, Any]:
    assert told is not None, "the app did not answer"
    return told


def test_an_annotator_goes_from_one_to_the_other(replicas: list[App], database: str) -> None:
    token = said(replicas[0].post(do="agree"))["token"]
    before, asked = len(rows(database)), said(replicas[0].post(do="ask", token=token))
    for turn in range(8):
        assert asked["kind"] == "pair"
        here = replicas[turn % 2]
        told = said(here.post(do="vote", token=token, ballot=asked["ballot"], choice="left", dwell_ms=500))
        assert told["kind"] == "saved", told
        again = said(replicas[(turn + 1) % 2].post(do="ask", token=token))
        assert again.get("ballot") == told["next"].get("ballot")  # the other process continues where this one is
        asked = again
    assert len(rows(database)) == before + 8


def test_one_click_that_reaches_both_is_one_vote(replicas: list[App], database: str) -> None:
    token = said(replicas[0].post(do="agree"))["token"]
    asked = said(replicas[1].post(do="ask", token=token))
    before, answers = len(rows(database)), dict[int, dict[str, Any]]()

    def click(number: int) -> None:
        body = {"do": "vote", "token": token, "ballot": asked["ballot"], "choice": "right", "dwell_ms": 500}
        answers[number] = said(replicas[number % 2].post(**body))

    clicks = [threading.Thread(target=click, args=(number,)) for number in range(6)]
    for thread in clicks:
        thread.start()
    for thread in clicks:
        thread.join(60)
    assert [answer["kind"] for answer in answers.values()] == ["saved"] * 6
    found = rows(database)
    assert len(found) == before + 1 and len(set(found)) == len(found)
