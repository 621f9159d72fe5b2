"""SDXL-Turbo: Sauer et al. 2023, arXiv:2311.17042, adversarial diffusion distillation. A release only.

A whole network; not for commerce. It was made for 512 px, and repeats itself at the 1024 px of its base. Drawn as its
makers say, with ancestral steps (Euler's method, then fresh noise), which are DDIM's with eta = 1 (arXiv:2010.02502,
eq. 16) in the variables used here, but for the two ends that lightning.py tells of.
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
    return x0 if s == FINAL else ddim_step(x0, eps, schedule.level(t), schedule.level(s), eta, noise())


METHOD = Method(
    name="turbo",
    title="SDXL-Turbo",
    paper="arXiv:2311.17042",
    summary="Adversarial distillation of a whole network, made for 512 px, for 1 to 4 steps.",
    sampler="Euler ancestral",
    step=step,
    steps=StepRange(1, 4, suggested=(1, 2, 4)),
    guidance=1.0,
    eta=1.0,
    sigma_start=True,
    licence="Stability AI Non-Commercial Research Community License",
)
