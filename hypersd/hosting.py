"""Hugging Face's ZeroGPU: there a drawing borrows a GPU for some seconds; everywhere else nothing here does anything.

A borrowed GPU comes with a process of its own that inherits the model. It is a generator there: each step is told when
it is made, the panel comes last, and closing the generator ends the drawing at the next step. A `Problem` comes as an
item too, since the lender brings only Gradio's own errors over; by those it says for itself that a quota is used up.

For how long it is asked: a start, in which the weights travel, and a time for each network call; both grow with the
weights. In half precision Stable Diffusion 1.5 has 2.1 GB and takes 0.8 TFLOP a call, SDXL 7 GB and 6.8: allowed are
0.1 s and 0.3 s, a rate of 8 and 24 TFLOP/s, a third or less of what half a card should do. Nobody has measured it on
ZeroGPU. Too little ends a drawing half-way; too much is refused to visitors with less left of their day's minutes,
which the lender counts 1.5 times on its present cards.
"""

from __future__ import annotations

import importlib
import math
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from hypersd.records import InputError, Panel, Problem, Request
from hypersd.sweep import MethodRow, calls

SECONDS, SECONDS_A_CALL, SECONDS_MAX = 5.0, 0.1, 60
SECONDS_A_GB, SECONDS_A_GB_AND_CALL = 1.0, 0.04  # of weights in memory


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

    def painted(request: Request, name: str) -> Generator[Made | list[Any] | Panel | Problem, None, None]:
        try:
            yield from _told(lambda tell: (paint or _generate())(model[0], request, methods[name], on_step=tell))
        except Problem as problem:
            yield problem

    def seconds(request: Request, name: str) -> int:
        return borrowed_seconds(calls(request, methods[name]), _gigabytes(model[0]))

    lent = lender.GPU(painted, duration=seconds)
    if lent is painted:  # the package is there, but this is not ZeroGPU
        return None

    def draw(backbone: Any, request: Request, method: MethodRow, *, on_step: Any = None) -> Panel:
        model[:] = [backbone]
        made: list[Made] = []
        with _refusals(), closing(lent(request, method.name)) as told:  # closed when `on_step` raises: so a stop comes
            for item in told:
                if isinstance(item, Problem):
                    raise item
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


def borrowed_seconds(calls: int, gigabytes: float) -> int:
    """For how long a GPU is asked for: `calls` network calls of a model whose weights take so many GB in memory."""
    a_call = max(SECONDS_A_CALL, SECONDS_A_GB_AND_CALL * gigabytes)
    return min(SECONDS_MAX, math.ceil(SECONDS + SECONDS_A_GB * gigabytes + a_call * calls))


def _gigabytes(backbone: Any) -> float:
    parts = [part for part in backbone.components.values() if hasattr(part, "parameters")]
    return sum(weight.numel() * weight.element_size() for part in parts for weight in part.parameters()) / 1e9


@contextmanager
def _refusals() -> Iterator[None]:
    """The lender's own sentences, such as that a quota is used up, are for the visitor; a fault's name is not."""
    import gradio as gr

    try:
        yield
    except gr.Error as refusal:
        if " " in str(refusal.message):
            raise InputError(f"No GPU can be borrowed: {refusal.message}") from refusal
        raise RuntimeError("the borrowed GPU gave no picture") from refusal


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
