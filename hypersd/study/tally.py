"""How often each pair was shown and what was said of it, kept up to date by reading only what is new."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import sqlalchemy as sa

from hypersd.records import CHOICES, Item
from hypersd.study import ratings
from hypersd.study.definition import Study
from hypersd.study.schema import ballot, vote
from hypersd.study.votes import Store


class Tally:
    """Counts over all annotators of what is shown to choose by; gold ballots, which choose nothing, are left out.

    `shown` [K, K] symmetric, ballots of each pair of arms; `prompts` [P], ballots of each prompt; `votes` [K, K, 4],
    votes with arm i on the left and arm j on the right, by choice. Undone votes stay in: they were looked at.
    """

    def __init__(self, store: Store, study: Study, items: Mapping[str, Item]) -> None:
        self._store, self._study, self._lock = store, study, threading.Lock()
        arms = {arm: k for k, arm in enumerate(study.arms)}
        self._arm = {name: arms[one.arm] for name, one in items.items() if one.arm in arms}
        self._prompt = {text: p for p, text in enumerate(study.prompts)}
        self._anchor = arms[study.anchor]
        self._ballots_read = self._votes_read = 0
        self.shown = np.zeros((len(arms), len(arms)))
        self.prompts = np.zeros(len(study.prompts))
        self.votes = np.zeros((len(arms), len(arms), len(CHOICES)))
        self.fit = ratings.fit(self.votes[:, :, :3], self._anchor)

    def refresh(self) -> None:
        """Read what has come since the last time, from whichever process."""
        with self._lock:
            shown, voted = self._store.read(self._news)
            for left, right, prompt, count in shown:
                if left in self._arm and right in self._arm and prompt in self._prompt:
                    i, j = self._arm[left], self._arm[right]
                    self.shown[i, j] += count
                    self.shown[j, i] += count
                    self.prompts[self._prompt[prompt]] += count
            for left, right, choice, count in voted:
                if left in self._arm and right in self._arm:
                    self.votes[self._arm[left], self._arm[right], CHOICES.index(choice)] += count
            if voted:
                self.fit = ratings.fit(self.votes[:, :, :3], self._anchor)

    def _news(self, connection: sa.Connection) -> tuple[list[Any], list[Any]]:
        """Counts of the rows that are new. Rows appear in the order of their numbers, so none is passed over."""
        last_ballot = connection.scalar(sa.select(sa.func.max(ballot.c.seq))) or 0
        last_vote = connection.scalar(sa.select(sa.func.max(vote.c.seq))) or 0
        ours = (ballot.c.study == self._study.sha256, ballot.c.expected.is_(None))
        pair = (ballot.c.left, ballot.c.right)
        shown = sa.select(*pair, ballot.c.prompt, sa.func.count()).group_by(*pair, ballot.c.prompt)
        shown = shown.where(*ours, ballot.c.seq > self._ballots_read, ballot.c.seq <= last_ballot)
        voted = sa.select(*pair, vote.c.choice, sa.func.count()).join(vote, vote.c.ballot == ballot.c.id)
        voted = voted.group_by(*pair, vote.c.choice)
        voted = voted.where(*ours, vote.c.seq > self._votes_read, vote.c.seq <= last_vote)
        found = list(connection.execute(shown)), list(connection.execute(voted))
        self._ballots_read, self._votes_read = last_ballot, last_vote
        return found
