"""A small study to test with: items without pictures, a store on a clock that only moves when told."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypersd.records import Ballot, Item
from hypersd.study.ballots import Desk
from hypersd.study.definition import Study, parse
from hypersd.study.people import new_id
from hypersd.study.votes import Store

STUDY = "5" * 64
ANN, BOB = "a" * 32, "b" * 32
MINUTE = 60_000_000  # microseconds


@contextmanager
def in_memory(otherwise: Path) -> Iterator[Path]:
    """A new folder in memory, or on systems without such in `otherwise`; gone afterwards."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else otherwise) as folder:
        yield Path(folder)


class Clock:
    """Microseconds that pass when told."""

    def __init__(self) -> None:
        self.now = 1_800_000_000_000_000

    def __call__(self) -> int:
        return self.now


def item(method: str = "base", steps: int = 4, prompt: str = "a cat", **changes: Any) -> Item:
    fields: dict[str, Any] = {
        "image_sha256": hashlib.sha256(f"{method} {steps} {prompt}".encode()).hexdigest(),
        "prompt": prompt,
        "method": method,
        "base_sha256": "1" * 64,
        "adapter_sha256": None,
        "sampler": "DDIM",
        "config_sha256": "2" * 64,
        "steps": steps,
        "nfe": 2 * steps,
        "guidance": 4.0,
        "eta": 0.0,
        "seed": 1,
        "noise_sha256": "3" * 64,
        "width": 8,
        "height": 6,
        "dtype": "float32",
        "seconds": 1.5,
    }
    return Item(**{**fields, **changes})


LEFT, RIGHT = item("base", 4), item("lcm", 4)


def store(address: Path | str, clock: Clock | None = None) -> Store:
    """A store that holds one study and two items of it."""
    opened = Store(address, clock=clock or Clock())
    opened.add_study(STUDY, "{}")
    opened.add_items([LEFT, RIGHT])
    return opened


def issue(into: Store, annotator: str = ANN, **changes: Any) -> str:
    """Issue a ballot that is good for half an hour; its id."""
    now = into.clock()
    one = Ballot(new_id(), STUDY, annotator, "a cat", LEFT.id, RIGHT.id, 0.5, now, now + 30 * MINUTE)
    one = Ballot(**{**one.__dict__, **changes})
    into.issue(one)
    return one.id


ARMS, PROMPTS = ("base@8", "base@4", "lcm@4"), ("a cat", "a dog", "a sun", "a car")


def definition(**changes: Any) -> dict[str, Any]:
    """A small study as a YAML file would give it."""
    given: dict[str, Any] = {
        "name": "small",
        "consent": "We keep your choices.",
        "licence": "CC0-1.0",
        "prompts": list(PROMPTS),
        "seeds": [1, 2],
        "arms": list(ARMS),
        "anchor": "base@8",
        "pairs": "all",
        "gold": [["base@8", "base@1"]],
        "ballots": 20,
        "votes_per_pair": 1000,
        "practice": 2,
        "shares": {"gold": 0.0, "repeat": 0.0, "uniform": 0.25},
        "attributes": ["alignment", "artefacts"],
        "reveal": "end",
        "minimum_dwell_ms": 0,
        "ballot_minutes": 30,
        "limits": {"annotator_per_minute": 1000, "annotator_per_day": 10_000, "network_per_minute": 10_000},
    }
    return {**given, **changes}


def pool(study: Study) -> list[Item]:
    """An item for each arm, prompt and seed that a study names."""
    arms = [arm.split("@") for arm in study.drawn_arms()]
    return [
        item(method, int(steps), prompt, seed=seed, noise_sha256=f"{seed:064x}")
        for method, steps in arms
        for prompt in study.prompts
        for seed in study.seeds
    ]


def desk(address: Path | str, clock: Clock | None = None, annotator: str = ANN, **changes: Any) -> Desk:
    """A desk whose pool is full, and which one annotator has consented to."""
    opened, study = Store(address, clock=clock or Clock()), parse(definition(**changes))
    opened.add_items(pool(study))
    made = Desk(opened, study, seed=1)
    made.consent(annotator)
    return made
