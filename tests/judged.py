"""A judge that costs nothing and artwork of a few pictures, for tests of what is measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hypersd.emoji import artwork
from hypersd.emoji.prompts import Prompt

WIDTH = 48


class Thumbnails:
    """Pictures are their 4 x 4 thumbnails; texts are random directions that their letters decide."""

    sha256 = "thumbnails"

    def pictures(self, pixels: Tensor) -> Tensor:
        x = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.1
        return F.normalize(F.adaptive_avg_pool2d(x, 4).flatten(1), dim=1)

    def looks(self, pixels: Tensor) -> Tensor:
        x = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        return torch.cat([F.adaptive_avg_pool2d(x, 4).flatten(1), x.std((2, 3))], 1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        rows = [np.frombuffer(hashlib.sha512(text.encode()).digest()[:WIDTH], np.uint8) for text in texts]
        return F.normalize(torch.from_numpy(np.stack(rows).astype(np.float32)) - 127.5, dim=1)


def make_artwork(folder: Path, prompts: Sequence[Prompt], trained: int = 12) -> Path:
    """The real pictures of these prompts and a few training pictures, in the layout of `emoji artwork`."""
    wanted = {prompt.picture for prompt in prompts if prompt.picture}
    rows = [row for row in artwork.read_manifest() if row.id in wanted]
    rows += [row for row in artwork.read_manifest() if row.split == "train" and row.id not in wanted][:trained]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (len(rows), 8, 8, 3), dtype=np.uint8)
    folder.mkdir(parents=True)
    np.save(folder / "pictures.npy", blocks.repeat(16, 1).repeat(16, 2))
    np.save(folder / "masks.npy", np.zeros((len(rows), 128, 128), np.uint8))
    (folder / "manifest.jsonl").write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")
    return folder
