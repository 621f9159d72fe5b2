"""PeRFlow: Yan et al. 2024, arXiv:2405.07510, piecewise rectified flow. Releases only; not for commerce.

The teacher's trajectory was cut into four windows and made straight in each (`WindowSchedule`), so that one Euler step
crosses a window. Guidance and negative prompts are kept. For Stable Diffusion 1.5 its makers ask for guidance 4.5 in 4
steps, 6 in 6 and 7.5 in 8; for SDXL for 1.5 to 2.5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from hypersd.methods.base import Method, StepRange
from hypersd.solvers import euler_step

if TYPE_CHECKING:
    from torch import Tensor

    from hypersd.schedule import Schedule, WindowSchedule


def step(
    schedule: Schedule, x_t: Tensor, x0: Tensor, eps: Tensor, t: int, s: int, eta: float, noise: Callable[[], Tensor]
) -> Tensor:
    """Rectified flow within a window, whose end stands in for the clean latent x0."""
    end = cast("WindowSchedule", schedule).window(t)[1]
    return euler_step(x_t, x0, t - end, max(s, 0) - end)


METHOD = Method(
    name="perflow",
    title="PeRFlow",
    paper="arXiv:2405.07510",
    summary="Piecewise rectified flow: straight in each of four windows, guidance kept.",
    sampler="Euler, four windows",
    step=step,
    steps=StepRange(4, 16, suggested=(4, 8)),
    guidance=7.5,
    eta=0.0,
    windows=4,
    licence="CC BY-NC 4.0",
)
