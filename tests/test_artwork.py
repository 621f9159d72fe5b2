"""The artwork: what is fetched is what was pinned, nothing is skipped in silence, the splits keep their promises."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import tarfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from hypersd.emoji import artwork
from hypersd.emoji.artwork import ArtworkError, Name, Pack


def tarball(files: dict[str, str]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
    return out.getvalue()


def integrity(content: bytes) -> str:
    return "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode()


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for npm that copies `registry/*.tgz` to where it is told, and counts its calls."""
    registry = tmp_path / "registry"
    registry.mkdir()
    script = tmp_path / "bin" / "npm"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\necho "$@" >> {registry}/calls\ncp {registry}/*.tgz "$4"/\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    return registry


def test_fetch_checks_the_hash_and_asks_once(npm: Path, tmp_path: Path) -> None:
    content = tarball({"icons.json": "{}"})
    (npm / "iconify-json-x-1.0.0.tgz").write_bytes(content)
    for _ in range(2):
        files = artwork.fetch("@iconify-json/x", "1.0.0", integrity(content), tmp_path / "packs")
        assert files == {"icons.json": b"{}"}
    assert len((npm / "calls").read_text().splitlines()) == 1


def test_fetch_names_a_changed_package_and_does_not_keep_it(npm: Path, tmp_path: Path) -> None:
    (npm / "iconify-json-x-1.0.0.tgz").write_bytes(tarball({"icons.json": "changed"}))
    with pytest.raises(ArtworkError, match=r"@iconify-json/x@1\.0\.0 is not the pinned package"):
        artwork.fetch("@iconify-json/x", "1.0.0", integrity(b"the pinned one"), tmp_path / "packs")
    assert not list((tmp_path / "packs").glob("*.tgz"))


def test_fetch_without_npm_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ArtworkError, match=r"npm is not installed.*apt install npm"):
        artwork.fetch("x", "1.0.0", "sha512-", tmp_path / "packs")


def test_fetch_passes_on_what_npm_says(npm: Path, tmp_path: Path) -> None:
    (npm.parent / "bin" / "npm").write_text("#!/bin/sh\necho E404 no such version >&2\nexit 1\n")
    with pytest.raises(ArtworkError, match=r"could not fetch x@9\.9\.9: E404 no such version"):
        artwork.fetch("x", "9.9.9", "sha512-", tmp_path / "packs")


def name(label: str, group: str = "food & drink", subgroup: str = "fruit", neutral: bool = True) -> Name:
    return Name(label, (), group, subgroup, neutral)


NAMES = {
    "1F34E": name("red apple"),
    "1F468": name("man", "people & body", "people", neutral=False),
    "1F1E6": name("flag: France", "flags", "country flags"),
    "1F552": name("three o’clock", "travel & places", "time"),
    "1F44B-1F3FF": name("waving hand: dark skin tone", "people & body", "hands", neutral=False),
}


def test_choose_finds_names_three_ways_and_counts_every_icon_it_leaves_out() -> None:
    icons = ["apple", "redapple", "red-apple", "man", "flag-france", "three-o-clock", "artist-dark", "nothing", "gone"]
    bodies = {icon: {"body": "<path/>", **({"hidden": True} if icon == "gone" else {})} for icon in icons}
    files = {"icons.json": json.dumps({"icons": bodies}).encode(), "chars.json": b'{"1f34e": "apple"}'}
    kept, left_out = artwork.choose(Pack("p", "p", "1", "", "MIT", ""), files, NAMES)
    assert list(kept) == ["apple"]
    assert left_out == {
        "second drawing of the same name": 2,
        "gendered twin": 1,
        "country flags": 1,
        "clock face": 1,
        "skin tone": 1,
        "no CLDR name": 1,
        "withdrawn by its pack": 1,
    }
    assert len(kept) + left_out.total() == len(icons)


SQUARE = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 4"><path fill="#f00" d="M1 1h2v2H1z"/></svg>'


def test_render_gives_the_picture_on_white_and_its_exact_mask() -> None:
    pytest.importorskip("resvg_py")
    picture, mask = artwork.on_white(artwork.render(("p/square", SQUARE)))
    assert picture.shape == (128, 128, 3) and mask.shape == (128, 128)
    inside = np.zeros((128, 128), bool)
    inside[32:96, 32:96] = True
    assert (mask == np.where(inside, 255, 0)).all()
    assert (picture[inside] == [255, 0, 0]).all() and (picture[~inside] == 255).all()


@pytest.mark.parametrize("svg", ["<svg", SQUARE.replace("#f00", "none"), ""])
def test_a_broken_or_blank_svg_is_named(svg: str) -> None:
    pytest.importorskip("resvg_py")
    with pytest.raises(ArtworkError, match="p/broken"):
        artwork.render(("p/broken", svg))


def test_half_transparent_colours_mix_with_white() -> None:
    picture, mask = artwork.on_white(np.array([[[0, 0, 0, 128]]], np.uint8))
    assert picture.tolist() == [[[127, 127, 127]]] and mask.tolist() == [[128]]


def test_twins_of_held_out_pictures_are_found() -> None:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (4, 128, 128, 3), np.uint8)
    pictures[2] = np.clip(pictures[0].astype(int) + 2, 0, 255)
    held_out = np.array([True, False, False, False])
    assert artwork.twins(pictures, held_out).tolist() == [False, False, True, False]


@pytest.fixture(scope="module")
def rows() -> list[artwork.Picture]:
    return list(artwork.read_manifest())


def test_manifest_splits_keep_their_promises(rows: list[artwork.Picture]) -> None:
    splits: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        splits[row.concept].add(row.split)
    assert all(found == {"concept"} for found in splits.values() if "concept" in found)
    assert all("train" in found for found in splits.values() if "composition" in found)
    share = sum("concept" in found for found in splits.values()) / len(splits)
    assert 0.02 < share < 0.04
    shown = {(row.concept, row.style) for row in rows if row.split == "train"}
    assert not shown & {(row.concept, row.style) for row in rows if row.split == "composition"}


def test_manifest_rows_are_unique_and_captioned(rows: list[artwork.Picture]) -> None:
    assert len({row.id for row in rows}) == len(rows) > 5000
    assert {row.style for row in rows} == {pack.style for pack in artwork.PACKS}
    for row in rows:
        captions = artwork.captions(row)
        assert captions[0] == f"{row.label}, {row.style} style" and captions[1] == row.label
        assert all(c.strip() for c in captions) and len(row.sha256) == 64


def test_a_rebuild_that_differs_is_refused_by_name() -> None:
    row = json.dumps({"id": "noto/cat", "sha256": "a"})
    with pytest.raises(ArtworkError, match=r"differs .* in 1 pictures, first noto/cat"):
        artwork._compare(row, row.replace('"a"', '"b"'))


@pytest.mark.slow
def test_rebuilding_from_the_packs_gives_the_frozen_manifest(tmp_path: Path) -> None:
    """Needs npm and the network; two minutes."""
    artwork.make(tmp_path)
    assert (tmp_path / "artwork" / "manifest.jsonl").read_bytes() == artwork.MANIFEST.read_bytes()
