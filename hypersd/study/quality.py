"""What the votes say of those who voted: who did not look, how consistent they are, whether they agree.

The filter decides which votes are used; it never deletes one. It has a version, which exports name, and its rules
were fixed before any vote was cast.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

from hypersd.study import ratings
from hypersd.study.ratings import Array
from hypersd.study.table import BOTH_BAD, LEFT, RIGHT, TIE, Bools, Ints, Table

FILTER_VERSION = 1
ODDS = 200.0  # at least, that somebody does not look: by Ville's inequality 1 in 200 of those who do reach it, ever
ONE_SIDED, ONE_SIDED_P = 0.9, 0.001
FAST_MS, FAST_VOTES = 800, 10
GOLD_FAILED, GOLD_SHARE = 2, 1 / 3
SAME, SAME_VOTES = 0.95, 20


@dataclass(frozen=True)
class Annotator:
    """One annotator, by number. `odds` that they do not look at the pictures, at their highest, against 1.

    `reasons` why their votes are not used; none for most. Shares are None where there is nothing to count.
    """

    number: int
    votes: int
    left: float | None
    gold: float | None
    consistency: float | None
    median_ms: float
    odds: float
    reasons: tuple[str, ...]


def annotators(table: Table, anchor: str) -> list[Annotator]:
    """Everybody who voted, judged by the rules of the filter."""
    odds = not_looking(table, anchor)
    return [_judge(table.where(table.annotator == n), n, odds[n]) for n in range(len(table.annotators))]


def used(table: Table, judged: list[Annotator]) -> Bools:
    """Which votes the filter lets through."""
    out = [one.number for one in judged if one.reasons]
    return np.asarray(~np.isin(table.annotator, out))


def _judge(own: Table, number: int, odds: float) -> Annotator:
    share = [float(np.mean(own.choice == choice)) if len(own) else 0.0 for choice in range(4)]
    left, decided = int((own.choice == LEFT).sum()), int(np.isin(own.choice, (LEFT, RIGHT)).sum())
    gold = own.choice[own.expected >= 0] == own.expected[own.expected >= 0]
    failed, median = int((~gold).sum()), float(np.median(own.dwell_ms)) if len(own) else 0.0
    side = max(left, decided - left)
    rules = {
        "does not look": odds >= ODDS,
        "one-sided": decided > 0 and side > ONE_SIDED * decided and two_sided(side, decided) < ONE_SIDED_P,
        "always the same": len(own) >= SAME_VOTES and max(share) > SAME,
        "too fast": len(own) >= FAST_VOTES and median < FAST_MS,
        "fails gold": failed >= GOLD_FAILED and failed > GOLD_SHARE * len(gold),
    }
    return Annotator(
        number=number,
        votes=len(own),
        left=left / decided if decided else None,
        gold=float(gold.mean()) if len(gold) else None,
        consistency=consistency(own)[0],
        median_ms=median,
        odds=odds,
        reasons=tuple(name for name, broken in rules.items() if broken),
    )


def two_sided(side: int, decided: int) -> float:
    """Probability that an even coin falls at least so often on one and the same side, either one."""
    return float(min(1, 2 * sum(comb(decided, k) for k in range(side, decided + 1)) / 2**decided))


def not_looking(table: Table, anchor: str) -> Array:
    """The highest odds, over an annotator's votes in order, that they answer without looking [annotators].

    Both hypotheses predict the next answer from how often the annotator gave each one before (Krichevsky and Trofimov's
    estimate), so neither a liking for ties nor one for a side counts. Who looks follows, beyond that, what the fitted
    model says of the two arms. The ratio is a martingale for those who do; arms that are alike leave it at 1.
    """
    fit = ratings.fit(table.where(table.compares).counts()[..., :3], table.arms.index(anchor))
    x = ratings.features(len(table.arms), table.left, table.right)
    chances = ratings.softmax(x @ np.append(fit.theta, [fit.side, fit.log_nu]))
    told = chances / chances.mean(axis=0) if len(table) else chances
    told = np.concatenate([told, np.ones((len(table), 1))], axis=1)  # "both bad" says nothing of which is better
    return np.array([_highest_odds(told[rows], table.choice[rows]) for rows in _rows_of(table)])


def _rows_of(table: Table) -> list[Ints]:
    order = np.argsort(table.annotator, kind="stable")
    ends = np.cumsum(np.bincount(table.annotator, minlength=len(table.annotators)))
    return np.split(order, ends[:-1]) if len(ends) else []


def _highest_odds(told: Array, choice: Ints) -> float:
    chosen = np.eye(4)[choice]
    before = chosen.cumsum(axis=0) - chosen
    habit = (before + 0.5) / (np.arange(len(choice))[:, None] + 2)
    looking = habit * told / (habit * told).sum(axis=1, keepdims=True)
    ratio = (habit * chosen).sum(axis=1) / (looking * chosen).sum(axis=1)
    return float(np.exp(min(np.log(ratio).cumsum().max(initial=0.0), 500.0)))


# Consistency and agreement


def consistency(table: Table) -> tuple[float | None, int]:
    """Share of repeated pairs that were answered the same way, sides swapped; None without any. And how many."""
    again = np.flatnonzero(table.repeats >= 0)
    if not len(again):
        return None, 0
    swap = np.array([RIGHT, LEFT, TIE, BOTH_BAD])
    same = swap[table.choice[again]] == table.choice[table.repeats[again]]
    return float(same.mean()), len(again)


def alpha(table: Table) -> float | None:
    """Krippendorff's alpha, nominal, of first / second / tie for pairs that several annotators compared.

    1 is agreement, 0 what chance gives; None when no pair was compared twice or all answers are the same.
    """
    kept = table.where(table.compares & (table.choice != BOTH_BAD))
    answers = np.where(kept.swapped & (kept.choice != TIE), 1 - kept.choice, kept.choice)
    units = np.zeros((int(kept.unit.max(initial=-1)) + 1, 3))
    np.add.at(units, (kept.unit, answers), 1.0)
    return nominal_alpha(units)


def nominal_alpha(units: NDArray[np.float64]) -> float | None:
    """Krippendorff's alpha from how often each unit got each value [units, values] (Krippendorff 2011, nominal)."""
    units = units[units.sum(axis=1) >= 2]
    if not len(units):
        return None
    size = units.sum(axis=1)
    total, values = size.sum(), units.sum(axis=0)
    observed = ((size**2 - (units**2).sum(axis=1)) / (size - 1)).sum() / total
    expected = (total**2 - (values**2).sum()) / (total * (total - 1))
    return float(1 - observed / expected) if expected else None


