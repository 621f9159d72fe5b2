"""SDXL-Lightning: Lin et al. 2024, arXiv:2402.13929, progressive adversarial distillation. Releases only.

Drawn as its makers say, with Euler's method on sigma = sqrt(1 - abar) / sqrt(abar). In the variables used here that is
DDIM (arXiv:2010.02502, section 4.3), but for its two ends: it starts at sigma_T times the noise, not at the noise, and
its last step lands at the clean estimate, not at abar_0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hypersd.methods.base import Method, StepRange
from hypersd.records import FINAL
from hypersd.solvers import ddim_step

if TYPE_CHECKING:
    from torch import Tensor

    from hypersd.schedule import Schedule


def step(
    schedule: Schedule, x_t: Tensor, x0: Tensor, eps: Tensor, t: int, s: int, eta: float, noise: Callable[[], Tensor]
) -> Tensor:
    return x0 if s == FINAL else ddim_step(x0, eps, schedule.level(t), schedule.level(s))


METHOD = Method(
    name="lightning",
    title="SDXL-Lightning",
    paper="arXiv:2402.13929",
    summary="Progressive distillation with an adversary, an adapter for each of 2, 4 and 8 steps.",
    sampler="Euler",
    step=step,
    steps=StepRange(2, 8, suggested=(2, 4, 8)),
    guidance=1.0,
    eta=0.0,
    otherwise="for one step choose hyper",
    sigma_start=True,
)
