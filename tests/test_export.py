"""Exports: the published loaders' columns, ties no preference, prompts in one split each, the same bytes twice."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from voting import PROMPTS, Clock, definition, in_memory, pool

from hypersd.records import Item, Pair, Problem
from hypersd.study import formats
from hypersd.study.ballots import Desk
from hypersd.study.definition import parse
from hypersd.study.export import export
from hypersd.study.pairs import Votes, gather, pairs, split_of
from hypersd.study.simulate import Truth, vote
from hypersd.study.table import read
from hypersd.study.votes import Store

MANY = [f"{text} number {n}" for n in range(5) for text in PROMPTS]
FIRST = '=HYPERLINK("http://x")'  # as a prompt: text everywhere, a formula nowhere


class Tick(Clock):
    """A second passes with every look."""

    def __call__(self) -> int:
        self.now += 1_000_000
        return self.now


def drawn(item: Item, folder: Path) -> Item:
    """The item with a small picture of its own in the folder."""
    colour = tuple(hashlib.sha256(item.id.encode()).digest()[:3])
    picture = Image.new("RGB", (item.width, item.height), colour)
    sha = hashlib.sha256(picture.tobytes()).hexdigest()
    picture.save(folder / f"{sha}.png")
    return replace(item, image_sha256=sha)


def simulated(address: str | Path, folder: Path) -> tuple[Store, Desk]:
    """A study with pictures, gold, repeats and the votes of twelve annotators, two of whom click at random."""
    folder.mkdir(exist_ok=True)
    shares = {"gold": 0.1, "repeat": 0.1, "uniform": 0.5}
    study = parse(definition(prompts=[FIRST, *MANY], ballots=25, shares=shares))
    store = Store(address, clock=Tick())
    store.add_items([drawn(item, folder) for item in pool(study)])
    desk = Desk(store, study, seed=1)
    truth = Truth((0.0, -0.5, 1.5, -4.0), bad=0.05, spammers=0.15, annotator_sd=0.0, prompt_sd=0.1)
    assert vote(desk, truth, 12, np.random.default_rng(4)) == 12 * 25
    return store, desk


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Store, Desk, Path]]:
    folder = tmp_path_factory.mktemp("study")
    with in_memory(folder) as memory:
        store, desk = simulated(memory / "study.db", folder / "pool")
        yield store, desk, folder / "pool"
        store.close()


@pytest.fixture(scope="module")
def out(made: tuple[Store, Desk, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    store, desk, images = made
    folder = tmp_path_factory.mktemp("export") / "out"
    sizes = export(store, desk.study, images, folder)
    assert sizes == {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    return folder


@pytest.fixture(scope="module")
def votes(made: tuple[Store, Desk, Path]) -> Votes:
    return gather(made[0], made[1].study)


def load(out: Path, name: str) -> dict[str, list[dict[str, object]]]:
    """The rows of a format by split."""
    if (out / name / "train.parquet").exists():
        return {split: pq.read_table(out / name / f"{split}.parquet").to_pylist() for split in SPLITS}
    return {split: json.loads((out / name / f"{split}.json").read_text(encoding="utf-8")) for split in SPLITS}


SPLITS = ("train", "validation", "test")


def test_pairs_count_what_people_said(votes: Votes) -> None:
    found = pairs(votes)
    assert found
    for pair in found:
        ends = {pair.chosen.id, pair.rejected.id}
        own = [one for one in votes.compared if {one.left.id, one.right.id} == ends]
        for_ = sum((one.left if one.choice == "left" else one.right).id == pair.chosen.id
                   for one in own if one.choice in ("left", "right"))  # fmt: skip
        assert pair.votes_for == for_ > pair.votes_against
        assert pair.n_votes == sum(one.choice != "both_bad" for one in own)
        assert not any(one.gold or one.repeat or not one.used for one in own)
    assert all(isinstance(pair, Pair) and 0 < pair.margin <= 1 for pair in found)
    assert len(pairs(votes, ties=True)) > len(found)
    assert found == sorted(found, key=lambda pair: (pair.prompt, pair.chosen.id, pair.rejected.id))


def test_spammers_are_in_the_raw_votes_and_nowhere_else(votes: Votes, out: Path) -> None:
    flagged = {one.number for one in votes.judged if one.reasons}
    assert flagged and flagged <= {0, 1}
    rows = list(csv.DictReader(io.StringIO((out / "votes.csv").read_text(encoding="utf-8"))))
    assert len(rows) == 300
    assert {int(row["annotator"]) for row in rows if row["used"] == "0"} == flagged
    for row in load(out, "pickapic")["train"]:
        assert row["user_id"] not in flagged


@pytest.mark.parametrize("name", ["pickapic", "imagereward", "hpdv2", "hpdv3", "preference"])
def test_no_prompt_is_in_two_splits(name: str, out: Path) -> None:
    found = load(out, name)
    named = {split: {str(row.get("prompt", row.get("caption"))) for row in rows} for split, rows in found.items()}
    assert all(split_of(prompt) == split for split, prompts in named.items() for prompt in prompts)
    assert len(named["train"]) > 5 and sum(len(prompts) > 0 for prompts in named.values()) >= 2


def test_pickapic_is_what_its_loader_reads(out: Path) -> None:
    table = pq.read_table(out / "pickapic/train.parquet")
    assert str(table.schema.field("created_at").type) == "timestamp[us]"
    rows = table.to_pylist()
    for row in rows:
        assert {row["label_0"], row["label_1"]} == {0.0, 1.0}, "a tie would be read as a preference"
        best = row["image_0_uid"] if row["label_0"] else row["image_1_uid"]
        assert row["best_image_uid"] == best and row["has_label"] and row["are_different"]
        for side in "01":
            with Image.open(io.BytesIO(row[f"jpg_{side}"])) as picture:
                assert hashlib.sha256(picture.convert("RGB").tobytes()).hexdigest() == row[f"image_{side}_uid"]
        assert "@" in row["model_0"]


def test_ties_are_there_when_asked_for(made: tuple[Store, Desk, Path], tmp_path: Path) -> None:
    store, desk, images = made
    export(store, desk.study, images, tmp_path / "ties", ["pickapic", "imagereward", "hpdv2", "hpdv3"], ties=True)
    labels = {(row["label_0"], row["label_1"]) for row in load(tmp_path / "ties", "pickapic")["train"]}
    assert labels == {(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)}
    assert {tuple(row["ranking"]) for row in load(tmp_path / "ties", "imagereward")["train"]} == {(1, 2), (1, 1)}  # type: ignore[arg-type]
    assert not (tmp_path / "ties/preference").exists()


def test_json_formats_say_the_same_as_the_pairs(votes: Votes, out: Path) -> None:
    expected = {split: [pair for pair in pairs(votes) if pair.split == split] for split in SPLITS}
    for split, found in expected.items():
        paths = [[f"images/{end.image_sha256}.png" for end in (pair.chosen, pair.rejected)] for pair in found]
        ranked, third = load(out, "imagereward")[split], load(out, "hpdv3")[split]
        assert [row["generations"] for row in ranked] == paths
        assert all(row["ranking"] == [1, 2] for row in ranked)
        assert len({row["id"] for row in ranked}) == len(found)
        assert [[row["path1"], row["path2"]] for row in third] == paths
        assert [row["choice_dist"] for row in third] == [[pair.votes_for, pair.votes_against] for pair in found]
        assert all(row["confidence"] > 0.5 for row in third)  # type: ignore[operator]
        key = "image_path" if split == "test" else "file_path"
        assert [row[key] for row in load(out, "hpdv2")[split]] == paths
        assert all((out / name).is_file() for names in paths for name in names)
    for row, pair in zip(load(out, "hpdv2")["test"], expected["test"], strict=True):
        assert row["rank"] == [1, 2]
        ranks = [annotation["rank"] for annotation in row["raw_annotations"]]  # type: ignore[attr-defined]
        assert (ranks.count([1, 2]), ranks.count([2, 1])) == (pair.votes_for, pair.votes_against)


def test_imagefolder_names_pictures_that_are_there(votes: Votes, out: Path) -> None:
    lines = (out / "imagefolder/train/metadata.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == sum(pair.split == "train" for pair in pairs(votes))
    for row in rows:
        for end in ("chosen", "rejected"):
            assert (out / "imagefolder/train" / row[f"{end}_file_name"]).is_file()
        assert 0 < row["margin"] <= 1 <= row["n_votes"]


def test_preference_parquet_opens_as_pictures(out: Path) -> None:
    table = pq.read_table(out / "preference/train.parquet")
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["chosen"] == {"_type": "Image"} and features["margin"] == {"dtype": "float64", "_type": "Value"}
    for row in table.to_pylist():
        with Image.open(io.BytesIO(row["chosen"]["bytes"])) as picture:
            assert picture.format == "PNG"


@pytest.mark.parametrize("name", ["pickapic", "preference", "imagefolder"])
def test_datasets_loads_it(name: str, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the name in the data card, as a stranger would; every split, the pictures as pictures."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    if name == "imagefolder":
        loaded = datasets.load_dataset("imagefolder", data_dir=str(out / name), cache_dir=str(tmp_path))
    else:
        loaded = datasets.load_dataset(str(out), name, cache_dir=str(tmp_path))
    assert set(loaded) == {"train", "validation", "test"}
    row = loaded["train"][0]
    if name == "pickapic":
        assert row["label_0"] + row["label_1"] == 1 and isinstance(row["jpg_0"], bytes)
    elif name == "preference":
        assert row["chosen"].size == row["rejected"].size and 0 < row["margin"] <= 1
    else:
        assert {"prompt", "margin", "n_votes"} <= row.keys()


def test_no_cell_is_a_formula_and_the_text_is_kept_elsewhere(out: Path) -> None:
    rows = list(csv.reader(io.StringIO((out / "votes.csv").read_text(encoding="utf-8"))))
    assert not [cell for row in rows for cell in row if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
    assert any(cell == f"'{FIRST}" for row in rows for cell in row)
    assert [formats.inert(text) for text in ("=1", "+1", "-1", "@x", "\tx", "\rx", "a=1")] == [
        "'=1", "'+1", "'-1", "'@x", "'\tx", "'\rx", "a=1"]  # fmt: skip
    assert FIRST in json.loads((out / "study.json").read_text(encoding="utf-8"))["prompts"]


def test_the_card_says_how_far_to_trust_it(votes: Votes, out: Path) -> None:
    text = (out / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(text.split("---")[1])
    assert head["license"] == "cc0-1.0"
    assert [config["config_name"] for config in head["configs"]] == ["pickapic", "preference"]
    for promised in ("300 by 12 annotators", "filter version 1", "Krippendorff's alpha", "human ceiling",
                     "ties | left out", votes.study.sha256, votes.study.consent):  # fmt: skip
        assert promised in text


def test_nothing_that_names_a_person_gets_out(made: tuple[Store, Desk, Path], out: Path) -> None:
    names = {name.encode() for name in read(made[0], made[1].study).annotators}
    ballots = {asked.ballot.id.encode() for name in names for asked in made[1].history(name.decode())}
    assert len(names) == 12 and len(ballots) >= 300
    for path in out.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert not [name for name in names | ballots if name in content], path


def test_the_same_votes_are_the_same_bytes(made: tuple[Store, Desk, Path], out: Path, tmp_path: Path) -> None:
    store, desk, images = made
    store.write(lambda c: c.exec_driver_sql("UPDATE ballot SET mirrored_us = 1"))
    export(store, desk.study, images, tmp_path / "again")
    for path in out.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(out)).read_bytes(), path


def test_what_stops_an_export_is_one_sentence_and_leaves_nothing(
    made: tuple[Store, Desk, Path], tmp_path: Path, ram: Path
) -> None:
    store, desk, images = made
    study = desk.study
    with pytest.raises(Problem, match="no format 'csv'; choose from pickapic, imagereward, hpdv2, hpdv3"):
        export(store, study, images, tmp_path / "x", ["csv"])
    with pytest.raises(Problem, match="is there already"):
        export(store, study, images, tmp_path)
    with pytest.raises(Problem, match=r"picture .*\.png cannot be read"):
        export(store, study, tmp_path, tmp_path / "x")
    empty = Store(ram / "empty.db")
    with pytest.raises(Problem, match="nobody has voted"):
        export(empty, study, images, tmp_path / "x")
    spoiled = tmp_path / "pool"
    spoiled.mkdir()
    for path in images.iterdir():
        Image.new("RGB", (8, 6), "red").save(spoiled / path.name)
    with pytest.raises(Problem, match="is not the one that was shown"):
        export(store, study, spoiled, tmp_path / "x")
    with pytest.raises(Problem, match="cannot be written"):
        export(store, study, images, images / next(iter(images.iterdir())).name / "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pool"]


def test_an_interrupted_export_is_begun_anew(made: tuple[Store, Desk, Path], tmp_path: Path) -> None:
    store, desk, images = made
    (tmp_path / "x.partial/pickapic").mkdir(parents=True)
    (tmp_path / "x.partial/pickapic/stale").write_text("half")
    export(store, desk.study, images, tmp_path / "x", ["hpdv3"])
    assert not (tmp_path / "x.partial").exists() and not (tmp_path / "x/pickapic").exists()
