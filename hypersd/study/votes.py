"""The store: what was asked and answered, kept so that "Saved" is only ever said of what is on disk.

A vote, an undo, a skip, a flag, a consent are rows of their own and nothing is rewritten. The one exception is a
person's withdrawal: their rows are erased, a row that says so stays, and keeps copies of them from coming back.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import sqlalchemy as sa

from hypersd.records import CHOICES, Ballot, InputError, Item, Problem
from hypersd.study import schema
from hypersd.study.schema import ballot, event, insert_new, item, study, vote

T = TypeVar("T")
DWELL_MAX_MS = 24 * 3600 * 1000
FULL, CANNOT_OPEN, IO_ERROR, DAMAGED, BUSY = 13, 14, 10, (11, 26), (5, 6)  # SQLite's result codes


@dataclass(frozen=True)
class Answer:
    """What became of a click. `said` is for the annotator; `choice` is the one that counts, if any."""

    kind: Literal["saved", "voted", "expired", "unknown", "early", "closed", "failed"]
    said: str
    choice: str = ""


EXPIRED = Answer("expired", "This comparison has expired, here is a new one.")
UNKNOWN = Answer("unknown", "This comparison was not made for you, here is a new one.")
CLOSED = Answer("closed", "This study is closed. Thank you for your votes.")
EARLY = Answer("early", "Look at both pictures first.")


class NotSaved(Problem):
    """Nothing was written, or nobody knows; doing the same again is always safe."""


def now_us() -> int:
    return time.time_ns() // 1000


class Store:
    """A study's database. Threads and processes may share it; every method is one transaction.

    `paused` is empty, or the sentence that says why no vote is taken. A damaged SQLite file is found at the start,
    kept aside under another name and never opened again.

    Raises:
        InputError: the address is not one of SQLite or PostgreSQL.
        NotSaved: from methods that write, when the database cannot.
    """

    def __init__(self, address: str | Path, *, clock: Callable[[], int] = now_us) -> None:
        self.url, self.clock, self.paused = schema.parse_url(address), clock, ""
        self.file = Path(self.url.database or "") if self.url.drivername == "sqlite" else None
        self._writing, self._reading = schema.open_engine(self.url), schema.open_engine(self.url, write=False)
        self._file_id: tuple[int, int] | None = None
        # Threads wait here for their turn: SQLite's own waiting is a lottery that some of many lose for half a minute.
        self._turn = threading.Lock() if self.file else contextlib.nullcontext()
        self._suspect = False  # an input or output error happened; look before writing on
        self._open()

    def close(self) -> None:
        self._writing.dispose()
        self._reading.dispose()

    # Asking and answering

    def add_study(self, sha256: str, definition: str) -> None:
        row = {"sha256": sha256, "definition": definition, "at_us": self.clock()}
        self.write(lambda c: c.execute(insert_new(c, study).values(row)))

    def add_items(self, items: Iterable[Item]) -> None:
        rows = [{"id": one.id, **asdict(one)} for one in items]
        self.write(lambda c: c.execute(insert_new(c, item), rows) if rows else None)

    def issue(self, one: Ballot) -> None:
        self.write(lambda c: c.execute(sa.insert(ballot).values(asdict(one))))

    def vote(
        self,
        ballot_id: str,
        annotator: str,
        choice: str,
        *,
        dwell_ms: int = 0,
        zoomed: bool = False,
        attributes: Mapping[str, str] | None = None,
        min_dwell_ms: int = 0,
    ) -> Answer:
        """Answer a ballot. One statement decides whether the vote is taken, and only a ballot's first one ever is.

        `attributes` has been checked by the caller; `min_dwell_ms` is how long the ballot must have been out.
        """
        if choice not in CHOICES:
            raise InputError(f"choice must be one of {', '.join(CHOICES)}")
        now = self.clock()
        row: dict[str, Any] = {
            "choice": choice,
            "attributes": json.dumps(dict(attributes or {}), sort_keys=True),
            "zoomed": int(zoomed),
        }
        row |= {"dwell_ms": min(max(int(dwell_ms), 0), DWELL_MAX_MS), "at_us": now}

        def work(connection: sa.Connection) -> Answer:
            chosen = sa.select(ballot.c.id, *(sa.literal(value) for value in row.values())).where(
                ballot.c.id == ballot_id,
                ballot.c.annotator == annotator,
                ballot.c.expires_us > now,
                ballot.c.issued_us <= now - 1000 * min_dwell_ms,
                ~sa.exists().where(event.c.ballot == ballot.c.id, event.c.kind == "skip"),
                ~is_frozen(ballot.c.study),
            )
            insert = insert_new(connection, vote).from_select(["ballot", *row], chosen).returning(vote.c.seq)
            if connection.scalar(insert) is not None:
                return Answer("saved", "Saved.", choice)
            return _why_not(connection, ballot_id, annotator, choice, now)

        try:
            return self.write(work)
        except NotSaved as problem:
            return Answer("failed", str(problem))

    def note(
        self, kind: str, annotator: str, study_sha: str = "", ballot_id: str | None = None, detail: object = None
    ) -> bool:
        """Record an event once; True if it is new. Of a ballot, if one is named, which must be the annotator's."""
        of_what = ballot_id or annotator
        row: dict[str, Any] = {
            "id": f"{kind}:{study_sha}:{of_what}",
            "kind": kind,
            "study": study_sha,
            "annotator": annotator,
        }
        row |= {"ballot": ballot_id, "detail": json.dumps(detail), "at_us": self.clock()}

        def work(connection: sa.Connection) -> bool:
            allowed = sa.select(*(sa.literal(value, event.c[name].type) for name, value in row.items()))
            if ballot_id:
                own = sa.exists().where(ballot.c.id == ballot_id, ballot.c.annotator == annotator)
                voted = sa.exists().where(vote.c.ballot == ballot_id)
                allowed = allowed.where(own, voted if kind == "undo" else ~voted if kind == "skip" else sa.true())
            allowed = allowed.where(~is_frozen(study_sha) if kind in ("undo", "skip") else sa.true())
            insert = insert_new(connection, event).from_select(list(row), allowed).returning(event.c.seq)
            return connection.scalar(insert) is not None

        return self.write(work)

    def withdraw(self, annotator: str) -> int:
        """Erase everything of this annotator; how many votes that were. What stays says only that it happened."""
        row = {"id": f"withdraw::{annotator}", "kind": "withdraw", "study": "", "annotator": annotator}

        def work(connection: sa.Connection) -> int:
            count = erase(connection, annotator)
            values = {**row, "detail": json.dumps({"votes": count}), "at_us": self.clock()}
            connection.execute(insert_new(connection, event).values(values))
            return count

        return self.write(work)

    # Reading and writing

    def write(self, work: Callable[[sa.Connection], T]) -> T:
        """Do `work` in one transaction; what it returns is returned after the commit. Raises NotSaved."""
        if self.paused:
            raise NotSaved(f"Not saved: {self.paused}")
        try:
            with self._turn, self._writing.begin() as connection:
                self._look_again(connection)
                done = work(connection)
            return done
        except (sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
            raise NotSaved(self._trouble(error)) from error

    def read(self, work: Callable[[sa.Connection], T]) -> T:
        """Do `work`, which must not write, on one state of the database. Raises Problem."""
        if self.paused:
            raise Problem(self.paused)
        try:
            with self._reading.begin() as connection:
                return work(connection)
        except (sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
            raise Problem(self._trouble(error)) from error

    def _trouble(self, error: sa.exc.SQLAlchemyError) -> str:
        """One sentence on what went wrong; puts the store into the state in which it can recover, or pauses it."""
        code = getattr(getattr(error, "orig", None), "sqlite_errorcode", 0) & 0xFF
        if isinstance(error, sa.exc.IntegrityError):
            raise error  # a bug of ours, not the disk's
        if code in DAMAGED:
            self.paused = "voting is paused, the database is damaged; see `python -m hypersd study restore`"
            return f"Not saved: {self.paused}"
        if code not in BUSY:
            self._suspect = True
            self.close()  # fresh connections roll back what a failed one has left
        reason = {FULL: "the disk is full", IO_ERROR: "the disk does not answer", CANNOT_OPEN: "the disk is not there"}
        return f"Not saved: {reason.get(code, 'the database does not answer')}; please try again in a moment."

    # Opening

    def _open(self) -> None:
        if self.file:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            if aside := self._kept_aside():
                self.paused = f"voting is paused, the database is damaged and kept aside as {aside.name}"
                return
        try:
            schema.migrate(self._writing)
        except (sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
            self.paused = f"voting is paused, the database cannot be opened: {getattr(error, 'orig', error)}"
            return
        self._file_id = self._current_file_id()

    def _kept_aside(self) -> Path | None:
        """Where a damaged file went, now or before, so that nobody takes an empty new one for the study."""
        assert self.file
        if self.file.exists() and not is_sound(self.file):
            stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(self.clock() / 1e6))
            for suffix in ("-journal", "-wal", "-shm", ""):
                part = self.file.with_name(self.file.name + suffix)
                if part.exists():
                    part.rename(self.file.with_name(f"{self.file.name}.damaged-{stamp}{suffix}"))
        if self.file.exists():
            return None
        return max(self.file.parent.glob(f"{self.file.name}.damaged-*"), default=None)

    def _current_file_id(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self.file) if self.file else None
        except FileNotFoundError:
            found = None
        return (found.st_dev, found.st_ino) if found else None

    def _look_again(self, connection: sa.Connection) -> None:
        """Before writing: is this still the study's file, and sound after an error?"""
        if self._current_file_id() != self._file_id:  # another process has kept a damaged file aside, or restored it
            self.close()
            self._open()
            raise NotSaved("Not saved: the database was replaced; please try again.")
        if self._suspect and self.file:
            if connection.exec_driver_sql("PRAGMA quick_check(1)").scalar() != "ok":
                raise sa.exc.DatabaseError(None, None, _damage())
            self._suspect = False


def _damage() -> sqlite3.DatabaseError:
    error = sqlite3.DatabaseError("quick_check failed")
    error.sqlite_errorcode = DAMAGED[0]
    return error


def is_sound(file: Path) -> bool:
    """Whether SQLite finds no damage in a file, finishing or undoing what a killed program left behind."""
    try:
        connection = sqlite3.connect(f"file:{file.resolve()}?mode=rw", uri=True, timeout=30)
    except sqlite3.OperationalError:
        return True  # not there or not ours to read: no damage that we know of
    try:
        return bool(connection.execute("PRAGMA quick_check(1)").fetchall() == [("ok",)])
    except sqlite3.DatabaseError as error:
        return getattr(error, "sqlite_errorcode", 0) & 0xFF not in DAMAGED
    finally:
        connection.close()


def is_frozen(of_study: Any) -> sa.Exists:
    return sa.exists().where(event.c.kind == "freeze", event.c.study == of_study)


def is_undone() -> sa.Exists:
    """Of a vote, in a select from `vote`: whether its annotator took it back."""
    return sa.exists().where(event.c.ballot == vote.c.ballot, event.c.kind == "undo")


def erase(connection: sa.Connection, annotator: str) -> int:
    """Delete the rows of one annotator; how many votes there were."""
    own = sa.select(ballot.c.id).where(ballot.c.annotator == annotator)
    count = connection.execute(sa.delete(vote).where(vote.c.ballot.in_(own))).rowcount
    connection.execute(sa.delete(event).where(event.c.annotator == annotator, event.c.kind != "withdraw"))
    connection.execute(sa.delete(ballot).where(ballot.c.annotator == annotator))
    return count


def _why_not(connection: sa.Connection, ballot_id: str, annotator: str, choice: str, now: int) -> Answer:
    """Why a vote was not taken, in the order in which the reasons matter to the annotator."""
    asked = sa.select(ballot.c.expires_us, ballot.c.study, vote.c.choice, is_undone().label("undone"))
    asked = asked.select_from(ballot.outerjoin(vote, vote.c.ballot == ballot.c.id))
    found = connection.execute(asked.where(ballot.c.id == ballot_id, ballot.c.annotator == annotator)).first()
    if found is None:
        return UNKNOWN
    if found.choice and found.undone:
        return EXPIRED
    if found.choice == choice:
        return Answer("saved", "Saved.", choice)
    if found.choice:
        return Answer("voted", f"You already voted: {found.choice.replace('_', ' ')}.", found.choice)
    if connection.scalar(sa.select(is_frozen(found.study))):
        return CLOSED
    skipped = sa.exists().where(event.c.ballot == ballot_id, event.c.kind == "skip")
    if found.expires_us <= now or connection.scalar(sa.select(skipped)):
        return EXPIRED
    return EARLY
