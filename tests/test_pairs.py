"""Preferences from votes, from files as they are published, and from a known order."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from judged import make_artwork
from PIL import Image
from test_export import simulated
from voting import in_memory

from hypersd.feedback import known as known_order
from hypersd.feedback import pairs
from hypersd.feedback.pairs import SIDE, Preferences
from hypersd.records import InputError, Problem
from hypersd.study.export import export
from hypersd.study.pairs import Votes, gather
from hypersd.study.pairs import pairs as voted


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Votes, Path, Path]]:
    """A study's votes, its pictures, and everything that export writes of it."""
    folder = tmp_path_factory.mktemp("study")
    with in_memory(folder) as memory:
        store, desk = simulated(memory / "study.db", folder / "pool")
        export(store, desk.study, folder / "pool", folder / "out", ties=True)
        yield gather(store, desk.study), folder / "pool", folder / "out"
        store.close()


@pytest.fixture(scope="module")
def found(study: tuple[Votes, Path, Path]) -> Preferences:
    return pairs.of_votes(*study[:2])


def known(found: Preferences) -> set[tuple[str, str, bytes, bytes, float]]:
    """Each pair by what is in it, whatever the pictures' numbers; of ties the sides do not matter."""
    rows = set()
    for row in found.rows:
        ends = tuple(found.pictures[n].numpy().tobytes() for n in (row.first, row.second))
        first, second = sorted(ends) if row.share == 0.5 else ends if row.share > 0.5 else ends[::-1]
        rows.add((row.prompt, row.split, first, second, max(row.share, 1 - row.share)))
    return rows


def test_votes_become_shares_with_their_splits(study: tuple[Votes, Path, Path], found: Preferences) -> None:
    there = voted(study[0], ties=True)
    assert len(found.rows) == len(there) and {row.split for row in found.rows} == {"train", "validation", "test"}
    for row, pair in zip(found.rows, there, strict=True):
        assert row.share == pytest.approx((pair.votes_for + pair.ties / 2) / pair.n_votes) and row.split == pair.split
    assert found.pictures.shape[1:] == (3, SIDE, SIDE) and found.pictures.dtype == torch.float16
    assert found.ceiling is not None and 0.5 < found.ceiling <= 1
    assert found.sources == {"votes": len(there)}
    assert any(row.share == 0.5 for row in found.rows), "ties are kept, as what they are"


def test_equal_votes_have_equal_digests(study: tuple[Votes, Path, Path], found: Preferences) -> None:
    assert pairs.of_votes(*study[:2]).digest == found.digest
    assert replace(found, rows=found.rows[1:]).digest != found.digest


@pytest.mark.parametrize("name", ["preference", "hpdv2", "imagereward", "hpdv3", "imagefolder"])
def test_what_export_writes_can_be_read(study: tuple[Votes, Path, Path], found: Preferences, name: str) -> None:
    """Every format keeps the order of each pair; only the plain preferences keep how many were for it."""
    if name == "imagefolder":
        with pytest.raises(InputError, match="holds no preferences"):
            pairs.read(study[2] / name)
        return
    got = pairs.read(study[2] / name)
    order = {row[:4] for row in known(got)}
    if name == "hpdv3":  # has no room for ties nobody decided
        assert order <= {row[:4] for row in known(found)} and len(order) > 50
    elif name in ("hpdv2", "imagereward"):
        assert order == {row[:4] for row in known(found)}
    else:
        assert {row[:4] for row in known(got)} == {row[:4] for row in known(found)}


def test_single_votes_add_up(study: tuple[Votes, Path, Path]) -> None:
    got = pairs.read(study[2] / "pickapic")
    kept = [one for one in study[0].compared if one.choice != "both_bad"]
    assert len(got.rows) == len(kept)
    assert sum(row.share == 0.5 for row in got.rows) == sum(one.choice == "tie" for one in kept)


def test_one_annotator_is_not_enough(study: tuple[Votes, Path, Path]) -> None:
    votes, images, _ = study
    mine = tuple(one for one in votes.cast if one.annotator == votes.compared[0].annotator)
    with pytest.raises(Problem, match=r"by 1 annotator, 2 are needed.*--annotators 1"):
        pairs.of_votes(replace(votes, cast=mine), images)
    assert pairs.of_votes(replace(votes, cast=mine), images, annotators=1).rows


