"""Hugging Face's ZeroGPU: there a drawing borrows a GPU for some seconds; everywhere else nothing here does anything.

A borrowed GPU comes with a process of its own that inherits the model. It is a generator there: each step is told when
it is made, the panel comes last, and closing the generator ends the drawing at the next step.
"""

from __future__ import annotations

import importlib
import math
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from hypersd.records import Panel, Request
from hypersd.sweep import MethodRow, calls

SECONDS, SECONDS_A_CALL, SECONDS_MAX = 5.0, 0.1, 60  # asked for generously: visitors have a few minutes a day


@dataclass
class Made:
    """Step `index` of `total` was made over there. Its `picture`, a uint8 array [1, height, width, 3], comes after the
    last step, as decoding counts in nobody's seconds; `pixels` is it as a tensor."""

    index: int
    total: int
    picture: Any = None

    def pixels(self) -> Any:
        import torch

        return torch.from_numpy(self.picture)


class _Left(Exception):
    """Whoever asked has gone."""


def gpu_draw(
    methods: Mapping[str, MethodRow], paint: Callable[..., Panel] | None = None
) -> Callable[..., Panel] | None:
    """A `draw` for the engine that borrows a GPU for each picture, or None where no GPUs are lent.

    Args:
        methods: the table of methods; a method travels by its name.
        paint: as `generate.draw`, which is the default.
    """
    lender = _lender()
    if lender is None:
        return None
    model: list[Any] = []  # read by the borrowed process, which is forked when it is full

    def painted(request: Request, name: str) -> Generator[Made | list[Any] | Panel, None, None]:
        yield from _told(lambda tell: (paint or _generate())(model[0], request, methods[name], on_step=tell))

    def seconds(request: Request, name: str) -> int:
        return min(SECONDS_MAX, math.ceil(SECONDS + SECONDS_A_CALL * calls(request, methods[name])))

    lent = lender.GPU(painted, duration=seconds)
    if lent is painted:  # the package is there, but this is not ZeroGPU
        return None

    def draw(backbone: Any, request: Request, method: MethodRow, *, on_step: Any = None) -> Panel:
        model[:] = [backbone]
        made: list[Made] = []
        with closing(lent(request, method.name)) as told:  # closed when `on_step` raises, which is how a stop comes
            for item in told:
                if isinstance(item, Panel):
                    return item
                if isinstance(item, Made):
                    made.append(item)
                    if on_step is not None:
                        on_step(item)
                else:
                    for step, picture in zip(made, item, strict=True):
                        step.picture = picture
        raise RuntimeError("the borrowed GPU gave no picture")

    return draw


def _told(paint: Callable[[Callable[[Any], None]], Panel]) -> Iterator[Made | list[Any] | Panel]:
    """From a painter that calls back after each step to a generator of steps, their pictures and, at last, the panel.

    The painter works in a thread, as only a generator can be closed from outside; then its next step is its last.
    """
    post: queue.SimpleQueue[Made | list[Any] | Panel | BaseException] = queue.SimpleQueue()
    steps: list[Any] = []
    left = threading.Event()

    def tell(step: Any) -> None:
        if left.is_set():
            raise _Left
        steps.append(step)
        post.put(Made(step.index, step.total))

    def work() -> None:
        try:
            panel = paint(tell)
            post.put([step.pixels().cpu().numpy() for step in steps])
            post.put(panel)
        except BaseException as problem:  # noqa: BLE001 (raised again where it is waited for)
            post.put(problem)

    thread = threading.Thread(target=work, name="painting", daemon=True)
    thread.start()
    try:
        while isinstance(item := post.get(), Made | list):
            yield item
        if isinstance(item, BaseException):
            raise item
        yield item
    finally:
        left.set()
        thread.join()


def _lender() -> Any:
    """The package `spaces`, which Hugging Face installs on its own machines; None elsewhere."""
    try:
        return importlib.import_module("spaces")
    except ImportError:
        return None


def _generate() -> Callable[..., Panel]:
    from hypersd import generate

    return generate.draw
