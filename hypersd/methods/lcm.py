"""Latent consistency models: Luo et al. 2023, arXiv:2310.04378; as a LoRA, arXiv:2311.05556.

From every point of the teacher's trajectory the student answers with the trajectory's clean end. Sampling jumps there,
noises the answer afresh to the next timestep, and jumps again.

Differs from the paper: the target network is an average of the LoRA (theirs averages all weights), guidance is a
number or drawn from a range but not an input, and the solver takes 40 points, shared by all methods here, not 50.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from hypersd.methods.base import Method, Stage, StepRange, Training
from hypersd.records import FINAL
from hypersd.solvers import lcm_step

if TYPE_CHECKING:
    from torch import Tensor

    from hypersd import train
    from hypersd.schedule import Schedule

HUBER = 1e-3  # c of the pseudo-Huber distance sqrt(d^2 + c^2) - c


def step(
    schedule: Schedule, x_t: Tensor, x0: Tensor, eps: Tensor, t: int, s: int, eta: float, noise: Callable[[], Tensor]
) -> Tensor:
    return lcm_step(x_t, x0, t, schedule.level(s), None if s == FINAL else noise())


def losses(training: Training, step: train.Step) -> Iterator[tuple[str, Tensor]]:
    """Algorithm 1, latent consistency distillation."""
    at = training.places(step)
    x_prev = training.teacher_step(at)
    target = clean(training, "ema", x_prev, at.t_prev, at.states)
    prediction = clean(training, "student", at.x_t, at.t, at.states)
    yield "student", (((prediction - target).square() + HUBER**2).sqrt() - HUBER).mean()


def clean(training: Training, role: str, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
    """The consistency function f(x_t, t), eq. 9: the identity at t = 0, whatever the network says."""
    x0, _ = training.estimate(role, x_t, t, states)
    return lcm_step(x_t, x0, t.view(-1, 1, 1, 1), training.level(t))


METHOD = Method(
    name="lcm",
    title="LCM",
    paper="arXiv:2310.04378",
    summary="Latent consistency: jumps to the clean picture, noises it afresh, jumps again.",
    sampler="LCM",
    step=step,
    steps=StepRange(1, 8, suggested=(1, 2, 4, 8)),
    guidance=1.0,
    eta=1.0,
    losses=losses,
    stages=(Stage(),),
)
