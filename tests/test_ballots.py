"""The desk: which ballot comes next, and what a reload, an undo, a skip and a hurry lead to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from voting import ANN, ARMS, BOB, MINUTE, Clock, definition, desk, pool

from hypersd.records import Ballot, InputError
from hypersd.study import definition as definitions
from hypersd.study.ballots import Desk, Wait, items_of, mirrored, missing
from hypersd.study.definition import load, parse
from hypersd.study.guards import Guards, network_of
from hypersd.study.votes import Store


def test_the_study_in_assets_is_one() -> None:
    study = load()
    assert study.anchor in study.arms
    assert len(study.prompts) * len(study.seeds) * len(study.drawn_arms()) > 100
    assert study == parse(yaml.safe_load(definitions.FILE.read_text(encoding="utf-8")))


def test_comments_make_no_other_study_but_words_do(ram: Path) -> None:
    text = definitions.FILE.read_text(encoding="utf-8")
    (ram / "x.yaml").write_text("# another comment\n" + text, encoding="utf-8")
    assert load(ram / "x.yaml").sha256 == load().sha256
    (ram / "x.yaml").write_text(text.replace("a happy cat", "a sad cat"), encoding="utf-8")
    assert load(ram / "x.yaml").sha256 != load().sha256


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"ballotz": 3}, "has no setting 'ballotz'; did you mean ballots?"),
        ({"consent": None}, "consent must be text"),
        ({"prompts": []}, "prompts must be a list of one or more"),
        ({"prompts": ["a cat", "a  cat"]}, "prompts names a cat twice"),
        ({"prompts": ["cat " * 999]}, "a prompt has 3,996 characters"),
        ({"seeds": [-1]}, "a seed must be a whole number from 0"),
        ({"arms": ["base"]}, "an arm is a method at a step count such as base@4, got 'base'"),
        ({"arms": ["base@5000", "base@1"]}, "got 'base@5000'"),
        ({"arms": ["base@8"]}, "arms must name two or more"),
        ({"anchor": "base@9"}, "anchor must be one of base@8, base@4, lcm@4, got 'base@9'"),
        ({"pairs": ["all"]}, "pairs must be one of all, same_steps"),
        ({"gold": [["base@8", "base@8"]]}, "a gold pair names two arms, the better one first"),
        ({"shares": {"gold": 0.4, "repeat": 0.4, "uniform": 0.25}}, "must leave half of the ballots"),
        ({"shares": {"gold": 0.1, "repeat": 0.1, "uniform": 0}}, "shares.uniform must be 0.05 or more"),
        ({"shares": {"gold": 0.1, "repeat": 0.1}}, "shares lacks uniform"),
        ({"gold": [], "shares": {"gold": 0.1, "repeat": 0, "uniform": 0.3}}, "gold names no pair"),
        ({"limits": {"annotator_per_minute": 1}}, "limits lacks annotator_per_day, network_per_minute"),
        ({"attributes": ["=1+1"]}, "an attribute is a word such as alignment"),
        ({"reveal": True}, "reveal must be one of end, never"),
    ],
)
def test_a_wrong_study_says_where(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(definition(**change))
    assert sentence in str(caught.value)


@pytest.mark.parametrize(("text", "sentence"), [("a: [", "is not YAML in line 1"), ("- 1", "the study must name")])
def test_a_wrong_file_names_itself(text: str, sentence: str, ram: Path) -> None:
    (ram / "x.yaml").write_text(text)
    with pytest.raises(InputError, match=rf"x\.yaml.*{sentence}"):
        load(ram / "x.yaml")
    with pytest.raises(InputError, match="cannot be read"):
        load(ram / "none.yaml")


def test_same_steps_compares_methods_and_the_anchor() -> None:
    study = parse(definition(arms=["base@25", "base@4", "lcm@4", "lcm@1"], anchor="base@25", pairs="same_steps"))
    named = {(study.arms[i], study.arms[j]) for i, j in study.arm_pairs()}
    assert named == {("base@25", "base@4"), ("base@25", "lcm@4"), ("base@25", "lcm@1"), ("base@4", "lcm@4")}


def test_no_ballot_before_consent_or_after_withdrawal(ram: Path) -> None:
    at = desk(ram / "x.db")
    with pytest.raises(InputError, match="agree first"):
        at.next(BOB)
    at.next(ANN)
    at.store.withdraw(ANN)
    at.consent(ANN)
    with pytest.raises(InputError, match="agree first"):
        at.next(ANN)


def test_a_reload_shows_the_same_pair_until_it_expires(ram: Path) -> None:
    clock = Clock()
    at = desk(ram / "x.db", clock)
    first = ballot(at)
    assert ballot(at) == first
    assert Desk(at.store, at.study, seed=2).next(ANN) == first, "another process, after a restart"
    clock.now += 30 * MINUTE
    second = ballot(at)
    assert second.id != first.id
    assert at.answer(first.id, ANN, "left").kind == "expired"


def test_both_pictures_share_prompt_and_noise_and_differ_in_arm(ram: Path) -> None:
    at = desk(ram / "x.db", ballots=12)
    for asked in vote_all(at, lambda b: "tie"):
        left, right = at.items[asked.left], at.items[asked.right]
        assert (left.prompt, left.seed, left.noise_sha256) == (right.prompt, right.seed, right.noise_sha256)
        assert asked.prompt == left.prompt
        assert left.arm != right.arm
        assert 0 < asked.propensity <= 1 / 2
    assert {asked.ballot.prompt for asked in at.history(ANN)[:4]} == set(at.study.prompts), "each once, then again"
    ended = at.next(ANN)
    assert isinstance(ended, Wait) and ended.said == "That was the last pair. Thank you!"


def test_undo_brings_the_same_pair_as_a_new_ballot(ram: Path) -> None:
    at = desk(ram / "x.db")
    assert not at.undo(ANN)
    first = ballot(at)
    at.answer(first.id, ANN, "left")
    assert at.undo(ANN) and at.progress(ANN).votes == 0
    again = ballot(at)
    assert (again.left, again.right) == (first.left, first.right) and again.id != first.id
    assert at.answer(first.id, ANN, "right").kind == "expired"
    assert at.answer(again.id, ANN, "right").kind == "saved"
    assert at.progress(ANN).votes == 1
    assert ballot(at).id not in (first.id, again.id)


def test_undo_comes_before_the_pair_that_is_open_already(ram: Path) -> None:
    at = desk(ram / "x.db")
    first = ballot(at)
    at.answer(first.id, ANN, "left")
    second = ballot(at)
    at.answer(second.id, ANN, "left")
    third = ballot(at)
    for taken in (second, first):
        assert at.undo(ANN)
        again = ballot(at)
        assert (again.left, again.right) == (taken.left, taken.right) and again.id != taken.id
        assert ballot(at) == again, "a reload"
    assert not at.undo(ANN)
    at.answer(ballot(at).id, ANN, "right")
    assert (ballot(at).left, ballot(at).right) == (second.left, second.right)
    at.answer(ballot(at).id, ANN, "right")
    assert ballot(at) == third
    assert at.progress(ANN).votes == 2


def test_a_picture_that_cannot_be_shown_is_in_no_pair(ram: Path) -> None:
    full = desk(ram / "x.db")
    at = Desk(full.store, full.study, seed=1, usable=lambda one: one.arm != "lcm@4" and one.seed == 1)
    at.consent(ANN)
    for asked in vote_all(at, lambda b: "tie"):
        for side in (asked.left, asked.right):
            assert at.items[side].arm != "lcm@4" and at.items[side].seed == 1


def test_a_closed_study_asks_nothing(ram: Path) -> None:
    at = desk(ram / "x.db")
    at.store.note("freeze", "", at.study.sha256)
    ended = at.next(ANN)
    assert isinstance(ended, Wait) and "closed" in ended.said


def test_a_skipped_pair_is_followed_by_another(ram: Path) -> None:
    at = desk(ram / "x.db")
    first = ballot(at)
    assert at.flag(first.id, ANN, "the left one is broken")
    assert at.skip(first.id, ANN)
    assert ballot(at).id != first.id
    assert at.progress(ANN).votes == 0


def test_gold_and_repeats_come_as_often_as_the_study_says(ram: Path) -> None:
    at = desk(ram / "x.db", ballots=100, shares={"gold": 0.1, "repeat": 0.2, "uniform": 0.25})
    asked = vote_all(at, lambda b: b.expected or "left")
    gold = [b for b in asked if b.is_gold]
    assert 3 <= len(gold) <= 20
    for one in gold:
        better = one.left if one.expected == "left" else one.right
        assert (at.items[one.left].arm == "base@1") != (at.items[one.right].arm == "base@1")
        assert at.items[better].arm == "base@8"
    by_id = {b.id: (n, b) for n, b in enumerate(asked)}
    repeats = [(n, b, *by_id[b.repeat_of]) for n, b in enumerate(asked) if b.repeat_of]
    assert 8 <= len(repeats) <= 35
    for n, again, before, first in repeats:
        assert (again.left, again.right) == (first.right, first.left)
        assert n - before >= 5
    assert len({first.id for _, _, _, first in repeats}) == len(repeats), "none is asked three times"
    progress = at.progress(ANN)
    assert (progress.votes, progress.repeats, progress.agreed) == (100, len(repeats), 0), "always left: never the same"
    assert mirrored("left") == "right" and mirrored("tie") == "tie" and mirrored(None) is None


def test_practice_is_known_and_leaves_nothing(ram: Path) -> None:
    at = desk(ram / "x.db")
    for left, right, better in at.practice():
        assert (left if better == "left" else right).arm == "base@8"
    assert len(at.practice()) == 2
    assert at.history(ANN) == []


def test_what_practice_tells_is_never_asked_as_gold(ram: Path) -> None:
    at = desk(ram / "x.db", ballots=100, practice=2, shares={"gold": 0.5, "repeat": 0.0, "uniform": 0.25})
    told = {left.prompt for _ in range(20) for left, _, _ in at.practice()}
    asked = {ballot.prompt for ballot in vote_all(at, lambda b: b.expected or "tie") if ballot.is_gold}
    assert told and asked and not told & asked


def test_a_pair_with_all_its_votes_is_not_asked_any_more(ram: Path) -> None:
    at = desk(ram / "x.db", votes_per_pair=4, ballots=100)
    asked = vote_all(at, lambda b: "left")
    pairs = Counter(frozenset((at.items[b.left].arm, at.items[b.right].arm)) for b in asked)
    assert len(pairs) == 3 and set(pairs.values()) == {4}
    ended = at.next(ANN)
    assert isinstance(ended, Wait) and "all the votes" in ended.said


def test_attributes_are_those_of_the_study(ram: Path) -> None:
    at = desk(ram / "x.db")
    asked = ballot(at)
    for wrong in ({"beauty": "left"}, {"alignment": "both_bad"}):
        with pytest.raises(InputError, match="attributes are alignment, artefacts, each left, right or tie"):
            at.answer(asked.id, ANN, "left", attributes=wrong)
    assert at.answer(asked.id, ANN, "left", attributes={"alignment": "tie"}).kind == "saved"


def test_the_desk_says_what_is_not_drawn(ram: Path) -> None:
    study, kept = parse(definition()), Store(ram / "x.db")
    with pytest.raises(InputError, match="no pair of the study has its pictures yet"):
        Desk(kept, study)
    kept.add_items([one for one in pool(study) if one.arm != "lcm@4"])
    lacking = missing(study, items_of(kept))
    assert {arm for arm, _, _ in lacking} == {"lcm@4"} and len(lacking) == 8
    assert len(Desk(kept, study)._pairs) == 1, "the rest can be compared meanwhile"
    assert items_of(kept)[pool(study)[0].id] == pool(study)[0]


def test_whoever_hurries_waits_and_nobody_else_does() -> None:
    seconds = [0.0]
    guards = Guards(parse(definition(limits=LIMITS)).limits, clock=lambda: seconds[0])
    assert [guards.wait(ANN) for _ in range(4)] == [0, 0, 0, 20]
    assert guards.wait(BOB) == 0
    seconds[0] += 20
    assert [guards.wait(ANN), guards.wait(ANN)] == [0, 20]
    assert max(guards.wait(f"{n:032x}", "net") for n in range(5)) == 0
    assert guards.wait("f" * 32, "net") == 12, "the sixth of one network, whoever it is"
    seconds[0] += 3600
    waits = 0
    for _ in range(30):
        waits += guards.wait(BOB) > 0
        seconds[0] += 60
    assert waits == 30 - (10 - 1), "a day's share is used up"


LIMITS = {"annotator_per_minute": 3, "annotator_per_day": 10, "network_per_minute": 5}


def test_the_desk_asks_its_guards(ram: Path) -> None:
    at = desk(ram / "x.db", limits=LIMITS)
    for _ in range(3):
        at.answer(ballot(at).id, ANN, "left")
    waiting = at.next(ANN)
    assert isinstance(waiting, Wait) and 0 < waiting.seconds <= 20
    assert "comes in" in waiting.said


def test_neighbours_share_a_network_and_names_cannot_be_read() -> None:
    assert network_of("203.0.113.7") == network_of("203.0.113.99") == network_of("::ffff:203.0.113.1")
    assert network_of("2001:db8::1") == network_of("2001:db8::2:0:0:1") != network_of("2001:db8:0:1::1")
    assert network_of("203.0.114.7") != network_of("203.0.113.7")
    assert network_of("testclient") == ""
    assert len(network_of("203.0.113.7")) == 16


def test_a_ballot_names_the_chance_that_it_had(ram: Path) -> None:
    """The mean of 1/chance is the number of possible ballots: here 6 pairs, 2 noises and 2 sides of 1 prompt."""
    four = ["base@8", "base@4", "base@2", "lcm@4"]
    at = desk(ram / "x.db", ballots=500, arms=four, prompts=["a cat"])
    chances = np.random.default_rng(3)
    asked = vote_all(at, lambda b: "left" if chances.random() < 0.7 else "tie")
    inverse = np.array([1 / b.propensity for b in asked])
    assert abs(inverse.mean() - 24) < 4 * inverse.std() / len(inverse) ** 0.5
    assert inverse.std() > 1, "the pairs' chances differ"


def test_arms_are_told_at_the_end_or_never(ram: Path) -> None:
    at = desk(ram / "x.db", ballots=3)
    at.answer(ballot(at).id, ANN, "left")
    assert at.reveal(ANN) == [], "the session goes on"
    asked = vote_all(at, lambda b: "tie")
    told = at.reveal(ANN)
    assert [one.choice for one in told] == ["left", "tie", "tie"]
    assert (told[-1].left, told[-1].right) == (at.items[asked[-1].left].arm, at.items[asked[-1].right].arm)
    silent = desk(ram / "y.db", ballots=3, reveal="never")
    vote_all(silent, lambda b: "tie")
    assert silent.reveal(ANN) == []


def ballot(at: Desk) -> Ballot:
    asked = at.next(ANN)
    assert isinstance(asked, Ballot), asked
    return asked


def vote_all(at: Desk, choose: Callable[[Ballot], str]) -> list[Ballot]:
    asked = []
    while isinstance(one := at.next(ANN), Ballot):
        assert at.answer(one.id, ANN, choose(one)).kind == "saved"
        asked.append(one)
    return asked


def test_arms_of_the_small_study_are_the_ones_compared(ram: Path) -> None:
    at = desk(ram / "x.db")
    assert {at.items[side].arm for b in vote_all(at, lambda b: "left") for side in (b.left, b.right)} == set(ARMS)