def cycles(table: Table) -> tuple[int, int]:
    """Triples of arms of which each beats the next by majority, and how many triples are decided at all."""
    counts = table.where(table.compares).counts()
    won = counts[..., LEFT] + counts[..., RIGHT].T
    beats, loses = won > won.T, won < won.T
    decided = beats | loses
    found = all_ = 0
    for i, j, k in combinations(range(len(table.arms)), 3):
        if decided[i, j] and decided[j, k] and decided[i, k]:
            all_ += 1
            found += bool(beats[i, j] == beats[j, k] == beats[k, i])
    return found, all_


def ceiling(table: Table) -> tuple[float | None, int]:
    """How often one annotator's left or right agrees with the majority of the others on that pair, an even split half.

    No model that reads the pictures only can be expected to agree with people more often. None, 0 without such votes.
    """
    kept = table.where(table.compares & (table.choice < TIE))
    answers = np.where(kept.swapped, 1 - kept.choice, kept.choice)
    units = np.zeros((int(kept.unit.max(initial=-1)) + 1, 2))
    np.add.at(units, (kept.unit, answers), 1.0)
    same, other = units[kept.unit, answers] - 1, units[kept.unit, 1 - answers]
    judged = same + other > 0
    agrees = np.where(same > other, 1.0, np.where(same == other, 0.5, 0.0))[judged]
    return (float(agrees.mean()) if len(agrees) else None), len(agrees)
