"""Likeness: drawings, as a whole, look like real pictures, at every number of steps.

A reward asks what one picture lacks. That drawings have too little contrast on average in one step and too much in
eight no single picture shows, but the mean of what a scorer's lower layers see does, and a gradient can take it to the
mean that real pictures have: feature matching (Salimans et al. 2016, arXiv:1606.03498, section 3.1), with a scorer
that is frozen in place of a discriminator. Few pictures do not tell a mean, so that of the drawings is learned
alongside, as a player of its own: half the squared gap g has the gradient g dz in one picture's looks z. With g fixed
that is a linear critic, the best one against a mean. Its optimizer is plain gradient descent, at a rate that makes it
the moving average over the last few updates: a slower one chases where the student was, and both swing.

What is on the whole too faint is not for a few ranks to mend: the strength of a whole LoRA is one number, and the gap
of drawings at several strengths tells it (`strength`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from hypersd import quality
from hypersd.records import InputError

RATE = 0.2  # of the moving average, an update that draws in as many steps
REAL = 2048  # pictures whose mean is aimed at
STRENGTHS = (0.9, 1.0, 1.1, 1.2)  # of a whole LoRA, tried on so many
SEEN = 512  # drawings of each number of steps
PARTS = 16  # of these, each left out once to tell the error


@runtime_checkable
class Eye(Protocol):
    """A reward that also tells how pictures are drawn, float [n, 3, h, w] in -1..1 -> [n, k], with their gradient."""

    def looks(self, pixels: Tensor) -> Tensor: ...


class Likeness(nn.Module):
    """How far the mean looks of drawings in each number of steps are from those of real pictures.

    Looks are standardised as the real ones vary, so that no feature outweighs the others only by its unit.
    """

    def __init__(self, counts: Sequence[int], real: Tensor) -> None:
        """`real` are looks of real pictures [m, k]; it comes to where they are. Raises InputError: fewer than two."""
        if len(real) < 2:
            raise InputError(
                f"likeness needs real pictures that vary, two or more, got {len(real)}; give more as --data"
            )
        super().__init__()
        self.counts = tuple(counts)
        for name, value in zip(("mean", "scale"), quality.spread(real), strict=True):
            self.register_buffer(name, value.float())
        self.gaps = nn.Parameter(torch.zeros(len(counts), real.shape[1], device=real.device))

    def optimizer(self) -> torch.optim.Optimizer:
        """What turns `follow` into the moving average, whatever rate weights are learned at.

        Its gradient, a k-th of the distance to go, is far too short to be clipped: 0.01 in the embedded model's runs.
        """
        return torch.optim.SGD([{"params": [self.gaps], "lr": RATE * self.gaps.shape[1], "own": True}])

    def of(self, looks: Tensor) -> Tensor:
        """Looks as deviations from the real mean. [n, k]"""
        mean, scale = self.get_buffer("mean"), self.get_buffer("scale")
        return (looks - mean) / scale

    def gap(self, count: int) -> Tensor:
        """What was learned of the mean of drawings in `count` steps, in deviations of the real ones. [k]"""
        return self.gaps[self.counts.index(count)]

    def forward(self, looks: Tensor, count: int) -> Tensor:
        """The student's loss, whose gradient is that of half the squared gap; [n], the mean over features."""
        return (self.of(looks) * self.gap(count).detach()).mean(1)

    def follow(self, looks: Tensor, count: int) -> Tensor:
        """The gap's own loss, least where it is the mean. [n]"""
        return (self.of(looks.detach()) - self.gap(count)).square().mean(1) / 2

    def squared(self) -> dict[int, float]:
        """The squared gap of each number of steps, the mean over features: 1 is a whole deviation in each."""
        return {count: float(self.gap(count).square().mean().detach()) for count in self.counts}


class Strength(NamedTuple):
    """How many times a LoRA should count, and the standard error of that."""

    value: float
    error: float


def strength(apart: Mapping[float, Sequence[tuple[float, Tensor]]]) -> Strength:
    """Where the squared gap is least, and by how much other drawings would have put it elsewhere.

    `apart` has for each strength that was tried the weight of each number of steps, and by how much its drawings were
    apart from the real pictures of their captions, in deviations [n, k]: the same captions everywhere, row by row. The
    error is that of the jackknife over parts of these.
    """
    part = torch.arange(len(next(iter(apart.values()))[0][1])) % PARTS

    def told(rows: Tensor) -> float:
        return least({at: sum(w * unbiased(gaps[rows]) for w, gaps in seen) for at, seen in apart.items()})

    without = [told(part != left_out) for left_out in range(PARTS)]
    return Strength(told(part >= 0), float(np.std(without)) * (PARTS - 1) ** 0.5)


def unbiased(apart: Tensor) -> float:
    """The squared gap of drawings that are so far apart [n, k] from their real pictures, the mean over features; below
    zero where chance alone would make a larger one."""
    return float((apart.mean(0).square() - apart.var(0) / len(apart)).mean())


def least(squared: Mapping[float, float]) -> float:
    """Where a parabola through the squared gaps of some strengths is least, among what lies between them."""
    tried = sorted(squared)
    bend, slope, _ = np.polyfit(tried, [squared[at] for at in tried], 2)
    if bend <= 0:
        return min(tried, key=lambda at: squared[at])
    return float(np.clip(-slope / (2 * bend), tried[0], tried[-1]))
