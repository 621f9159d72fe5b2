"""Fixtures that several tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import tiny
import torch
from modelhub import Server
from voting import in_memory

from hypersd.adapters import AdapterFile
from hypersd.backbone import Backbone


def pytest_configure() -> None:
    """Workers side by side share the cores instead of fighting for them, and so do the programs that they start."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        threads = max(1, (os.cpu_count() or 1) // workers)
        torch.set_num_threads(threads)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model on disk, v-prediction; not to be changed, copy it instead."""
    return tiny.build(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_backbone(tiny_folder: Path) -> Backbone:
    return Backbone.load(tiny_folder)


@pytest.fixture(scope="session")
def tiny_adapters(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Sequence[AdapterFile]:
    """A small random LoRA for every stage of every method, made for the tiny model."""
    return tiny.adapters(tiny_folder, tmp_path_factory.mktemp("lora"))


@pytest.fixture
def ram(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is such a thing: a busy disk takes a minute for a thousand commits."""
    with in_memory(tmp_path) as folder:
        yield folder


@pytest.fixture
def server() -> Iterator[Server]:
    """A stand-in for the hub."""
    made = Server()
    yield made
    made.close()


@pytest.fixture
def cache(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of the hub's client, filled by the stand-in; the client reads its variables at import."""
    folder = tmp_path / "cache"
    for name, value in {
        "ENDPOINT": server.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(folder),
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    return folder
