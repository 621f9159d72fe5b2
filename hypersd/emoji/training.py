"""The artwork as training data for distillation: no folder of picture files between.

data = dataset(Path("runs/emoji"), Backbone.load("emoji"))
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from hypersd.data import Dataset, Encoder, Sample, prepare
from hypersd.emoji import artwork

PIECE = 500  # pictures


class Artwork:
    """A `data.Source` of the training split: pictures as pixels, all captions of each."""

    pictures = True

    def __init__(self, runs: Path) -> None:
        self.pixels, _, rows = artwork.load(runs / "artwork")
        train = [(number, row) for number, row in enumerate(rows) if row.split == "train"]
        self.parts = [train[first : first + PIECE] for first in range(0, len(train), PIECE)]

    def stamps(self) -> list[str]:
        return ["\n".join(f"{row.sha256} {captions(row)}" for _, row in part) for part in self.parts]

    def read(self, piece: int) -> Iterator[Sample]:
        for number, row in self.parts[piece]:
            yield Sample(row.id, captions(row), Image.fromarray(np.array(self.pixels[number])))


def captions(row: artwork.Picture) -> tuple[str, ...]:
    """All captions, the one that names the style as often as all others together, as the teacher learned them."""
    styled, *plain = artwork.captions(row)
    return (*[styled] * len(plain), *plain)


def dataset(runs: Path, encoder: Encoder) -> Dataset:
    """The cache below `runs/data`, made where it is missing. Raises ArtworkError if there is no artwork yet."""
    return prepare(Artwork(runs), encoder, runs / "data")
