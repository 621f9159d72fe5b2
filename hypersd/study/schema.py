"""The tables of a study, their migrations, and how a database is opened so that "saved" means saved.

One schema for SQLite and PostgreSQL. Times are UTC microseconds, ids are text, so that both hold the same rows.
SQLite's settings were measured, not guessed: libraries before 3.51.3 can lose committed rows in WAL mode, a deferred
transaction that reads and then writes fails at once when two processes do it, and an `open()` of the live file by its
own process drops the process's locks. So nobody but SQLite opens the file, here or anywhere.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from hypersd.records import CHOICES, InputError, Problem

# STRICT tables of SQLite know INTEGER and REAL only; PostgreSQL's own INTEGER would be too small for microseconds.
Whole: sa.types.TypeEngine[int] = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
Real: sa.types.TypeEngine[float] = sa.Double().with_variant(sa.REAL(), "sqlite")
KINDS = ("undo", "skip", "flag", "consent", "withdraw", "freeze")

metadata = sa.MetaData()


def _table(name: str, *columns: sa.schema.SchemaItem) -> sa.Table:
    """A table with a number in order of arrival and a note of when the row was mirrored; both stay in this database."""
    return sa.Table(
        name,
        metadata,
        sa.Column("seq", Whole, primary_key=True, autoincrement=True),
        *columns,
        sa.Column("mirrored_us", Whole),
        sa.Index(f"{name}_to_mirror", "seq", sqlite_where=_waiting(), postgresql_where=_waiting()),
        sqlite_strict=True,
        sqlite_autoincrement=True,
    )


def _waiting() -> sa.TextClause:
    return sa.text("mirrored_us IS NULL")


def _text(name: str, *more: Any, null: bool = False, **options: Any) -> sa.Column[str]:
    return sa.Column(name, sa.Text, *more, nullable=null, **options)


def _number(name: str, kind: Any = Whole) -> sa.Column[Any]:
    return sa.Column(name, kind, nullable=False)


study = _table("study", _text("sha256", unique=True), _text("definition"), _number("at_us"))

item = _table(
    "item",
    _text("id", unique=True),
    *(_text(name) for name in ("image_sha256", "prompt", "method", "base_sha256")),
    _text("adapter_sha256", null=True),
    *(_text(name) for name in ("sampler", "config_sha256", "noise_sha256", "dtype")),
    *(_number(name) for name in ("steps", "nfe", "seed", "width", "height")),
    *(_number(name, Real) for name in ("guidance", "eta", "seconds")),
)

ballot = _table(
    "ballot",
    _text("id", unique=True),
    _text("study", sa.ForeignKey("study.sha256")),
    _text("annotator"),
    _text("prompt"),
    _text("left", sa.ForeignKey("item.id")),
    _text("right", sa.ForeignKey("item.id")),
    _number("propensity", Real),
    _number("issued_us"),
    _number("expires_us"),
    _text("expected", sa.CheckConstraint("expected IN ('left', 'right')"), null=True),
    _text("repeat_of", sa.ForeignKey("ballot.id"), null=True),
    sa.Index("ballot_by_annotator", "annotator", "study"),
)

vote = _table(
    "vote",
    _text("ballot", sa.ForeignKey("ballot.id"), unique=True),
    _text("choice", sa.CheckConstraint(f"choice IN {CHOICES}")),
    _text("attributes"),  # a JSON object
    _number("dwell_ms"),
    _number("zoomed"),
    _number("at_us"),
)

event = _table(
    "event",
    _text("id", unique=True),  # says what happened to what, so the same thing cannot happen twice
    _text("kind", sa.CheckConstraint(f"kind IN {KINDS}")),
    _text("study"),
    _text("annotator"),
    _text("ballot", sa.ForeignKey("ballot.id"), null=True, index=True),
    _text("detail"),
    _number("at_us"),
    sa.Index("event_by_annotator", "annotator", "kind"),
)

TABLES = (study, item, ballot, vote, event)  # a row refers to rows of tables before its own
KEYS = {"study": "sha256", "item": "id", "ballot": "id", "vote": "ballot", "event": "id"}  # the same in every copy

version = sa.Table("schema_version", sa.MetaData(), sa.Column("number", sa.Integer, nullable=False), sqlite_strict=True)

Migration = Callable[[sa.Connection], None]
# Number n makes version n out of n - 1, once, in one transaction. Append; never change one that has been released.
MIGRATIONS: tuple[Migration, ...] = (metadata.create_all,)


def migrate(engine: sa.Engine, migrations: Sequence[Migration] = MIGRATIONS) -> None:
    """Bring the tables up to date. Interrupted anywhere, the database is at the version before or after a migration.

    Raises:
        Problem: the database was made by a newer program.
    """
    while True:
        with engine.begin() as connection:
            version.create(connection, checkfirst=True)
            done = connection.scalar(sa.select(sa.func.coalesce(sa.func.max(version.c.number), 0))) or 0
            if done > len(migrations):
                raise Problem(f"the database is of version {done}, this program knows {len(migrations)}; update it")
            if done == len(migrations):
                return
            migrations[done](connection)
            connection.execute(sa.insert(version).values(number=done + 1))


# Opening


def parse_url(given: str | Path) -> sa.URL:
    """A database's address: a file's path, or a URL of SQLite or PostgreSQL. Raises InputError for anything else."""
    if isinstance(given, Path) or "://" not in given:
        return sa.URL.create("sqlite", database=str(given))
    try:
        url = sa.make_url(given)
    except sa.exc.ArgumentError:
        raise InputError("DATABASE_URL cannot be read; write postgresql+psycopg://user:password@host/name") from None
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername="postgresql+psycopg")
    if url.drivername not in ("sqlite", "postgresql+psycopg") or not url.database or ":memory:" in url.database:
        raise InputError(f"votes are kept in an SQLite file or in PostgreSQL, got {url.drivername}://...")
    return url


def wal_is_safe(library: tuple[int, ...] = sqlite3.sqlite_version_info) -> bool:
    """Whether this SQLite keeps committed rows when two connections write and checkpoint at once."""
    return library >= (3, 51, 3) or (3, 50, 7) <= library < (3, 51) or (3, 44, 6) <= library < (3, 45)


def open_engine(url: sa.URL, *, write: bool = True) -> sa.Engine:
    """Connections to the database. Write transactions come one after the other, in all processes together, so what
    one of them reads stays true until it commits, and rows become visible in the order of their numbers."""
    if url.drivername != "sqlite":
        engine = sa.create_engine(url, pool_size=20, max_overflow=20, pool_pre_ping=True)
        begin = "SELECT pg_advisory_xact_lock(7267203)" if write else "SET TRANSACTION READ ONLY"
    else:
        engine = sa.create_engine(url, pool_size=40, max_overflow=0)
        sa.event.listen(engine, "connect", _set_up_sqlite)
        begin = "BEGIN IMMEDIATE" if write else "BEGIN"

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # transactions begin where we say so
    connection.execute("PRAGMA busy_timeout=30000")  # milliseconds; before anything that may have to wait
    journal, synchronous = ("wal", 2) if wal_is_safe() else ("delete", 3)  # 2 is FULL, 3 is EXTRA
    # secure_delete: a withdrawn vote must not stay readable in the file's free pages.
    wanted = {"journal_mode": journal, "synchronous": synchronous, "foreign_keys": 1, "trusted_schema": 0}
    wanted |= {"mmap_size": 0, "secure_delete": 1, "busy_timeout": 30000}
    for name, value in wanted.items():
        connection.execute(f"PRAGMA {name}={value}").fetchall()
    for name, value in wanted.items():
        found = connection.execute(f"PRAGMA {name}").fetchone()
        if found != (value,):
            raise Problem(f"SQLite refused {name}={value} (it is {found}); stop other programs that use the database")


def insert_new(connection: sa.Connection, table: sa.Table) -> postgresql.Insert | sqlite.Insert:
    """An INSERT that leaves a row alone that is there already, by the key that is the same in every copy."""
    kind = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    return kind(table).on_conflict_do_nothing(index_elements=[KEYS[table.name]])
