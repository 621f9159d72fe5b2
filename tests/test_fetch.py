"""Downloads from a stand-in of the hub on loopback: cut off, gone on with, damaged, missing, offline."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import checker
import pytest
import tiny
import torch
from diffusers import AutoencoderTiny
from listing import ROOT
from modelhub import Server
from test_releases import published

from hypersd import releases, safety
from hypersd.__main__ import main
from hypersd.backbone import Backbone
from hypersd.folders import BACKBONES, ModelError, check_folder, find_folder, load_decoder
from hypersd.hub import REVISIONS
from hypersd.records import InputError
from hypersd.single import _layout

FETCH = """
import sys
from pathlib import Path
from hypersd import releases
from hypersd.records import InputError
release = releases.Release("lcm", "sd15", "maker/repo", "lora.safetensors", 1, "free", 1, sha256=sys.argv[2])
try:
    print("kept", releases.fetch(release, "base", Path(sys.argv[1])).path.name)
except InputError as problem:
    print("refused:", problem)
"""


def started(server: Server, home: Path, sha256: str = "", **environment: str) -> subprocess.Popen[str]:
    """A process of its own that fetches maker/repo/lora.safetensors; `home` is its cache."""
    known = {"HF_ENDPOINT": server.address, "HF_HOME": str(home), **environment}
    run = [sys.executable, "-B", "-c", FETCH, str(home / "lora"), sha256]
    pipe = subprocess.PIPE
    return subprocess.Popen(run, cwd=ROOT, env={**os.environ, **known}, text=True, stdout=pipe, stderr=pipe)


def fetch(server: Server, home: Path, sha256: str = "", **environment: str) -> str:
    """What such a process says."""
    said, problems = started(server, home, sha256, **environment).communicate(timeout=240)
    assert said, problems
    return said


@pytest.fixture
def lora(tiny_backbone: Backbone, tmp_path: Path) -> bytes:
    return published(tiny_backbone, tmp_path, kohya=True).read_bytes()


def test_a_download_that_was_cut_off_goes_on(server: Server, tmp_path: Path) -> None:
    """The client writes ten megabytes at a time, so the file is larger than a LoRA of the tiny model."""
    content = os.urandom(1 << 20) * 24
    server.files["maker/repo/lora.safetensors"] = content
    server.cut = [15 << 20]
    said = fetch(server, tmp_path, hashlib.sha256(content).hexdigest())
    assert "is not a safetensors file" in said  # all of it came, it is only no LoRA
    assert len(server.ranges) == 2 and server.ranges[0] == 0 and server.ranges[1] >= 10 << 20


def test_another_process_goes_on_where_one_was_killed(server: Server, tmp_path: Path) -> None:
    content = os.urandom(1 << 20) * 24
    server.files["maker/repo/lora.safetensors"] = content
    server.cut, server.stalls = [15 << 20], True
    with started(server, tmp_path) as process:
        deadline = time.monotonic() + 240
        while not any(part.stat().st_size >= 10 << 20 for part in tmp_path.rglob("*.incomplete")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.kill()
    assert "is not a safetensors file" in fetch(server, tmp_path, hashlib.sha256(content).hexdigest())
    assert server.ranges == [0, 10 << 20] and not list(tmp_path.rglob("*.incomplete"))


def test_what_is_cached_is_not_fetched_again(server: Server, lora: bytes, tmp_path: Path) -> None:
    server.files["maker/repo/lora.safetensors"] = lora
    fetch(server, tmp_path)
    assert fetch(server, tmp_path, HF_HUB_OFFLINE="1") == "kept lcm.safetensors\n"
    assert server.ranges == [0]


def test_another_file_under_the_same_name_is_refused(server: Server, lora: bytes, tmp_path: Path) -> None:
    server.files["maker/repo/lora.safetensors"] = lora
    said = fetch(server, tmp_path, "ab" * 32)
    assert "is not what maker/repo published" in said and "it is another file, or was replaced since" in said
    assert not (tmp_path / "lora").exists()


def test_a_file_that_is_not_what_the_hub_said_is_refused(server: Server, lora: bytes, tmp_path: Path) -> None:
    server.files["maker/repo/lora.safetensors"] = lora
    server.told["maker/repo/lora.safetensors"] = "cd" * 32
    assert "is not what maker/repo published" in fetch(server, tmp_path)


def test_a_missing_file_is_named(server: Server, tmp_path: Path) -> None:
    said = fetch(server, tmp_path)
    assert said.startswith("refused: maker/repo/lora.safetensors could not be fetched from the Hugging Face hub")


def test_offline_says_so(server: Server, tmp_path: Path) -> None:
    said = fetch(server, tmp_path, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set: unset it, or put a copy somewhere and name it with fetch --file" in said
    assert server.ranges == []


# ------------------------------------------------------------------------------------------------ in this process

SD15 = BACKBONES["sd15"].source
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def sd15(server: Server, cache: Path, tiny_folder: Path) -> Server:
    """With a tiny model in the place of Stable Diffusion 1.5, and beside it what nobody reads."""
    server.offer(SD15, tiny_folder)
    server.files |= {f"{SD15}/{name}": b"x" for name in ("v1-5.safetensors", "unet/diffusion_pytorch_model.bin")}
    return server


def advised(said: str) -> Path:
    """What an error says is to be deleted."""
    found = re.search(r"delete (\S+) and try again", said)
    assert found, said
    return Path(found[1])


def test_a_base_model_is_announced_and_fetched_once(
    sd15: Server, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backbone = Backbone.load("sd15")
    assert (backbone.name, backbone.licence) == ("sd15", "CreativeML OpenRAIL-M")
    size = sum(len(sd15.files[name]) for name in sd15.sent) / 1e6
    assert [record.message for record in caplog.records if record.name == "hypersd.hub"] == [
        f"fetching {SD15}: {size:.1f} MB from the Hugging Face hub into {cache}"
    ]
    assert sd15.revisions == {REVISIONS[SD15]}
    assert {f"{SD15}/v1-5.safetensors", f"{SD15}/unet/diffusion_pytorch_model.bin"}.isdisjoint(sd15.sent)
    caplog.clear()
    before = list(sd15.sent)
    assert find_folder("sd15")[1] == backbone.folder
    assert sd15.sent == before and not caplog.records


def test_a_base_model_that_was_cut_off_goes_on(sd15: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    sd15.cut = [5500]
    check_folder(find_folder("sd15")[1], "sd15")
    assert sd15.ranges[:2] == [0, 5000]


def test_a_file_that_the_repository_lacks_is_named(sd15: Server) -> None:
    del sd15.files[f"{SD15}/{UNET}"]
    with pytest.raises(ModelError, match=rf"sd15: {UNET} is missing; fetch it .* or give the folder of a copy"):
        Backbone.load("sd15")


def test_what_comes_damaged_is_not_kept(sd15: Server, cache: Path) -> None:
    sd15.told[f"{SD15}/{UNET}"] = "cd" * 32
    with pytest.raises(ModelError, match=rf"sd15: {UNET} is not what {SD15} published"):
        find_folder("sd15")
    assert not list(cache.glob("models*/blobs/cdcd*"))


def test_a_file_that_was_cut_short_in_the_cache_comes_again(sd15: Server) -> None:
    """Its link alone would be made anew, to the same bytes."""
    folder = find_folder("sd15")[1]
    (folder / UNET).resolve().write_bytes(b"short")
    with pytest.raises(ModelError, match=rf"sd15: {UNET} is truncated or damaged") as told:
        check_folder(find_folder("sd15")[1], "sd15")
    advised(str(told.value)).unlink()
    check_folder(find_folder("sd15")[1], "sd15")
    assert sd15.sent.count(f"{SD15}/{UNET}") == 2


def test_a_release_that_was_damaged_in_the_cache_comes_again(
    server: Server, cache: Path, lora: bytes, tmp_path: Path
) -> None:
    server.files["maker/repo/lora.safetensors"] = lora
    release = releases.Release("lcm", "sd15", "maker/repo", "lora.safetensors", 1, "free", 1)
    releases.hub("maker/repo", "lora.safetensors").resolve().write_bytes(lora[:-1] + b"!")
    with pytest.raises(InputError, match="is not what maker/repo published") as told:
        releases.fetch(release, "base", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    advised(str(told.value)).unlink()
    assert releases.fetch(release, "base", tmp_path / "lora").path.is_file()


def test_the_commit_is_asked_for_where_one_is_known(server: Server, cache: Path) -> None:
    for repository in (releases.HYPER, "maker/repo"):
        server.files[f"{repository}/x.safetensors"] = b"x"
    assert releases.hub(releases.HYPER, "x.safetensors").parent.name == REVISIONS[releases.HYPER]
    assert server.revisions == {REVISIONS[releases.HYPER]}
    releases.hub("maker/repo", "x.safetensors")
    assert "main" in server.revisions


def test_the_quick_decoder_is_that_of_its_commit(server: Server, cache: Path, tmp_path: Path) -> None:
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )  # fmt: skip
    tiny.save_pretrained(tmp_path / "tiny")
    server.offer("madebyollin/taesd", tmp_path / "tiny")
    assert load_decoder("sd15", "quick", torch.float32).config.decoder_block_out_channels == [4, 4]
    assert server.revisions == {REVISIONS["madebyollin/taesd"]}


def test_a_checker_of_other_weights_is_refused(
    server: Server, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checker.folder(tmp_path / "checker")
    (folder / "model.safetensors").rename(folder / safety.WEIGHTS)
    server.offer(f"{SD15}/safety_checker", folder)
    with pytest.raises(InputError, match="is not the safety checker that was published; delete"):
        safety.load()
    monkeypatch.setattr(safety, "SHA256", hashlib.sha256((folder / safety.WEIGHTS).read_bytes()).hexdigest())
    assert safety.load()(torch.zeros(1, 30, 30, 3).byte()) == [False]
    assert server.revisions == {REVISIONS[SD15]}


ASKED: dict[str, Callable[[], object]] = {
    "give the folder of a copy": lambda: find_folder("sd3"),
    "leave the decoder out": lambda: load_decoder("sd3", "quick", torch.float32),
    "name the folder of a copy in HYPERSD_SAFETY": safety.load,
    "put a copy somewhere and name it with fetch --file": lambda: releases.hub("maker/repo", "x"),
    "name the folder of any model of its kind: HYPERSD_LAYOUT=folder": lambda: _layout(
        "FluxPipeline", [], ["vae"], "x"
    ),
}


@pytest.mark.parametrize("instead", ASKED)
def test_whatever_is_wanted_offline_says_what_to_do(
    instead: str, server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=f"HF_HUB_OFFLINE is set: unset it, or {instead}$"):
        ASKED[instead]()
    assert not server.revisions


LOGIN = "log in with `hf auth login` or HF_TOKEN"
LICENCE = f"accept its licence at https://huggingface.co/{BACKBONES['sd3'].source} and {LOGIN}"


@pytest.mark.parametrize(("status", "code", "told"), [
    (401, "GatedRepo", LICENCE),
    (403, "GatedRepo", LICENCE),
    (403, "", LICENCE),
    (401, "RepoNotFound", f"knows no such repository, or not for you: {LOGIN}"),
    (401, "", f"knows no such repository, or not for you: {LOGIN}"),
    (404, "RevisionNotFound", "the hub does not have it"),
    (400, "", "check the network"),
])  # fmt: skip
def test_a_refusal_says_what_to_do(server: Server, cache: Path, status: int, code: str, told: str) -> None:
    server.refusal = (status, code)
    with pytest.raises(ModelError, match=rf"sd3: {BACKBONES['sd3'].source} could not be fetched") as problem:
        find_folder("sd3")
    assert told in str(problem.value)


def test_the_command_says_what_is_to_come_and_gets_it(
    sd15: Server,
    lora: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    sd15.files["maker/repo/x.safetensors"] = lora
    release = releases.Release("lcm", "sd15", "maker/repo", "x.safetensors", 1, "free", 3)
    monkeypatch.setattr(releases, "RELEASES", (release,))
    assert main(["fetch", "sd15"]) == 0
    assert "with the base model: Stable Diffusion 1.5, 512 px, 4 GB" in capsys.readouterr().out and not sd15.sent
    assert main(["fetch", "sd15", "lcm", "--out", str(tmp_path / "lora")]) == 0
    assert "4 GB from the Hugging Face hub, and 3 MB beside it" in capsys.readouterr().out
    said = [record.message for record in caplog.records if record.name == "hypersd.hub"]
    assert [line.split(":")[0] for line in said] == [f"fetching {SD15}", "fetching maker/repo"]
    assert (tmp_path / "lora/lcm.safetensors").is_file()


def test_a_hub_out_of_reach_is_a_sentence(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _seconds: None)  # between its five tries
    server.close()
    with pytest.raises(ModelError, match=r"sd15: .* could not be fetched .* check the network, or give the folder"):
        find_folder("sd15")


def test_every_backbone_says_how_much_it_fetches() -> None:
    assert all(re.search(r"\d+ GB", preset.summary) for name, preset in BACKBONES.items() if name != "emoji")


# -------------------------------------------------------------------------------- a base that is not for commerce

FLUX = BACKBONES["flux"]
ASKED_FOR = "not for commerce .* if that suits you, type: python -m hypersd fetch flux --accept-licence$"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, where nothing has been accepted."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.mark.parametrize("command", [
    ["draw", "--backbone", "flux", "--prompt", "a cat"],
    ["fetch", "flux", "tscd-cfg-8"],
    ["evaluate", "--backbone", "flux", "--sets", "colour"],
], ids=lambda words: words[0])  # fmt: skip
def test_a_base_that_is_not_for_commerce_waits_for_a_word(
    server: Server, cache: Path, elsewhere: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 2
    said = capsys.readouterr().err.strip()
    assert re.search(ASKED_FOR, said) and FLUX.licence in said and FLUX.source in said
    assert not server.revisions and not server.sent, "nobody was asked for it"


def test_a_licence_is_accepted_once(
    server: Server, cache: Path, elsewhere: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    server.offer(FLUX.source, tiny.build_flux(tmp_path / "flux"))
    assert main(["fetch", "flux"]) == 0
    assert f"licence: {FLUX.licence}" in capsys.readouterr().out
    assert main(["fetch", "flux", "nothing", "--accept-licence"]) == 2
    with pytest.raises(ModelError, match=ASKED_FOR):
        find_folder("flux")
    assert main(["fetch", "flux", "--accept-licence"]) == 0
    assert not server.sent, "which is a word, and 34 GB are for another day"
    assert Backbone.load("flux").name == "flux"
    monkeypatch.setitem(BACKBONES, "flux", replace(FLUX, licence="another one"))
    with pytest.raises(ModelError, match=ASKED_FOR):
        find_folder("flux")


def test_a_folder_of_ones_own_is_not_asked_about(elsewhere: Path) -> None:
    assert Backbone.load(tiny.build_flux(elsewhere / "flux")).name == "flux"


def test_the_app_asks_before_it_opens(elsewhere: Path) -> None:
    environment = {**os.environ, "HYPERSD_BACKBONE": "flux", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-B", str(ROOT / "app.py")], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 1 and re.search(ASKED_FOR, done.stderr.strip())


def test_every_base_is_listed_with_its_licence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines.keys() == BACKBONES.keys()
    assert all(preset.licence in lines[name] and preset.summary in lines[name] for name, preset in BACKBONES.items())
    assert [name for name, preset in BACKBONES.items() if not preset.commercial] == ["flux"]
