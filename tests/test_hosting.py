"""ZeroGPU with a stand-in for its package: who borrows a GPU, for how long, that it tells and stops, and that nobody
borrows elsewhere."""

from __future__ import annotations

import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
import torch
from rows import METHODS
from samples import panel

from hypersd.engine import Engine, Progress, Stopped, Watch
from hypersd.hosting import SECONDS_MAX, borrowed_seconds, gpu_draw
from hypersd.records import InputError, Panel, Request

CAT = Request("a cat", 1, 4)


class Lender:
    """What `spaces` does on ZeroGPU with a generator, in this process: notes for how long a GPU is asked for, carries
    each item over as bytes, and closes the task when its own generator is closed."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.carried = 0
        self.refuses = ""

    def GPU(self, task: Callable[..., Any], duration: Callable[..., int]) -> Callable[..., Any]:
        def borrowed(*arguments: Any) -> Iterator[Any]:
            self.asked.append(duration(*arguments))
            if self.refuses:
                raise gr.Error(self.refuses)
            try:
                for item in task(*arguments):
                    self.carried += 1
                    yield pickle.loads(pickle.dumps(item))  # noqa: S301 (our own bytes)
            except (ValueError, RuntimeError) as fault:  # of which no more than its class comes over
                raise gr.Error(type(fault).__name__) from None

        return borrowed


def paint(backbone: Any, request: Request, method: Any, *, on_step: Any = None) -> Panel:
    assert backbone.sha256 == "weights"
    for index in range(request.steps):
        on_step(SimpleNamespace(index=index, total=request.steps, pixels=lambda: torch.zeros(1, 4, 4, 3)))
        backbone.steps.append(index)
        time.sleep(0.002)
    if request.prompt == "broken":
        raise ValueError("no picture today")
    if request.prompt == "too much":
        raise InputError("the GPU has too little memory")
    return panel(method=method.name, steps=request.steps)


@pytest.fixture
def lender(monkeypatch: pytest.MonkeyPatch) -> Lender:
    lender = Lender()
    monkeypatch.setitem(sys.modules, "spaces", lender)
    return lender


def model() -> Any:
    return SimpleNamespace(sha256="weights", truncated=lambda prompt: "", steps=[], components={})


def test_each_picture_borrows_a_gpu_for_as_long_as_its_calls_need(lender: Lender) -> None:
    draw = Engine(model, METHODS, gpu_draw(METHODS, paint))
    assert draw(CAT, "lcm").panel == panel(method="lcm", steps=4)
    draw(CAT, "lcm")  # kept: nothing is borrowed
    draw(Request("a cat", 1, 50), "base")  # guided: 100 calls
    draw(Request("a cat", 1, 100), "base")
    assert lender.asked == [6, 15, 25]
    assert max(lender.asked) <= SECONDS_MAX


def test_steps_are_told_while_they_are_made(lender: Lender) -> None:
    seen: list[Progress] = []
    drawing = Engine(model, METHODS, gpu_draw(METHODS, paint))(CAT, "lcm", Watch(seen.append, trail=True))
    assert seen == [Progress(n, 4) for n in (1, 2, 3, 4)]
    assert len(drawing.trail) == 4
    assert lender.carried == 4 + 1 + 1  # steps, their pictures, the panel


def test_a_stop_ends_the_borrowing_at_the_next_step(lender: Lender) -> None:
    borrowed, told = model(), [0]

    def stop() -> bool:
        told[0] += 1
        return told[0] > 3

    with pytest.raises(Stopped):
        Engine(lambda: borrowed, METHODS, gpu_draw(METHODS, paint))(Request("a cat", 1, 100), "base", Watch(stop=stop))
    assert len(borrowed.steps) < 50
    assert lender.carried <= 4
    assert not [thread for thread in threading.enumerate() if thread.name == "painting"]


def test_a_fault_over_there_is_a_fault_here(lender: Lender) -> None:
    draw = gpu_draw(METHODS, paint)
    assert draw is not None
    with pytest.raises(RuntimeError, match="the borrowed GPU gave no picture"):
        draw(model(), Request("broken", 1, 2), METHODS["lcm"])


def test_what_a_person_can_mend_is_said_in_full(lender: Lender) -> None:
    draw = Engine(model, METHODS, gpu_draw(METHODS, paint))
    with pytest.raises(InputError, match=r"^the GPU has too little memory$"):
        draw(Request("too much", 1, 2), "lcm")
    lender.refuses = "You have exceeded your free ZeroGPU quota (9s requested vs. 3s left)."
    with pytest.raises(InputError, match="No GPU can be borrowed: You have exceeded your free ZeroGPU quota"):
        draw(CAT, "lcm")


@pytest.mark.parametrize(("gigabytes", "calls", "seconds"), [
    (0.1, 4, 6), (2.1, 4, 8), (2.1, 50, 13), (7.0, 4, 14), (7.0, 50, 26), (7.0, 200, SECONDS_MAX),
])  # fmt: skip
def test_larger_models_ask_for_longer(gigabytes: float, calls: int, seconds: int) -> None:
    assert borrowed_seconds(calls, gigabytes) == seconds


def test_the_weights_in_memory_are_counted(lender: Lender) -> None:
    heavy = torch.nn.Module()
    heavy.weight = torch.nn.Parameter(torch.empty(3_000_000_000, dtype=torch.float16, device="meta"))
    large = model()
    large.components = {"unet": heavy, "tokenizer": object()}
    draw = gpu_draw(METHODS, paint)
    assert draw is not None
    draw(large, CAT, METHODS["lcm"])
    assert lender.asked == [borrowed_seconds(4, 6.0)]


def test_the_weights_load_in_the_thread_that_asks_and_are_hashed(lender: Lender) -> None:
    """The lender's stand-in for CUDA is there for the main thread alone, and takes the files away later."""
    seen: list[str] = []

    class Weights:
        def __init__(self) -> None:
            seen.append(threading.current_thread().name)

        def __getattr__(self, name: str) -> str:
            seen.append(name)
            return name

    engine = Engine(Weights, METHODS, gpu_draw(METHODS, paint))
    engine.load_now()
    assert seen == [threading.current_thread().name, "sha256", "network_sha256"]
    assert engine.ready


