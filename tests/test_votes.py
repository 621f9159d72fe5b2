"""The store: one ballot is one vote, whatever is clicked, and "Saved" is true."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from voting import ANN, BOB, LEFT, MINUTE, RIGHT, STUDY, Clock, issue, store

from hypersd.records import InputError, Problem
from hypersd.study import people, schema
from hypersd.study.votes import NotSaved, Store


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def kept(ram: Path, clock: Clock) -> Iterator[Store]:
    opened = store(ram / "study.db", clock)
    yield opened
    opened.close()


def stored(kept: Store) -> list[tuple[str, str]]:
    rows = kept.read(lambda c: c.execute(sa.select(schema.vote.c.ballot, schema.vote.c.choice)).all())
    return [(row.ballot, row.choice) for row in rows]


def test_the_same_again_is_saved_and_another_choice_is_told(kept: Store) -> None:
    asked = issue(kept)
    answers = [kept.vote(asked, ANN, choice) for choice in ("left", "left", "tie")]
    assert [answer.kind for answer in answers] == ["saved", "saved", "voted"]
    assert answers[2].said == "You already voted: left."
    assert stored(kept) == [(asked, "left")]


def test_a_vote_needs_a_ballot_of_ones_own_in_time(kept: Store, clock: Clock) -> None:
    asked, late = issue(kept), issue(kept, BOB)
    assert kept.vote(asked, BOB, "left").kind == "unknown"
    assert kept.vote("f" * 32, ANN, "left").kind == "unknown"
    clock.now += 30 * MINUTE
    assert kept.vote(late, BOB, "left").kind == "expired"
    assert stored(kept) == []


def test_a_saved_vote_is_saved_even_after_its_ballot_expired(kept: Store, clock: Clock) -> None:
    asked = issue(kept)
    assert kept.vote(asked, ANN, "both_bad").kind == "saved"
    clock.now += 31 * MINUTE
    assert kept.vote(asked, ANN, "both_bad").kind == "saved"


def test_looking_comes_before_voting(kept: Store, clock: Clock) -> None:
    asked = issue(kept)
    clock.now += 700_000
    assert kept.vote(asked, ANN, "left", min_dwell_ms=800).kind == "early"
    clock.now += 100_000
    assert kept.vote(asked, ANN, "left", min_dwell_ms=800).kind == "saved"


@pytest.mark.parametrize("choice", ["", "LEFT", "label_0", "left'; drop table vote"])
def test_other_choices_are_refused(choice: str, kept: Store) -> None:
    asked = issue(kept)
    with pytest.raises(InputError, match="choice must be one of left, right, tie, both_bad"):
        kept.vote(asked, ANN, choice)


def test_undo_and_skip_happen_once_and_close_the_ballot(kept: Store) -> None:
    voted, skipped = issue(kept), issue(kept)
    assert not kept.note("undo", ANN, STUDY, voted), "there is nothing to take back yet"
    kept.vote(voted, ANN, "left")
    assert [kept.note("undo", ANN, STUDY, voted) for _ in range(2)] == [True, False]
    assert kept.vote(voted, ANN, "left").kind == "expired"
    assert kept.note("skip", ANN, STUDY, skipped)
    assert kept.vote(skipped, ANN, "left").kind == "expired"
    assert not kept.note("skip", ANN, STUDY, voted), "a vote is not skipped afterwards"
    assert not kept.note("flag", BOB, STUDY, voted), "nobody else's ballot"
    assert stored(kept) == [(voted, "left")], "the vote itself is never rewritten"


def test_a_frozen_study_takes_nothing_more(kept: Store) -> None:
    voted, asked = issue(kept), issue(kept)
    kept.vote(voted, ANN, "left")
    kept.note("freeze", "", STUDY)
    assert kept.vote(asked, ANN, "left").kind == "closed"
    assert not kept.note("undo", ANN, STUDY, voted)
    assert kept.vote(voted, ANN, "left").kind == "saved"


def test_withdrawal_leaves_no_trace_but_itself(kept: Store, ram: Path) -> None:
    token = people.new_id()
    own = people.annotator_of(people.receipt_of(token))
    first, second = issue(kept, own), issue(kept, own)
    issue(kept, own, repeat_of=first)
    kept.note("consent", own, STUDY)
    kept.vote(first, own, "left")
    kept.vote(second, own, "tie")
    kept.note("undo", own, STUDY, second)
    kept.vote(issue(kept, BOB), BOB, "right")
    assert [kept.withdraw(own) for _ in range(2)] == [2, 0]
    assert [choice for _, choice in stored(kept)] == ["right"]
    assert kept.vote(first, own, "left").kind == "unknown"
    kept.close()
    assert first.encode() not in (ram / "study.db").read_bytes(), "not even in free pages"


def test_receipts_can_be_typed_and_lead_one_way() -> None:
    token = people.new_id()
    code = people.receipt_of(token)
    assert people.annotator_of(f" {code.lower().replace('-', ' ')} ") == people.annotator_of(code)
    assert token not in code and people.annotator_of(code) not in code.lower()
    for wrong in ("", "K7QM", code[:-1], code + "A", code[:-1] + "1"):
        with pytest.raises(InputError, match="a receipt has 20 letters and digits"):
            people.annotator_of(wrong)
    with pytest.raises(InputError, match="study token"):
        people.receipt_of("not a token")


def test_settings_are_the_measured_ones(kept: Store) -> None:
    def pragmas(connection: sa.Connection) -> list[object]:
        names = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout", "mmap_size", "secure_delete")
        return [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names]

    expected = ["wal", 2] if schema.wal_is_safe() else ["delete", 3]
    assert kept.write(pragmas) == kept.read(pragmas) == [*expected, 1, 30000, 0, 1]


@pytest.mark.parametrize(
    ("library", "safe"),
    [((3, 40, 1), False), ((3, 44, 6), True), ((3, 45, 0), False), ((3, 50, 7), True), ((3, 51, 2), False),
     ((3, 51, 3), True), ((3, 53, 0), True)],
)  # fmt: skip
def test_wal_is_used_only_where_it_keeps_rows(library: tuple[int, ...], safe: bool) -> None:
    assert schema.wal_is_safe(library) is safe


@pytest.mark.parametrize(
    ("table", "change"),
    [
        ("vote", {"choice": "maybe"}),
        ("vote", {"dwell_ms": "long"}),
        ("vote", {"ballot": "f" * 32}),
        ("ballot", {"expected": "tie"}),
        ("ballot", {"left": "f" * 64}),
        ("event", {"kind": "applause"}),
    ],
)
def test_the_tables_themselves_refuse_wrong_rows(table: str, change: dict[str, object], kept: Store) -> None:
    kept.vote(issue(kept), ANN, "left")
    kept.note("consent", ANN, STUDY)
    new: dict[str, object] = {"id": "e" * 32} if table != "vote" else {"ballot": issue(kept)}

    def spoil(connection: sa.Connection) -> None:
        row = connection.execute(sa.select(schema.metadata.tables[table])).mappings().first()
        assert row
        kept_columns = {name: value for name, value in row.items() if name != "seq"}
        connection.execute(sa.insert(schema.metadata.tables[table]).values({**kept_columns, **new, **change}))

    with pytest.raises(sa.exc.IntegrityError):
        kept.write(spoil)


def test_a_migration_that_fails_half_way_has_not_begun(kept: Store) -> None:
    def second(connection: sa.Connection) -> None:
        connection.exec_driver_sql("CREATE TABLE later (id INTEGER)")
        connection.exec_driver_sql("ALTER TABLE vote ADD COLUMN mood TEXT")
        if failing:
            raise RuntimeError("killed here")

    def state(connection: sa.Connection) -> tuple[object, bool]:
        columns = [row[1] for row in connection.exec_driver_sql("PRAGMA table_info(vote)")]
        return connection.scalar(sa.select(schema.version.c.number).order_by(sa.desc("number"))), "mood" in columns

    engine, failing = schema.open_engine(kept.url), True
    with pytest.raises(RuntimeError):
        schema.migrate(engine, [*schema.MIGRATIONS, second])
    assert kept.read(state) == (1, False)
    failing = False
    schema.migrate(engine, [*schema.MIGRATIONS, second])
    assert kept.read(state) == (2, True)
    with pytest.raises(Problem, match="of version 2, this program knows 1; update it"):
        schema.migrate(engine)
    engine.dispose()


@pytest.mark.parametrize("given", ["mysql://x/y", "sqlite://", "sqlite:///:memory:", "://", "postgresql://host"])
def test_other_databases_are_refused(given: str) -> None:
    with pytest.raises(InputError, match=r"SQLite file or in PostgreSQL|cannot be read"):
        schema.parse_url(given)


def test_postgresql_urls_of_hosters_are_understood() -> None:
    assert schema.parse_url("postgres://u:p@host/name").drivername == "postgresql+psycopg"


def damage(file: Path) -> None:
    """Overwrite every page but the first."""
    with file.open("r+b") as raw:
        raw.seek(4096)
        raw.write(b"\xa5" * (file.stat().st_size - 4096))


@pytest.mark.parametrize("how", ["pages", "header", "text"])
def test_a_damaged_database_pauses_voting_and_is_kept_aside(how: str, ram: Path, clock: Clock) -> None:
    file = ram / "study.db"
    before = store(file, clock)
    asked = issue(before)
    before.close()
    if how == "pages":
        damage(file)
    else:
        file.write_bytes(
            b"\0" * 5000 if how == "header" else b"not a database, but long enough to be taken for one" * 9
        )
    spoiled = file.read_bytes()
    for _ in range(2):  # the second start must not take an empty new file for the study
        after = Store(file, clock=clock)
        answer = after.vote(asked, ANN, "left")
        assert answer.kind == "failed"
        assert "Not saved: voting is paused" in answer.said
        with pytest.raises(Problem, match="voting is paused"):
            after.read(lambda c: None)
        after.close()
    (aside,) = ram.glob("study.db.damaged-*")
    assert aside.read_bytes() == spoiled
    assert not file.exists()


def test_nothing_is_acknowledged_into_a_file_that_was_kept_aside(kept: Store, ram: Path) -> None:
    asked = issue(kept)
    (ram / "study.db").rename(ram / "study.db.damaged-1")
    for _ in range(2):
        assert kept.vote(asked, ANN, "left").kind == "failed"
    assert "kept aside as study.db.damaged-1" in kept.paused
    aside = sqlite3.connect(ram / "study.db.damaged-1")
    assert aside.execute("select count(*) from vote").fetchone() == (0,)
    aside.close()


def test_a_full_disk_is_told_and_forgotten_when_there_is_room(kept: Store) -> None:
    """SQLite's own page limit fails the way a full disk does."""

    def limit(pages: str) -> None:
        kept.close()  # the setting belongs to a connection: the pool then holds one
        with kept._writing.connect() as connection:
            connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")

    asked = [issue(kept) for _ in range(40)]
    limit("1")
    answers = [kept.vote(one, ANN, "left", attributes={"alignment": "left" * 999}) for one in asked]
    failed = [answer for answer in answers if answer.kind == "failed"]
    assert failed and {answer.said for answer in failed} == {
        "Not saved: the disk is full; please try again in a moment."
    }
    saved = {one for one, answer in zip(asked, answers, strict=True) if answer.kind == "saved"}
    assert {one for one, _ in stored(kept)} == saved
    assert {kept.vote(one, ANN, "left").kind for one in asked} == {"saved"}, "the connection was replaced"
    assert len(stored(kept)) == 40


def test_an_error_of_the_disk_is_told_and_the_file_looked_at_before_the_next_vote(
    kept: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = issue(kept)
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC

    def fail(_connection: sa.Connection) -> None:
        raise sa.exc.OperationalError("COMMIT", None, error)

    with pytest.raises(NotSaved, match="Not saved: the disk does not answer"):
        kept.write(fail)
    looked: list[Any] = []
    sa.event.listen(
        kept._writing, "before_cursor_execute", lambda c, cursor, statement, *more: looked.append(statement)
    )
    assert kept.vote(asked, ANN, "left").kind == "saved"
    assert kept.vote(asked, ANN, "left").kind == "saved"
    assert looked.count("PRAGMA quick_check(1)") == 1


def test_items_and_studies_are_added_once(kept: Store) -> None:
    kept.add_items([LEFT, RIGHT])
    kept.add_study(STUDY, "another text")

    def counts(connection: sa.Connection) -> list[int | None]:
        return [connection.scalar(sa.select(sa.func.count()).select_from(table)) for table in schema.TABLES[:2]]

    assert kept.read(counts) == [1, 2]
