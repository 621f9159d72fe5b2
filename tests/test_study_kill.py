"""Killed at each of its writes and syncs in turn, a vote is there if it was acknowledged, and all is sound.

strace counts the calls that touch the database and kills the program at the n-th, for every n until it survives.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from listing import ROOT
from test_export import simulated
from voting import ANN, issue, store

from hypersd.study import mirror, schema
from hypersd.study.export import export
from hypersd.study.mirror import Folder
from hypersd.study.votes import Store, now_us

EXPORTED = ("README.md", "preference/test.parquet", "preference/train.parquet", "preference/validation.parquet",
            "study.json", "votes.csv")  # fmt: skip
WRITES = "pwrite64,write,fsync,fdatasync,unlink,ftruncate,rename"
pytestmark = pytest.mark.skipif(not shutil.which("strace"), reason="no strace")


def prepare(folder: Path, voted: int) -> Path:
    """A database with three ballots of one annotator, of which so many were answered."""
    folder.mkdir()
    kept = store(folder / "study.db", clock=now_us)  # type: ignore[arg-type]
    asked = [issue(kept) for _ in range(3)]
    for one in asked[:voted]:
        kept.vote(one, ANN, "left")
    kept.close()
    (folder / "ballots").write_text(" ".join(asked))
    return folder


def traced(what: str, folder: Path, fault: str, calls: str = WRITES) -> int:
    """Run `one_write.py` with a fault at some call that touches the database or the mirror; the exit status."""
    touched = [folder / name for name in ("study.db", "study.db-journal", "study.db-wal", "study.db-shm")]
    segments = list((folder / "mirror").parent.glob("mirror/*"))
    written = [folder / "out.partial" / name for name in EXPORTED] if what == "export" else []
    paths = [part for path in (*touched, folder, *segments, *written) for part in ("-P", str(path))]
    inject = ["-e", f"trace={calls}", "-e", f"inject={calls}:{fault}"]
    command = [sys.executable, str(ROOT / "tests/one_write.py"), what, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    watch = ["strace", "-f", "-qq", "-o", "/dev/null", *(paths if what != "flush" else []), *inject]
    done = subprocess.run([*watch, *command], env=environment, capture_output=True, text=True)
    assert "Traceback" not in done.stderr or what == "flush", done.stderr
    return done.returncode


def acknowledged(folder: Path) -> list[str]:
    return (folder / "acked").read_text().split() if (folder / "acked").exists() else []


def sound(folder: Path) -> Store:
    """The database, opened as a restarted program would: at once, and nothing wrong with it."""
    begun = time.process_time()
    again = Store(folder / "study.db")
    assert time.process_time() - begun < 2.0
    assert again.paused == ""
    assert again.read(lambda c: c.exec_driver_sql("PRAGMA integrity_check").scalar()) == "ok"
    return again


def kill_everywhere(what: str, tmp_path: Path, start: Path, calls: str = WRITES) -> Iterator[tuple[Path, bool]]:
    """Folders after a kill at each call, and whether the program came to its end.

    strace counts each kind of call for itself, so the kinds are gone through one after the other: told of all together
    it would never reach a sync that comes after as many writes.
    """
    killed = 0
    for call in calls.split(","):
        for n in range(1, 200):
            folder = shutil.copytree(start, tmp_path / f"{what}-{call}-{n}")
            survived = traced(what, folder, f"signal=KILL:when={n}", call) == 0
            yield folder, survived
            shutil.rmtree(folder)
            if survived:
                break
            killed += 1
        else:
            raise AssertionError(f"it never came to its end: {call}")
    assert killed > 3, "it was killed somewhere"


def count(kept: Store, table: sa.Table) -> int:
    return kept.read(lambda c: c.scalar(sa.select(sa.func.count()).select_from(table))) or 0


def test_a_vote_is_there_if_it_was_acknowledged(ram: Path) -> None:
    for folder, _ in kill_everywhere("vote", ram, prepare(ram / "start", voted=0)):
        kept, acked = sound(folder), acknowledged(folder)
        assert count(kept, schema.vote) in ((1,) if acked == ["saved"] else (0, 1))
        asked = (folder / "ballots").read_text().split()[0]
        assert kept.vote(asked, ANN, "left").kind == "saved", "the click again"
        assert count(kept, schema.vote) == 1
        kept.close()


@pytest.mark.slow
def test_a_withdrawal_is_whole_or_not_at_all(ram: Path) -> None:
    for folder, _ in kill_everywhere("withdraw", ram, prepare(ram / "start", voted=2)):
        kept, acked = sound(folder), acknowledged(folder)
        left = (count(kept, schema.vote), count(kept, schema.ballot), count(kept, schema.event))
        assert left == (0, 0, 1) or (left == (2, 3, 0) and not acked)
        kept.close()


@pytest.mark.slow
def test_a_migration_is_whole_or_not_at_all(ram: Path) -> None:
    (ram / "start").mkdir()
    for folder, _ in kill_everywhere("migrate", ram, ram / "start"):
        names = tables(folder / "study.db")
        assert names in (set(), {"schema_version"}) or set(schema.KEYS) < names
        sound(folder).close()


def tables(file: Path) -> set[str]:
    connection = sqlite3.connect(file)
    found = connection.execute("select name from sqlite_master where type = 'table' and name not like 'sqlite_%'")
    names = {name for (name,) in found}
    connection.close()
    return names


@pytest.mark.slow
def test_a_row_is_on_the_mirror_or_waits(ram: Path) -> None:
    start = prepare(ram / "start", voted=2)
    for folder, _ in kill_everywhere("flush", ram, start, "pwrite64,fsync,fdatasync,unlink,rename"):
        kept, place, fresh = sound(folder), Folder(folder / "mirror"), Store(folder / "fresh.db")
        if acknowledged(folder):
            assert mirror.waiting(kept) == 0
        mirror.flush(kept, place)
        mirror.pull(fresh, place)
        assert [count(fresh, table) for table in schema.TABLES] == [count(kept, table) for table in schema.TABLES]
        kept.close()
        fresh.close()


@pytest.mark.slow
def test_an_export_is_whole_or_not_there(ram: Path) -> None:
    """Pictures are among what it writes, inside the parquet files; a killed one is begun anew and ends the same."""
    start = ram / "start"
    start.mkdir()
    kept, desk = simulated(start / "study.db", start / "pool")
    kept.close()
    (start / "definition").write_text(desk.study.definition)
    wanted: set[str] = set()
    for folder, survived in kill_everywhere("export", ram, start, "write,fsync,rename,mkdir"):
        kept, out = sound(folder), folder / "out"
        if not out.exists():
            assert not survived and not acknowledged(folder)
            export(kept, desk.study, folder / "pool", out, ["preference"])
        kept.close()
        wanted.add(digest(out))
    assert len(wanted) == 1


def digest(out: Path) -> str:
    files = sorted(path for path in out.rglob("*") if path.is_file())
    assert [path.relative_to(out).as_posix() for path in files] == sorted(EXPORTED)
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


@pytest.mark.parametrize("fault", ["fdatasync,fsync:error=EIO:when=1", "pwrite64:error=ENOSPC:when=1"])
def test_a_disk_that_fails_is_told_and_tried_again(fault: str, ram: Path) -> None:
    folder = prepare(ram / "start", voted=0)
    calls, _, what = fault.partition(":")
    assert traced("votes", folder, what, calls) == 0
    assert acknowledged(folder) == ["failed", "saved", "saved"]
    kept = sound(folder)
    assert count(kept, schema.vote) == 2
    kept.close()
