"""A study to test the screens with: pictures by the painter, a store in a folder, and what a browser would send."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fake import paint
from rows import METHODS
from voting import definition

from hypersd.pool import Pool
from hypersd.records import Panel, Request
from hypersd.study.definition import parse
from hypersd.study.votes import Store

ARMS = ["base@8", "base@4", "lcm@4"]


def small(folder: Path, painter: Callable[[Request, str], Panel] = paint, **changes: Any) -> Pool:
    """A pool that has drawn its pictures, unless something is in the way."""
    given = {"ballots": 6, "practice": 1, "minimum_dwell_ms": 0, "arms": ARMS, **changes}
    pool = Pool(parse(definition(**given)), Store(folder / "study.db"), folder / "images", painter, METHODS)
    pool.fill().join(60)
    return pool
