"""A checkpoint is complete or not there; damage is noticed and passed over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hypersd import checkpoint

TENSORS = {"a/b": torch.arange(6.0).reshape(2, 3), "c": torch.tensor(3)}


def publish(folder: Path, *steps: int, keep: int = 2) -> None:
    for step in steps:
        checkpoint.save(folder, step, {**TENSORS, "step": torch.tensor(step)}, {"note": step}, keep)


def test_round_trip(tmp_path: Path) -> None:
    publish(tmp_path, 5)
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.step == 5 and found.state == {"note": 5}
    assert all(torch.equal(found.tensors[k], v) for k, v in TENSORS.items())


def test_newest_wins_and_older_ones_are_pruned(tmp_path: Path) -> None:
    publish(tmp_path, 1, 2, 10)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000010"]
    assert checkpoint.latest(tmp_path).step == 10  # type: ignore[union-attr]


def test_nothing_there_is_none(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "never") is None


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "empty"])
def test_damage_is_reported_and_the_one_before_is_taken(tmp_path: Path, file: str, harm: str) -> None:
    publish(tmp_path, 1, 2)
    path = tmp_path / "step-00000002" / file
    content = path.read_bytes()
    if harm == "remove":
        path.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
        path.write_bytes({"flip": flipped, "cut": content[:-1], "empty": b""}[harm])
    heard: list[str] = []
    found = checkpoint.latest(tmp_path, heard.append)
    assert found is not None and found.step == 1
    assert len(heard) == 1 and "step-00000002" in heard[0]


def test_staging_left_by_a_killed_writer_is_ignored_and_replaced(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    half = tmp_path / ".step-00000002.tmp"
    half.mkdir()
    (half / "tensors.safetensors").write_bytes(b"half")
    assert checkpoint.latest(tmp_path).step == 1  # type: ignore[union-attr]
    publish(tmp_path, 2)
    assert checkpoint.latest(tmp_path).step == 2 and not half.exists()  # type: ignore[union-attr]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_is_refused_by_name_and_nothing_changes(tmp_path: Path, bad: float) -> None:
    publish(tmp_path, 1)
    with pytest.raises(checkpoint.NotFinite, match="weights/w is not finite at step 2"):
        checkpoint.save(tmp_path, 2, {"weights/w": torch.tensor([1.0, bad])}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_manifest_names_every_file_with_its_hash(tmp_path: Path) -> None:
    publish(tmp_path, 3)
    folder = tmp_path / "step-00000003"
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert set(files) == {"tensors.safetensors", "state.json"}
    assert all(checkpoint.sha256(folder / name) == entry["sha256"] for name, entry in files.items())
