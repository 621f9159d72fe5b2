"""app.py as it is started: what its environment asks for, and a Space that begins with an empty disk."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from diffusers import AutoencoderTiny
from fake import eventually
from gradio_client import Client
from modelhub import Server
from page import look
from test_releases import published

import app
from hypersd import releases
from hypersd.backbone import Backbone
from hypersd.folders import BACKBONES
from hypersd.hub import digest
from hypersd.records import InputError
from hypersd.space import lay_out

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
SD15 = BACKBONES["sd15"].source


# ------------------------------------------------------------------------------------------------ the environment


@pytest.fixture
def local(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The app draws with the tiny model."""
    monkeypatch.setattr(app, "NAME", str(tiny_folder))
    return tiny_folder


def test_a_quick_decoder_is_asked_for_by_the_environment(
    server: Server, cache: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )  # fmt: skip
    tiny.save_pretrained(tmp_path / "tiny")
    server.offer(SD15, tiny_folder)
    server.offer("madebyollin/taesd", tmp_path / "tiny")
    monkeypatch.setattr(app, "NAME", "sd15")
    assert app.load().decoder.__class__.__name__ == "AutoencoderKL"
    monkeypatch.setenv("HYPERSD_DECODER", "quick")
    assert isinstance(app.load().decoder, AutoencoderTiny)


def test_the_small_model_leaves_a_core_to_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(app, "device", lambda: "cpu")
    monkeypatch.setattr(Backbone, "load", lambda *_, **__: torch.get_num_threads())

    def used(threads: int, engine: str = "torch", name: str = "emoji") -> int:
        torch.set_num_threads(threads)
        monkeypatch.setattr(app, "ENGINE", engine)
        monkeypatch.setattr(app, "NAME", name)
        return int(app.load())

    try:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr(app, "cores", lambda: 2)
        assert used(2) == used(1) == 1
        monkeypatch.setattr(app, "cores", lambda: 8)
        assert used(2) == 2, "torch counts cores, the system counts threads of cores"
        monkeypatch.setattr(app, "cores", lambda: 1)
        assert used(1) == 1
        monkeypatch.setattr(app, "cores", lambda: 2)
        assert used(2, engine="openvino") == used(2, name="sd15") == 2
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert used(2) == 2, "who says how many gets them"
    finally:
        torch.set_num_threads(before)


def test_offload_lets_all_but_the_network_rest(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "device", lambda: "meta")  # a device that every machine has
    parts = ("unet", "text_encoder", "vae")
    assert [getattr(app.load(), part).device.type for part in parts] == ["meta"] * 3
    monkeypatch.setenv("HYPERSD_OFFLOAD", "1")
    assert [getattr(app.load(), part).device.type for part in parts] == ["meta", "cpu", "cpu"]


