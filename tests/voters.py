"""One process of voters who click twice and change their minds: voters.py DATABASE NAME VOTERS BALLOTS PACE.

Prints one JSON line: what was acknowledged, how long each acknowledgement took, and what else was answered.
`PACE` is votes a second of the whole process, 0 for as fast as it goes.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from collections import Counter

from voting import LEFT, MINUTE, RIGHT, STUDY

from hypersd.records import CHOICES, Ballot
from hypersd.study.people import new_id
from hypersd.study.votes import Store, now_us


def main(database: str, name: str, voters: int, ballots: int, pace: float) -> None:
    store, told = Store(database), Told()
    work = [(f"{name}-{n}".rjust(32, "0"), ballots, voters / pace if pace else 0.0) for n in range(voters)]
    threads = [threading.Thread(target=vote_all, args=(store, told, *one)) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.close()
    print(json.dumps({"acked": told.acked, "seconds": told.seconds, "kinds": told.kinds, "wrong": told.wrong}))  # noqa: T201


class Told:
    """What the voters of a process saw."""

    def __init__(self) -> None:
        self.acked: dict[str, str] = {}
        self.seconds: list[float] = []
        self.kinds: Counter[str] = Counter()
        self.wrong: list[str] = []


def vote_all(store: Store, told: Told, annotator: str, ballots: int, between: float) -> None:
    """Answer so many ballots: 30 % are posted twice, 10 % again with another choice."""
    chances = random.Random(annotator)
    time.sleep(between * chances.random())
    for _ in range(ballots):
        now = now_us()
        asked = Ballot(new_id(), STUDY, annotator, "a cat", LEFT.id, RIGHT.id, 0.5, now, now + 30 * MINUTE)
        store.issue(asked)
        choice, other = chances.sample(CHOICES, 2)
        begun = time.perf_counter()
        kind = store.vote(asked.id, annotator, choice).kind
        told.seconds.append(time.perf_counter() - begun)
        told.kinds[kind] += 1
        if kind == "saved":
            told.acked[asked.id] = choice
        draw = chances.random()
        if draw < 0.3 and store.vote(asked.id, annotator, choice).kind != "saved":
            told.wrong.append("a repeated post was not acknowledged")
        elif 0.3 <= draw < 0.4 and store.vote(asked.id, annotator, other).kind != "voted":
            told.wrong.append("a conflicting post was not told so")
        time.sleep(max(0.0, between - (time.perf_counter() - begun)))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))
