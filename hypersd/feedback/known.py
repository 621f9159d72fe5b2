"""Pairs whose order is known without asking: artwork over the teacher's drawings, over hurried, over corrupted ones."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from hypersd.backbone import Backbone
from hypersd.emoji import artwork
from hypersd.feedback.pairs import Preferences, constructed
from hypersd.generate import draw
from hypersd.methods import find
from hypersd.records import Request

STEPS, FEW = 8, 2  # of the teacher: its pictures hardly change after 8, and after 2 they are not done
SPLITS = ("train", "composition")  # whose things the teacher knows


def emoji(folder: Path, limit: int, engine: str = "torch") -> Preferences:
    """The embedded model's: real pictures, the teacher's of the same captions, those of a few steps, and these spoilt.

    At most `limit` captions, spread evenly over the artwork. Raises ArtworkError: it is not there.
    """
    pictures, _, rows = artwork.load(folder)
    places = [place for place, row in enumerate(rows) if row.split in SPLITS]
    chosen = places[:: max(1, -(-len(places) // limit))]
    captions = [artwork.captions(rows[place])[0] for place in chosen]
    backbone, base = Backbone.load("emoji", engine=engine), find("base")
    drawn: dict[int, list[Tensor]] = {STEPS: [], FEW: []}
    for place, caption in tqdm(list(zip(chosen, captions, strict=True)), desc="teacher", unit="caption"):
        for steps, so_far in drawn.items():
            panel = draw(backbone, Request(caption, place, steps), base)
            flat = torch.frombuffer(bytearray(panel.pixels), dtype=torch.uint8)
            so_far.append(flat.view(panel.height, panel.width, 3))
    good, few = (torch.stack(pictures) for pictures in drawn.values())
    ladder = {
        "artwork": torch.from_numpy(pictures[chosen]),
        f"teacher, {STEPS} steps": good,
        f"teacher, {FEW} steps": few,
        "the latter, blurred and noisy": worse(few),
    }
    return constructed(captions, ladder)


def worse(pictures: Tensor) -> Tensor:
    """Blurred over 9 pixels, with noise of 40 grey levels. uint8 [n, h, w, 3], the same shape."""
    x = pictures.permute(0, 3, 1, 2).float()
    blurred = F.avg_pool2d(F.pad(x, (4, 4, 4, 4), mode="replicate"), 9, stride=1)
    noise = 40 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return (blurred + noise).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
