"""Atomic, verified checkpoints: a folder per step that is either complete or not there.

Everything is written into a hidden staging folder and flushed; the manifest with sizes and sha256 comes last; then one
rename publishes the folder. A reader takes the newest folder whose manifest verifies and says which ones it passed
over. A process killed at any moment therefore loses at most the work since the last publish.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hypersd.records import Problem

MANIFEST = "manifest.json"


class NotFinite(Problem, ArithmeticError):
    """A tensor about to be published holds NaN or infinity; the message names it. Nothing was written."""


@dataclass(frozen=True)
class Checkpoint:
    step: int
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]  # whatever JSON the writer put beside the tensors


def save(folder: Path, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any], keep: int = 2) -> Path:
    """Publish `folder/step-<step>` and prune all but the newest `keep` complete checkpoints.

    Raises:
        NotFinite: a floating-point tensor is not finite; older checkpoints stay as they are.
        OSError: the disk is full or read-only; older checkpoints stay as they are.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NotFinite(f"{name} is not finite at step {step}; nothing was saved, the last good checkpoint stands")
    folder.mkdir(parents=True, exist_ok=True)
    final, staging = folder / f"step-{step:08d}", folder / f".step-{step:08d}.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, staging / "tensors.safetensors")
    (staging / "state.json").write_text(json.dumps(state), encoding="utf-8")
    entries = {}
    for path in sorted(staging.iterdir()):
        flush(path)
        entries[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (staging / MANIFEST).write_text(json.dumps({"step": step, "files": entries}), encoding="utf-8")
    flush(staging / MANIFEST)
    flush(staging)
    shutil.rmtree(final, ignore_errors=True)  # only a damaged one or a rerun of the same step can be here
    os.replace(staging, final)
    flush(folder)
    for old in _folders(folder)[keep:]:
        shutil.rmtree(old)
    return final


def latest(folder: Path, warn: Any = print) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None; each damaged one that was passed over is reported to `warn`."""
    for path in _folders(folder):
        if problem := damage(path):
            warn(f"passing over {path.name}: {problem}")
            continue
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        return Checkpoint(int(path.name.removeprefix("step-")), load_file(path / "tensors.safetensors"), state)
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, in words; None if nothing is."""
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, entry in files.items():
            if (path / name).stat().st_size != entry["bytes"]:
                return f"{name} has another size than its manifest says"
            if sha256(path / name) != entry["sha256"]:
                return f"{name} has other bytes than its manifest says"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read ({type(error).__name__})"
    return None


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folders(folder: Path) -> list[Path]:
    """Published checkpoint folders, newest first."""
    return sorted(folder.glob("step-*"), reverse=True) if folder.exists() else []


def flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flatten(prefix: str, tree: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a nested dict as ("prefix/key/..", tensor)."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(f"{prefix}/{key}", value)
        elif isinstance(value, torch.Tensor):
            yield f"{prefix}/{key}", value
