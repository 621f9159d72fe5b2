"""The desk: gives an annotator the next ballot and takes the answer. A screen needs nothing else of the study."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import sqlalchemy as sa

from hypersd.records import Ballot, InputError, Item
from hypersd.study import pick
from hypersd.study.definition import Study, steps_of
from hypersd.study.guards import Guards
from hypersd.study.people import new_id
from hypersd.study.schema import ballot, event, item, vote
from hypersd.study.tally import Tally
from hypersd.study.votes import CLOSED, Answer, Store, is_frozen

REPEAT_AFTER = 5  # ballots; sooner, one would still know what one said


@dataclass(frozen=True)
class Asked:
    """A ballot and what became of it so far; `choice` is None without a vote."""

    ballot: Ballot
    choice: str | None
    undone: bool
    skipped: bool

    @property
    def counts(self) -> bool:
        return self.choice is not None and not self.undone


@dataclass(frozen=True)
class Progress:
    """`votes` of `of` given; `repeats` pairs asked twice, of which `agreed` were answered the same way."""

    votes: int
    of: int
    repeats: int
    agreed: int


@dataclass(frozen=True)
class Revealed:
    """A vote with the arms that it was about."""

    prompt: str
    left: str
    right: str
    choice: str


@dataclass(frozen=True)
class Wait:
    """No ballot now; `seconds` is 0 when there will be none."""

    said: str
    seconds: int = 0


class Desk:
    """Everything between the screen and the store, for one study.

    Args:
        usable: which items may be shown; of an item of the store the picture may be missing here.

    Raises:
        InputError: from the constructor, when no pair of the study has its pictures.
        NotSaved: from methods that write.
    """

    def __init__(
        self,
        store: Store,
        study: Study,
        guards: Guards | None = None,
        seed: int | None = None,
        usable: Callable[[Item], bool] = lambda one: True,
    ) -> None:
        self.store, self.study = store, study
        self.items = {name: one for name, one in items_of(store).items() if one.prompt in study.prompts}
        self._guards, self._rng = guards or Guards(study.limits), np.random.default_rng(seed)
        self._pool = _pool(filter(usable, self.items.values()))
        self._pairs = [(i, j) for i, j in study.arm_pairs() if self._prompts(study.arms[i], study.arms[j])]
        if not self._pairs:
            raise InputError("no pair of the study has its pictures yet; draw them first")
        self._strata = [_stratum(study.arms[i], study.arms[j]) for i, j in self._pairs]
        self._tally = Tally(store, study, self.items)
        store.add_study(study.sha256, study.definition)

    def consent(self, annotator: str) -> None:
        self.store.note("consent", annotator, self.study.sha256)

    def consented(self, annotator: str) -> bool:
        """Whether this annotator agreed to this study, and has not withdrawn."""
        given = sa.select(event.c.kind).where(event.c.annotator == annotator, event.c.kind.in_(("consent", "withdraw")))
        given = given.where(event.c.study.in_((self.study.sha256, "")))
        return self.store.read(lambda c: set(c.scalars(given))) == {"consent"}

    def closed(self) -> bool:
        return self.store.read(lambda c: bool(c.scalar(sa.select(is_frozen(self.study.sha256)))))

    def next(self, annotator: str, network: str = "") -> Ballot | Wait:
        """The open ballot of this annotator if there is one, so that a reload changes nothing; else a new one.

        Raises:
            InputError: the annotator has not consented, or has withdrawn.
        """
        if not self.consented(annotator):
            raise InputError("read what the study is about and agree first")
        if self.closed():
            return Wait(CLOSED.said)
        history = self.history(annotator)
        now = self.store.clock()
        for asked in [] if _taken_back(history) else reversed(history):
            if asked.choice is None and not asked.skipped and asked.ballot.expires_us > now:
                return asked.ballot
        if sum(asked.counts for asked in history) >= self.study.ballots:
            return Wait("That was the last pair. Thank you!")
        if seconds := self._guards.wait(annotator, network):
            return Wait(f"That was quick. The next pair comes in {seconds} s.", seconds)
        made = self._make(annotator, history)
        if made is None:
            return Wait("The study has all the votes that it needs. Thank you!")
        minutes = self.study.ballot_minutes * 60_000_000
        issued = replace(made, id=new_id(), annotator=annotator, issued_us=now, expires_us=now + minutes)
        self.store.issue(issued)
        return issued

    def answer(
        self,
        ballot_id: str,
        annotator: str,
        choice: str,
        *,
        dwell_ms: int = 0,
        zoomed: bool = False,
        attributes: Mapping[str, str] | None = None,
    ) -> Answer:
        """Take a vote; see `Store.vote`. Raises InputError for a choice or attribute that the study does not have."""
        for name, side in (attributes or {}).items():
            if name not in self.study.attributes or side not in ("left", "right", "tie"):
                allowed = ", ".join(self.study.attributes) or "nothing"
                raise InputError(f"attributes are {allowed}, each left, right or tie")
        least = self.study.minimum_dwell_ms
        given = {"dwell_ms": dwell_ms, "zoomed": zoomed, "attributes": attributes, "min_dwell_ms": least}
        return self.store.vote(ballot_id, annotator, choice, **given)  # type: ignore[arg-type]

    def skip(self, ballot_id: str, annotator: str) -> bool:
        return self.store.note("skip", annotator, self.study.sha256, ballot_id)

    def flag(self, ballot_id: str, annotator: str, why: str) -> bool:
        """Tell that something is wrong with a pair, such as a broken picture."""
        return self.store.note("flag", annotator, self.study.sha256, ballot_id, why[:500])

    def undo(self, annotator: str) -> bool:
        """Take back the latest vote; the same pair comes again as a fresh ballot, before the one that is open now.
        False if there is none."""
        voted = [asked for asked in self.history(annotator) if asked.counts]
        return bool(voted) and self.store.note("undo", annotator, self.study.sha256, voted[-1].ballot.id)

    def practice(self) -> list[tuple[Item, Item, str]]:
        """A few pairs whose answer is known and told: left, right, and the better side. Nothing of them is stored.

        Their prompts are kept for practice: what was told here is never asked as a gold pair, if there are prompts
        enough for both.
        """
        return [
            (self.items[made.left], self.items[made.right], made.expected or "")
            for made in (self._gold([], practice=True) for _ in range(self.study.practice))
            if made
        ]

    def progress(self, annotator: str) -> Progress:
        counted = {asked.ballot.id: asked for asked in self.history(annotator) if asked.counts}
        twice = [(counted[b.repeat_of], a) for a in counted.values() if (b := a.ballot).repeat_of in counted]
        agreed = sum(mirrored(first.choice) == second.choice for first, second in twice)
        return Progress(len(counted), self.study.ballots, len(twice), agreed)

    def reveal(self, annotator: str) -> list[Revealed]:
        """What was compared, once this annotator's session is over and if the study tells at all; else nothing."""
        counted = [asked for asked in self.history(annotator) if asked.counts and not asked.ballot.is_gold]
        if self.study.reveal != "end" or self.progress(annotator).votes < self.study.ballots:
            return []
        return [
            Revealed(a.ballot.prompt, self.items[a.ballot.left].arm, self.items[a.ballot.right].arm, a.choice or "")
            for a in counted
        ]

    def history(self, annotator: str) -> list[Asked]:
        """What this annotator was asked, oldest first."""
        return self.store.read(lambda c: _history(c, annotator, self.study.sha256))

    # Making ballots

    def _make(self, annotator: str, history: Sequence[Asked]) -> Ballot | None:
        """A ballot without its annotator and times: what was taken back, else gold, a repeat or a new pair."""
        if again := _taken_back(history):
            return again
        draw, shares = self._rng.random(), self.study.shares
        made = None
        if draw < shares.gold:
            made = self._gold(history)
        elif draw < shares.gold + shares.repeat:
            made = self._repeat(history)
        return made or self._pair(history)

    def _gold(self, history: Sequence[Asked], *, practice: bool = False) -> Ballot | None:
        able = [(better, worse) for better, worse in self.study.gold if self._prompts(better, worse)]
        if not able:
            return None
        better, worse = able[int(self._rng.integers(len(able)))]
        seen = Counter(asked.ballot.prompt for asked in history if asked.ballot.is_gold)
        prompts = self._prompts(better, worse)
        kept = min(self.study.practice, len(prompts) // 2)
        prompts = (prompts[:kept] or prompts) if practice else prompts[kept:]
        prompt = pick.least([seen[text] for text in prompts], self._rng)
        made = self._sides(prompts[prompt.place], better, worse, prompt.probability / len(able))
        expected = "left" if self.items[made.left].arm == better else "right"
        return replace(made, expected=expected)

    def _repeat(self, history: Sequence[Asked]) -> Ballot | None:
        again = {asked.ballot.repeat_of for asked in history}
        able = [
            asked.ballot
            for asked in history[:-REPEAT_AFTER]
            if asked.counts and not asked.ballot.is_gold and not asked.ballot.repeat_of and asked.ballot.id not in again
        ]
        if not able:
            return None
        first = able[int(self._rng.integers(len(able)))]
        return replace(first, left=first.right, right=first.left, repeat_of=first.id)

    def _pair(self, history: Sequence[Asked]) -> Ballot | None:
        tally, arms = self._tally, self.study.arms
        tally.refresh()
        voted = tally.votes.sum(axis=2)
        enough = self.study.votes_per_pair
        kept = [n for n, (i, j) in enumerate(self._pairs) if voted[i, j] + voted[j, i] < enough]
        if not kept:
            return None
        pairs, strata = [self._pairs[n] for n in kept], [self._strata[n] for n in kept]
        fit, anchor = tally.fit, arms.index(self.study.anchor)
        uniform = self.study.shares.uniform
        chosen = pick.pair(pairs, strata, tally.shown, fit.theta, float(fit.log_nu), anchor, uniform, self._rng)
        one, other = (arms[k] for k in pairs[chosen.place])
        prompts = self._prompts(one, other)
        seen = Counter(asked.ballot.prompt for asked in history)
        # First what this annotator has seen least, then what all have: no vote is worth more than the number of all.
        served = [(seen[text], tally.prompts[self.study.prompts.index(text)]) for text in prompts]
        ranks = {value: rank for rank, value in enumerate(sorted(set(served)))}
        prompt = pick.least([ranks[value] for value in served], self._rng)
        return self._sides(prompts[prompt.place], one, other, chosen.probability * prompt.probability)

    def _sides(self, prompt: str, one: str, other: str, probability: float) -> Ballot:
        """A ballot on two arms, with one of their common noises and either one on the left."""
        noises = sorted(self._pool[one, prompt].keys() & self._pool[other, prompt].keys())
        noise = noises[int(self._rng.integers(len(noises)))]
        left, right = (one, other) if self._rng.random() < 0.5 else (other, one)
        ends = self._pool[left, prompt][noise], self._pool[right, prompt][noise]
        return Ballot("", self.study.sha256, "", prompt, *ends, probability / len(noises) / 2, 0, 0)

    def _prompts(self, one: str, other: str) -> list[str]:
        """The prompts of which both arms have a picture from the same noise."""
        pool = self._pool
        return [text for text in self.study.prompts if pool.get((one, text), {}).keys() & pool.get((other, text), {})]


def mirrored(choice: str | None) -> str | None:
    """The same answer with the sides swapped."""
    return {"left": "right", "right": "left"}.get(choice or "", choice)


def _taken_back(history: Sequence[Asked]) -> Ballot | None:
    """The latest ballot whose vote was taken back, unless it was asked again since."""
    since: set[tuple[str, str]] = set()
    for asked in reversed(history):
        sides = (asked.ballot.left, asked.ballot.right)
        if asked.undone and sides not in since:
            return asked.ballot
        since.add(sides)
    return None


def items_of(store: Store) -> dict[str, Item]:
    """Every item of a store by its id."""
    columns = [item.c[name] for name in Item.__dataclass_fields__]
    rows = store.read(lambda c: list(c.execute(sa.select(item.c.id, *columns).order_by(item.c.id))))
    return {row[0]: Item(*row[1:]) for row in rows}


def missing(study: Study, items: Mapping[str, Item]) -> list[tuple[str, str, int]]:
    """(arm, prompt, seed) of every picture that the study names and the pool lacks."""
    there = {(one.arm, one.prompt, one.seed) for one in items.values()}
    named = [(arm, text, seed) for arm in study.drawn_arms() for text in study.prompts for seed in study.seeds]
    return [place for place in named if place not in there]


def _pool(items: Iterable[Item]) -> dict[tuple[str, str], dict[str, str]]:
    """Item ids by (arm, prompt), then by noise."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for one in items:
        found.setdefault((one.arm, one.prompt), {})[f"{one.seed}:{one.noise_sha256}"] = one.id
    return found


def _stratum(one: str, other: str) -> object:
    return steps_of(one) if steps_of(one) == steps_of(other) else "mixed"


def _history(connection: sa.Connection, annotator: str, study_sha: str) -> list[Asked]:
    def noted(kind: str) -> sa.Label[bool]:
        return sa.exists().where(event.c.ballot == ballot.c.id, event.c.kind == kind).label(kind)

    columns = [ballot.c[name] for name in Ballot.__dataclass_fields__]
    asked = sa.select(*columns, vote.c.choice, noted("undo"), noted("skip"))
    asked = asked.select_from(ballot.outerjoin(vote, vote.c.ballot == ballot.c.id)).order_by(ballot.c.seq)
    rows = connection.execute(asked.where(ballot.c.annotator == annotator, ballot.c.study == study_sha))
    return [Asked(Ballot(*row[:-3]), row[-3], bool(row[-2]), bool(row[-1])) for row in rows]
