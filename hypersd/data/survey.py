"""One look at every sample: what is kept, and what is left out for which reason."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageOps

from hypersd.data.files import DataError
from hypersd.data.sources import Sample

REMEDIES = {  # why a sample is left out, and what to do about it
    "unreadable": "copy the unreadable pictures again",
    "too small": "take larger pictures, or set `smallest` to have small ones enlarged",
    "no caption": "put a .txt of the same name beside each picture, or list it in metadata.jsonl",
    "duplicate": "remove pictures that come twice with the same caption",
}
# What Pillow's decoders raise at bytes that are no picture, or half of one.
UNREADABLE = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip

Row = dict[str, Any]  # {"key", "captions", "picture": sha256 or None, "size": [width, height] or None}, or a reason
In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True)
class Survey:
    """`pieces` are the rows to keep, piece by piece of the source; `at` in each is its place within the piece."""

    pieces: list[list[Row]]
    rejected: list[Row]  # {"key", "reason"}

    @property
    def kept(self) -> int:
        return sum(map(len, self.pieces))

    def told(self) -> str:
        """How many were left out for which reason, with the first of each."""
        first = {row["reason"]: row["key"] for row in reversed(self.rejected)}
        counts = Counter(row["reason"] for row in self.rejected).most_common()
        return ", ".join(f"{count:,} {reason} such as {first[reason]}" for reason, count in counts) or "none"

    def check(self, limit: float) -> None:
        """DataError if nothing is left, or if more than the share `limit` is left out."""
        total = self.kept + len(self.rejected)
        if self.kept and len(self.rejected) <= limit * total:
            return
        if not total:
            raise DataError("the source holds no samples; give one that does")
        remedies = "; ".join(REMEDIES[reason] for reason in dict.fromkeys(row["reason"] for row in self.rejected))
        raise DataError(
            f"{len(self.rejected):,} of {total:,} samples cannot be used ({self.told()}), at most {limit:.0%} may be "
            f"left out; {remedies}; or allow a larger share with `rejects`"
        )


def look(sample: Sample) -> Row:
    """What is noted of one sample; a picture is decoded in full, for only then is it known to be whole."""
    if not sample.captions:
        return {"key": sample.key, "reason": "no caption"}
    row: Row = {"key": sample.key, "captions": sample.captions, "picture": None, "size": None}
    if sample.picture is None:
        return row
    try:
        size = opened(sample.picture).size
    except UNREADABLE:
        return {"key": sample.key, "reason": "unreadable"}
    return {**row, "picture": picture_digest(sample.picture), "size": size}


def judge(files: Iterable[Path], smallest: int) -> Survey:
    """The notes of all pieces in order: what is too small or came before is left out too."""
    seen: set[tuple[str, ...]] = set()
    pieces, rejected = [], []
    for file in files:
        kept: list[Row] = []
        for at, line in enumerate(file.read_text(encoding="utf-8").splitlines()):
            row = json.loads(line)
            reason, same = row.get("reason"), (row.get("picture"), *row.get("captions", ()))
            if not reason and row["size"] and min(row["size"]) < smallest:
                reason = "too small"
            elif not reason and same in seen:
                reason = "duplicate"
            if reason:
                rejected.append({"key": row["key"], "reason": reason})
            else:
                seen.add(same)
                kept.append({**row, "at": at})
        pieces.append(kept)
    return Survey(pieces, rejected)


def opened(picture: bytes | Image.Image | None) -> Image.Image:
    """All pixels of a picture: upright, on white, RGB. Raises one of UNREADABLE if it is none or is cut off."""
    image = picture if isinstance(picture, Image.Image) else Image.open(io.BytesIO(picture or b""))
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip
        image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def square(image: Image.Image, side: int) -> np.ndarray:
    """The centre square, resized with Lanczos: uint8 [side, side, 3]."""
    return np.array(ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS))


def picture_digest(picture: bytes | Image.Image | None) -> str:
    if isinstance(picture, Image.Image):
        picture = f"{picture.mode} {picture.size}".encode() + picture.tobytes()
    return hashlib.sha256(picture or b"").hexdigest()


def ahead(function: Callable[[In], Out], items: Iterable[In], threads: int | None = None) -> Iterator[Out]:
    """`function` of each item, in order, in threads, a few items ahead of whoever takes them."""
    threads = threads or min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Out]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 4 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:  # nobody will take these
                future.cancel()
