"""Pairs whose order is known without asking: artwork over the teacher's drawings, these over corrupted ones."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from hypersd.backbone import Backbone
from hypersd.emoji import artwork, prompts
from hypersd.evaluate.plan import seed
from hypersd.feedback.pairs import Preferences, constructed
from hypersd.generate import draw
from hypersd.methods import find
from hypersd.records import Problem, Request

RUNGS = (("teacher, 25 steps", 25), ("teacher, 4 steps", 4))
SETS = ("seen", "composition")  # sets of prompts that have a real picture


def emoji(folder: Path, limit: int, engine: str = "torch") -> Preferences:
    """The embedded model's: real pictures, the teacher's in 25 steps, and its pictures of 4 made blurred and noisy.

    Raises:
        Problem: the artwork is not there.
    """
    pictures, _, rows = artwork.load(folder)
    place = {row.id: number for number, row in enumerate(rows)}
    known = [p for p in prompts.load() if p.set in SETS and p.picture in place]
    chosen = known[:: max(1, -(-len(known) // limit))]
    if not chosen:
        raise Problem(f"{folder} holds none of the pictures that the frozen prompts name")
    backbone, base = Backbone.load("emoji", engine=engine), find("base")
    ladder = {"artwork": torch.stack([torch.from_numpy(pictures[place[p.picture]].copy()) for p in chosen])}
    for name, steps in RUNGS:
        drawn = []
        for prompt in tqdm(chosen, desc=name, unit="picture"):
            panel = draw(backbone, Request(prompt.text, seed(prompt, 0), steps), base)
            flat = torch.frombuffer(bytearray(panel.pixels), dtype=torch.uint8)
            drawn.append(flat.view(panel.height, panel.width, 3))
        ladder[name] = torch.stack(drawn)
    ladder["4 steps, blurred and noisy"] = worse(ladder["teacher, 4 steps"])
    del ladder["teacher, 4 steps"]  # whether 25 steps are better than 4 is for people to say
    return constructed([p.text for p in chosen], ladder)


def worse(pictures: Tensor) -> Tensor:
    """Blurred over 9 pixels, with noise of 40 grey levels. uint8 [n, h, w, 3], the same shape."""
    x = pictures.permute(0, 3, 1, 2).float()
    blurred = F.avg_pool2d(F.pad(x, (4, 4, 4, 4), mode="replicate"), 9, stride=1)
    noise = 40 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return (blurred + noise).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
