"""The served app, killed again and again under load: every vote that it called saved is there, once, as it was given.

`HYPERSD_KILLS=200 python -m pytest -m slow tests/test_study_crash.py` is the long run, about five seconds a kill.
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import sqlalchemy as sa
from listing import ROOT

from hypersd.study import schema
from hypersd.study.votes import Store

KILLS, VOTERS = int(os.environ.get("HYPERSD_KILLS", "5")), 6
pytestmark = pytest.mark.slow


class App:
    """One life of the server after the other, on one folder and one port."""

    def __init__(self, folder: Path, database: str = "") -> None:
        self.folder, self.database, self.lives = folder, database, 0
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.component: int | None = None

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Serve until the block ends, then kill -9."""
        command = [sys.executable, str(ROOT / "tests/study_app.py"), str(self.folder), str(self.port)]
        command += [self.database] if self.database else []
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=log)
        try:
            self._wait(process)
            self.lives += 1
            yield
        finally:
            self.component = None
            process.kill()
            process.wait()

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        for _ in range(600):
            assert process.poll() is None, (self.folder / "log").read_text()[-2000:]
            try:
                parts = requests.get(f"http://127.0.0.1:{self.port}/config", timeout=5).json()["components"]
            except requests.RequestException:
                time.sleep(0.1)
                continue
            self.component = next(part["id"] for part in parts if part["props"].get("elem_id") == "hs-study")
            return
        raise AssertionError("the app did not answer within a minute")

    def post(self, **given: Any) -> dict[str, Any] | None:
        """The study's answer, or None if the app died before it could give one."""
        if (component := self.component) is None:
            time.sleep(0.05)
            return None
        body: dict[str, Any] = {"component_id": component, "fn_name": "study", "session_hash": "x", "data": given}
        try:
            answer = requests.post(f"http://127.0.0.1:{self.port}/gradio_api/component_server/", json=body, timeout=20)
            return dict(answer.json()) if answer.ok else None
        except requests.RequestException:
            return None


class Voter(threading.Thread):
    """Votes on what it is shown; what was not acknowledged it posts again, as the page does."""

    def __init__(self, app: App, number: int, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self.app, self.stop, self.chances = app, stop, random.Random(number)
        self.acked: dict[str, str] = {}
        self.posted: dict[str, str] = {}
        self.odd: list[dict[str, Any]] = []

    def run(self) -> None:
        token, asked = "", None
        while not self.stop.is_set():
            if not token:
                token = (self.app.post(do="agree") or {}).get("token", "")
            elif asked is None:
                asked = self.app.post(do="ask", token=token)
            elif asked["kind"] != "pair":
                token, asked = "", None  # this annotator has done enough: a new one
            else:
                asked = self.vote(token, asked)

    def vote(self, token: str, asked: dict[str, Any]) -> dict[str, Any] | None:
        ballot = asked["ballot"]
        choice = self.posted.setdefault(ballot, self.chances.choice(["left", "right", "tie"]))
        told = self.app.post(do="vote", token=token, ballot=ballot, choice=choice, dwell_ms=500)
        if told is None:
            return asked  # the same click again
        if told["kind"] == "saved":
            self.acked[ballot] = choice
        else:
            self.odd.append(told)
        return told.get("next")


def test_no_acknowledged_vote_is_lost_to_a_kill(ram: Path) -> None:
    app, stop, chances = App(ram), threading.Event(), random.Random(1)
    voters = [Voter(app, number, stop) for number in range(VOTERS)]
    for voter in voters:
        voter.start()
    for _ in range(KILLS):
        before = sum(len(voter.acked) for voter in voters)
        with app.alive():
            while sum(len(voter.acked) for voter in voters) == before:
                time.sleep(0.01)
            time.sleep(chances.uniform(0, 0.7))
        sound(ram)
    stop.set()
    for voter in voters:
        voter.join(30)
    assert app.lives == KILLS
    assert [told for voter in voters for told in voter.odd] == []
    acked = {ballot: choice for voter in voters for ballot, choice in voter.acked.items()}
    posted = {ballot: choice for voter in voters for ballot, choice in voter.posted.items()}
    stored = sound(ram)
    assert len(acked) >= KILLS
    assert acked.items() <= stored.items() <= posted.items()


def sound(folder: Path) -> dict[str, str]:
    """Ballot -> choice of every vote, from a database that opens at once and has nothing wrong with it."""
    begun = time.process_time()
    store = Store(folder / "study.db")
    assert time.process_time() - begun < 2.0 and store.paused == ""
    assert store.read(lambda c: c.exec_driver_sql("PRAGMA integrity_check").scalar()) == "ok"
    rows = store.read(lambda c: c.execute(sa.select(schema.vote.c.ballot, schema.vote.c.choice)).all())
    store.close()
    assert len({ballot for ballot, _ in rows}) == len(rows), "nothing is counted twice"
    return {str(ballot): str(choice) for ballot, choice in rows}
