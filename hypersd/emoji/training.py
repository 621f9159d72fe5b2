"""The artwork as training data for distillation: no folder of picture files between.

data = dataset(Path("runs/emoji"), Backbone.load("emoji"))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hypersd.data import Dataset, Encoder, Sample, Source, open_source, prepare
from hypersd.data.coco import Outlined, open_coco
from hypersd.data.dataset import Batch, Draws
from hypersd.emoji import artwork
from hypersd.emoji.autoencoder import to_float
from hypersd.train import processes

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


def dataset(runs: Path, encoder: Encoder) -> Masked:
    """The cache below `runs/data`, made where it is missing. Raises ArtworkError if there is no artwork yet."""
    return Masked(shared(Artwork(runs), encoder, runs / "data"), runs)


class Masked:
    """The cached artwork, with every picture as it was drawn, and its mask."""

    def __init__(self, cached: Dataset, runs: Path) -> None:
        self._pixels, self._masks, rows = artwork.load(runs / "artwork")
        place = {row.id: number for number, row in enumerate(rows)}
        self.cached = cached
        self._places = [place[key] for key in cached.keys]

    def __len__(self) -> int:
        return len(self.cached)

    @property
    def digest(self) -> str:
        return self.cached.digest

    @property
    def empty(self) -> Tensor:
        return self.cached.empty

    def take(self, rows: Tensor, draws: Draws | None = None) -> Batch:
        return self.cached.take(rows, draws)

    def pixels(self, rows: Tensor) -> Tensor:
        """The pictures themselves, float32 [rows, 3, 128, 128] in -1..1."""
        return to_float(self._pixels[self._of(rows)])

    def masks(self, rows: Tensor) -> Tensor:
        """What is object and not background, float32 [rows, 128, 128] in 0..1."""
        return torch.from_numpy(np.array(self._masks[self._of(rows)])).float() / 255

    def _of(self, rows: Tensor) -> list[int]:
        return [self._places[row] for row in rows.tolist()]


def tells(data: str | None) -> tuple[str, ...]:
    """What `opener`'s data can be asked about its pictures' objects, known before it is opened."""
    if data is None:
        return ("masks",)
    return ("masks", "instances") if (Path(data) / "annotations").is_dir() else ()


def opener(data: str | None, runs: Path) -> Callable[[Encoder], Dataset | Masked | Outlined]:
    """A function that opens training data for a backbone: a person's own, cached below `runs`, or the artwork.

    A folder with COCO's annotations has masks, as the artwork has.
    """
    if data is None:
        return lambda encoder: dataset(Path("runs/emoji"), encoder)
    if tells(data):
        coco = open_coco(Path(data))
        return lambda encoder: Outlined(shared(coco, encoder, runs / "data"), coco, encoder.picture_px)
    return lambda encoder: shared(open_source(data), encoder, runs / "data")


def shared(source: Source, encoder: Encoder, cache: Path) -> Dataset:
    """The cache of a source; of several processes, as `accelerate launch` starts them, each encodes its share."""
    here = processes()
    return prepare(source, encoder, cache, rank=here.process_index, world=here.num_processes)
