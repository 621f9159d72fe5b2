"""Many voters at once, on both databases; the full size is slow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import postgres
import pytest
import sqlalchemy as sa
from listing import ROOT
from test_export import simulated
from voting import ANN, issue, store

from hypersd.study.export import export
from hypersd.study.schema import vote
from hypersd.study.votes import Store, now_us

BOTH = ["sqlite", pytest.param("postgresql", marks=pytest.mark.skipif(not postgres.PROGRAMS, reason="no PostgreSQL"))]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as above:
        os.chmod(above, 0o755)
        with postgres.running(Path(above) / "server") as url:
            yield url


@pytest.fixture
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database of the kind that the test names, on a real disk."""
    if request.param == "sqlite":
        yield str(tmp_path / "study.db")
        return
    url, name = request.getfixturevalue("server"), f"test_{os.getpid()}_{tmp_path.name.lower()}"[:60]
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f'CREATE DATABASE "{name}"')
    yield url.replace("/postgres?", f"/{name}?")
    engine.dispose()


def crowd(address: str, voters: int, ballots: int, pace: float) -> tuple[dict[str, str], list[float], list[str]]:
    """Two processes of so many voters each: acknowledged votes, seconds, and what went wrong."""
    command = [sys.executable, str(ROOT / "tests/voters.py"), address]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen(
            [*command, name, str(voters), str(ballots), str(pace)], stdout=subprocess.PIPE, env=environment
        )
        for name in ("a", "b")
    ]
    acked: dict[str, str] = {}
    seconds, wrong = [], []
    for one in running:
        told = json.loads(one.communicate()[0])
        acked |= told["acked"]
        seconds += told["seconds"]
        wrong += told["wrong"] + [kind for kind in told["kinds"] if kind != "saved"]
    return acked, seconds, wrong


def check(address: str, voters: int, ballots: int, pace: float = 0.0) -> list[float]:
    kept = store(address, clock=now_us)  # type: ignore[arg-type]
    acked, seconds, wrong = crowd(address, voters, ballots, pace)
    rows = kept.read(lambda c: list(c.execute(sa.select(vote.c.ballot, vote.c.choice))))
    kept.close()
    assert wrong == [], wrong
    assert len(rows) == len(acked) == 2 * voters * ballots, "none lost, none twice"
    assert {row.ballot: row.choice for row in rows} == acked
    return seconds


@pytest.mark.parametrize("address", BOTH, indirect=True)
def test_two_processes_of_voters(address: str) -> None:
    check(address, voters=4, ballots=5)


@pytest.mark.slow
@pytest.mark.parametrize("address", BOTH, indirect=True)
def test_64_voters_of_200_ballots(address: str) -> None:
    check(address, voters=32, ballots=200)


@pytest.mark.slow
@pytest.mark.parametrize("address", BOTH, indirect=True)
def test_acknowledged_within_250_ms_at_50_votes_a_second(address: str) -> None:
    seconds = check(address, voters=32, ballots=20, pace=25.0)
    assert np.quantile(seconds, 0.99) <= 0.25


@pytest.mark.skipif(not postgres.PROGRAMS, reason="no PostgreSQL")
@pytest.mark.parametrize("address", ["postgresql"], indirect=True)
def test_answers_are_the_same_on_postgresql(address: str) -> None:
    kept = store(address)
    asked, late = issue(kept), issue(kept)
    assert [kept.vote(asked, ANN, choice).kind for choice in ("left", "left", "tie")] == ["saved", "saved", "voted"]
    assert kept.vote("f" * 32, ANN, "left").kind == "unknown"
    assert kept.note("skip", ANN, "5" * 64, late) and not kept.note("skip", ANN, "5" * 64, late)
    assert kept.vote(late, ANN, "left").kind == "expired"
    assert kept.note("undo", ANN, "5" * 64, asked)
    assert kept.withdraw(ANN) == 1
    kept.close()
    again = Store(address)
    assert again.paused == ""
    again.close()


@pytest.mark.slow
@pytest.mark.skipif(not postgres.PROGRAMS, reason="no PostgreSQL")
@pytest.mark.parametrize("address", ["postgresql"], indirect=True)
def test_both_databases_export_the_same_bytes(address: str, ram: Path, tmp_path: Path) -> None:
    """The rows of one, mirrored into the other."""
    from hypersd.study import mirror

    here, desk = simulated(ram / "x.db", tmp_path / "pool")
    place = mirror.Folder(tmp_path / "mirror")
    mirror.flush(here, place)
    there = Store(address)
    mirror.pull(there, place)
    for name, kept in (("sqlite", here), ("postgresql", there)):
        export(kept, desk.study, tmp_path / "pool", tmp_path / name)
        kept.close()
    for path in (tmp_path / "sqlite").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "postgresql" / path.relative_to(tmp_path / "sqlite")).read_bytes()
