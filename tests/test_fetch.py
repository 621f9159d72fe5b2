"""Downloads from a stand-in of the hub on loopback: cut off, gone on with, damaged, missing, offline."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import checker
import pytest
import tiny
import torch
from diffusers import AutoencoderTiny
from listing import ROOT
from test_releases import published

from hypersd import releases, safety
from hypersd.__main__ import main
from hypersd.backbone import Backbone
from hypersd.folders import BACKBONES, ModelError, check_folder, find_folder, load_decoder
from hypersd.hub import REVISIONS
from hypersd.records import InputError
from hypersd.single import _layout

COMMIT = "c" * 40


class Server:
    """Files by "owner/name/path", listed and sent as the hub does: of a safetensors file it tells the sha256.

    `cut` is how many bytes of a file it sends before it hangs up, once an entry; where it `stalls` it goes silent
    instead. `refusal` is the status and the hub's code for it that everything is answered with.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.told: dict[str, str] = {}  # what it says a file's sha256 is, where it is not that
        self.cut: list[int] = []
        self.stalls = False
        self.refusal: tuple[int, str] | None = None
        self.ranges: list[int] = []  # where each sending of a safetensors file began
        self.sent: list[str] = []
        self.revisions: set[str] = set()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if server.refusal:
                    return self._answer(server.refusal[0], {"X-Error-Code": server.refusal[1]})
                path = self.path.partition("?")[0]
                if found := re.fullmatch(r"/api/models/(.+)/(revision|tree)/(\w+)", path):
                    repository, what, revision = found.groups()
                    server.revisions.add(revision)
                    listed = [n.removeprefix(f"{repository}/") for n in server.files if n.startswith(f"{repository}/")]
                    told = [server.entry(repository, name) for name in listed]
                    content = json.dumps({"id": repository, "sha": COMMIT} if what == "revision" else told).encode()
                    return self._answer(200, {"Content-Type": "application/json"}, content)
                found = re.fullmatch(r"/(.+)/resolve/(\w+)/(.+)", path)
                name = f"{found[1]}/{found[3]}" if found else ""
                if not found or name not in server.files:
                    return self._answer(404, {"X-Error-Code": "EntryNotFound"})
                return self._file(name, found[2])

            def _file(self, name: str, revision: str) -> None:
                server.revisions.add(revision)
                content, tag = server.files[name], server.tag(name)
                span = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
                start = int(span[1]) if span else 0
                lines = {
                    "ETag": f'"{tag}"', "X-Linked-Etag": f'"{tag}"', "Accept-Ranges": "bytes",
                    "X-Repo-Commit": revision if len(revision) == 40 else COMMIT, "X-Linked-Size": str(len(content)),
                }  # fmt: skip
                if span:
                    lines["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                if self.command != "HEAD":
                    server.sent.append(name)
                    server.ranges += [start] if name.endswith(".safetensors") else []
                end = server.cut.pop(0) if server.cut and self.command != "HEAD" else None
                self._answer(206 if span else 200, lines, content[start:], None if end is None else end - start)

            def _answer(self, status: int, lines: dict[str, str], content: bytes = b"", end: int | None = None) -> None:
                self.send_response(status)
                for key, value in {**lines, "Content-Length": str(len(content))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content[:end])
                if end is not None:
                    self.close_connection = True
                    server.closed.wait(60 if server.stalls else 0)

            do_HEAD = do_GET

            def log_message(self, *_arguments: object) -> None:
                pass

        self.closed = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def tag(self, name: str) -> str:
        """Of a large file its sha256, of a small one a shorter hash."""
        sha256 = self.told.get(name, hashlib.sha256(self.files[name]).hexdigest())
        return sha256 if name.endswith(".safetensors") else sha256[:40]

    def entry(self, repository: str, path: str) -> dict[str, Any]:
        name = f"{repository}/{path}"
        told = {"type": "file", "path": path, "oid": "0" * 40, "size": len(self.files[name])}
        large = {"lfs": {"oid": self.tag(name), "size": told["size"], "pointerSize": 130}}
        return told | (large if name.endswith(".safetensors") else {})

    def offer(self, repository: str, folder: Path) -> None:
        """All files of a folder as a repository."""
        files = [file for file in folder.rglob("*") if file.is_file()]
        self.files |= {f"{repository}/{file.relative_to(folder).as_posix()}": file.read_bytes() for file in files}

    def close(self) -> None:
        self.closed.set()
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


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
    assert "HF_HUB_OFFLINE is set: unset it, or put a copy somewhere and name it with --file" in said
    assert server.ranges == []


# ------------------------------------------------------------------------------------------------ in this process

SD15 = BACKBONES["sd15"].source
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def cache(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The client's cache, of the stand-in; the client reads its variables at import."""
    folder = tmp_path / "cache"
    for name, value in {
        "ENDPOINT": server.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(folder),
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    return folder


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
    "put a copy somewhere and name it with --file": lambda: releases.hub("maker/repo", "x"),
    "name the folder of any model of its kind: HYPERSD_LAYOUT=folder": lambda: _layout("StableDiffusionPipeline"),
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
