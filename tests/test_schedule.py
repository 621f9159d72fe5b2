"""The schedule against diffusers' own, and the conversions against their definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hypersd.records import InputError
from hypersd.schedule import FINAL, PREDICTIONS, Schedule

LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def pair(**config: Any) -> tuple[Schedule, DDIMScheduler]:
    theirs = DDIMScheduler(**{**LATENT, **config})
    return Schedule.from_config(theirs.config), theirs


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("to_one", [False, True])
def test_table_equals_diffusers_bit_for_bit(kind: str, to_one: bool) -> None:
    ours, theirs = pair(beta_schedule=kind, set_alpha_to_one=to_one)
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    assert ours.final_alpha_cumprod == float(theirs.final_alpha_cumprod)
    assert float(ours.level(FINAL).alpha) == float(theirs.final_alpha_cumprod**0.5)


def test_trained_betas_and_other_lengths() -> None:
    ours, theirs = pair(trained_betas=[0.1, 0.2, 0.3], num_train_timesteps=3)
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    ours, theirs = pair(num_train_timesteps=400)
    theirs.set_timesteps(7)
    assert ours.timesteps(7) == theirs.timesteps.tolist()


@pytest.mark.parametrize(
    ("spacing", "offset", "longest"),
    [("trailing", 0, 1000), ("leading", 0, 1000), ("leading", 1, 999), ("linspace", 0, 1000)],
)
def test_grids_equal_diffusers_for_every_number_of_steps(spacing: str, offset: int, longest: int) -> None:
    ours, theirs = pair(timestep_spacing=spacing, steps_offset=offset)
    for steps in range(1, longest + 1):
        theirs.set_timesteps(steps)
        grid = theirs.timesteps.tolist()
        if spacing == "trailing" and len(grid) > steps:  # diffusers' rounding error: one timestep too many, at -1
            assert grid.pop() == -1
        assert ours.timesteps(steps) == grid, f"{steps} steps"


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_jumps_form_a_chain_that_ends_at_final(spacing: str) -> None:
    ours, _ = pair()
    for steps in (1, 2, 3, 8, 61, 1000):
        jumps = ours.jumps(steps, spacing)
        assert len(jumps) == steps
        assert all(t > s for t, s in jumps)
        assert [s for _, s in jumps] == [*(t for t, _ in jumps[1:]), FINAL]


def test_a_grid_that_does_not_exist_is_refused() -> None:
    ours, _ = pair(steps_offset=1)
    for steps in (0, 1001, "many"):
        with pytest.raises(InputError, match="steps must be a whole number from 1 to 1,000"):
            ours.timesteps(steps)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="leading spacing holds no 1000 steps"):
        ours.timesteps(1000, "leading")
    with pytest.raises(InputError, match="timestep_spacing must be one of trailing"):
        ours.timesteps(4, "sideways")


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule must be linear, scaled_linear or squaredcos_cap_v2"),
        ({"prediction_type": "flow"}, "prediction_type must be one of epsilon, v_prediction, sample"),
        ({"timestep_spacing": "log"}, "timestep_spacing must be one of"),
        ({"thresholding": True}, "thresholding is not supported"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is not supported"),
        ({"_class_name": "DDIMScheduler"}, "clip_sample is not supported"),  # there, absent means true
    ],
)
def test_a_config_that_would_change_pictures_is_refused(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        Schedule.from_config(config)


def test_absent_options_mean_what_each_scheduler_means_by_it() -> None:
    assert Schedule.from_config({"_class_name": "PNDMScheduler"}).final_alpha_cumprod < 1
    assert Schedule.from_config({"_class_name": "DDIMScheduler", "clip_sample": False}).final_alpha_cumprod == 1


@given(t=st.integers(0, 999), prediction=st.sampled_from(PREDICTIONS), seed=st.integers(0, 99))
def test_split_undoes_target(t: int, prediction: str, seed: int) -> None:
    ours, _ = pair(prediction_type=prediction)
    x0, eps = torch.randn(2, 1, 4, 2, 2, generator=torch.Generator().manual_seed(seed))
    x_t = ours.diffuse(x0, eps, t)
    found_x0, found_eps = ours.split(ours.target(x0, eps, t), x_t, t)
    alpha, sigma = ours.level(t)
    # An error of one float32 rounding of x_t grows by 1 / alpha or 1 / sigma where a division by it is needed.
    assert_close(found_x0, x0, rtol=0, atol=2e-6 / float(alpha))
    assert_close(found_eps, eps, rtol=0, atol=2e-6 / float(sigma))


def test_a_batch_of_timesteps_gives_the_same_as_one_at_a_time() -> None:
    ours, _ = pair(prediction_type="v_prediction")
    generator = torch.Generator().manual_seed(0)
    output, x_t = torch.randn(2, 3, 4, 2, 2, generator=generator)
    places = [FINAL, 0, 999]
    together = ours.split(output, x_t, torch.tensor(places))
    for row, t in enumerate(places):
        alone = ours.split(output[row : row + 1], x_t[row : row + 1], t)
        assert torch.equal(together[0][row : row + 1], alone[0])
        assert torch.equal(together[1][row : row + 1], alone[1])


def test_split_works_in_float32_whatever_it_is_given() -> None:
    ours, _ = pair()
    half = torch.ones(1, 4, 2, 2, dtype=torch.float16)
    assert {part.dtype for part in ours.split(half, half, 999)} == {torch.float32}


@pytest.mark.parametrize("t", [-2, 1000])
def test_a_timestep_off_the_table_is_an_error(t: int) -> None:
    ours, _ = pair()
    with pytest.raises(IndexError, match="timestep must be from -1 to 999"):
        ours.level(t)
