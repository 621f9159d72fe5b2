"""Trajectory consistency distillation: Zheng et al. 2024, arXiv:2402.19159.

From every point of the teacher's trajectory the student can be carried to every later one: the solver takes its one
estimate all the way. Sampling goes a bit lower than the next timestep and climbs back with fresh noise; eta says how
much.

Differs from the paper: the network is not told where the jump ends (its own released models are not either), guidance
is a number or drawn from a range, and the solver takes 40 points, shared by all methods here, not 50.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from hypersd.methods.base import Method, Places, Stage, StepRange, Training
from hypersd.records import CLEAN, FINAL
from hypersd.solvers import ddim_step, tcd_step

if TYPE_CHECKING:
    from torch import Tensor

    from hypersd import train
    from hypersd.schedule import Schedule


def step(
    schedule: Schedule, x_t: Tensor, x0: Tensor, eps: Tensor, t: int, s: int, eta: float, noise: Callable[[], Tensor]
) -> Tensor:
    """Strategic stochastic sampling, algorithm 4; the last step lands where training's jumps end."""
    if s == FINAL:
        return ddim_step(x0, eps, schedule.level(t), schedule.level(CLEAN))
    middle = int((1 - eta) * s)
    return tcd_step(x0, eps, schedule.level(middle), schedule.level(s), noise() if eta else None)


def losses(training: Training, step: train.Step) -> Iterator[tuple[str, Tensor]]:
    """Algorithm 1."""
    at = training.places(step)
    prediction, target = trajectories(training, at)
    yield "student", (prediction - target).square().mean()


def trajectories(training: Training, at: Places) -> tuple[Tensor, Tensor]:
    """Student and target carried to t_end (Hyper-SD, arXiv:2404.13686, eq. 12; with one segment it is TCD's)."""
    x_prev = training.teacher_step(at)
    target = jump(training, "ema", x_prev, at.t_prev, at)
    return jump(training, "student", at.x_t, at.t, at), target


def jump(training: Training, role: str, x_t: Tensor, t: Tensor, at: Places) -> Tensor:
    """From x_t at t to t_end on one estimate; the identity where t is t_end."""
    x0, eps = training.estimate(role, x_t, t, at.states)
    return ddim_step(x0, eps, training.level(t), training.level(at.t_end))


METHOD = Method(
    name="tcd",
    title="TCD",
    paper="arXiv:2402.19159",
    summary="Trajectory consistency: jumps from anywhere to anywhere later on the teacher's trajectory.",
    sampler="TCD",
    step=step,
    steps=StepRange(1, 8, suggested=(1, 2, 4, 8)),
    guidance=1.0,
    eta=0.0,
    losses=losses,
    stages=(Stage(),),
)
