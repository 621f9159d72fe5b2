"""The engine without a model: who draws when, what is kept, and that a stop stops."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
from fake import Painter, eventually, paint
from rows import METHODS

from hypersd.engine import BROKEN, NO_WEIGHTS, Drawing, Engine, News, Shelf, Stopped, Watch, plan, stream
from hypersd.records import InputError, Panel, Request


@dataclass
class Model:
    """A backbone and its `draw`: counts what is asked of it and never lets two drawings overlap unnoticed."""

    seconds: float = 0.0
    sha256: str = "weights"
    drawn: list[tuple[str, str]] = field(default_factory=list)
    loads: int = 0
    steps: int = 0
    busy: bool = False
    overlap: bool = False

    def load(self) -> Model:
        self.loads += 1
        return self

    def draw(self, backbone: object, request: Request, method: Any, *, on_step: Callable[[Any], None]) -> Panel:
        self.overlap |= self.busy
        self.busy = True
        try:
            for index in range(request.steps):
                time.sleep(self.seconds)
                self.steps += 1
                on_step(SimpleNamespace(index=index, total=request.steps, pixels=self.pixels))
        finally:
            self.busy = False
        self.drawn.append((request.prompt, method.name))
        return paint(request, method.name)

    def truncated(self, prompt: str) -> str:
        return prompt[18:]

    def pixels(self) -> Any:
        import numpy as np

        return [SimpleNamespace(numpy=lambda: np.full((64, 64, 3), 7, np.uint8))]


def engine(model: Model, **more: Any) -> Engine:
    return Engine(model.load, METHODS, model.draw, **more)


CAT = Request("a cat", 1, 4)


def test_weights_load_once_and_only_when_wanted() -> None:
    model = Model()
    draw = engine(model)
    assert (model.loads, draw.ready) == (0, False)
    draw(CAT, "base")
    draw(replace(CAT, seed=2), "base")
    assert (model.loads, draw.ready) == (1, True)


def test_warm_up_loads_and_draws() -> None:
    model = Model()
    draw = engine(model)
    draw.warm_up(CAT).join(5)
    assert draw.ready
    assert model.drawn == [("a cat", "base")]


def test_whoever_asks_one_thread_draws() -> None:
    """More threads that compute than cores make each wait for the others at every operation."""
    model, threads = Model(), set[int]()

    def paint(*given: Any, **more: Any) -> Any:
        threads.add(threading.get_ident())
        return model.draw(*given, **more)

    draw = Engine(model.load, METHODS, paint)
    visitors = [threading.Thread(target=draw, args=(replace(CAT, seed=seed), "base")) for seed in range(3)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join(5)
    draw(replace(CAT, seed=9), "base")
    assert len(model.drawn) == 4 and len(threads) == 1 and threading.get_ident() not in threads


def test_the_same_request_twice_is_the_same_pixels_drawn_once() -> None:
    model = Model()
    draw = engine(model)
    first, second = draw(CAT, "lcm"), draw(Request("a   cat", 1.0, "4"), "lcm")  # type: ignore[arg-type]
    assert (first.kept, second.kept, len(model.drawn)) == (False, True, 1)
    assert first.panel == second.panel


@pytest.mark.parametrize("other", [
    replace(CAT, prompt="a Cat"), replace(CAT, seed=2), replace(CAT, steps=5), replace(CAT, guidance=2.0),
    replace(CAT, eta=0.5), replace(CAT, negative_prompt="red"),
], ids=str)  # fmt: skip
def test_whatever_differs_is_drawn_anew(other: Request) -> None:
    model = Model()
    draw = engine(model)
    draw(CAT, "base")
    assert not draw(other, "base").kept
    assert not draw(CAT, "lcm").kept
    assert len(model.drawn) == 3


def test_other_weights_are_another_picture() -> None:
    model = Model()
    draw = engine(model)
    draw(CAT, "base")
    model.sha256 = "other weights"
    assert not draw(CAT, "base").kept


def test_a_strip_is_drawn_when_only_the_panel_was_kept() -> None:
    draw = engine(Model())
    assert draw(CAT, "base").trail == ()
    with_trail = draw(CAT, "base", Watch(trail=True))
    assert [len(pixels) for pixels in with_trail.trail] == [64 * 64 * 3] * 4
    assert draw(CAT, "base", Watch(trail=True)).kept


def test_crowds_share_one_model_and_everyone_gets_the_own_picture() -> None:
    model = Model(0.0005)
    draw = engine(model)
    wanted = [(replace(CAT, seed=i % 10), method) for i in range(40) for method in ("base", "hyper")]
    got: dict[int, Drawing] = {}

    def ask(number: int) -> None:
        got[number] = draw(*wanted[number])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(wanted))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert all(got[i].panel == paint(request, method) for i, (request, method) in enumerate(wanted))
    assert (model.overlap, model.loads, len(model.drawn)) == (False, 1, 20)


def test_stop_ends_a_drawing_at_its_next_step_and_frees_the_model() -> None:
    model = Model(0.01)
    draw = engine(model)
    with pytest.raises(Stopped):
        draw(replace(CAT, steps=100), "base", Watch(stop=lambda: model.steps >= 3))
    assert model.steps == 3
    assert not draw(CAT, "base").kept


def test_stop_ends_the_wait_for_somebody_elses_drawing() -> None:
    model, stop = Model(0.02), threading.Event()
    draw = engine(model)
    long = threading.Thread(target=draw, args=(replace(CAT, steps=30), "base"))
    long.start()
    eventually(lambda: model.steps)
    stop.set()
    with pytest.raises(Stopped):
        draw(CAT, "lcm", Watch(stop=stop.is_set))
    assert long.is_alive()
    long.join(5)


def test_missing_weights_are_said_and_tried_again() -> None:
    model = Model()
    faults: list[Exception] = [OSError("/secret/path"), InputError("emoji: unet is missing; copy it again")]

    def load() -> Model:
        if faults:
            raise faults.pop(0)
        return model

    draw = Engine(load, METHODS, model.draw)
    with pytest.raises(InputError) as told:
        draw(CAT, "base")
    assert str(told.value) == NO_WEIGHTS
    with pytest.raises(InputError, match="unet is missing"):
        draw(CAT, "base")
    assert draw(CAT, "base").panel == paint(CAT, "base")


def test_warm_up_survives_missing_weights(caplog: pytest.LogCaptureFixture) -> None:
    def load() -> Model:
        raise InputError("emoji: unet is missing")

    Engine(load, METHODS).warm_up().join(5)
    assert "unet is missing" in caplog.text


def test_unknown_methods_and_step_counts_are_refused_before_loading() -> None:
    model = Model()
    with pytest.raises(InputError, match="there is no method 'nope'; choose from base, lcm"):
        engine(model)(CAT, "nope")
    with pytest.raises(InputError, match="tcd was made for 2-8 steps, got 1"):
        engine(model)(replace(CAT, steps=1), "tcd")
    assert model.loads == 0


def test_a_caller_is_told_that_the_weights_are_loading_and_only_then() -> None:
    draw, told = engine(Model()), list[str]()
    draw(CAT, "base", Watch(loading=told.append))
    assert told == [""]
    draw(replace(CAT, seed=2), "base", Watch(loading=told.append))
    assert told == [""]


def test_whoever_waits_for_somebody_elses_loading_is_told_too() -> None:
    model, begun, go = Model(), threading.Event(), threading.Event()

    def load() -> Model:
        begun.set()
        go.wait(5)
        return model

    draw, told = Engine(load, METHODS, model.draw), threading.Event()
    warm = draw.warm_up(CAT)
    assert begun.wait(5)
    watch = Watch(loading=lambda text: told.set())
    visitor = threading.Thread(target=draw, args=(replace(CAT, seed=2), "lcm", watch))
    visitor.start()
    assert told.wait(5)
    go.set()
    warm.join(5)
    visitor.join(5)


def test_what_the_model_does_not_read_is_said() -> None:
    draw = engine(Model())
    assert draw(CAT, "base").unread == ""
    assert draw(Request("a cat with a very long tail"), "base").unread == "long tail"
    assert draw(Request("a cat with a very long tail"), "base").unread == "long tail"  # kept


def test_the_engine_knows_what_it_has_and_how_long_pictures_take() -> None:
    draw = engine(Model())
    assert not draw.has(CAT, "base")
    assert draw.pace.seconds(1, 4) is None
    drawing = draw(CAT, "base")
    assert draw.has(CAT, "base")
    assert not draw.has(CAT, "lcm")
    assert not draw.has(CAT, "nope")
    before = draw.pace.seconds(1, drawing.panel.nfe)
    assert before == pytest.approx(drawing.panel.seconds)
    draw(CAT, "base")  # kept: nothing was measured
    assert draw.pace.seconds(1, drawing.panel.nfe) == before


def test_the_drawing_happens_in_the_callers_context() -> None:
    visitor: contextvars.ContextVar[str] = contextvars.ContextVar("visitor", default="nobody")
    painter, seen = Painter(), []

    def asks(request: Request, method: str, watch: Watch) -> Drawing:
        seen.append(visitor.get())
        return painter(request, method, watch)

    visitor.set("somebody")
    hear(asks)
    assert seen == ["somebody"] * 2


def test_the_shelf_forgets_what_was_not_asked_for_longest() -> None:
    size = len(paint(CAT, "base").pixels)
    shelf: Shelf[Drawing] = Shelf(2 * size)
    for key in "ab":
        shelf.put(key, Drawing(paint(CAT, "base")))
    shelf.get("a")
    shelf.put("c", Drawing(paint(CAT, "base")))
    assert [key for key in "abc" if shelf.get(key)] == ["a", "c"]


def test_the_plan_follows_the_table_and_ends_with_the_reference() -> None:
    cells = plan(CAT, ["hyper", "lcm"], METHODS, ("base", 25))
    assert [(c.method, c.request.steps, c.reference) for c in cells] == [
        ("lcm", 4, False), ("hyper", 4, False), ("base", 25, True)]  # fmt: skip
    assert {c.request.seed for c in cells} == {1}
    assert plan(replace(CAT, steps=1), ["tcd"], METHODS)[0].problem.startswith("tcd was made for")


def hear(painter: Any, steps: int = 4, leave_after: int = 10**6) -> list[News]:
    async def listen() -> list[News]:
        heard: list[News] = []
        told = stream(plan(replace(CAT, steps=steps), ["base", "lcm"], METHODS), painter, beat=0.02)
        async for news in told:
            heard += news
            if len(heard) >= leave_after:
                break
        await told.aclose()
        return heard

    return asyncio.run(listen())


def test_news_come_in_order_and_finished_panels_at_once() -> None:
    heard = hear(Painter(0.005))
    assert [n.cell for n in heard] == sorted(n.cell for n in heard)
    assert [n.cell for n in heard if n.drawing] == [0, 1]
    assert [n.progress.step for n in heard if n.progress] == [1, 2, 3, 4] * 2


def test_leaving_the_stream_stops_the_painter_and_begins_nothing_new() -> None:
    painter = Painter(0.02)
    hear(painter, steps=8, leave_after=2)
    eventually(lambda: painter.stops)
    made = painter.steps
    time.sleep(0.1)
    assert painter.steps == made <= 4
    assert painter.calls == ["base 8"]


def test_a_panel_that_fails_leaves_the_others_alone(caplog: pytest.LogCaptureFixture) -> None:
    painter = Painter()

    def moody(request: Request, method: str, watch: Watch) -> Drawing:
        if method == "base":
            raise ZeroDivisionError
        return painter(request, method, watch)

    heard = [n for n in hear(moody) if n.problem or n.drawing]
    assert [(n.cell, n.problem) for n in heard] == [(0, BROKEN), (1, "")]
    assert "ZeroDivisionError" in caplog.text


def test_a_real_backbone_gives_the_pixels_that_generate_gives(tiny_backbone: Any) -> None:
    from hypersd import generate
    from hypersd.methods import METHODS as REAL

    draw = Engine(lambda: tiny_backbone, REAL)
    request = Request("a happy cat", 3, 3)
    steps: list[int] = []
    drawing = draw(request, "base", Watch(progress=lambda made: steps.append(made.step), trail=True))
    alone = generate.draw(tiny_backbone, request, REAL["base"])
    assert replace(drawing.panel, seconds=0) == replace(alone, seconds=0)
    assert steps == [1, 2, 3]
    assert [len(pixels) for pixels in drawing.trail] == [len(alone.pixels)] * 3
    assert drawing.trail[-1] != drawing.trail[0]
