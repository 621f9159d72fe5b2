"""Hyper-SD's unified LoRA, Ren et al. 2024, arXiv:2404.13686, section 3.3: one adapter for 1 to 8 steps.

It goes on from the last stage of TSCD. Consistency along the whole trajectory stays the loss of every update, so that
many steps go on working; score distillation, which makes one step good, is added to it in each fifth.

Silent in the paper and chosen here: both losses together instead of one after the other, and equal weights. Scores are
compared not only of what is drawn from pure noise: half of the latents start at the timesteps where drawings of 2, 4
and 8 steps stop by (as DMD2, arXiv:2405.14867, section 4.4), so that each of their jumps is one that was made sharp.
Drawn with eta = 1, as the paper's own unified LoRA, every stop is then a place like those. The regression on paired
samples of the teacher is left to `dmd`: here consistency, whose targets the teacher gives, is what holds the student.
The feedback losses are trained by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hypersd.methods.base import Method, Stage, StepRange, Training
from hypersd.methods.dmd import EVERY, denoising, matching
from hypersd.methods.tcd import step, trajectories

if TYPE_CHECKING:
    from torch import Tensor

    from hypersd import train


def losses(training: Training, step: train.Step) -> Iterator[tuple[str, Tensor]]:
    """Algorithm 1 in one segment, and eq. 7 to 9 from every timestep that drawings of 1 to 8 steps visit."""
    prediction, target = trajectories(training, training.places(step))
    loss = (prediction - target).square().mean()
    at = training.visits(step)
    turn = step.index % EVERY == 0
    x0, _ = training.estimate("student", at.x_t, at.t, at.states, learn=turn)
    yield "student", loss + matching(training, x0, at, step) if turn else loss
    yield "fake", denoising(training, x0.detach(), at, step)


METHOD = Method(
    name="hyper",
    title="Hyper-SD",
    paper="arXiv:2404.13686",
    summary="One adapter for 1 to 8 steps: trajectory consistency and score distillation together.",
    sampler="TCD",
    step=step,
    steps=StepRange(1, 8, suggested=(1, 2, 4, 8)),
    guidance=1.0,
    eta=1.0,
    losses=losses,
    stages=(Stage(offset_noise=0.05),),
    begins_with="tscd",
    learners=("student", "fake"),
)
