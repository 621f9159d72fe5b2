"""What the votes say of the arms: ratings with honest intervals, differences, and how fragile the first place is.

Votes of one annotator, and votes on one prompt, are alike, so intervals that take votes for independent are two to
three times too narrow. Here annotators are resampled, and prompts are, and the two variances are added less the one
they share (Cameron, Gelbach & Miller 2011). Resampling both at once, the "pigeonhole" bootstrap, would count the
chance in single votes three times (Owen 2007), which is most of the variance of a study of this kind.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from statistics import NormalDist

import numpy as np

from hypersd.study import ratings
from hypersd.study.definition import steps_of
from hypersd.study.ratings import SCALE, Array, Fit
from hypersd.study.table import BOTH_BAD, Ints, Table

RESAMPLES = 400  # a standard error is then right to 4 %
POWER = 0.8  # of the number of votes still needed


@dataclass(frozen=True)
class Rating:
    """One arm: its rating on the scale where the anchor has 1000, with a 95 % interval, and its share of "both bad"."""

    arm: str
    rating: float
    low: float
    high: float
    votes: int
    both_bad: float


@dataclass(frozen=True)
class Difference:
    """Rating of `arm` less that of `other`, 95 % interval; `p` two-sided, `p_holm` for all differences together.

    `votes_needed` more of the same kind would show a difference of this size with 80 % power; 0 if it is shown.
    """

    arm: str
    other: str
    gap: float
    low: float
    high: float
    p: float
    p_holm: float
    votes_needed: int


@dataclass(frozen=True)
class Result:
    """One fit: of all arms together, or of those of one step count with the anchor.

    `wins` [K, K] is the share that arm i won against arm j, ties half; `met` how often they met. `left` is the odds
    factor that the left side gives, with its interval; 1 is no bias.
    """

    name: str
    votes: int
    ratings: tuple[Rating, ...]
    differences: tuple[Difference, ...]
    wins: Array
    met: Array
    left: tuple[float, float, float]


@dataclass(frozen=True)
class Estimate:
    """Maximum-likelihood parameters and what resampling says of them; `quantile` of the interval in deviations."""

    fit: Fit
    by_annotator: Fit
    by_prompt: Fit
    factors: tuple[float, float]
    quantile: float

    def error(self, weights: Array) -> float:
        """The standard error of weights . theta."""
        one, other = (
            factor * float(np.var(part.theta @ weights, ddof=1))
            for factor, part in zip(self.factors, (self.by_annotator, self.by_prompt), strict=True)
        )
        shared = float(weights @ self.fit.covariance @ weights)
        return float(max(one + other - shared, one, other) ** 0.5)


def results(table: Table, anchor: str, *, seed: int = 0, resamples: int = RESAMPLES) -> list[Result]:
    """All arms that were compared together, then each step count with the anchor."""
    table = table.where(table.compares)
    met = np.unique(np.concatenate([table.left, table.right]))
    arms = [arm for k, arm in enumerate(table.arms) if k in met or arm == anchor]
    groups = {"all": arms}
    for steps in sorted({steps_of(arm) for arm in arms}):
        group = [arm for arm in arms if steps_of(arm) == steps or arm == anchor]
        if 2 < len(group) < len(arms):
            groups[f"{steps} steps"] = group
    told = ((name, only(table, group)) for name, group in groups.items())
    return [result(name, cut, anchor, seed, resamples) for name, cut in told if (cut.choice != BOTH_BAD).any()]


def only(table: Table, arms: list[str]) -> Table:
    """The votes between these arms, which are numbered anew."""
    place = np.full(len(table.arms), -1)
    place[[table.arms.index(arm) for arm in arms]] = np.arange(len(arms))
    cut = table.where((place[table.left] >= 0) & (place[table.right] >= 0))
    return replace(cut, arms=tuple(arms), left=place[cut.left], right=place[cut.right])


def result(name: str, table: Table, anchor: str, seed: int = 0, resamples: int = RESAMPLES) -> Result:
    counts = table.counts()
    estimate_ = estimate(table, table.arms.index(anchor), np.random.default_rng(seed), resamples)
    decided = counts[..., :3]
    met = decided.sum(axis=2) + decided.sum(axis=2).T
    won = decided[..., 0] + decided[..., 1].T + (decided[..., 2] + decided[..., 2].T) / 2
    with np.errstate(invalid="ignore"):
        wins = won / met
    return Result(
        name=name,
        votes=len(table),
        ratings=_ratings(table.arms, counts, estimate_),
        differences=differences(table.arms, estimate_, int(decided.sum())),
        wins=wins,
        met=met,
        left=_left(estimate_),
    )


def _ratings(arms: tuple[str, ...], counts: Array, found: Estimate) -> tuple[Rating, ...]:
    rows = []
    for k, arm in enumerate(arms):
        value, error = float(found.fit.rating[k]), SCALE * found.error(np.eye(len(arms))[k])
        shown = counts[k].sum() + counts[:, k].sum()
        bad = (counts[k, :, BOTH_BAD].sum() + counts[:, k, BOTH_BAD].sum()) / max(shown, 1)
        ends = value - found.quantile * error, value + found.quantile * error
        rows.append(Rating(arm, value, *ends, int(shown), float(bad)))
    return tuple(sorted(rows, key=lambda row: -row.rating))


def _left(found: Estimate) -> tuple[float, float, float]:
    one, other = (
        factor * float(np.var(part.side, ddof=1))
        for factor, part in zip(found.factors, (found.by_annotator, found.by_prompt), strict=True)
    )
    side, error = float(found.fit.side), max(one, other) ** 0.5
    low, middle, high = np.exp([side - found.quantile * error, side, side + found.quantile * error])
    return float(middle), float(low), float(high)


# Intervals


def estimate(table: Table, anchor: int, rng: np.random.Generator, resamples: int = RESAMPLES) -> Estimate:
    """Fit the decided votes of a table, and fit them again with annotators, then prompts, drawn with replacement."""
    table = table.where(table.choice != BOTH_BAD)
    arms = len(table.arms)
    by, factors = [], []
    for group in (table.annotator, table.prompt):
        resampled, size = _resample(table, group, rng, resamples)
        by.append(ratings.fit(resampled.reshape(resamples, arms, arms, 4)[..., :3], anchor))
        factors.append(size / max(size - 1, 1))
    smaller = min(len(np.unique(table.annotator)), len(np.unique(table.prompt)))
    fitted = ratings.fit(table.counts()[..., :3], anchor)
    return Estimate(fitted, by[0], by[1], (factors[0], factors[1]), t_quantile(0.975, smaller - 1))


def _resample(table: Table, group: Ints, rng: np.random.Generator, resamples: int) -> tuple[Array, int]:
    """Counts [resamples, cells] of votes whose groups were drawn with replacement, and how many groups there are."""
    names, member = np.unique(group, return_inverse=True)
    cells = 4 * len(table.arms) ** 2
    of_group = np.bincount(member * cells + table.cell(), minlength=len(names) * cells).reshape(len(names), cells)
    often = rng.multinomial(len(names), np.full(len(names), 1 / max(len(names), 1)), size=resamples)
    return often.astype(np.float64) @ of_group.astype(np.float64), len(names)


def t_quantile(p: float, freedom: int) -> float:
    """Of Student's t, by Cornish and Fisher's expansion: right to three digits from 3 degrees of freedom on."""
    z, n = NormalDist().inv_cdf(p), max(freedom, 3)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(z + sum(term / n**power for power, term in enumerate(terms, 1)))


# Differences


def differences(arms: tuple[str, ...], found: Estimate, votes: int) -> tuple[Difference, ...]:
    """Every pair of arms, the better one first."""
    rows = []
    for i, j in combinations(np.argsort(-found.fit.theta, kind="stable"), 2):
        weights = np.zeros(len(arms))
        weights[i], weights[j] = 1.0, -1.0
        gap, error = SCALE * float(found.fit.theta @ weights), SCALE * found.error(weights)
        half = found.quantile * error
        # The same quantile for the test: a p under 0.05 and an interval without 0 are one thing.
        z = gap / error * NormalDist().inv_cdf(0.975) / found.quantile if error else 0.0
        p = 2 * NormalDist().cdf(-abs(z))
        rows.append([arms[i], arms[j], gap, gap - half, gap + half, p, 1.0, votes_needed(gap, error, votes)])
    for row, corrected in zip(rows, holm([float(row[5]) for row in rows]), strict=True):
        row[6] = corrected
    return tuple(Difference(*row) for row in rows)


def holm(p: list[float]) -> list[float]:
    """Holm's step-down correction, which keeps the chance of any false difference at the level of the test."""
    order = np.argsort(p, kind="stable")
    raised = np.maximum.accumulate(np.array(p)[order] * np.arange(len(p), 0, -1))
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(raised, 1.0)
    return [float(value) for value in corrected]


