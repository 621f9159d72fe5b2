"""PeRFlow: Yan et al. 2024, arXiv:2405.07510, piecewise rectified flow. A release only, a whole network;
not for commerce.

Time is cut in four windows, in each of which the flow was straightened: a picture moves on a straight line from the
window's start to its end. The network is asked for the noise that leads from one to the other as DDIM does,

    x_end = lambda x_start + eta eps,   lambda = alpha_end / alpha_start,   eta = sigma_end - lambda sigma_start,

and what is at hand is a place between them, x_t = (1 - c) x_start + c x_end, so that both follow from x_t and eps.

Differs from its makers' scheduler, which tells the network timesteps that are one higher: t = 1000 at the start, where
no timestep of the base is, and the noise levels below them. Here the two agree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hypersd.methods.base import Method, StepRange

if TYPE_CHECKING:
    from torch import Tensor

    from hypersd.schedule import Schedule

WINDOWS = 4


def step(
    schedule: Schedule, x_t: Tensor, x0: Tensor, eps: Tensor, t: int, s: int, eta: float, noise: Callable[[], Tensor]
) -> Tensor:
    """Along the window's straight line from t to s; times are counted from 1, and FINAL is 0."""
    length = len(schedule) // WINDOWS
    start = -(-(t + 1) // length) * length
    gone = (start - (t + 1)) / length
    begin, end = schedule.level(start - 1), schedule.level(start - length - 1)
    factor = end.alpha / begin.alpha
    added = (end.sigma - factor * begin.sigma) * eps
    x_start = (x_t - gone * added) / (1 - gone + gone * factor)
    x_end = factor * x_start + added
    return x_t + (t - s) / ((t + 1) - (start - length)) * (x_end - x_t)


METHOD = Method(
    name="perflow",
    title="PeRFlow",
    paper="arXiv:2405.07510",
    summary="Piecewise rectified flow, a whole network, guidance kept, for 4 and 8 steps.",
    sampler="PeRFlow",
    step=step,
    steps=StepRange(4, 8, suggested=(4, 8)),
    guidance=2.0,
    eta=0.0,
    licence="CC BY-NC 4.0",
)
