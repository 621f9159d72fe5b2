"""COCO: pictures with five captions each, and the outlines of their objects as masks.

    backbone = Backbone.load("my/model")
    coco = open_coco(Path("my/coco"))
    data = Outlined(prepare(coco, backbone, Path("runs/data")), coco, backbone.picture_px)

Hyper-SD learns structure from the instances of COCO 2017's training split (arXiv:2404.13686, section 3.2). A folder
holds train2017/, annotations/captions_train2017.json and annotations/instances_train2017.json, as COCO is published.
An outline is polygons, or runs of equal pixels down the columns; crowds are runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hypersd.data.dataset import Batch, Dataset, Draws
from hypersd.data.sources import Sample, SourceError, in_parts, read_bytes, signature, stamp, texts
from hypersd.data.survey import square


@dataclass(frozen=True)
class Coco:
    """A split of COCO as a `Source`; pictures without a caption are there too, for the survey to count.

    Raises:
        SourceError: an annotation file is missing or not JSON of COCO's layout.
    """

    root: Path
    split: str = "train2017"
    pictures = True

    @cached_property
    def images(self) -> dict[str, dict[str, Any]]:
        """File name -> {"id", "width", "height", "file_name", ...}, by id."""
        rows = sorted(self._read("instances")["images"], key=lambda row: row["id"])
        return {row["file_name"]: row for row in rows}

    @cached_property
    def captions(self) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        for row in self._read("captions")["annotations"]:
            found.setdefault(row["image_id"], []).append(row["caption"])
        return found

    @cached_property
    def outlines(self) -> dict[int, list[Any]]:
        """The segmentations of each picture, by its id."""
        found: dict[int, list[Any]] = {}
        for row in self._read("instances")["annotations"]:
            found.setdefault(row["image_id"], []).append(row["segmentation"])
        return found

    def stamps(self) -> list[str]:
        about = stamp(self.root, *(f"annotations/{kind}_{self.split}.json" for kind in ("captions", "instances")))
        names = [f"{self.split}/{name}" for name in self.images]
        return [signature(about, stamp(self.root, *part)) for part in in_parts(names)]

    def read(self, piece: int) -> Iterator[Sample]:
        for name in in_parts(list(self.images))[piece]:
            captions = texts(self.captions.get(self.images[name]["id"], []))
            yield Sample(name, captions, read_bytes(self.root / self.split / name))

    def mask(self, name: str) -> np.ndarray:
        """Where in a picture there is any object: bool [height, width]."""
        about = self.images[name]
        found = np.zeros((about["height"], about["width"]), bool)
        for outline in self.outlines.get(about["id"], []):
            found |= mask_of(outline, about["height"], about["width"])
        return found

    def _read(self, kind: str) -> dict[str, Any]:
        file = self.root / "annotations" / f"{kind}_{self.split}.json"
        try:
            content = json.loads(file.read_bytes())
        except OSError:
            raise SourceError(f"{file} is not there; unpack COCO's annotations below {self.root}") from None
        except ValueError as error:
            raise SourceError(f"{file} is not JSON ({error}); download it again") from None
        if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
            raise SourceError(f"{file} is JSON, but lists no images and annotations; download COCO's own")
        return content


def open_coco(root: Path, split: str = "train2017") -> Coco:
    """A split of COCO. Raises SourceError: its annotations are not there."""
    coco = Coco(root, split)
    _ = coco.images, coco.captions
    return coco


class Outlined:
    """A cached split with a mask for every picture, cut and resized as the picture was."""

    def __init__(self, cached: Dataset, coco: Coco, side: int) -> None:
        self.cached, self.coco, self.side = cached, coco, side
        self.digest, self.empty = cached.digest, cached.empty

    def __len__(self) -> int:
        return len(self.cached)

    def take(self, rows: Tensor, draws: Draws | None = None) -> Batch:
        return self.cached.take(rows, draws)

    def masks(self, rows: Tensor) -> Tensor:
        """What is object and not background, float32 [rows, side, side] in 0..1."""
        masks = (Image.fromarray(self.coco.mask(self.cached.keys[row])).convert("RGB") for row in rows.tolist())
        return torch.from_numpy(np.stack([square(mask, self.side)[..., 0] for mask in masks])).float() / 255


def mask_of(outline: Any, height: int, width: int) -> np.ndarray:
    """A segmentation of COCO: bool [height, width].

    Raises:
        SourceError: runs of another size than the picture's.
    """
    if isinstance(outline, list):
        filled = [inside(np.array(polygon, np.float64).reshape(-1, 2), height, width) for polygon in outline]
        return np.logical_or.reduce(filled) if filled else np.zeros((height, width), bool)
    counts = outline["counts"]
    counts = unpacked(counts) if isinstance(counts, str) else counts
    if sum(counts) != height * width or min(counts) < 0:
        raise SourceError(f"a mask has runs of {sum(counts):,} pixels in a picture of {width} x {height}")
    flat = np.zeros(height * width, bool)
    for first, last in list(pairwise((0, *accumulate(counts))))[1::2]:
        flat[first:last] = True
    return flat.reshape(width, height).T


def inside(polygon: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pixels whose middle is in a polygon, x and y of corners [n, 2] in pixels: an odd number of sides to its left."""
    crossed = np.zeros((height, width + 1), bool)
    middles = np.arange(height) + 0.5
    for (x, y), (x_end, y_end) in zip(polygon, np.roll(polygon, -1, 0), strict=True):
        rows = np.flatnonzero((middles >= min(y, y_end)) & (middles < max(y, y_end)))
        at = x + (middles[rows] - y) * (x_end - x) / ((y_end - y) or 1.0)
        crossed[rows, np.ceil(at - 0.5).clip(0, width).astype(int)] ^= True
    return np.logical_xor.accumulate(crossed, 1)[:, :width]


def unpacked(text: str) -> list[int]:
    """Lengths of runs from COCO's compressed text: five bits a character, the sixth says that more follow, from the
    fourth number on the difference to the one before the last."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) and 1 << shift  # the last bit is the sign
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts
