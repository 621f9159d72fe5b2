"""Who looks at the pictures: encoders of pictures and texts, and the real pictures to compare with.

A judge that is not there, and artwork that was not made, stop nothing: the report says what could not be measured and
where it would come from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hypersd import checkpoint
from hypersd.emoji import artwork, scorer
from hypersd.records import Problem

ASSETS = artwork.MANIFEST.parent


class Judge(Protocol):
    """Pictures uint8 [n, h, w, 3] of any size, and texts, as unit vectors float32 [n, d] in one space; and the looks of
    pictures, float32 [n, k], in which blur and noise leave a mark as well."""

    @property
    def sha256(self) -> str: ...
    def pictures(self, pixels: Tensor) -> Tensor: ...
    def looks(self, pixels: Tensor) -> Tensor: ...
    def texts(self, texts: Sequence[str]) -> Tensor: ...


class EmojiJudge:
    """One of the two emoji scorers. Raises ArtworkError if it was not trained."""

    def __init__(self, folder: Path) -> None:
        self.scorer = scorer.load(folder)
        weights = sorted(folder.rglob("*.safetensors"))
        self.sha256 = "-".join(checkpoint.sha256(file)[:8] for file in weights)

    def pictures(self, pixels: Tensor) -> Tensor:
        return scorer.embed_pictures(self.scorer, pixels.numpy())

    def looks(self, pixels: Tensor) -> Tensor:
        return scorer.looks(self.scorer, pixels.numpy())

    def texts(self, texts: Sequence[str]) -> Tensor:
        return scorer.embed_texts(self.scorer, texts)


JUDGES: dict[str, Callable[[], Judge]] = {
    "measure": lambda: EmojiJudge(ASSETS / "emoji-scorer-b"),  # nothing is ever trained on it
    "reward": lambda: EmojiJudge(ASSETS / "emoji-scorer-a"),
}


def load(name: str) -> Judge | str:
    """The judge of that name, or the sentence that says why it cannot judge."""
    try:
        return JUDGES[name]()
    except Problem as problem:
        return str(problem)


@dataclass(frozen=True)
class Artwork:
    """The real pictures: uint8 [n, 128, 128, 3], and which row has which id."""

    pictures: np.ndarray
    rows: Sequence[artwork.Picture]

    @cached_property
    def place(self) -> dict[str, int]:
        return {row.id: number for number, row in enumerate(self.rows)}

    def of(self, ids: Sequence[str]) -> Tensor:
        """The pictures of these ids, uint8 [n, 128, 128, 3]."""
        return torch.from_numpy(np.array(self.pictures[[self.place[name] for name in ids]]))

    def train(self) -> Tensor:
        """Every picture that was trained on."""
        return torch.from_numpy(np.array(self.pictures[[row.split == "train" for row in self.rows]]))


def real(folder: Path) -> Artwork | str:
    """The artwork under `folder`, or the sentence that says how to make it."""
    try:
        pictures, _, rows = artwork.load(folder)
    except Problem as problem:
        return str(problem)
    return Artwork(pictures, rows)
