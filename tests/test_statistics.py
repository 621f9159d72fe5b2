"""The statistics find what simulated annotators were made with, and their intervals hold as often as they say."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from hypersd.study import quality, ratings, simulate
from hypersd.study import statistics as stats
from hypersd.study.simulate import Truth, table
from hypersd.study.table import LEFT, TIE, Table

FIVE = (0.0, 0.5, -0.5, -1.0, 0.2)
ANCHOR = "arm@1"


def rng(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


def coverage(truth: Truth, annotators: int, ballots: int, prompts: int, studies: int, resamples: int) -> float:
    """How often the 95 % intervals of ratings and of neighbours' gaps hold what an endless study would find."""
    chances, inside = rng(7), []
    true = truth.average(chances, 100_000)
    arms = np.eye(len(true))
    weights = [*arms[1:], *(arms[1:-1] - arms[2:])]
    for _ in range(studies):
        made = table(truth, annotators, ballots, prompts, chances)
        found = stats.estimate(made, 0, chances, resamples)
        inside += [abs(w @ (found.fit.theta - true)) <= found.quantile * found.error(w) for w in weights]
    return float(np.mean(inside))


def test_intervals_hold_quick() -> None:
    share = coverage(
        Truth((0.0, 0.6, -0.6), side=0.2), annotators=16, ballots=20, prompts=40, studies=60, resamples=100
    )
    assert 0.89 <= share <= 0.99, "180 intervals; the slow test is the sharp one"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("annotators", "ballots", "prompts", "spread"),
    [(24, 40, 120, (0.3, 0.5)), (24, 40, 30, (0.5, 0.8)), (60, 20, 24, (0.5, 0.8)), (20, 100, 40, (0.3, 0.5))],
)
def test_intervals_hold_93_to_97_percent(
    annotators: int, ballots: int, prompts: int, spread: tuple[float, float]
) -> None:
    truth = Truth(FIVE, side=0.2, annotator_sd=spread[0], prompt_sd=spread[1])
    assert 0.93 <= coverage(truth, annotators, ballots, prompts, studies=500, resamples=200) <= 0.97


def test_intervals_that_ignore_who_voted_would_not_hold() -> None:
    """The reason for all the resampling: the naive error is too small by half where annotators and prompts differ."""
    made = table(Truth(FIVE, annotator_sd=0.5, prompt_sd=0.8), 20, 150, 24, rng())
    found = stats.estimate(made, 0, rng(), 200)
    weights = np.eye(5)[3]
    assert found.error(weights) > 1.6 * float(weights @ found.fit.covariance @ weights) ** 0.5


def test_order_side_and_floor_are_found() -> None:
    truth = Truth(FIVE, side=0.4, bad=0.05, annotator_sd=0.1, prompt_sd=0.1)
    (pooled,) = stats.results(table(truth, 60, 100, 60, rng()), ANCHOR)
    assert [row.arm for row in pooled.ratings] == ["arm@2", "arm@5", "arm@1", "arm@3", "arm@4"]
    anchor = pooled.ratings[2]
    assert (anchor.rating, anchor.low, anchor.high) == (1000.0, 1000.0, 1000.0)
    assert all(row.low < row.rating < row.high for row in pooled.ratings if row is not anchor)
    assert pooled.left[1] <= np.exp(0.4) <= pooled.left[2]
    assert all(0.03 < row.both_bad < 0.07 for row in pooled.ratings)
    best, worst = (pooled.ratings[k].arm for k in (0, -1))
    assert pooled.differences[0].arm == best
    steepest = next(d for d in pooled.differences if (d.arm, d.other) == (best, worst))
    assert steepest.gap == pytest.approx(ratings.SCALE * 1.5, rel=0.1)
    assert steepest.p_holm < 1e-6 and steepest.votes_needed == 0


def test_wins_are_shares_with_ties_half() -> None:
    (pooled,) = stats.results(table(Truth((0.0, 0.7)), 20, 50, 20, rng()), ANCHOR)
    assert pooled.wins[0, 1] + pooled.wins[1, 0] == pytest.approx(1.0)
    assert pooled.wins[1, 0] > 0.55 and np.isnan(pooled.wins[0, 0])
    assert pooled.met.sum() == 2 * 1000


