"""A second copy of every row, elsewhere: for machines whose disk is wiped, and against disks that break.

Rows that are not mirrored yet wait in the database itself. They leave as segments, files that are never changed and
named by their sha256, so that sending one twice is nothing and half of one is noticed. A row is marked as mirrored
only when its segment is known to be there. Only a withdrawal replaces segments: by ones without that person's rows.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import sqlalchemy as sa

from hypersd.records import Problem
from hypersd.study.schema import KEYS, TABLES, event, insert_new
from hypersd.study.votes import Store, erase

SEGMENT_ROWS = 2000  # of each table
EVERY, LONGEST_WAIT = 30.0, 600.0  # seconds between segments, and at most after failures
KEPT_HERE = ("seq", "mirrored_us")  # columns that mean something in one database only
Row = dict[str, Any]


class NotMirrored(Problem):
    """The other place did not take or give what it was asked to; nothing is lost, try again later."""


class Place(Protocol):
    """Where segments go: files by name, written all or none. Methods raise NotMirrored."""

    def names(self) -> set[str]: ...
    def read(self, name: str) -> bytes: ...
    def write(self, files: Mapping[str, bytes], gone: Iterable[str] = ()) -> None: ...


class Folder:
    """Segments in a folder, such as a bucket that is mounted, or a copy of a data set."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> set[str]:
        return {path.name for path in self.path.glob("*.jsonl")}

    def read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise NotMirrored(f"{self.path / name} cannot be read: {error.strerror}") from None

    def write(self, files: Mapping[str, bytes], gone: Iterable[str] = ()) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                partial = self.path / f"{name}.partial"
                with partial.open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                partial.rename(self.path / name)
            for name in gone:
                (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise NotMirrored(f"{self.path} cannot be written: {error.strerror}") from None


class HubDataset:
    """Segments in a private data set of the Hugging Face Hub, one commit each time."""

    FOLDER = "segments"

    def __init__(self, repo: str, token: str | None = None, endpoint: str | None = None) -> None:
        self.repo, self.token, self.endpoint = repo, token, endpoint

    def names(self) -> set[str]:
        listed = self._call("list_repo_files")
        return {path.rpartition("/")[2] for path in listed if path.startswith(f"{self.FOLDER}/")}

    def read(self, name: str) -> bytes:
        return Path(self._call("hf_hub_download", filename=f"{self.FOLDER}/{name}")).read_bytes()

    def write(self, files: Mapping[str, bytes], gone: Iterable[str] = ()) -> None:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        added = [CommitOperationAdd(f"{self.FOLDER}/{name}", content) for name, content in files.items()]
        removed = [CommitOperationDelete(f"{self.FOLDER}/{name}") for name in gone]
        message = f"{len(added)} segments more, {len(removed)} less"
        self._call("create_commit", operations=[*added, *removed], commit_message=message)

    def _call(self, method: str, **arguments: Any) -> Any:
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self.endpoint, token=self.token)
        try:
            return getattr(api, method)(self.repo, repo_type="dataset", **arguments)
        except Exception as error:  # noqa: BLE001  whatever a service far away does wrong means the same: not yet
            said = str(error).strip().partition("\n")[0] or type(error).__name__
            raise NotMirrored(f"the mirror {self.repo} did not answer as it should: {said[:200]}") from None


def place_of(name: str) -> Place:
    """The place of a name: `hf://datasets/owner/name`, read and written with HF_TOKEN, or a folder."""
    if name.startswith("hf://datasets/"):
        return HubDataset(name.removeprefix("hf://datasets/"), os.environ.get("HF_TOKEN"))
    return Folder(Path(name))


# Sending


def flush(store: Store, place: Place) -> int:
    """Send every row that waits; how many there were. Raises NotMirrored or Problem, after which the rest waits."""
    sent = 0
    while rows := store.read(_waiting):
        name, content = segment(rows)
        place.write({name: content})
        withdrawn = {row["annotator"] for table, row in rows if table == "event" and row["kind"] == "withdraw"}
        if withdrawn:
            forget(place, withdrawn)  # before it is marked, so that it is tried until it succeeds
        store.write(partial(_mark, rows=rows, now=store.clock()))
        sent += len(rows)
    return sent


def waiting(store: Store) -> int:
    """How many rows are not mirrored yet."""

    def count(connection: sa.Connection) -> int:
        asked = (sa.select(sa.func.count()).select_from(t).where(t.c.mirrored_us.is_(None)) for t in TABLES)
        return sum(connection.scalar(one) or 0 for one in asked)

    return store.read(count)


def segment(rows: Iterable[tuple[str, Row]]) -> tuple[str, bytes]:
    """Name and content of the file that holds these rows."""
    lines = []
    for table, row in rows:
        told = {name: value for name, value in row.items() if name not in KEPT_HERE}
        lines.append(json.dumps({"table": table, **told}, sort_keys=True, ensure_ascii=False))
    content = "".join(f"{line}\n" for line in lines).encode()
    return f"{hashlib.sha256(content).hexdigest()}.jsonl", content


