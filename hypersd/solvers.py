"""One step of each sampler, as plain functions on tensors: where a latent at noise level t goes at the lower level s.

All take the estimates (x0, eps) that `Schedule.split` made of a network's output, so none asks what the network
predicts; all are differentiable and broadcast a `Level` of shape [] or [batch, 1, 1, 1] over latents [batch, c, h, w].
Symbols: see schedule.py. Fresh noise is handed in, so that a step is a pure function.

Differs from the papers: nothing is thresholded or clipped, since latents have no natural range.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from hypersd.schedule import Level


def ddim_step(x0: Tensor, eps: Tensor, t: Level, s: Level, eta: float = 0.0, noise: Tensor | None = None) -> Tensor:
    """DDIM: Song et al. 2020, arXiv:2010.02502, eq. 12 with the deviation of eq. 16. `noise` is needed when eta > 0.

    eta = 0 follows the probability flow and is what distillation calls the ODE solver; eta = 1 is DDPM.
    """
    if not eta:
        return s.alpha * x0 + s.sigma * eps
    if noise is None:
        raise ValueError(f"ddim_step with eta {eta} needs noise")
    # eq. 16: eta sqrt((1 - abar_s) / (1 - abar_t)) sqrt(1 - abar_t / abar_s)
    deviation = eta * (s.sigma / t.sigma) * (1 - (t.alpha / s.alpha) ** 2) ** 0.5
    direction = (s.sigma**2 - deviation**2) ** 0.5 * eps
    return s.alpha * x0 + direction + deviation * noise


def lcm_step(x_t: Tensor, x0: Tensor, t: int | Tensor, s: Level, noise: Tensor | None = None) -> Tensor:
    """LCM: Luo et al. 2023, arXiv:2310.04378, eq. 9, then multistep sampling by Song et al. 2023, arXiv:2303.01469,
    algorithm 1: jump to the clean latent, then noise it afresh to level s. Without noise (the last step) stay there.

    `t` is the integer timestep, an int or [batch, 1, 1, 1]; the boundary scalings use sigma_data = 0.5 and ten times
    t, as LCM's own code and diffusers do, and differ from 0 and 1 only for the smallest t.
    """
    scaled, sigma_data = 10.0 * t, 0.5
    c_skip = sigma_data**2 / (scaled**2 + sigma_data**2)
    c_out = scaled / (scaled**2 + sigma_data**2) ** 0.5
    clean = c_skip * x_t + c_out * x0
    return clean if noise is None else s.alpha * clean + s.sigma * noise


def tcd_step(x0: Tensor, eps: Tensor, middle: Level, s: Level, noise: Tensor | None = None) -> Tensor:
    """TCD's strategic stochastic sampling: Zheng et al. 2024, arXiv:2402.19159, section 4.2.

    Go down to `middle`, the level at floor((1 - gamma) s), below the goal, then climb back to s with fresh noise
    (DDPM, arXiv:2006.11239, eq. 4, between two levels). Without noise (gamma = 0 or the last step) stay at `middle`.
    """
    x_middle = middle.alpha * x0 + middle.sigma * eps
    if noise is None:
        return x_middle
    ratio = s.alpha / middle.alpha
    return ratio * x_middle + (1 - ratio**2) ** 0.5 * noise


def euler_step(x_t: Tensor, x0: Tensor, t: float | Tensor, s: float | Tensor) -> Tensor:
    """Euler's method: Karras et al. 2022, arXiv:2206.00364, algorithm 1 without the second-order correction.

    `t` and `s` are noise levels and x_t = x_0 + t eps: sigma / alpha of this package's levels, with x_t divided by
    alpha. There it equals ddim_step at eta 0. For rectified flow, x_t = (1 - t) x_0 + t eps, the same line holds.
    """
    slope = (x_t - x0) / t  # dx/dt
    return x_t + (s - t) * slope