def test_step_counts_are_rated_apart_with_the_anchor() -> None:
    made = replace(table(Truth(FIVE), 20, 50, 20, rng()), arms=("base@25", "lcm@4", "tcd@4", "lcm@1", "tcd@1"))
    found = {result.name: result for result in stats.results(made, "base@25", resamples=20)}
    assert list(found) == ["all", "1 steps", "4 steps"]
    assert {row.arm for row in found["4 steps"].ratings} == {"base@25", "lcm@4", "tcd@4"}
    assert found["1 steps"].votes < found["all"].votes == 1000


def test_nothing_voted_is_no_result_and_no_error() -> None:
    empty = table(Truth(FIVE), 1, 4, 3, rng()).where(np.zeros(4, dtype=bool))
    assert stats.results(empty, ANCHOR) == []
    assert (quality.alpha(empty), quality.consistency(empty), quality.cycles(empty)) == (None, (None, 0), (0, 0))
    assert stats.drop_to_flip(empty, ANCHOR) == (0, 0.0)


def test_one_vote_does_not_break_anything() -> None:
    one = table(Truth((0.0, 1.0)), 1, 1, 1, rng())
    (pooled,) = stats.results(one, ANCHOR)
    assert pooled.votes == 1
    assert len(quality.annotators(one, ANCHOR)) == 1


def test_holm_is_the_textbooks() -> None:
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.6, 0.7]) == [1.0, 1.0]
    assert stats.holm([]) == []


