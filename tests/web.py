"""A small internet on loopback for tests of gathering; as a program, it gathers by two, and while being killed.

python tests/web.py INDEX FOLDER ADDRESS EVERY    prints the number of moments there were; tries every so many
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
from fakecoder import child, content, status
from PIL import Image

from hypersd.data import download, files, gather
from hypersd.data.download import Downloads
from hypersd.data.gather import Wanted
from hypersd.data.index import open_index

WANTED = Wanted(side=32, smallest=48)
ROWS = 4  # a piece
Answer = tuple[int, dict[str, str], bytes]


def photo(seed: int, size: tuple[int, int] = (64, 56)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def jpeg(image: Image.Image, quality: int = 92) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.server.asked[self.path] += 1
        if secret := self.headers.get("Authorization"):
            self.server.knocked.append((self.path, secret))
        answer = self.server.answers.get(self.path, (404, {}, b""))
        code, headers, body = answer(self.server.asked[self.path]) if callable(answer) else answer
        span, whole = self.headers.get("Range", ""), self.path in self.server.whole
        if span and code == 200 and not whole and not (span.startswith("bytes=-") and self.server.spelt_out):
            code, headers, body = self._part(span, headers, body)
        self.send_response(code)
        length = {} if "Transfer-Encoding" in headers else {"Content-Length": str(len(body))}
        for name, value in {"Connection": "close", **length, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        pause = self.server.slow.get(self.path, 0.0)
        step = 100 if pause else len(body) or 1
        for first in range(0, len(body), step):
            time.sleep(pause)
            self.wfile.write(body[first : first + step])
            self.wfile.flush()
        self.close_connection = True

    def do_POST(self) -> None:
        self.server.posted = self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def _part(self, span: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Of bytes=2-5 those four, of bytes=-3 the last three."""
        low, high = span.removeprefix("bytes=").split("-")
        size = len(body)
        first, last = (int(low), min(int(high), size - 1)) if low else (max(0, size - int(high)), size - 1)
        if first > last:
            return 416, {}, b""
        self.server.spans.append((self.path, first, last))
        part = body[first : last + 1]
        return 206, {**headers, "Content-Range": f"bytes {first}-{last}/{size}"}, part

    def log_message(self, *_: Any) -> None: ...


class Server(ThreadingHTTPServer):
    """`answers` by path, each (status, headers, body) or a function of how often it was asked for.

    Parts are sent of all but the `whole` ones; `spans` are (path, first byte, last byte) of those that were. `posted`
    is what came with the last POST, `knocked` are (path, value) of all that came with an Authorization.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, Answer | Callable[[int], Answer]] = {}
        self.slow: dict[str, float] = {}  # seconds before each 100 bytes
        self.asked: Counter[str] = Counter()
        self.whole: set[str] = set()
        self.spelt_out = False  # whether spans need a first byte; those without are answered with the whole file
        self.spans: list[tuple[str, int, int]] = []
        self.posted = b""
        self.knocked: list[tuple[str, str]] = []

    def put(self, path: str, body: bytes | Image.Image, headers: Mapping[str, str] | None = None) -> str:
        self.answers[path] = (200, dict(headers or {}), body if isinstance(body, bytes) else jpeg(body))
        return self.at(path)

    def at(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.server_address[1]}{path}"

    def handle_error(self, *_: Any) -> None: ...  # whoever asked was killed


@contextmanager
def serving() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def laion(file: Path, rows: Sequence[Mapping[str, Any]], group: int = 100) -> Path:
    """An index as LAION's aesthetic subsets are; what a row leaves out is good enough to be kept."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    usual = {"URL": None, "TEXT": "a happy cat", "WIDTH": 2000, "HEIGHT": 1500, "similarity": 0.3, "hash": 7,
             "punsafe": 0.01, "pwatermark": 0.1, "AESTHETIC_SCORE": 6.5}  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([{**usual, **row} for row in rows]), file, row_group_size=group)
    return file


def make(place: Path, out: Path, kill_at: int = 0) -> None:
    if kill_at:
        die_at(kill_at)
    gather.gather(open_index([place], ROWS), out, WANTED, Downloads(seconds=5, private=True), threads=2)


def die_at(moment: int) -> None:
    """From now on, die without a word in the given download, flush or rename, or between two samples of a tar."""
    left = [moment]

    def fatal(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return call

    files.flush = gather.flush = fatal(files.flush)
    os.replace, gather._put, download._target = fatal(os.replace), fatal(gather._put), fatal(download._target)


def main(place: Path, folder: Path, address: str, every: int) -> None:
    both = [child(partial(make, place, folder / "both")) for _ in range(2)]
    assert [status(process) for process in both] == [0, 0]
    with urlopen(f"{address}/asked") as answer:  # which also makes the server quick
        asked = json.load(answer)
    assert set(asked.values()) == {1}, "somebody asked twice"
    assert status(child(partial(make, place, folder / "calm"))) == 0
    calm = content(folder / "calm")
    assert content(folder / "both") == calm
    moment, alive = 1 - every, False
    while not alive:
        moment += every
        out = folder / f"killed-{moment}"
        alive = status(child(partial(make, place, out, moment))) == 0
        assert status(child(partial(make, place, out))) == 0
        assert content(out) == calm, moment
    sys.stdout.write(f"{moment}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
