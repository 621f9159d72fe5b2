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
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hypersd.data.dataset import Batch, Dataset, Draws
from hypersd.data.sources import Sample, SourceError, in_parts, read_bytes, signature, stamp, texts
from hypersd.data.survey import square


class Outline(NamedTuple):
    """An object: where it is, as COCO writes it; its class, -1 where that is not told; whether it is many in one."""

    segmentation: Any
    kind: int
    crowd: bool


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
    def outlines(self) -> dict[int, list[Outline]]:
        """The objects of each picture, by its id. Classes are counted in the order of COCO's ids, which have gaps."""
        content = self._read("instances")
        kinds = {n: place for place, n in enumerate(sorted(row["id"] for row in content.get("categories", ())))}
        found: dict[int, list[Outline]] = {}
        for row in content["annotations"]:
            one = Outline(row["segmentation"], kinds.get(row["category_id"], -1), bool(row["iscrowd"]))
            found.setdefault(row["image_id"], []).append(one)
        return found

    def stamps(self) -> list[str]:
        about = stamp(self.root, *(f"annotations/{kind}_{self.split}.json" for kind in ("captions", "instances")))
        names = [f"{self.split}/{name}" for name in self.images]
        return [signature(about, stamp(self.root, *part)) for part in in_parts(names)]

    def read(self, piece: int) -> Iterator[Sample]:
        for name in in_parts(list(self.images))[piece]:
            captions = texts(self.captions.get(self.images[name]["id"], []))
            yield Sample(name, captions, read_bytes(self.root / self.split / name))

    def objects(self, name: str) -> list[tuple[np.ndarray, Outline]]:
        """Where in a picture each of its objects is, bool [height, width]."""
        about = self.images[name]
        found = self.outlines.get(about["id"], [])
        return [(mask_of(one.segmentation, about["height"], about["width"]), one) for one in found]

    def mask(self, name: str) -> np.ndarray:
        """Where in a picture there is any object: bool [height, width]."""
        nothing = np.zeros((self.images[name]["height"], self.images[name]["width"]), bool)
        return np.logical_or.reduce([nothing, *(mask for mask, _ in self.objects(name))])

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
    """A cached split with a mask for every picture and every object, cut and resized as the picture was."""

    def __init__(self, cached: Dataset, coco: Coco, side: int) -> None:
        self.cached, self.coco, self.side = cached, coco, side
        self.digest, self.empty = cached.digest, cached.empty

    def __len__(self) -> int:
        return len(self.cached)

    def take(self, rows: Tensor, draws: Draws | None = None) -> Batch:
        return self.cached.take(rows, draws)

    def masks(self, rows: Tensor) -> Tensor:
        """What is object and not background, float32 [rows, side, side] in 0..1."""
        return torch.stack([self._cut(self.coco.mask(self.cached.keys[row])) for row in rows.tolist()])

    def instances(self, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Each row's objects that the cut left something of, without crowds: bool [objects, side, side], and their
        classes, int64 [objects].

        Raises:
            SourceError: the annotations do not say which classes there are.
        """
        return [self._instances(self.cached.keys[row]) for row in rows.tolist()]

    def _instances(self, name: str) -> tuple[Tensor, Tensor]:
        found = [(self._cut(mask) > 0.5, one.kind) for mask, one in self.coco.objects(name) if not one.crowd]
        found = [(mask, kind) for mask, kind in found if mask.any()]
        if any(kind < 0 for _, kind in found):
            raise SourceError(f"the annotations of {name} are of no category of COCO's; download COCO's own")
        masks = torch.stack([mask for mask, _ in found]) if found else torch.zeros(0, self.side, self.side).bool()
        return masks, torch.tensor([kind for _, kind in found], dtype=torch.long)

    def _cut(self, mask: np.ndarray) -> Tensor:
        """A mask as the picture was cut and resized, float32 [side, side] in 0..1."""
        return torch.from_numpy(square(Image.fromarray(mask).convert("RGB"), self.side)[..., 0]).float() / 255


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
