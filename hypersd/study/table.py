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
OF_VOTE = ("choice", "attributes", "dwell_ms", "at_us")
COLUMNS = ("id", "annotator", "prompt", "left", "right", "propensity", "issued_us", "expected", "repeat_of", *OF_VOTE)


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
    columns: list[tuple[Any, ...]] = list(zip(*rows, strict=True)) or [()] * len(COLUMNS)
    of = dict(zip(COLUMNS, columns, strict=True))
    arms, annotators = study.drawn_arms(), tuple(dict.fromkeys(of["annotator"]))
    ends = {name: n for n, name in enumerate(items)}
    arm_of = np.array([arms.index(one.arm) if one.arm in arms else -1 for one in items.values()], dtype=np.int64)
    left, right = _numbered(of["left"], ends), _numbered(of["right"], ends)
    _, unit = np.unique(np.minimum(left, right) * len(ends) + np.maximum(left, right), return_inverse=True)
    dwell_ms, issued_us, at_us = (np.array(of[name], dtype=np.int64) for name in ("dwell_ms", "issued_us", "at_us"))
    choices = {name: n for n, name in enumerate(CHOICES)}
    return Table(
        annotators=annotators,
        prompts=study.prompts,
        arms=arms,
        annotator=_numbered(of["annotator"], {name: n for n, name in enumerate(annotators)}),
        prompt=_numbered(of["prompt"], {name: n for n, name in enumerate(study.prompts)}),
        left=arm_of[left],
        right=arm_of[right],
        choice=_numbered(of["choice"], choices),
        dwell_ms=np.minimum(dwell_ms, (at_us - issued_us) // 1000),
        unit=unit.astype(np.int64),
        swapped=left > right,
        expected=_numbered(of["expected"], {**choices, None: -1}),
        repeats=_numbered(of["repeat_of"], _places(of["id"], of["repeat_of"])),
    )


def _places(ballots: tuple[str, ...], repeat_of: tuple[str | None, ...]) -> dict[str | None, int]:
    """The row of every ballot that is repeated, -1 where it was taken back."""
    at = {name: n for n, name in enumerate(ballots)}
    return {None: -1, **{name: at.get(name, -1) for name in repeat_of if name}}


def _numbered(values: tuple[Any, ...], numbers: Mapping[Any, int]) -> Ints:
    return np.fromiter(map(numbers.__getitem__, values), dtype=np.int64, count=len(values))


def _query(study_sha: str) -> sa.Select[Any]:
    """Counted votes with their ballots. Ordered by what every copy of the database agrees on."""
    columns = [(vote if name in OF_VOTE else ballot).c[name] for name in COLUMNS]
    rows = sa.select(*columns).join_from(ballot, vote, vote.c.ballot == ballot.c.id)
    return rows.where(ballot.c.study == study_sha, ~is_undone()).order_by(vote.c.at_us, ballot.c.id)
