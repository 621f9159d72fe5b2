"""From votes to preference pairs: one a pair of pictures, and never the same prompt in two splits."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

import numpy as np

from hypersd.records import Item, Pair, Problem
from hypersd.study import quality
from hypersd.study.ballots import items_of
from hypersd.study.definition import Study
from hypersd.study.table import Table, fetch, tabulate
from hypersd.study.votes import Store

SPLITS = (("train", 80), ("validation", 10), ("test", 10))  # per cent of all prompts there are


@dataclass(frozen=True)
class Cast:
    """One counted vote on two arms, as it is published: the annotator is a number, in order of appearance.

    `used` says whether the filter lets it through, `repeat` that it asks again what the annotator was asked before.
    """

    prompt: str
    left: Item
    right: Item
    choice: str
    attributes: str
    annotator: int
    dwell_ms: int
    at_us: int
    propensity: float
    used: bool
    repeat: bool
    gold: bool


@dataclass(frozen=True)
class Votes:
    """Everything that an export needs of a study: its votes, as rows and as a table, and who was judged how."""

    study: Study
    cast: tuple[Cast, ...]
    table: Table
    judged: tuple[quality.Annotator, ...]

    @property
    def compared(self) -> list[Cast]:
        """The votes that make preferences: let through by the filter, neither gold nor repeats."""
        return [one for one in self.cast if one.used and not one.gold and not one.repeat]


def gather(store: Store, study: Study) -> Votes:
    """Read a study's votes and judge its annotators. Raises Problem: nobody voted yet."""
    rows, items = fetch(store, study), items_of(store)
    if not rows:
        raise Problem(f"nobody has voted in the study {study.name!r} yet, so there is nothing to export")
    table = tabulate(rows, items, study)
    judged = quality.annotators(table, study.anchor)
    passed = quality.used(table, judged)
    number = {name: n for n, name in enumerate(table.annotators)}
    cast = tuple(
        Cast(
            prompt=row.prompt,
            left=items[row.left],
            right=items[row.right],
            choice=row.choice,
            attributes=row.attributes,
            annotator=number[row.annotator],
            dwell_ms=int(table.dwell_ms[n]),
            at_us=row.at_us,
            propensity=row.propensity,
            used=bool(passed[n]),
            repeat=bool(table.repeats[n] >= 0),
            gold=row.expected is not None,
        )
        for n, row in enumerate(rows)
    )
    return Votes(study, cast, table, tuple(judged))


def pairs(votes: Votes, *, ties: bool = False) -> list[Pair]:
    """What people prefer, one Pair for each two pictures, in an order that depends on nothing but the votes.

    Pairs without a preference are left out unless `ties`: common training scripts take a tie for a preference.
    """
    found: dict[tuple[str, str], Counter[str]] = {}
    items: dict[str, Item] = {}
    for one in votes.compared:
        if one.choice == "both_bad":
            continue
        items |= {one.left.id: one.left, one.right.id: one.right}
        low, high = sorted((one.left.id, one.right.id))
        winner = {"left": one.left.id, "right": one.right.id}.get(one.choice, "tie")
        found.setdefault((low, high), Counter())[winner] += 1
    made = [_pair(items[low], items[high], often) for (low, high), often in found.items()]
    kept = [pair for pair in made if ties or pair.votes_for > pair.votes_against]
    return sorted(kept, key=lambda pair: (pair.prompt, pair.chosen.id, pair.rejected.id))


def _pair(one: Item, other: Item, often: Counter[str]) -> Pair:
    chosen, rejected = (one, other) if often[one.id] >= often[other.id] else (other, one)
    return Pair(
        prompt=one.prompt,
        chosen=chosen,
        rejected=rejected,
        votes_for=often[chosen.id],
        votes_against=often[rejected.id],
        ties=often["tie"],
        split=split_of(one.prompt),
    )


def split_of(prompt: str) -> str:
    """Where a prompt belongs, now and whatever prompts are added."""
    at = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") % 100
    edges = np.cumsum([share for _, share in SPLITS])
    return SPLITS[int(np.searchsorted(edges, at, side="right"))][0]
