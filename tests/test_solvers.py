"""Each step against diffusers' scheduler for it, and against worlds whose answer is known."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler, TCDScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from hypersd.schedule import FINAL, PREDICTIONS, Level, Schedule
from hypersd.solvers import ddim_step, euler_step, lcm_step, tcd_step

LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (2, 4, 3, 3)
over_predictions = pytest.mark.parametrize("prediction", PREDICTIONS)


def answers(steps: int) -> tuple[Tensor, list[Tensor]]:
    """An initial latent and what a network might say at each step."""
    first, *outputs = torch.randn(steps + 1, *SHAPE, generator=torch.Generator().manual_seed(steps))
    return first, outputs


def close(ours: Tensor, theirs: Tensor) -> None:
    assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@over_predictions
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 4, 25])
def test_ddim_equals_diffusers(prediction: str, eta: float, to_one: bool, steps: int) -> None:
    theirs = DDIMScheduler(
        **LATENT,
        prediction_type=prediction,
        set_alpha_to_one=to_one,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    theirs.set_timesteps(steps)
    schedule = Schedule.from_config(theirs.config)
    x_t, outputs = answers(steps)
    for (t, s), output in zip(schedule.jumps(steps), outputs, strict=True):
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(t))
        x0, eps = schedule.split(output, x_t, t)
        ours = ddim_step(x0, eps, schedule.level(t), schedule.level(s), eta, noise)
        x_t = theirs.step(output, t, x_t, eta=eta, variance_noise=noise if eta else None).prev_sample
        close(ours, x_t)


@over_predictions
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_lcm_equals_diffusers(prediction: str, steps: int) -> None:
    theirs = LCMScheduler(**LATENT, prediction_type=prediction)
    theirs.set_timesteps(steps)
    schedule = Schedule.from_config(theirs.config)
    x_t, outputs = answers(steps)
    grid = theirs.timesteps.tolist()
    for t, s, output in zip(grid, [*grid[1:], FINAL], outputs, strict=True):
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(t)) if s != FINAL else None
        x0, _ = schedule.split(output, x_t, t)
        ours = lcm_step(x_t, x0, t, schedule.level(s), noise)
        x_t = theirs.step(output, t, x_t, generator=torch.Generator().manual_seed(t)).prev_sample
        close(ours, x_t)


@over_predictions
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_tcd_equals_diffusers(prediction: str, gamma: float, steps: int) -> None:
    theirs = TCDScheduler(**LATENT, prediction_type=prediction, clip_sample=False)
    theirs.set_timesteps(steps)
    schedule = Schedule.from_config(theirs.config)
    x_t, outputs = answers(steps)
    grid = theirs.timesteps.tolist()
    for t, s, output in zip(grid, [*grid[1:], 0], outputs, strict=True):
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(t)) if gamma and s else None
        x0, eps = schedule.split(output, x_t, t)
        ours = tcd_step(x0, eps, schedule.level(math.floor((1 - gamma) * s)), schedule.level(s), noise)
        x_t = theirs.step(output, t, x_t, eta=gamma, generator=torch.Generator().manual_seed(t)).prev_sample
        close(ours, x_t)


@over_predictions
@pytest.mark.parametrize("steps", [1, 2, 4, 25])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers makes arrays of tensors
def test_euler_equals_diffusers(prediction: str, steps: int) -> None:
    theirs = EulerDiscreteScheduler(**LATENT, prediction_type=prediction, timestep_spacing="trailing")
    theirs.set_timesteps(steps)
    schedule = Schedule.from_config({**theirs.config, "set_alpha_to_one": True})  # its last sigma is 0
    x, outputs = answers(steps)
    x = x * theirs.init_noise_sigma
    for (t, s), output in zip(schedule.jumps(steps), outputs, strict=True):
        here, there = schedule.level(t), schedule.level(s)
        x0, _ = schedule.split(output, here.alpha * x, t)
        ours = euler_step(x, x0, here.sigma / here.alpha, there.sigma / there.alpha)
        theirs.scale_model_input(x, theirs.timesteps[theirs.step_index or 0])
        x = theirs.step(output, theirs.timesteps[theirs.step_index or 0], x).prev_sample
        close(ours, x)


def angle(phi: float) -> Level:
    """A level by its angle: alpha = cos, sigma = sin, in float64."""
    return Level(torch.tensor(math.cos(phi), dtype=torch.float64), torch.tensor(math.sin(phi), dtype=torch.float64))


levels = st.floats(0.01, 1.55).map(angle)
FIRST, SECOND = torch.eye(2, dtype=torch.float64).reshape(2, 1, 2, 1, 1)


@given(t=levels, s=levels, eta=st.floats(0, 1))
def test_ddim_lands_on_the_noise_level_it_is_sent_to(t: Level, s: Level, eta: float) -> None:
    if s.sigma > t.sigma:
        t, s = s, t
    # With x0 = 0 and independent eps and noise, what is left is the noise of x_s: its size must be sigma_s.
    x_s = ddim_step(torch.zeros_like(FIRST), FIRST, t, s, eta, SECOND)
    assert_close(x_s.norm(), s.sigma)
    assert_close(ddim_step(FIRST, torch.zeros_like(FIRST), t, s, eta, torch.zeros_like(FIRST)), s.alpha * FIRST)


@given(middle=levels, s=levels)
def test_tcd_climbs_back_to_the_noise_level_it_is_sent_to(middle: Level, s: Level) -> None:
    if middle.sigma > s.sigma:
        middle, s = s, middle
    assert_close(tcd_step(torch.zeros_like(FIRST), FIRST, middle, s, SECOND).norm(), s.sigma)


@given(t=levels, s=levels)
def test_euler_in_rescaled_time_is_ddim(t: Level, s: Level) -> None:
    x0, eps = FIRST, SECOND
    x = (t.alpha * x0 + t.sigma * eps) / t.alpha
    assert_close(s.alpha * euler_step(x, x0, t.sigma / t.alpha, s.sigma / s.alpha), ddim_step(x0, eps, t, s))


@given(t=st.floats(0.1, 1), s=st.floats(0, 1))
def test_euler_is_exact_on_the_straight_lines_of_rectified_flow(t: float, s: float) -> None:
    x0, eps = FIRST, SECOND
    assert_close(euler_step((1 - t) * x0 + t * eps, x0, t, s), (1 - s) * x0 + s * eps)


def flow_error(steps: int) -> float:
    """Distance between DDIM's end and the true one where x_0 is Gaussian, whose denoiser and flow are known.

    For x_0 ~ N(m, d^2): E[x_0 | x_t] = m + alpha d^2 / (alpha^2 d^2 + sigma^2) (x_t - alpha m), and along the
    probability flow (x_t - alpha m) / sqrt(alpha^2 d^2 + sigma^2) stays what it is.
    """
    m, d, start, end = 0.7, 0.4, 1.5, 0.1

    def spread(level: Level) -> Tensor:
        return (level.alpha**2 * d**2 + level.sigma**2) ** 0.5

    x_t = torch.tensor(1.3, dtype=torch.float64)
    whole = (x_t - angle(start).alpha * m) / spread(angle(start))
    for step in range(steps):
        t = angle(start + (end - start) * step / steps)
        s = angle(start + (end - start) * (step + 1) / steps)
        x0 = m + t.alpha * d**2 / spread(t) ** 2 * (x_t - t.alpha * m)
        x_t = ddim_step(x0, (x_t - t.alpha * x0) / t.sigma, t, s)
    return float((x_t - angle(end).alpha * m - whole * spread(angle(end))).abs())


def test_ddim_is_of_first_order() -> None:
    errors = [flow_error(steps) for steps in (64, 128, 256, 512)]
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert orders == pytest.approx([1, 1, 1], abs=0.05)


def test_lcm_step_at_zero_stays_where_it_is() -> None:
    assert torch.equal(lcm_step(FIRST, SECOND, 0, angle(0.1)), FIRST)  # the boundary condition, eq. 9


def test_ddim_without_its_noise_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"eta 0\.5 needs noise"):
        ddim_step(FIRST, SECOND, angle(1.0), angle(0.5), 0.5)
