"""python -m hypersd study: a rehearsal from simulated votes to an export, a withdrawal, a loss and a restore."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sqlalchemy as sa
import yaml
from voting import definition

from hypersd.__main__ import main
from hypersd.study import mirror, simulate
from hypersd.study.ballots import Desk
from hypersd.study.definition import load
from hypersd.study.people import annotator_of, new_id, receipt_of
from hypersd.study.schema import vote
from hypersd.study.simulate import twin
from hypersd.study.votes import Store


@pytest.fixture
def folder(ram: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(ram)
    monkeypatch.delenv("DATABASE_URL", raising=False)
    (ram / "study.yaml").write_text(yaml.safe_dump(definition(ballots=20)))
    return ram


def run(action: str, *more: str, database: str | None = "x.db") -> int:
    named = ["--database", database] if database else []
    return main(["study", action, *more, *named, "--study", "study.yaml", "--images", "images"])


def test_from_simulated_votes_to_a_restore(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("simulate", "--annotators", "6", "--spammers", "0") == 0
    assert "120 simulated votes by 6 annotators" in capsys.readouterr().out

    assert run("status") == 0
    told = capsys.readouterr().out
    for promised in ("simulated: small", "open", "pictures    all there", "120 by 6 annotators", "rows not mirrored",
                     "base@8              1000", "(Holm)", "alpha", "first place"):  # fmt: skip
        assert promised in told

    assert run("export", "--out", "out", "--format", "hpdv3", "--format", "imagereward") == 0
    assert "train.json" in capsys.readouterr().out
    assert json.loads((folder / "out/study.json").read_text())["name"] == "simulated: small"
    assert "# simulated: small" in (folder / "out/README.md").read_text()

    receipt = own_votes(folder, 2)
    assert run("withdraw", receipt, "--mirror", "copy") == 0
    assert "erased 2 votes" in capsys.readouterr().out
    assert run("withdraw", receipt) == 0
    assert "erased 0 votes" in capsys.readouterr().out

    (folder / "x.db").write_bytes(b"\xa5" * 9999)
    assert run("status") == 1
    assert "the database is damaged and kept aside as x.db.damaged-" in capsys.readouterr().err
    assert run("restore", "--mirror", "copy") == 0
    told = capsys.readouterr().out
    assert "the old database stays: it was damaged and kept aside as x.db.damaged-" in told
    assert "120 votes" in told
    assert run("status") == 0
    assert "120 by 6 annotators" in capsys.readouterr().out
    assert run("restore", "--mirror", "copy") == 0
    assert "0 votes" in capsys.readouterr().out

    assert run("freeze") == 0
    assert run("freeze") == 0
    assert "is closed already" in capsys.readouterr().out
    assert run("status") == 0
    assert "closed" in capsys.readouterr().out.splitlines()[0]


def own_votes(folder: Path, count: int) -> str:
    """Vote a little in the rehearsed study; the receipt."""
    store, receipt = Store(folder / "x.db"), receipt_of(new_id())
    desk = Desk(store, twin(load(folder / "study.yaml")))
    desk.consent(annotator_of(receipt))
    for _ in range(count):
        ballot = desk.next(annotator_of(receipt))
        assert desk.answer(ballot.id, annotator_of(receipt), "left").kind == "saved"  # type: ignore[union-attr]
    assert mirror.waiting(store) > 0
    store.close()
    return receipt


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["status"], "there is no database x.db; name it with --database"),
        (["withdraw"], "name the receipt: python -m hypersd study withdraw K7QM-"),
        (["withdraw", "K7QM"], "a receipt has 20 letters and digits"),
        (["freeze", "K7QM"], "study freeze takes no receipt"),
        (["restore"], "name where the rows are: --mirror FOLDER"),
        (["simulate", "--annotators", "0"], "annotators must be a whole number from 1 to 10,000, got '0'"),
        (["simulate", "--spammers", "2"], "spammers must be a number from 0 to 1, got '2'"),
    ],
)
def test_a_wrong_input_is_one_sentence(
    arguments: list[str], sentence: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("hypersd: ") and told.err.count("\n") == 1
    assert sentence in told.err


def test_the_address_comes_from_the_environment_too(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", "mysql://host/votes")
    assert run("status", database=None) == 2
    assert "an SQLite file or in PostgreSQL, got mysql://" in capsys.readouterr().err


def test_the_pace_is_that_of_votes_that_are_stored(folder: Path) -> None:
    per_second = simulate.pace(folder, load("study.yaml"), count=30)
    store = Store(folder / "pace.db")
    stored = store.read(lambda c: c.scalar(sa.select(sa.func.count()).select_from(vote)))
    store.close()
    assert stored == 30 and 1 < per_second < 100_000
