"""Which pair to show next: the one that tells most, some of the time any, and always with a known probability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hypersd.study.ratings import PRIOR, Array, information

Rng = np.random.Generator


class Choice(NamedTuple):
    """A place in a list, with the probability that it had."""

    place: int
    probability: float


def least(served: Sequence[float] | Array, rng: Rng) -> Choice:
    """One of those served least, each with the same probability."""
    counts = np.asarray(served)
    lowest = np.flatnonzero(counts == counts.min())
    return Choice(int(rng.choice(lowest)), 1 / len(lowest))


def pair(
    pairs: Sequence[tuple[int, int]],
    strata: Sequence[object],
    shown: Array,
    theta: Array,
    log_nu: float,
    anchor: int,
    uniform: float,
    rng: Rng,
) -> Choice:
    """The place in `pairs` of the arms to compare next.

    With probability `uniform` any pair, else one of the stratum (step count) that was shown least per pair, with a
    probability in proportion to how much a vote on it shrinks the trace of the ratings' covariance.

    Args:
        shown: [K, K] symmetric, how often each pair was shown so far.
        theta, log_nu: current ratings, see `ratings.Fit`.
    """
    chances = np.full(len(pairs), uniform / len(pairs))
    gains = gain(pairs, shown, theta, log_nu, anchor)
    names = list(dict.fromkeys(strata))
    member = np.array([[stratum == name for stratum in strata] for name in names])
    often = np.array([shown[i, j] for i, j in pairs])
    per_pair = member @ often / member.sum(axis=1)
    lowest = np.flatnonzero(per_pair == per_pair.min())
    for stratum in lowest:
        inside = np.where(member[stratum], gains, 0.0)
        chances += (1 - uniform) / len(lowest) * inside / inside.sum()
    place = int(rng.choice(len(pairs), p=chances / chances.sum()))
    return Choice(place, float(chances[place]))


def gain(pairs: Sequence[tuple[int, int]], shown: Array, theta: Array, log_nu: float, anchor: int) -> Array:
    """By how much one more vote on each pair lowers the trace of the covariance of theta, the anchor being fixed."""
    arms = len(theta)
    told = information(theta, log_nu)
    weight = shown * told
    precision = np.diag(weight.sum(axis=1) + PRIOR) - weight
    free = [k for k in range(arms) if k != anchor]
    covariance = np.linalg.inv(precision[np.ix_(free, free)])
    d = np.zeros((len(pairs), arms))
    rows = np.arange(len(pairs))
    i, j = np.array(pairs).T
    d[rows, i], d[rows, j] = 1.0, -1.0
    moved = d[:, free] @ covariance  # [pairs, K - 1]
    spread = (moved * d[:, free]).sum(axis=1)
    w = told[i, j]
    # Sherman and Morrison: C' = C - w C d d'C / (1 + w d'C d)
    return np.asarray(w * (moved**2).sum(axis=1) / (1 + w * spread))
