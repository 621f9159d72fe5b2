"""A small distillation on the tiny model, in pieces for tests, and as a program to kill or to run twice at once.

python tests/stages.py MODEL FOLDER [--accumulate 2] [--die-at N] [--all]
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from hypersd import distill
from hypersd.adapters import AdapterFile
from hypersd.backbone import Backbone
from hypersd.distill import Distillation, Settings
from hypersd.methods import METHODS, Stage
from hypersd.train import Recipe, Run, Step

SETTINGS = Settings(rank=2, guidance=(3.0, 8.0), prompts=("a happy cat", "a red heart"))
RECIPE = Recipe(updates=6, batch=8, lr=1e-2, warmup=2, cooldown=2, weight_decay=0.0, ema=0.9, accumulate=2)
STAGE = Stage(segments=4, mse=0.5, adversarial=0.5, offset_noise=0.05)


@dataclass(frozen=True)
class Batch:
    latents: Tensor | None
    states: Tensor


@dataclass
class Latents:
    """A `distill.Data` of random latents, a caption each, some mirrored; counts how often it is asked."""

    latents: Tensor | None
    states: Tensor
    empty: Tensor
    die_at: int = 0  # the call at which it kills the process
    digest: str = "few"
    asked: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, backbone: Backbone, count: int = 20, die_at: int = 0) -> Latents:
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(count, *backbone.latent_shape, generator=generator)
        empty, *states = backbone.embed(["", "a cat", "a dog", "red heart"]).float().cpu().split(1)
        return cls(latents, torch.cat(states)[torch.arange(count) % 3], empty, die_at)

    def __len__(self) -> int:
        return len(self.states)

    def take(self, rows: Tensor, draws: Step | None = None) -> Batch:
        if draws:
            self.asked += rows.tolist()
        if self.die_at and len(self.asked) >= self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.latents is None:
            return Batch(None, self.states[rows])
        latents = self.latents[rows]
        if draws:
            latents = torch.where(draws.uniform("mirror").view(-1, 1, 1, 1) < 0.5, latents, latents.flip(-1))
        return Batch(latents, self.states[rows])


def objective(
    backbone: Backbone,
    method: str = "tscd",
    stage: Stage = STAGE,
    settings: Settings = SETTINGS,
    die_at: int = 0,
    ready: bool = False,
) -> Distillation:
    """`ready`: as after some training, with roles that change what the network says and differ from each other."""
    made = Distillation(backbone, Latents.of(backbone, die_at=die_at), METHODS[method], stage, settings)
    if ready:
        generator = torch.Generator().manual_seed(1)
        for role in ("student", "ema"):
            for tensor in made.roles[role].adapter().values():
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    return made


def all_stages(model: Path, folder: Path, accumulate: int) -> list[AdapterFile]:
    """TSCD in two stages of two updates, the second with an adversary, each to a file in `folder`/out."""
    row, recipe = METHODS["tscd"], Recipe(**{**vars(RECIPE), "accumulate": accumulate, "updates": 2})
    row = replace(row, stages=(Stage(segments=2), Stage(mse=0.5, adversarial=0.5)))
    given = (lambda: Backbone.load(model), Latents.of, SETTINGS, recipe, folder / "runs", folder / "out")
    return distill.run(row, *given)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--accumulate", type=int, default=RECIPE.accumulate)
    parser.add_argument("--die-at", type=int, default=0)
    parser.add_argument("--all", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.all:
        distill.SHEET_STEPS = (1,)  # type: ignore[assignment]
        distill.TEACHER_STEPS = 2
        sys.exit(len(all_stages(given.model, given.folder, given.accumulate)) != 2)
    made = objective(Backbone.load(given.model), die_at=given.die_at)
    made.sheet = lambda folder, step: {}  # type: ignore[method-assign]  # drawn by nobody, and slower than the training
    recipe = Recipe(**{**vars(RECIPE), "accumulate": given.accumulate})
    sys.exit(not Run(made, recipe, given.folder).advance(save_every=0.0))