def test_offload_without_a_gpu_is_told_and_does_nothing(
    local: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(app, "device", lambda: "cpu")
    monkeypatch.setenv("HYPERSD_OFFLOAD", "1")
    assert app.load().device == torch.device("cpu")
    assert caplog.messages == ["HYPERSD_OFFLOAD=1 changes nothing here: there is no GPU to make room on"]


@pytest.mark.parametrize(("setting", "value", "sentence"), [
    ("HYPERSD_OFFLOAD", "yes", "HYPERSD_OFFLOAD must be 1 or 0, got 'yes'"),
    ("HYPERSD_DECODER", "quik", "the decoder must be 'quick' or the folder of one, got 'quik'"),
    ("HYPERSD_DECODER", "quick", "no quick decoder is known for tiny; give the folder of one instead of 'quick'"),
])  # fmt: skip
def test_a_setting_that_cannot_be_is_a_sentence(
    setting: str, value: str, sentence: str, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(setting, value)
    with pytest.raises(InputError) as told:
        app.load()
    assert str(told.value) == sentence


@pytest.mark.parametrize(("settings", "sentence"), [
    ({"HYPERSD_BACKBONE": "sdxl", "HYPERSD_FETCH": "hyper, lcn"}, "hypersd: no lcn is published for sdxl; choose from"),
    ({"HYPERSD_BACKBONE": "sdxl", "HYPERSD_FETCH": "dmd2"}, "hypersd: dmd2 is CC BY-NC 4.0, not for commerce; if that"),
    ({"HYPERSD_FETCH": "lcm"}, "hypersd: nothing is published for emoji; choose from flux, sd15, sd3, sdxl"),
])  # fmt: skip
def test_an_app_that_cannot_start_says_why(settings: dict[str, str], sentence: str) -> None:
    run = [sys.executable, "-B", app.__file__]
    ended = subprocess.run(run, env={**os.environ, **settings}, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 1 and ended.stderr.startswith(sentence)


# ------------------------------------------------------------------------------------------------ a Space's start


@pytest.fixture
def space(server: Server, tiny_folder: Path, tiny_backbone: Backbone, tmp_path: Path) -> Path:
    """The folder of a Space with `hyper` and `tscd`. The hub has a tiny model and LoRAs in the places of the true ones,
    and their hashes stand in this folder's copy of releases.py: the true ones would be refused, which is tested
    elsewhere."""
    folder = tmp_path / "space"
    lay_out(folder, "sd15", "hyper,tscd")
    server.offer(SD15, tiny_folder)
    table = folder / "hypersd/releases.py"
    text = table.read_text(encoding="utf-8")
    for number, release in enumerate(releases.chosen("sd15", ["hyper", "tscd"])):
        file = published(tiny_backbone, tmp_path, kohya=True, alpha=1.0 + number)
        server.files[f"{release.repository}/{release.file}"] = file.read_bytes()
        assert text.count(release.sha256) == 1
        text = text.replace(release.sha256, digest(file))
    table.write_text(text, encoding="utf-8")
    return folder


@contextmanager
def started(folder: Path, server: Server, home: Path) -> Iterator[str]:
    """The address of the app that runs in a Space's folder, open to others; `home` is an empty cache of the hub."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **{k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "TMPDIR", "OMP_NUM_THREADS")},
        "GRADIO_SERVER_PORT": str(port), "HYPERSD_STUDY": "none.yaml", "PYTHONDONTWRITEBYTECODE": "1",
        "HF_ENDPOINT": server.address, "HF_HOME": str(home), "HYPERSD_PUBLIC": "1", "HYPERSD_SAFETY": "off",
    }  # fmt: skip
    log, place = home.with_suffix(".txt"), f"http://127.0.0.1:{port}/"
    with log.open("w") as told:
        process = subprocess.Popen([sys.executable, "app.py"], cwd=folder, env=environment, stdout=told, stderr=told)
    try:
        end = time.monotonic() + 120
        while not _answers(place):
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield place
    finally:
        process.terminate()
        process.wait(30)


def _answers(address: str) -> bool:
    try:
        return requests.get(f"{address}config", timeout=5).ok
    except requests.ConnectionError:
        return False


def told(address: str, pattern: str) -> str:
    """What the page says once it matches."""
    said: list[str] = []

    def matches() -> bool:
        said.append(look(address)[0])
        return re.search(pattern, said[-1]) is not None

    eventually(matches, 60)
    return said[-1]


def draws(client: Client, **more: Any) -> dict[str, dict[str, Any]]:
    panels = client.predict("a happy cat", steps=4, **more, api_name="/compare")
    return {panel["method"]: panel for panel in panels}


def test_a_space_is_there_before_its_weights_and_draws_once_they_are(
    space: Path, server: Server, tmp_path: Path
) -> None:
    base, lora = (
        f"{SD15}/unet/diffusion_pytorch_model.safetensors",
        "ByteDance/Hyper-SD/Hyper-SD15-8steps-lora.safetensors",
    )
    held = server.held[base] = threading.Event()
    server.closed_off.add(lora)
    with started(space, server, tmp_path / "hub") as address:
        size = sum(len(content) for name, content in server.files.items() if name.startswith(SD15)) / 1e6
        said = told(address, "Downloading")
        assert re.search(
            rf"Downloading Stable Diffusion 1\.5: 0\.\d of {size:.1f} MB, then 4 more files, 1\.1 GB", said
        )
        held.set()
        said = told(address, "hs-failed")
        assert f"{lora} could not be fetched" in said and "The next drawing with Hyper-SD (TSCD) tries again." in said

        client = Client(address, verbose=False)
        panels = draws(client)
        assert [name for name, panel in panels.items() if panel["png"]] == ["base", "hyper"]
        assert "accept its licence" in panels["tscd"]["problem"]
        server.closed_off.clear()
        panels = draws(client, methods=["tscd"])
        assert panels["tscd"]["problem"] == "" and panels["tscd"]["provenance"]["backbone"] == "sd15"
        assert look(address) == ("", False)
        assert sorted(file.name for file in (space / "runs/lora/sd15").iterdir()) == [
            "hyper.safetensors", "tscd-2.safetensors", "tscd-4.safetensors", "tscd-8.safetensors"
        ]  # fmt: skip
        client.close()
