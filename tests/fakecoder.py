"""An encoder of a few lines for tests of data; as a program, it makes caches while being killed.

python tests/fakecoder.py SOURCE FOLDER    prints the number of moments that were tried
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hypersd import data
from hypersd.data import cache, files, sources


class Fake:
    """16 px pictures <-> 2 x 2 x 3 latents of block means; a caption's states are its hash."""

    picture_px = 16
    encoders_sha256 = "f" * 64
    dtype = torch.float32

    def __init__(self) -> None:
        self.encoded, self.embedded = 0, 0

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        assert pixels.dtype == torch.uint8 and pixels.shape[1:] == (16, 16, 3)
        self.encoded += len(pixels)
        mean = torch.nn.functional.avg_pool2d(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1, 8)
        return mean, 0.1 + mean.abs()

    def embed(self, prompts: Sequence[str]) -> Tensor:
        self.embedded += len(prompts)
        hashes = [list(hashlib.sha256(p.encode()).digest()[:8]) for p in prompts]
        return (torch.tensor(hashes).float() / 256).reshape(-1, 2, 4)


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def small_pieces() -> None:
    sources.PIECE, cache.TEXTS = 3, 4


def make(source: Path, folder: Path, kill_at: int = 0, **options: Any) -> None:
    if kill_at:
        die_at(kill_at)
    data.prepare(data.open_source(source), Fake(), folder, data.Transform(flip=True), batch=2, **options)


def die_at(moment: int) -> None:
    """From now on, die without a word in the given write, flush or rename, counted from 1; a write is half done."""
    left = [moment]

    def fatal(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return call

    write, pause = cache.save_file, fatal(lambda: None)

    def torn(tensors: dict[str, Tensor], filename: Any, metadata: Any = None) -> None:
        write(tensors, filename)
        os.truncate(filename, filename.stat().st_size // 2)
        pause()
        write(tensors, filename)

    cache.save_file, files.flush, os.replace = torn, fatal(files.flush), fatal(os.replace)


def child(work: Callable[[], None]) -> int:
    """Start `work` in a process of its own; returns its id."""
    if process := os.fork():
        return process
    try:
        work()
    finally:
        os._exit(0 if sys.exc_info()[0] is None else 1)


def status(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def main(source: Path, folder: Path) -> None:
    small_pieces()
    assert status(child(partial(make, source, folder / "calm"))) == 0
    calm = content(folder / "calm")

    def shot(place: Path, moment: int) -> int:
        return status(child(partial(make, source, place, moment)))

    moment, alive = 0, False
    while not alive:
        moment += 1
        place = folder / f"killed-{moment}"
        alive = shot(place, moment) == 0
        shot(place, 2)  # and once more soon after it went on
        assert status(child(partial(make, source, place))) == 0
        assert content(place) == calm, moment
    both = [child(partial(make, source, folder / "shared", rank=rank, world=2)) for rank in (0, 1)]
    assert [status(process) for process in both] == [0, 0]
    assert content(folder / "shared") == calm
    sys.stdout.write(f"{moment}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
