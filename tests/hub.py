"""A stand-in for the Hub's API, as far as the mirror calls it, that can be told to misbehave."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub:
    """`files` are what the data set holds; `faults` are what the next commits meet, first first.

    A fault is a status to answer, "half" to commit and then answer 500, or "slow" to commit after `slow_seconds`.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: list[int | str] = []
        self.commits = 0
        self.slow_seconds = 1.0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or self._chunks()
                if "/preupload/" in self.path:
                    asked = json.loads(body)["files"]
                    told = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]
                    return self._answer(200, {"files": told})
                fault = hub.faults.pop(0) if hub.faults else 200
                if isinstance(fault, int) and fault != 200:
                    return self._answer(fault, {"error": "A commit has happened since. Please refresh and try again."})
                if fault == "slow":
                    time.sleep(hub.slow_seconds)
                hub.commit(body)
                if fault == "half":
                    return self._answer(500, {"error": "internal"})
                return self._answer(
                    200, {"commitUrl": f"https://huggingface.co/datasets/a/b/commit/{'c' * 40}", "commitOid": "c" * 40}
                )

            def _chunks(self) -> bytes:
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)

            def do_GET(self) -> None:
                path = unquote(urlsplit(self.path).path)
                if "/tree/" in path:
                    listed = [
                        {"type": "file", "path": n, "oid": "0" * 40, "size": len(c)} for n, c in hub.files.items()
                    ]
                    return self._answer(200, listed)
                return self._file(path.partition("/resolve/main/")[2] or path.partition(f"/resolve/{'c' * 40}/")[2])

            do_HEAD = do_GET

            def _file(self, name: str) -> None:
                content = hub.files.get(name)
                if content is None:
                    return self._answer(404, {"error": "not found"})
                tags = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": "c" * 40}
                return self._send(200, content, tags)

            def _answer(self, status: int, told: Any) -> None:
                self._send(status, json.dumps(told).encode(), {"Content-Type": "application/json"})

            def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def log_message(self, *_arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def commit(self, body: bytes) -> None:
        self.commits += 1
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "deletedFile":
                del self.files[entry["value"]["path"]]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