def test_weights_that_are_not_there_leave_a_page_that_says_so(caplog: pytest.LogCaptureFixture) -> None:
    def missing() -> Any:
        raise InputError("sd15: unet is missing")

    engine = Engine(missing, METHODS)
    engine.load_now()
    assert not engine.ready
    assert caplog.messages == ["the weights: sd15: unet is missing"]


def test_what_cannot_be_drawn_borrows_nothing(lender: Lender) -> None:
    with pytest.raises(InputError, match="tcd was made for 2-8 steps"):
        Engine(model, METHODS, gpu_draw(METHODS, paint))(Request("a cat", 1, 1), "tcd")
    assert lender.asked == []


def test_where_the_package_does_nothing_the_engine_draws_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    unchanged = SimpleNamespace(GPU=lambda task, duration: task)
    monkeypatch.setitem(sys.modules, "spaces", unchanged)
    assert gpu_draw(METHODS, paint) is None


def test_without_the_package_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spaces", None)
    assert gpu_draw(METHODS) is None


def test_the_borrowed_gpu_draws_what_generate_draws(lender: Lender, tiny_backbone: Any) -> None:
    from dataclasses import replace

    from hypersd import generate
    from hypersd.methods import METHODS as REAL

    request = Request("a happy cat", 3, 2)
    borrowed = Engine(lambda: tiny_backbone, REAL, gpu_draw(REAL))(request, "base").panel
    assert replace(borrowed, seconds=0) == replace(generate.draw(tiny_backbone, request, REAL["base"]), seconds=0)
    assert len(lender.asked) == 1
