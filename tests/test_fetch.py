"""Downloads from a stand-in of the hub on loopback: cut off, gone on with, damaged, missing, offline."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from listing import ROOT
from test_releases import published

from hypersd.backbone import Backbone
from hypersd.folders import BACKBONES

COMMIT = "c" * 40


class Server:
    """Files by "owner/name/path"; `cut` is how many bytes of a file it sends before it hangs up, once an entry."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.told: dict[str, str] = {}  # what it says a file's sha256 is, where it is not that
        self.cut: list[int] = []
        self.ranges: list[int] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                found = re.fullmatch(rf"/(.+)/resolve/(?:main|{COMMIT})/(.+)", self.path)
                name = f"{found[1]}/{found[2]}" if found else ""
                content = server.files.get(name)
                if content is None:
                    self.send_response(404)
                    self.send_header("X-Error-Code", "EntryNotFound")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                span = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
                start = int(span[1]) if span else 0
                self.send_response(206 if span else 200)
                sha256 = server.told.get(name, hashlib.sha256(content).hexdigest())
                lines = {
                    "ETag": f'"{sha256}"', "X-Linked-Etag": f'"{sha256}"', "X-Repo-Commit": COMMIT,
                    "X-Linked-Size": str(len(content)), "Accept-Ranges": "bytes",
                    "Content-Length": str(len(content) - start),
                }  # fmt: skip
                if span:
                    lines["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                for key, value in lines.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "HEAD":
                    return
                server.ranges.append(start)
                if server.cut:
                    self.wfile.write(content[start : server.cut.pop(0)])
                    self.close_connection = True
                    return
                self.wfile.write(content[start:])

            do_HEAD = do_GET

            def log_message(self, *_arguments: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
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


def fetch(server: Server, home: Path, sha256: str = "", **environment: str) -> str:
    """What a process of its own says that fetches maker/repo/lora.safetensors; `home` is its cache."""
    known = {"HF_ENDPOINT": server.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **environment}
    run = [sys.executable, "-B", "-c", FETCH, str(home / "lora"), sha256]
    done = subprocess.run(run, cwd=ROOT, env={**os.environ, **known}, capture_output=True, text=True, timeout=120)
    assert done.stdout, done.stderr
    return done.stdout


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


def test_what_is_cached_is_not_fetched_again(server: Server, lora: bytes, tmp_path: Path) -> None:
    server.files["maker/repo/lora.safetensors"] = lora
    fetch(server, tmp_path)
    assert fetch(server, tmp_path, HF_HUB_OFFLINE="1") == "kept lcm.safetensors\n"
    assert server.ranges == [0]


def test_another_file_under_the_same_name_is_refused(server: Server, lora: bytes, tmp_path: Path) -> None:
    server.files["maker/repo/lora.safetensors"] = lora
    said = fetch(server, tmp_path, "ab" * 32)
    assert "is not what maker/repo published" in said and "fetch it again" in said
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
    assert "HF_HUB_OFFLINE is set" in said and "--file" in said
    assert server.ranges == []


def test_every_backbone_says_how_much_it_fetches() -> None:
    assert all(re.search(r"\d+ GB", preset.summary) for name, preset in BACKBONES.items() if name != "emoji")
