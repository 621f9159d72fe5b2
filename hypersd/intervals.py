"""How sure a figure is: bootstrap over prompts, Holm's correction, Kendall's tau, ratios of timings. numpy only.

A figure is the mean of one value a prompt, NaN where a prompt has none. All figures of one report are resampled by the
same draws, so differences between methods are paired. Prompts are the unit: pictures of one prompt are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
LEVEL = 0.95
ROUNDS = 4000  # of the bootstrap: the ends of a 95 % interval then move by about 3 % of its length between seeds


class Estimate(NamedTuple):
    """A mean over so many prompts and the ends of its 95 % interval; NaN where fewer than two have a value."""

    value: float
    low: float
    high: float
    prompts: int


class Difference(NamedTuple):
    """Mean of a - b over the prompts that have both, its 95 % interval and two-sided bootstrap p."""

    value: float
    low: float
    high: float
    p: float
    prompts: int


def draws(count: int, rounds: int = ROUNDS, seed: int = 0) -> Values:
    """How often each of `count` prompts is drawn in each round, [rounds, count]; the same for the same arguments."""
    counts = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=rounds)
    return counts.astype(np.float64)


def estimate(values: Values, drawn: Values) -> Estimate:
    """Mean and percentile interval (Efron and Tibshirani 1993, chapter 13) of values [prompts], over draws(prompts)."""
    known = np.isfinite(values)
    if known.sum() < 2:
        return Estimate(float(np.mean(values[known])) if known.any() else np.nan, np.nan, np.nan, int(known.sum()))
    low, high = _ends(_means(values, drawn))
    return Estimate(float(values[known].mean()), low, high, int(known.sum()))


def difference(a: Values, b: Values, drawn: Values) -> Difference:
    """Paired over prompts. p is twice the smaller share of rounds on either side of zero, at least 2 / rounds."""
    apart = a - b
    value, low, high, count = estimate(apart, drawn)
    if count < 2:
        return Difference(value, low, high, np.nan, count)
    means = _means(apart, drawn)
    beyond = min(int((means <= 0).sum()), int((means >= 0).sum()))
    return Difference(value, low, high, min(1.0, 2 * (beyond + 1) / (len(means) + 1)), count)


def _means(values: Values, drawn: Values) -> Values:
    """The mean of each round over its prompts that have a value; rounds that drew none of them are left out."""
    known = np.isfinite(values)
    sums, counts = drawn[:, known] @ values[known], drawn[:, known].sum(1)
    return sums[counts > 0] / counts[counts > 0]


def _ends(means: Values) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p of each of several comparisons (Holm 1979): below 0.05 in one means so in all of them together.

    NaN stays NaN and does not count as a comparison.
    """
    adjusted = np.full(len(p), np.nan)
    known = [i for i in np.argsort(p, kind="stable") if np.isfinite(p[i])]
    reached = 0.0
    for rank, i in enumerate(known):
        reached = max(reached, min(1.0, (len(known) - rank) * p[i]))
        adjusted[i] = reached
    return [float(value) for value in adjusted]


def kendall_tau(values: Sequence[float]) -> float:
    """Share of pairs that rise minus share that fall, -1 to 1 (Kendall 1938); 1 if every value is above those before.

    Raises:
        ValueError: fewer than two values.
    """
    if len(values) < 2:
        raise ValueError("an order needs at least two values")
    pairs = [(a, b) for i, a in enumerate(values) for b in values[i + 1 :]]
    return float(np.mean([np.sign(b - a) for a, b in pairs]))


def ratio(over: Sequence[float], under: Sequence[float], rounds: int = ROUNDS, seed: int = 0) -> Estimate:
    """Ratio of two medians of timings and its interval, both resampled by the same rounds (they were taken in turn).

    Raises:
        ValueError: not equally many, or none.
    """
    a, b = np.asarray(over, dtype=np.float64), np.asarray(under, dtype=np.float64)
    if len(a) != len(b) or not len(a):
        raise ValueError(f"timings are compared round by round, got {len(a)} and {len(b)}")
    rows = np.random.default_rng(seed).integers(0, len(a), (rounds, len(a)))
    low, high = _ends(np.median(a[rows], axis=1) / np.median(b[rows], axis=1))
    return Estimate(float(np.median(a) / np.median(b)), low, high, len(a))


def abba(names: Sequence[str], rounds: int) -> list[str]:
    """An order of work in which each name comes once a round, every other round backwards.

    Whatever drifts evenly (heat, a machine that fills up) then falls on all names alike.
    """
    return [name for number in range(rounds) for name in (names if number % 2 == 0 else tuple(reversed(names)))]