def votes_needed(gap: float, error: float, votes: int) -> int:
    """How many more votes like these would show a gap at the 5 % level with 80 % power; 0 if there are enough.

    `error` is the standard error of the gap now, clustering included, which shrinks like the root of the votes as
    long as annotators and prompts grow with them.
    """
    wanted = NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(POWER)
    if not gap or not votes:
        return 0
    return max(0, int(np.ceil(votes * ((wanted * error / abs(gap)) ** 2 - 1))))


def drop_to_flip(table: Table, anchor: str) -> tuple[int, float]:
    """How few votes need to be left out for the first place to change hands, and what share of the votes that is.

    Votes are left out in the order of their first-order influence, so a smaller number may exist, but not by much;
    it is checked that the place changes. (0, 0.0) if there are fewer than two arms or votes.
    """
    table = table.where(table.compares & (table.choice != BOTH_BAD))
    place = table.arms.index(anchor)
    counts = table.counts()[..., :3]
    fitted = ratings.fit(counts, place)
    seen = np.flatnonzero(counts.sum(axis=(1, 2)) + counts.sum(axis=(0, 2)))
    if len(seen) < 2:
        return 0, 0.0
    first, second = seen[np.argsort(-fitted.theta[seen], kind="stable")[:2]]
    order, size = _by_influence(counts, fitted, int(first), int(second))
    low, high = 0, len(order)
    while low < high:  # the smallest number that flips; influence is monotone along the order
        middle = (low + high) // 2
        left_out = np.bincount(order[: middle + 1], minlength=counts.size).reshape(counts.shape)
        theta = ratings.fit(counts - left_out, place).theta
        low, high = (low, middle) if theta[first] <= theta[second] else (middle + 1, high)
    return (low + 1, (low + 1) / size) if low < len(order) else (0, 0.0)


def _by_influence(counts: Array, fitted: Fit, first: int, second: int) -> tuple[Ints, int]:
    """Cells of single votes, those that hold `first` above `second` most strongly first; and how many votes."""
    arms = len(fitted.theta)
    left, right = np.nonzero(counts.sum(axis=2))
    x = ratings.features(arms, left, right)
    p = ratings.softmax(x @ np.append(fitted.theta, [fitted.side, fitted.log_nu]))
    score = (x - (p[..., None] * x).sum(axis=1, keepdims=True))[..., :arms]  # [pairs, 3, arms]
    pull = score @ (fitted.covariance[first] - fitted.covariance[second])
    cells = (left[:, None] * arms + right[:, None]) * 3 + np.arange(3)
    held = pull > 0
    order = np.argsort(-pull[held], kind="stable")
    cells_in_order = cells[held][order]
    often = counts.reshape(-1)[cells_in_order].astype(np.int64)
    return np.repeat(cells_in_order, often), int(counts.sum())
