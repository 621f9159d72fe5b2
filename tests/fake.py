"""Stand-ins for the engine: a painter of flat colours that takes as long as it is told."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import gradio as gr
import pytest
from rows import METHODS

from hypersd import ui
from hypersd.engine import UNWATCHED, Coming, Drawing, Progress, Stopped, Watch
from hypersd.records import Panel, Request, digest
from hypersd.sweep import Pace

SIDE = 64


@dataclass
class Painter:
    """An `engine.Draw`: a colour from the request's hash, `seconds` a step. `calls` and `stops` are for asserting."""

    seconds: float = 0.0
    calls: list[str] = field(default_factory=list)
    stops: list[str] = field(default_factory=list)
    steps: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    pace: Pace = field(default_factory=Pace)
    kept: dict[str, Panel] = field(default_factory=dict)
    keep: bool = False  # whether to remember pictures, as the engine does
    unread: str = ""
    coming: Coming | None = None

    def __call__(self, request: Request, method: str, watch: Watch = UNWATCHED) -> Drawing:
        METHODS[method].check(request)
        if self.has(request, method):
            return Drawing(self.kept[method + digest(request)], kept=True)
        with self.lock:
            self.calls.append(f"{method} {request.steps}")
            for step in range(request.steps):
                time.sleep(self.seconds)
                self.steps += 1
                if watch.stop():
                    self.stops.append(f"{method} {request.steps} at {step + 1}")
                    raise Stopped
                watch.progress(Progress(step + 1, request.steps))
        panel = paint(request, method)
        self.pace.note(panel)
        if self.keep:
            self.kept[method + digest(request)] = panel
        return Drawing(panel, (panel.pixels,) * request.steps if watch.trail else (), unread=self.unread)

    def has(self, request: Request, method: str) -> bool:
        return method + digest(request) in self.kept


def paint(request: Request, method: str) -> Panel:
    """A disc on white: its colour is the request's, its size the method's, so equal questions give equal pixels."""
    row = METHODS[method]
    ink = hashlib.sha256(digest(request).encode()).digest()[:3]
    radius = (SIDE // 2 - 6 - 2 * list(METHODS).index(method)) ** 2
    spots = ((x - SIDE // 2) ** 2 + (y - SIDE // 2) ** 2 for y in range(SIDE) for x in range(SIDE))
    pixels = b"".join(ink if spot < radius else b"\xff\xff\xff" for spot in spots)
    guidance = row.guidance if request.guidance is None else request.guidance
    return Panel(
        pixels=pixels, width=SIDE, height=SIDE, prompt=request.prompt, negative_prompt=request.negative_prompt,
        seed=request.seed, noise_sha256=hashlib.sha256(str(request.seed).encode()).hexdigest(), backbone="fake",
        base_sha256="0" * 64, method=method, adapter_sha256=None, sampler=row.sampler, steps=request.steps,
        nfe=request.steps * (2 if guidance > 1 else 1), guidance=guidance, eta=row.eta, dtype="float32",
        seconds=0.01 * request.steps, version="0", nag=None if guidance > 1 else request.nag,
    )  # fmt: skip


@contextmanager
def served(app: gr.Blocks, **more: object) -> Iterator[gr.Blocks]:
    """The app behind a real server on a free port of this machine, its files in a folder that goes away with it."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        before = os.environ.get("GRADIO_TEMP_DIR")
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            ui.serve(app, prevent_thread_lock=True, quiet=True, **more)
            yield app
        finally:
            app.close()
            gc.collect()  # event loops that Gradio leaves behind complain when they go, so let them go here
            os.environ.pop("GRADIO_TEMP_DIR") if before is None else os.environ.update(GRADIO_TEMP_DIR=before)


@pytest.fixture(scope="module", autouse=True)
def no_loops_left() -> Iterator[None]:
    """For modules that build apps: closes the event loop Gradio opens in this thread, or later tests are blamed."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with suppress(RuntimeError):  # there is none
            asyncio.get_event_loop().close()
        asyncio.set_event_loop(None)
        gc.collect()


def address(app: gr.Blocks) -> str:
    """Where a served app answers, with a slash at the end."""
    return str(app.local_url)


def eventually(true: Callable[[], object], seconds: float = 5) -> None:
    """Wait for something that another thread brings about."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.02)
