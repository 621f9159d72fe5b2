"""A small study to test with: items without pictures, a store on a clock that only moves when told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypersd.records import Ballot, Item
from hypersd.study.people import new_id
from hypersd.study.votes import Store

STUDY = "5" * 64
ANN, BOB = "a" * 32, "b" * 32
MINUTE = 60_000_000  # microseconds


class Clock:
    """Microseconds that pass when told."""

    def __init__(self) -> None:
        self.now = 1_800_000_000_000_000

    def __call__(self) -> int:
        return self.now


def item(method: str = "base", steps: int = 4, prompt: str = "a cat", **changes: Any) -> Item:
    fields: dict[str, Any] = {
        "image_sha256": f"{abs(hash((method, steps, prompt))) % 16**12:064x}",
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
