"""The base model itself, the teacher that every other method is measured against: DDIM, arXiv:2010.02502.

Differs from diffusers' default for Stable Diffusion 1.5 (PNDM, leading): DDIM as in every distillation paper, trailing
timesteps as in arXiv:2305.08891, since with few steps a grid that does not start at pure noise is a different task.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hypersd.methods.base import Method, StepRange
from hypersd.solvers import ddim_step

if TYPE_CHECKING:
    from torch import Tensor

    from hypersd.schedule import Schedule


def step(
    schedule: Schedule, x_t: Tensor, x0: Tensor, eps: Tensor, t: int, s: int, eta: float, noise: Callable[[], Tensor]
) -> Tensor:
    return ddim_step(x0, eps, schedule.level(t), schedule.level(s), eta, noise() if eta else None)


METHOD = Method(
    name="base",
    title="Base model",
    paper="arXiv:2010.02502",
    summary="The undistilled teacher with DDIM: best at 25 steps and more, blurred below 8.",
    sampler="DDIM",
    step=step,
    steps=StepRange(1, 100, suggested=(1, 2, 4, 8, 25)),
    guidance=4.0,
    eta=0.0,
    adapted=False,
)
