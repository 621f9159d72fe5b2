"""Trajectory segmented consistency distillation: Hyper-SD, Ren et al. 2024, arXiv:2404.13686, section 3.1.

TCD within each of 8 segments of the trajectory, then 4, 2 and 1: short jumps are learned before long ones. Each stage
starts from the LoRA of the one before, which stays the one to draw so many steps with. Where prediction and target are
near each other the squared error serves; where they are far apart, an adversary says what is missing.

Silent in the paper and chosen here: the teacher is the guided base in all stages, the weights below, offset noise of
0.05, 40 solver points in every stage so that all edges coincide with the timesteps of 8, 4, 2 and 1 trailing steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hypersd.methods.base import Method, Stage, StepRange, Training
from hypersd.methods.tcd import step, trajectories

if TYPE_CHECKING:
    from torch import Tensor

    from hypersd import train


def losses(training: Training, step: train.Step) -> Iterator[tuple[str, Tensor]]:
    """Algorithm 1, with the two distances of section 3.1; student and adversary learn in the same update."""
    at, stage = training.places(step), training.stage
    prediction, target = trajectories(training, at)
    loss = stage.mse * (prediction - target).square().mean()
    if not stage.adversarial:
        yield "student", loss
        return
    yield "student", loss + stage.adversarial * training.fool(prediction, at, step)
    yield "adversary", training.tell(target, at, step)


METHOD = Method(
    name="tscd",
    title="Hyper-SD (TSCD)",
    paper="arXiv:2404.13686",
    summary="Trajectory segmented consistency: TCD in 8, 4, 2 and 1 segments, an adapter for each.",
    sampler="TCD",
    step=step,
    steps=StepRange(1, 8, suggested=(1, 2, 4, 8)),
    guidance=1.0,
    eta=0.0,
    losses=losses,
    stages=(
        Stage(segments=8, mse=1.0, adversarial=0.0, offset_noise=0.05),
        Stage(segments=4, mse=1.0, adversarial=0.1, offset_noise=0.05),
        Stage(segments=2, mse=0.5, adversarial=0.5, offset_noise=0.05),
        Stage(segments=1, mse=0.1, adversarial=1.0, offset_noise=0.05),
    ),
)
