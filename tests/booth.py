"""A study to test the screens with: pictures by the painter, a store in a folder, and what a browser would send."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake import paint
from rows import METHODS
from voting import definition

from hypersd.pool import Pool
from hypersd.records import Panel, Request
from hypersd.study.definition import parse
from hypersd.study.votes import Store, now_us

ARMS = ["base@8", "base@4", "lcm@4"]


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The `ram` of conftest.py for all tests of a module."""
    there = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=there if there.is_dir() else tmp_path_factory.mktemp("ram")) as folder:
        yield Path(folder)


def small(
    folder: Path,
    painter: Callable[[Request, str], Panel] = paint,
    clock: Callable[[], int] = now_us,
    database: str | None = None,
    **changes: Any,
) -> Pool:
    """A pool that has drawn its pictures, unless something is in the way."""
    given = {"ballots": 6, "practice": 1, "minimum_dwell_ms": 0, "arms": ARMS, **changes}
    store = Store(database or folder / "study.db", clock=clock)
    pool = Pool(parse(definition(**given)), store, folder / "images", painter, METHODS)
    pool.fill().join(60)
    return pool
