"""Intervals cover what they promise, corrections and orders against cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hypersd.intervals import Values, abba, difference, draws, estimate, holm, kendall_tau, ratio

STUDIES, PROMPTS = 1000, 150
LOW, HIGH = 0.93, 0.97
DRAWN = draws(PROMPTS, 1000)


def scores(kind: str, rng: np.random.Generator) -> tuple[Values, float]:
    """Synthetic scores of one study, [PROMPTS], and the true mean."""
    if kind == "normal":
        return rng.normal(0.3, 1.0, PROMPTS), 0.3
    if kind == "right or wrong":  # four pictures a prompt, prompts differ in difficulty
        return rng.binomial(4, rng.beta(3, 2, PROMPTS)) / 4, 0.6
    if kind == "skewed":
        return rng.exponential(2.0, PROMPTS), 2.0
    values = rng.normal(1.0, 1.0, PROMPTS)  # half of the prompts have no value
    values[rng.random(PROMPTS) < 0.5] = np.nan
    return values, 1.0


@pytest.mark.parametrize("kind", ["normal", "right or wrong", "skewed", "half missing"])
def test_intervals_cover_the_truth_as_often_as_they_say(kind: str) -> None:
    rng, hits = np.random.default_rng(5), 0
    for _ in range(STUDIES):
        values, truth = scores(kind, rng)
        found = estimate(values, DRAWN)
        hits += found.low <= truth <= found.high
    assert LOW <= hits / STUDIES <= HIGH


def test_differences_are_paired_and_cover_the_truth() -> None:
    rng, hits, width = np.random.default_rng(6), 0, []
    for _ in range(STUDIES):
        difficulty = rng.normal(0, 3, PROMPTS)  # shared by both methods: cancels in a pair
        a, b = difficulty + rng.normal(0.5, 1, PROMPTS), difficulty + rng.normal(0, 1, PROMPTS)
        found = difference(a, b, DRAWN)
        hits += found.low <= 0.5 <= found.high
        width.append(found.high - found.low)
    assert LOW <= hits / STUDIES <= HIGH
    assert np.mean(width) == pytest.approx(2 * 1.96 * np.sqrt(2 / PROMPTS), rel=0.05)


def test_p_of_no_difference_is_uniform() -> None:
    rng = np.random.default_rng(7)
    pairs = rng.normal(0, 1, (STUDIES, 2, PROMPTS))
    p = np.array([difference(a, b, DRAWN).p for a, b in pairs])
    assert np.mean(p < 0.05) == pytest.approx(0.05, abs=0.02)
    assert np.mean(p) == pytest.approx(0.5, abs=0.04)


def test_a_report_of_equal_arguments_has_equal_draws() -> None:
    assert np.array_equal(draws(20, 10), draws(20, 10))
    assert (draws(20, 10).sum(1) == 20).all()


def test_too_little_has_no_interval() -> None:
    nothing = np.full(5, np.nan)
    assert np.isnan(estimate(nothing, draws(5)).value)
    one = np.array([np.nan, 2.0, np.nan])
    found = estimate(one, draws(3))
    assert (found.value, found.prompts, np.isnan(found.low)) == (2.0, 1, True)
    assert np.isnan(difference(nothing, nothing, draws(5)).p)


def test_equal_methods_do_not_differ() -> None:
    a = np.arange(10.0)
    assert difference(a, a, draws(10))[:4] == (0.0, 0.0, 0.0, 1.0)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    some = holm([0.5, float("nan"), 0.6])
    assert some[::2] == [1.0, 1.0] and np.isnan(some[1])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_holm_never_lowers_p_and_keeps_its_order(p: list[float]) -> None:
    adjusted = holm(p)
    assert all(q >= x for q, x in zip(adjusted, p, strict=True))
    order = np.argsort(p, kind="stable")
    assert [adjusted[i] for i in order] == sorted(adjusted)
    assert min(adjusted) == pytest.approx(min(1.0, len(p) * min(p)))


def test_kendall_by_hand() -> None:
    assert kendall_tau([1, 2, 3]) == 1.0
    assert kendall_tau([3, 2, 1]) == -1.0
    assert kendall_tau([1, 3, 2]) == pytest.approx(1 / 3)
    assert kendall_tau([1, 1, 2]) == pytest.approx(2 / 3)  # a tie orders nothing
    with pytest.raises(ValueError, match="at least two"):
        kendall_tau([1])


def test_ratio_of_timings() -> None:
    found = ratio([2.0, 4.0, 2.0, 2.2], [1.0, 2.0, 1.0, 1.1])
    assert found.value == pytest.approx(2.0)
    assert found.low <= 2.0 <= found.high
    assert ratio([3.0] * 5, [2.0] * 5)[:3] == (1.5, 1.5, 1.5)
    with pytest.raises(ValueError, match="round by round, got 1 and 2"):
        ratio([1.0], [1.0, 2.0])


def test_turns_go_back_and_forth() -> None:
    assert abba(("a", "b", "c"), 3) == [*"abc", *"cba", *"abc"]
    order = abba(("a", "b"), 10)
    mean = {name: np.mean([i for i, who in enumerate(order) if who == name]) for name in "ab"}
    assert mean["a"] == mean["b"]  # an even drift falls on both alike