def test_ties_alone_teach_nothing(found: Preferences) -> None:
    tied = replace(found, rows=tuple(replace(row, share=0.5) for row in found.rows))
    with pytest.raises(Problem, match=r"0 pairs of pictures have a preferred one \(\d+ more are ties"):
        pairs.check(tied)


def test_too_few_are_counted(found: Preferences) -> None:
    assert pairs.check(found, found.decided) is found
    with pytest.raises(Problem, match="needed: 7 are missing"):
        pairs.check(found, found.decided + 7)


def test_a_split_without_any_is_named(found: Preferences) -> None:
    rows = tuple(row for row in found.rows if row.split != "validation")
    with pytest.raises(Problem, match="validation split"):
        pairs.check(replace(found, rows=rows))


def test_contradictions_are_half_and_half(study: tuple[Votes, Path, Path]) -> None:
    """One for, one against: the share says so, and it counts as undecided."""
    votes, images, _ = study
    one = next(one for one in votes.compared if one.choice in ("left", "right"))
    other = replace(one, choice="right" if one.choice == "left" else "left", annotator=99)
    found = pairs.of_votes(replace(votes, cast=(one, other)), images)
    assert [row.share for row in found.rows] == [0.5] and found.decided == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "cannot be read"),
        ("[]", "holds no preferences"),
        (json.dumps([{"text": "a", "good": 1}]), "none of the columns that are known"),
        (json.dumps([{"prompt": "a", "generations": ["x.png"], "ranking": "12"}]), "a row is not as|cannot be opened"),
        (
            json.dumps([{"prompt": "a", "file_path": ["x.png", "y.png"], "human_preference": [1, 0]}]),
            "cannot be opened",
        ),
        (json.dumps([{"prompt": "a", "file_path": 3, "human_preference": [1, 0]}]), "a row is not as HPD v2"),
    ],
)
def test_files_of_no_use_are_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "train.json"
    file.write_text(content)
    with pytest.raises(InputError, match=message):
        pairs.read(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        pairs.read(tmp_path / "no.parquet")


def test_known_order_is_labelled_with_its_rungs() -> None:
    shades = {name: torch.full((2, 8, 8, 3), shade, dtype=torch.uint8) for name, shade in
              (("best", 10), ("middle", 20), ("worst", 30))}  # fmt: skip
    for pictures in shades.values():
        pictures[1] += 100
    found = pairs.constructed(["a cat", "a dog"], shades)
    assert found.sources == {
        "constructed: best over middle": 2,
        "constructed: best over worst": 2,
        "constructed: middle over worst": 2,
    }
    for row in found.rows:
        assert found.pictures[row.first].float().mean() < found.pictures[row.second].float().mean()


def test_the_embedded_model_has_a_known_order(tmp_path: Path) -> None:
    """Real, drawn, drawn in haste, spoiled: six kinds of pairs for each caption; the last are visibly so."""
    make_artwork(tmp_path / "artwork", [], trained=4)
    found = known_order.emoji(tmp_path / "artwork", 2)
    assert [*found.sources.values()] == [2] * 6 and {row.share for row in found.rows} == {1.0}
    flat = torch.full((1, 64, 64, 3), 200, dtype=torch.uint8)
    assert float(known_order.worse(flat).float().std()) > 20


def test_a_prompt_is_in_one_split_however_often_it_is_given(tmp_path: Path) -> None:
    """In the strictest, over files that are named after a split and over sources that are joined."""
    for name in ("one.png", "other.png"):
        Image.new("RGB", (8, 8), {"one.png": "red"}.get(name, "blue")).save(tmp_path / name)
    row = {"file_path": ["one.png", "other.png"], "human_preference": [1, 0]}
    for name in pairs.STRICTER:
        rows = [{**row, "prompt": prompt} for prompt in ("everywhere", f"only {name}")]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    wanted = {("everywhere", "test"), *((f"only {name}", name) for name in pairs.STRICTER)}
    assert {(row.prompt, row.split) for row in pairs.read(tmp_path).rows} == wanted
    parts = [pairs.read(tmp_path / f"{name}.json") for name in pairs.STRICTER]
    assert {row.split for row in parts[0].rows} == {"train"}
    for both in (pairs.join(*parts), pairs.join(*parts[::-1])):
        assert {(row.prompt, row.split) for row in both.rows} == wanted


def test_joined_preferences_point_at_their_own_pictures(found: Preferences) -> None:
    both = pairs.join(found, found)
    assert known(both) == known(found) and len(both.rows) == 2 * len(found.rows)
