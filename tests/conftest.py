"""Fixtures that several tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from voting import in_memory

from hypersd.backbone import Backbone


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model on disk, v-prediction; not to be changed, copy it instead."""
    return tiny.build(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_backbone(tiny_folder: Path) -> Backbone:
    return Backbone.load(tiny_folder)


@pytest.fixture
def ram(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is such a thing: a busy disk takes a minute for a thousand commits."""
    with in_memory(tmp_path) as folder:
        yield folder
