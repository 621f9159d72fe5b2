"""A stand-in for the hub's repositories of models: lists files and sends them, and can be told to misbehave."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c" * 40


class Server:
    """Files by "owner/name/path", listed and sent as the hub does: of a safetensors file it tells the sha256.

    `cut` is how many bytes of a file it sends before it hangs up, once an entry; where it `stalls` it goes silent
    instead. A file that is `held` is not sent before its event. `refusal` is the status and the hub's code for it that
    everything is answered with; what is `closed_off` is answered with 403.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.told: dict[str, str] = {}  # what it says a file's sha256 is, where it is not that
        self.cut: list[int] = []
        self.stalls = False
        self.held: dict[str, threading.Event] = {}
        self.closed_off: set[str] = set()
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
                if name in server.closed_off:
                    return self._answer(403, {})
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
                    if held := server.held.get(name):
                        held.wait(120)
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
