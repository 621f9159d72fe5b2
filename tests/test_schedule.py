"""The schedule against diffusers' own, and the conversions against their definitions."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hypersd.records import CLEAN, InputError
from hypersd.schedule import FINAL, PREDICTIONS, Schedule, Segments

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


# ------------------------------------------------------------------------------- segments of the trajectory

EACH_K = pytest.mark.parametrize("k", [8, 4, 2, 1])
ALMOST_ONE = 1 - 2**-53  # the largest number below 1 in float64, and the largest that torch.rand gives


def outcomes(k: int, n: int = 40) -> Counter[tuple[int, int, int]]:
    """(start, previous, end) of `draw`, from the middle of each of many equal cells of the unit square.

    9,240 divides evenly by most numbers of ends; for the others a count may be one off.
    """
    segments, fine = Segments.of(k, n), 9240
    cells = (torch.arange(fine, dtype=torch.float64) + 0.5) / fine
    counts: Counter[tuple[int, int, int]] = Counter()
    for i in range(n):
        start = torch.full((fine,), (i + 0.5) / n, dtype=torch.float64)
        counts.update(zip(*(index.tolist() for index in segments.draw(start, cells)), strict=True))
    return counts


@EACH_K
def test_every_jump_stays_inside_its_segment(k: int) -> None:
    segments, size = Segments.of(k), 40 // k
    for start, previous, end in outcomes(k):
        lower = (start - 1) // size * size  # by hand: the point at an edge belongs to the segment below it
        assert int(segments.lower[start]) == lower
        assert lower <= end <= previous == start - 1 < start <= lower + size == int(segments.top(torch.tensor(start)))
        t, t_prev, t_end = (int(segments.timesteps[i]) for i in (start, previous, end))
        assert CLEAN <= t_end <= t_prev < t <= 999


@EACH_K
def test_every_start_and_end_is_reached_and_none_more_often(k: int) -> None:
    counts, size = outcomes(k), 40 // k
    assert set(counts) == {
        (start, start - 1, end) for start in range(1, 41) for end in range((start - 1) // size * size, start)
    }
    for (start, _, _), count in counts.items():
        ends = (start - 1) % size + 1
        assert abs(count - 9240 / ends) <= 1, f"start {start} has {ends} ends, one of them {count} times in 9,240"


@EACH_K
def test_segment_edges_are_the_timesteps_of_a_drawing(k: int) -> None:
    segments, (schedule, _) = Segments.of(k), pair()
    edges = {int(segments.timesteps[i]) for i in segments.lower}
    assert edges == {CLEAN, *schedule.timesteps(k, "trailing")[1:]}
    for steps in range(k, 41, k):  # a drawing in any multiple of k steps visits every edge of k segments
        assert set(schedule.timesteps(k, "trailing")) <= set(schedule.timesteps(steps, "trailing"))
    assert segments.timesteps.tolist()[:0:-1] == schedule.timesteps(40, "trailing")


@EACH_K
@pytest.mark.parametrize("n", [40, 1000, 200, 8])
def test_random_numbers_next_to_0_and_1_stay_on_the_table(k: int, n: int) -> None:
    segments = Segments.of(k, n)
    nearly, nothing = (torch.tensor([u], dtype=torch.float64) for u in (ALMOST_ONE, 0.0))
    assert [int(i) for i in segments.draw(nothing, nothing)] == [1, 0, 0]
    assert [int(i) for i in segments.draw(nearly, nearly)] == [n, n - 1, n - 1]
    assert [int(i) for i in segments.draw(nearly, nothing)] == [n, n - 1, n - n // k]
    for start in range(n):  # the middle of a start's interval, and its two ends
        for u in (start / n, (start + 0.5) / n, math.nextafter((start + 1) / n, 0)):
            first, previous, end = segments.draw(torch.tensor([u], dtype=torch.float64), nearly)
            assert abs(int(first) - start - 1) <= (u != (start + 0.5) / n)
            assert int(end) == int(previous) == int(first) - 1


def test_starts_are_uniform_too() -> None:
    cells = (torch.arange(40_000, dtype=torch.float64) + 0.5) / 40_000
    first, _, _ = Segments.of(8).draw(cells, torch.zeros_like(cells))
    assert Counter(first.tolist()) == dict.fromkeys(range(1, 41), 1000)


@pytest.mark.parametrize(
    ("k", "n", "total", "sentence"),
    [
        (3, 40, 1000, "40 solver points make no 3 equal segments; choose k from 1, 2, 4, 5, 8, 10, 20, 40"),
        (0, 40, 1000, "40 solver points make no 0 equal segments"),
        (-8, 40, 1000, "40 solver points make no -8 equal segments"),
        (8, 4, 1000, "4 solver points make no 8 equal segments"),
        (8, 48, 1000, "solver points must divide the 1000 timesteps, got 48; type 40"),
        (8, 0, 1000, "solver points must divide the 1000 timesteps, got 0"),
        (8, -40, 1000, "got -40"),
        (1, 40, 90, "solver points must divide the 90 timesteps, got 40; type 30"),
    ],
)
def test_segments_that_would_not_be_equal_are_refused(k: int, n: int, total: int, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        Segments.of(k, n, total)
