"""All votes of a study as columns of numbers, which is what statistics are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from hypersd.records import CHOICES, Item
from hypersd.study.ballots import items_of
from hypersd.study.definition import Study
from hypersd.study.schema import ballot, vote
from hypersd.study.votes import Store, is_undone

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
LEFT, RIGHT, TIE, BOTH_BAD = range(4)


@dataclass(frozen=True)
class Table:
    """One entry a vote in each array, oldest first.

    `annotator`, `prompt`, `left`, `right` are places in `annotators`, `prompts`, `arms`; `choice` in CHOICES. `unit`
    numbers the pair of pictures whichever way round, `swapped` says that the one with the greater id was on the left.
    `expected` is the known answer of gold votes, else -1; `repeats` the row that asked the same before, else -1.
    """

    annotators: tuple[str, ...]
    prompts: tuple[str, ...]
    arms: tuple[str, ...]
    annotator: Ints
    prompt: Ints
    left: Ints
    right: Ints
    choice: Ints
    dwell_ms: Ints
    unit: Ints
    swapped: Bools
    expected: Ints
    repeats: Ints

    def __len__(self) -> int:
        return len(self.choice)

    def where(self, mask: Bools) -> Table:
        """The rows of a mask; a repeat whose first vote is left out is one no more."""
        new_place = np.where(mask, np.cumsum(mask) - 1, -1)
        cut = {f.name: getattr(self, f.name)[mask] for f in fields(self)[3:]}
        cut["repeats"] = np.where(cut["repeats"] >= 0, new_place[cut["repeats"]], -1)
        return replace(self, **cut)

    @property
    def compares(self) -> Bools:
        """Votes that compare arms: gold and repeated ballots measure the annotator instead."""
        return np.asarray((self.expected < 0) & (self.repeats < 0))

    def counts(self) -> NDArray[np.float64]:
        """[K, K, 4] votes with arm i on the left and arm j on the right, by choice."""
        arms = len(self.arms)
        cells = np.bincount(self.cell(), minlength=arms * arms * len(CHOICES))
        return cells.reshape(arms, arms, len(CHOICES)).astype(np.float64)

    def cell(self) -> Ints:
        return np.asarray((self.left * len(self.arms) + self.right) * len(CHOICES) + self.choice)


def read(store: Store, study: Study) -> Table:
    """The votes of a study that were not taken back. Raises Problem."""
    return tabulate(fetch(store, study), items_of(store), study)


def fetch(store: Store, study: Study) -> list[Any]:
    """The rows that a table is made of, with the columns of their ballots and votes, in the same order."""
    return store.read(lambda c: list(c.execute(_query(study.sha256))))


def tabulate(rows: list[Any], items: Mapping[str, Item], study: Study) -> Table:
    arms = study.drawn_arms()
    number = {name: n for n, name in enumerate(items)}
    place = {name: arms.index(items[name].arm) for name in {row.left for row in rows} | {row.right for row in rows}}
    annotators = tuple(dict.fromkeys(row.annotator for row in rows))
    who, text = ({name: n for n, name in enumerate(names)} for names in (annotators, study.prompts))
    at = {row.id: n for n, row in enumerate(rows)}
    low_high = np.array([sorted((number[row.left], number[row.right])) for row in rows], dtype=np.int64).reshape(-1, 2)
    _, unit = np.unique(low_high, axis=0, return_inverse=True)
    return Table(
        annotators=annotators,
        prompts=study.prompts,
        arms=arms,
        annotator=_ints(who[row.annotator] for row in rows),
        prompt=_ints(text[row.prompt] for row in rows),
        left=_ints(place[row.left] for row in rows),
        right=_ints(place[row.right] for row in rows),
        choice=_ints(CHOICES.index(row.choice) for row in rows),
        dwell_ms=_ints(min(row.dwell_ms, (row.at_us - row.issued_us) // 1000) for row in rows),
        unit=unit.reshape(-1).astype(np.int64),
        swapped=np.array([number[row.left] > number[row.right] for row in rows], dtype=bool),
        expected=_ints(CHOICES.index(row.expected) if row.expected else -1 for row in rows),
        repeats=_ints(at.get(row.repeat_of, -1) for row in rows),
    )


def _query(study_sha: str) -> sa.Select[Any]:
    """Counted votes with their ballots. Ordered by what every copy of the database agrees on."""
    of_ballot = ("id", "annotator", "prompt", "left", "right", "propensity", "issued_us", "expected", "repeat_of")
    of_vote = ("choice", "attributes", "dwell_ms", "at_us")
    columns = [*(ballot.c[name] for name in of_ballot), *(vote.c[name] for name in of_vote)]
    rows = sa.select(*columns).join(vote, vote.c.ballot == ballot.c.id)
    return rows.where(ballot.c.study == study_sha, ~is_undone()).order_by(vote.c.at_us, ballot.c.id)


def _ints(values: Any) -> Ints:
    return np.array(list(values), dtype=np.int64)