@pytest.mark.parametrize(("freedom", "expected"), [(3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (1000, 1.962)])
def test_students_quantiles_are_the_tables(freedom: int, expected: float) -> None:
    assert stats.t_quantile(0.975, freedom) == pytest.approx(expected, rel=3e-3)


def test_votes_needed_are_those_that_would_do() -> None:
    needed = stats.votes_needed(30.0, 20.0, 500)
    error_then = 20.0 * (500 / (500 + needed)) ** 0.5
    assert 30.0 / error_then == pytest.approx(1.96 + 0.842, abs=2e-3)
    assert stats.votes_needed(30.0, 5.0, 500) == stats.votes_needed(0.0, 5.0, 500) == 0


def test_the_first_place_falls_with_so_many_votes_and_not_with_one_less() -> None:
    """Two arms, no side effect: 60 against 50 wins needs 10 of the 60 to go for a draw."""
    wins = [LEFT] * 60 + [1] * 50
    made = table(Truth((0.0, 0.0)), 1, 110, 1, rng())
    made = replace(made, left=np.zeros(110, np.int64), right=np.ones(110, np.int64), choice=np.array(wins))
    halves = np.arange(110) % 2 == 0  # each arm on either side as often
    made = replace(
        made,
        left=np.where(halves, 0, 1),
        right=np.where(halves, 1, 0),
        choice=np.where(halves, made.choice, 1 - made.choice),
    )
    dropped, share = stats.drop_to_flip(made, ANCHOR)
    assert 9 <= dropped <= 11
    assert share == dropped / 110


def test_alpha_is_the_textbooks() -> None:
    """Krippendorff (2011), example C: four observers, twelve units, five values, with missing answers: 0.743."""
    observers = [
        "1 2 3 3 2 1 4 1 2 . . .",
        "1 2 3 3 2 2 4 1 2 5 . 3",
        ". 3 3 3 2 3 4 2 2 5 1 .",
        "1 2 3 3 2 4 4 1 2 5 1 .",
    ]
    units = np.zeros((12, 5))
    for row in observers:
        for unit, value in enumerate(row.split()):
            if value != ".":
                units[unit, int(value) - 1] += 1
    assert quality.nominal_alpha(units) == pytest.approx(0.743421, abs=1e-6)
    assert quality.nominal_alpha(np.array([[2.0, 0.0]])) is None, "all the same: nothing to disagree about"


def test_alpha_and_repeats_tell_lookers_from_clickers() -> None:
    sharp, blind = Truth((0.0, 4.0, -4.0), log_nu=-3.0), Truth((0.0, 0.0, 0.0), annotator_sd=0.0, prompt_sd=0.0)
    made = [table(truth, 30, 40, 8, rng(), repeat=0.3) for truth in (sharp, blind)]
    seeing, random_ = (quality.alpha(one) for one in made)
    assert seeing is not None and random_ is not None
    assert seeing > 0.8 and abs(random_) < 0.05
    same = [quality.consistency(one) for one in made]
    assert all(count > 100 for _, count in same)
    assert same[0][0] is not None and same[1][0] is not None and same[0][0] > 0.85 > 0.5 > same[1][0]


def test_a_circle_of_three_is_counted() -> None:
    made = table(Truth((0.0, 0.0, 0.0)), 1, 6, 1, rng())
    left, right = np.array([0, 1, 2, 0, 1, 2]), np.array([1, 2, 0, 1, 2, 0])
    circle = replace(made, left=left, right=right, choice=np.zeros(6, np.int64))
    assert quality.cycles(circle) == (1, 1)
    chain = replace(circle, choice=np.array([0, 0, 1, 0, 0, 1]))
    assert quality.cycles(chain) == (0, 1)


def spammers_found(seed: int, annotators: int, ballots: int) -> tuple[int, int, int]:
    """(spammers found, spammers, others blamed)."""
    truth = Truth((0.0, 0.8, -0.8, -1.6, 1.4), side=0.2, bad=0.02, spammers=0.1)
    judged = quality.annotators(table(truth, annotators, ballots, 60, rng(seed)), ANCHOR)
    guilty = round(0.1 * annotators)
    flagged = [bool(one.reasons) for one in judged]
    return sum(flagged[:guilty]), guilty, sum(flagged[guilty:])


def test_spammers_are_flagged_and_nobody_else() -> None:
    found = np.array([spammers_found(seed, 100, 100) for seed in range(4)]).sum(axis=0)
    assert found[0] >= 0.9 * found[1]
    assert found[2] < 0.01 * (400 - found[1])


def test_habits_alone_are_no_reason() -> None:
    """Arms that are alike: whoever never says tie, or prefers a side a little, cannot be told from one who looks."""
    made = table(Truth((0.0, 0.02, -0.02), annotator_sd=0.0, prompt_sd=0.0), 60, 60, 20, rng())
    own = (made.annotator < 20) & (made.choice == TIE)
    made = replace(made, choice=np.where(own, rng(2).integers(2, size=len(made)), made.choice))
    assert [one for one in quality.annotators(made, ANCHOR) if one.reasons] == []


def judged(made: Table) -> set[str]:
    return set(quality.annotators(made, ANCHOR)[0].reasons)


def test_gold_speed_and_sameness_are_reasons() -> None:
    made = table(Truth((0.0, 1.0)), 1, 30, 5, rng())
    assert judged(made) == set()
    assert judged(replace(made, dwell_ms=np.full(30, 300))) == {"too fast"}
    assert judged(replace(made, choice=np.full(30, TIE))) == {"always the same"}
    assert judged(replace(made, choice=np.full(30, LEFT))) == {"always the same", "one-sided"}
    gold = np.where(np.arange(30) < 6, 1 - made.choice.clip(0, 1), -1)
    assert judged(replace(made, expected=gold)) == {"fails gold"}
    assert not quality.used(made, quality.annotators(replace(made, expected=gold), ANCHOR)).any()


def test_what_is_cut_keeps_its_repeats_straight() -> None:
    made = table(Truth(FIVE), 4, 20, 5, rng(), repeat=0.5)
    cut = made.where(made.annotator > 0)
    again = cut.repeats >= 0
    assert again.any()
    assert (cut.unit[again] == cut.unit[cut.repeats[again]]).all()
    assert (cut.swapped[again] != cut.swapped[cut.repeats[again]]).all()
    firsts = np.isin(np.arange(len(made)), made.repeats[made.repeats >= 0])
    assert (made.where(~firsts).repeats == -1).all()


@pytest.mark.slow
def test_a_million_votes_take_two_seconds_of_work() -> None:
    made = table(Truth((*FIVE, 0.3, -0.3, 0.1)), 5000, 200, 120, rng())
    stats.results(made.where(np.arange(len(made)) < 1000), ANCHOR)
    begun = time.process_time()
    stats.results(made, ANCHOR)
    assert time.process_time() - begun < 2.0


def test_the_random_choice_follows_its_chances() -> None:
    chances = np.tile([0.1, 0.2, 0.3, 0.4], (20_000, 1))
    often = np.bincount(simulate.draw(chances, rng()), minlength=4) / 20_000
    assert often == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.015)
