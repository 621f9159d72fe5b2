"""The choice of pairs: what tells most, with known probabilities, and Davidson's model that it leans on."""

from __future__ import annotations

import time

import numpy as np
import pytest

from hypersd.study import pick
from hypersd.study.ratings import PRIOR, SCALE, fit, information

RNG = np.random.default_rng(1)
PAIRS = [(0, 1), (0, 2), (1, 2)]


def shown(*counts: float) -> np.ndarray:
    table = np.zeros((3, 3))
    for (i, j), count in zip(PAIRS, counts, strict=True):
        table[i, j] = table[j, i] = count
    return table


def test_gain_is_the_drop_of_the_covariances_trace() -> None:
    """Against inverting both matrices."""
    theta, seen = np.array([0.0, 0.5, -1.0]), shown(5, 2, 9)

    def trace(table: np.ndarray) -> float:
        weight = table * information(theta, -0.5)
        precision = np.diag(weight.sum(axis=1)) - weight
        return float(np.trace(np.linalg.inv(precision[1:, 1:] + PRIOR * np.eye(2))))

    for place, (i, j) in enumerate(PAIRS):
        more = seen.copy()
        more[i, j] += 1
        more[j, i] += 1
        expected = trace(seen) - trace(more)
        assert pick.gain(PAIRS, seen, theta, -0.5, 0)[place] == pytest.approx(expected, rel=1e-9)


def test_the_pair_that_was_never_shown_tells_most() -> None:
    gains = pick.gain(PAIRS, shown(50, 0, 50), np.zeros(3), -0.5, 0)
    assert gains.argmax() == 1
    told = information(np.array([0.0, 0.0, 5.0]), -0.5)
    assert told[0, 1] > 5 * told[0, 2], "a vote on what is clear already tells little"


def test_pairs_come_as_often_as_their_probability_says() -> None:
    drawn = [pick.pair(PAIRS, "aab", shown(9, 3, 8), np.zeros(3), -0.5, 0, 0.25, RNG) for _ in range(3000)]
    for place in range(3):
        chances = {choice.probability for choice in drawn if choice.place == place}
        assert len(chances) == 1
        (chance,) = chances
        often = sum(choice.place == place for choice in drawn) / 3000
        assert abs(often - chance) < 4 * (chance * (1 - chance) / 3000) ** 0.5
        assert chance >= 0.25 / 3
    assert all(c.probability < 0.09 for c in drawn if c.place == 2), (
        "its stratum was shown more: by the blind draw only"
    )


def test_the_least_served_is_chosen_and_ties_are_even() -> None:
    assert {pick.least([3, 1, 2], RNG) for _ in range(9)} == {(1, 1.0)}
    assert {pick.least([1, 1, 2], RNG) for _ in range(99)} == {(0, 0.5), (1, 0.5)}


def test_twenty_arms_are_chosen_from_in_milliseconds() -> None:
    pairs = [(i, j) for i in range(20) for j in range(i + 1, 20)]
    seen = np.full((20, 20), 5000.0)
    begun = time.process_time()
    for _ in range(10):
        pick.pair(pairs, ["all"] * 190, seen, RNG.normal(size=20), -0.5, 0, 0.25, RNG)
    assert (time.process_time() - begun) / 10 < 0.02


def test_the_model_finds_what_counts_were_made_from() -> None:
    """Expected counts under known parameters give those parameters back, but for the weak prior."""
    theta, side, log_nu = np.array([0.0, 0.6, -0.9]), 0.3, -0.4
    logits = np.stack(
        [
            theta[:, None] + side / 2 + 0 * theta,
            theta[None, :] - side / 2 + 0 * theta[:, None],
            log_nu + (theta[:, None] + theta[None, :]) / 2,
        ],
        axis=-1,
    )
    chances = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    counts = 1e6 * chances * (1 - np.eye(3))[..., None]
    found = fit(np.stack([counts, counts / 2]), anchor=0)
    assert found.theta == pytest.approx(np.stack([theta, theta]), abs=1e-5)
    assert found.side == pytest.approx([side, side], abs=1e-5) and found.log_nu == pytest.approx([log_nu] * 2, abs=1e-5)
    assert found.rating[0] == pytest.approx(1000 + SCALE * theta)
    assert found.covariance[0] == pytest.approx(found.covariance[1] / 2, rel=1e-4)
    assert np.abs(found.covariance[:, 0]).max() == 0, "the anchor does not move"


def test_two_arms_have_a_closed_form() -> None:
    """Odds of wins for the strength, ties over the geometric mean of wins for nu."""
    counts = np.zeros((2, 2, 3))
    counts[0, 1] = counts[1, 0, [1, 0, 2]] = [300, 100, 50]
    found = fit(counts, anchor=1)
    assert found.theta[0] == pytest.approx(np.log(3), abs=1e-3)
    assert np.exp(found.log_nu) == pytest.approx(50 / (300 * 100) ** 0.5, abs=2e-3)


def test_an_arm_that_never_lost_has_a_finite_rating() -> None:
    counts = np.zeros((2, 2, 3))
    counts[0, 1, 0] = 1000.0
    assert 1500 < fit(counts, anchor=1).rating[0] < 4000
    assert fit(np.zeros((3, 3, 3)), anchor=0).theta.tolist() == [0.0, 0.0, 0.0]