def _waiting(connection: sa.Connection) -> list[tuple[str, Row]]:
    rows = []
    for table in TABLES:
        asked = sa.select(table).where(table.c.mirrored_us.is_(None)).order_by(table.c.seq).limit(SEGMENT_ROWS)
        rows += [(table.name, dict(row)) for row in connection.execute(asked).mappings()]
    return rows


def _mark(connection: sa.Connection, rows: list[tuple[str, Row]], now: int) -> None:
    for table in TABLES:
        numbers = [{"n": row["seq"]} for name, row in rows if name == table.name]
        if numbers:
            update = sa.update(table).where(table.c.seq == sa.bindparam("n")).values(mirrored_us=now)
            connection.execute(update, numbers)


def forget(place: Place, annotators: set[str]) -> None:
    """Replace the segments that hold rows of these annotators, but for the rows that say that they withdrew."""
    there = {name: _lines(place, name) for name in sorted(place.names())}
    ballots = _ballots((line for lines in there.values() for line in lines), annotators)
    files, gone = {}, []
    for name, lines in there.items():
        kept = [(table, row) for table, row in lines if not _is_of(table, row, annotators, ballots)]
        if len(kept) < len(lines):
            gone.append(name)
            if kept:
                new, content = segment(kept)
                files[new] = content
    if gone:
        place.write(files, gone)


def _ballots(lines: Iterable[tuple[str, Row]], annotators: set[str]) -> set[str]:
    return {row["id"] for table, row in lines if table == "ballot" and row["annotator"] in annotators}


def _is_of(table: str, row: Row, annotators: set[str], ballots: set[str]) -> bool:
    if table == "vote":
        return row["ballot"] in ballots
    return row.get("annotator") in annotators and row.get("kind") != "withdraw"


# Bringing back


def pull(store: Store, place: Place) -> dict[str, int]:
    """Bring back every row that the database lacks, all or none; how many of each table.

    Rows of people who withdrew stay away. Raises NotMirrored: a segment cannot be read or is not what its name says.
    """
    lines = [line for name in sorted(place.names()) for line in _lines(place, name)]
    withdrawn = {row["annotator"] for table, row in lines if table == "event" and row["kind"] == "withdraw"}

    def work(connection: sa.Connection) -> dict[str, int]:
        own = sa.select(event.c.annotator).where(event.c.kind == "withdraw")
        out = withdrawn | set(connection.scalars(own))
        ballots = _ballots(lines, out)
        kept = [(table, row) for table, row in lines if not _is_of(table, row, out, ballots)]
        for annotator in sorted(withdrawn):
            erase(connection, annotator)
        return {table.name: _insert(connection, table, kept, store.clock()) for table in TABLES}

    return store.write(work)


def _insert(connection: sa.Connection, table: sa.Table, lines: list[tuple[str, Row]], now: int) -> int:
    """Oldest first, so that numbers are in order of arrival here as well."""
    rows = {row[KEYS[table.name]]: {**row, "mirrored_us": now} for name, row in lines if name == table.name}
    if not rows:
        return 0
    moment = next((name for name in ("at_us", "issued_us") if name in table.c), "id")
    before = connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0
    connection.execute(insert_new(connection, table), sorted(rows.values(), key=lambda row: row[moment]))
    return (connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0) - before


def _lines(place: Place, name: str) -> list[tuple[str, Row]]:
    """The rows of a segment, whose content must be the one that its name promises."""
    content = place.read(name)
    if f"{hashlib.sha256(content).hexdigest()}.jsonl" != name:
        raise NotMirrored(f"the segment {name} is damaged; fetch it again, or take it away to go on without it")
    rows: list[Row] = [json.loads(line) for line in content.decode().splitlines()]
    return [(row.pop("table"), row) for row in rows]


# In the background


class Mirror:
    """Brings back what the place holds, then sends what waits every so often, from a thread of its own."""

    def __init__(self, store: Store, place: Place, every: float = EVERY) -> None:
        self.store, self.place, self.every = store, place, every
        self._stop, self._failed, self._since, self._pulled = threading.Event(), 0, 0.0, False
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)

    def start(self) -> None:
        """Returns once the place was asked for its rows. If it does not answer, it is asked again later."""
        self._once()
        self._thread.start()

    def stop(self, seconds: float = 8.0) -> bool:
        """Send what is left, within so many seconds; whether all of it arrived. For the end of the program."""
        self._stop.set()
        self._thread.join(seconds)
        return not self._thread.is_alive() and not self._failed

    def banner(self) -> str:
        """Empty, or a sentence for the page."""
        if not self._failed:
            return ""
        since = time.strftime("%H:%M", time.gmtime(self._since))
        return f"The mirror is delayed since {since} UTC ({waiting(self.store)} rows are waiting)."

    def _run(self) -> None:
        while not self._stop.wait(min(self.every * 2**self._failed, LONGEST_WAIT)):
            self._once()
        self._once()

    def _once(self) -> None:
        try:
            if not self._pulled:
                pull(self.store, self.place)
                self._pulled = True
            flush(self.store, self.place)
            self._failed = 0
        except Problem:
            self._since = self._since if self._failed else time.time()
            self._failed += 1
