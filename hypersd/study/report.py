"""Everything that the votes of a study say, worked out when somebody asks and kept until there is a new vote."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import sqlalchemy as sa

from hypersd.records import Item
from hypersd.study import quality
from hypersd.study.ballots import items_of
from hypersd.study.definition import Study
from hypersd.study.schema import ballot, vote
from hypersd.study.statistics import Result, drop_to_flip, results
from hypersd.study.table import Ints, fetch, tabulate
from hypersd.study.votes import Store, is_undone

Key = tuple[int, int, int]


@dataclass(frozen=True)
class Cost:
    """What a picture of an arm costs: network forward passes, and the median of the seconds that it took."""

    nfe: float
    seconds: float


@dataclass(frozen=True)
class Report:
    """`votes` were cast, `used` of them pass the filter; `results` are of those, and so is everything below.

    `repeats` and `ceiling` are (share, of how many), `cycles` (found, of how many triples), `fragile` how many votes
    hold the first place and their share, `dwell_ms` of each vote. `judged` are all annotators.
    """

    study: Study
    votes: int
    used: int
    judged: tuple[quality.Annotator, ...]
    results: tuple[Result, ...]
    costs: dict[str, Cost]
    repeats: tuple[float | None, int]
    alpha: float | None
    ceiling: tuple[float | None, int]
    cycles: tuple[int, int]
    fragile: tuple[int, float]
    dwell_ms: Ints

    @property
    def flagged(self) -> list[quality.Annotator]:
        return [one for one in self.judged if one.reasons]


class Reports:
    """The report of one study, the same one until a vote comes, is taken back or erased. Thread-safe."""

    def __init__(self, store: Store, study: Study) -> None:
        self._store, self._study, self._lock = store, study, threading.Lock()
        self._kept: tuple[Key, Report] | None = None

    def latest(self) -> Report:
        """Raises Problem: the database cannot be read."""
        with self._lock:  # whoever comes second waits for the first one's report instead of making it again
            key = self._store.read(self._key)
            if self._kept is None or self._kept[0] != key:
                self._kept = key, report(self._store, self._study)
            return self._kept[1]

    def _key(self, connection: sa.Connection) -> Key:
        counted = sa.select(sa.func.count(), sa.func.coalesce(sa.func.max(vote.c.seq), 0))
        counted = counted.select_from(vote).join(ballot, vote.c.ballot == ballot.c.id)
        number, last = connection.execute(counted.where(ballot.c.study == self._study.sha256, ~is_undone())).one()
        return int(number), int(last), quality.FILTER_VERSION


def report(store: Store, study: Study) -> Report:
    """Read all votes of a study and say what they say."""
    items = items_of(store)
    table = tabulate(fetch(store, study), items, study)
    judged = quality.annotators(table, study.anchor) if len(table) else []
    kept = table.where(quality.used(table, judged))
    return Report(
        study=study,
        votes=len(table),
        used=len(kept),
        judged=tuple(judged),
        results=tuple(results(kept, study.anchor)) if kept.compares.any() else (),
        costs=_costs(items.values(), study),
        repeats=quality.consistency(kept),
        alpha=quality.alpha(kept) if len(kept) else None,
        ceiling=quality.ceiling(kept) if len(kept) else (None, 0),
        cycles=quality.cycles(kept),
        fragile=drop_to_flip(kept, study.anchor) if kept.compares.any() else (0, 0.0),
        dwell_ms=kept.dwell_ms,
    )


def _costs(items: Iterable[Item], study: Study) -> dict[str, Cost]:
    of_arm: dict[str, list[Item]] = {arm: [] for arm in study.arms}
    for one in items:
        if one.arm in of_arm and one.prompt in study.prompts:
            of_arm[one.arm].append(one)
    return {
        arm: Cost(float(np.mean([one.nfe for one in own])), float(np.median([one.seconds for one in own])))
        for arm, own in of_arm.items()
        if own
    }
