"""A finished cache, read by row number."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from hypersd.data.files import DataError

MANIFEST, ROWS = "manifest.json", "rows.jsonl"


@dataclass(frozen=True)
class Batch:
    latents: Tensor | None  # float32 [batch, c, h, w]; None where there are prompts only
    states: Tensor  # float32 [batch, tokens, width]
    captions: list[str]


class Draws(Protocol):
    """Random numbers for each place of a batch; `train.Step` has them, whatever the batch is cut into."""

    def uniform(self, stream: str) -> Tensor:
        """In [0, 1), [batch]."""

    def randn(self, stream: str, shape: Sequence[int]) -> Tensor:
        """Standard normal, float32 [batch, *shape]."""


class Dataset:
    """A finished cache. Only the captions are in memory; the files are mapped when first asked for.

    Raises:
        DataError: the cache is not finished, or a file of it is cut off.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, manifest = folder, _manifest(folder)
        rows = [json.loads(line) for line in (folder / ROWS).read_text(encoding="utf-8").splitlines()]
        self.digest: str = manifest["digest"]  # names everything that decides what is in here
        self.views: int = manifest["views"]  # of each picture: 2 with mirrored ones, 0 where there are prompts only
        self.sampled: bool = manifest["config"]["posterior"] == "sample"
        self.texts = texts_of(rows)
        place = {text: number for number, text in enumerate(self.texts)}
        self.captions = [[place[text] for text in row["captions"]] for row in rows]  # numbers of texts
        self.keys: list[str] = [row["key"] for row in rows]  # what the source calls them
        self._latents, self._states = (_Shards(folder, manifest[name]) for name in ("latents", "states"))

    def __len__(self) -> int:
        return len(self.captions)

    @cached_property
    def empty(self) -> Tensor:
        """States of the empty caption, for guidance: float32 [1, tokens, width]."""
        return self._states.take("states", [(self.texts.index(""),)])

    def take(self, rows: Tensor, draws: Draws | None = None) -> Batch:
        """The samples of these row numbers, int64 [batch].

        `draws`, as a rule a `train.Step`, chooses for each row one of its captions, whether it is mirrored, and a point
        of its posterior, where the cache leaves a choice. Without it: the first caption, not mirrored, the mean.
        """
        picked = rows.tolist()
        zeros = torch.zeros(len(picked))
        caption, mirror = (draws.uniform(stream) if draws else zeros for stream in ("caption", "mirror"))
        options = [self.captions[row] for row in picked]
        texts = [known[int(c * len(known))] for known, c in zip(options, caption.tolist(), strict=True)]
        states, captions = self._states.take("states", [(t,) for t in texts]), [self.texts[t] for t in texts]
        if not self.views:
            return Batch(None, states, captions)
        places = list(zip(picked, (mirror * self.views).long().tolist(), strict=True))
        latents = self._latents.take("mean", places)
        if self.sampled and draws:
            latents += self._latents.take("std", places) * draws.randn("posterior", latents.shape[1:])
        return Batch(latents, states, captions)


def texts_of(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Every caption once, the empty one among them, in a fixed order."""
    return sorted({"", *(text for row in rows for text in row["captions"])})


def _manifest(folder: Path) -> dict[str, Any]:
    """What `prepare` wrote last, after the files it names."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise DataError(f"{folder} is not a finished cache; prepare the data again") from None
    for name, size in manifest["bytes"].items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if found != size:
            raise DataError(
                f"{folder / name} is cut off ({found:,} of {size:,} bytes); "
                "prepare the data again: only what is damaged is made anew"
            )
    return manifest


class _Shards:
    """Tensors whose rows lie in several files, read where they lie."""

    def __init__(self, folder: Path, counts: dict[str, int]) -> None:
        self.files = [folder / name for name in counts]
        self.ends = list(accumulate(counts.values()))
        self.starts = [0, *self.ends]
        self.mapped: dict[int, dict[str, Tensor]] = {}

    def take(self, name: str, places: Sequence[tuple[int, ...]]) -> Tensor:
        """One slice a place, which is a row number and maybe further indices. float32 [places, ...]"""
        slices = []
        for row, *rest in places:
            shard = bisect_right(self.ends, row)
            if shard not in self.mapped:
                self.mapped[shard] = load_file(self.files[shard])  # maps it; a page is read when it is touched
            slices.append(self.mapped[shard][name][(row - self.starts[shard], *rest)])
        return torch.stack(slices).float()
