"""SDXL-Turbo: Sauer et al. 2023, arXiv:2311.17042, adversarial diffusion distillation. Releases only; not for commerce.

Drawn as its makers say, with the ancestral form of Euler's method. In the variables used here that is DDIM with eta = 1
(arXiv:2010.02502, eq. 16), begun and ended like `lightning`; and with half the side of SDXL's pictures, 512 pixels, so
that its noise is not the others' from the same seed.
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
    if s == FINAL:
        return x0
    return ddim_step(x0, eps, schedule.level(t), schedule.level(s), eta, noise() if eta else None)


METHOD = Method(
    name="turbo",
    title="SDXL-Turbo",
    paper="arXiv:2311.17042",
    summary="An adversary and the teacher's scores, for 1 to 4 steps; half the side of the base's pictures.",
    sampler="Euler ancestral",
    step=step,
    steps=StepRange(1, 4, suggested=(1, 2, 4)),
    guidance=1.0,
    eta=1.0,
    sigma_start=True,
    smaller=2,
    licence="Stability AI non-commercial",
)
