"""Calls that no sane program makes: each is answered with pictures or a sentence, and costs no memory."""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
import pytest
import requests
from fake import address, no_loops_left, served
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rows import METHODS
from samples import panel

from hypersd import ui
from hypersd.engine import UNWATCHED, Drawing, Watch
from hypersd.records import Request
from hypersd.sweep import Pace
from hypersd.ui import api, compare, sweep

__all__ = ["no_loops_left"]  # a fixture that runs by itself
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::pandas.errors.Pandas4Warning"
)
GROWTH_MB = 100


class Blank:
    """Draws the same small picture for everything, at once."""

    pace = Pace()
    coming = None

    def __call__(self, request: Request, method: str, watch: Watch = UNWATCHED) -> Drawing:
        METHODS[method].check(request)
        return Drawing(panel(12, 12, prompt=request.prompt, seed=request.seed, method=method))

    def has(self, request: Request, method: str) -> bool:
        return False


SCREEN = compare.Screen(Blank(), METHODS, ("base", 25))

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.integers(min_value=10**300, max_value=10**301) | st.floats()
    | st.text(max_size=12) | st.text(st.characters(categories=["Cs", "Cc", "Cf", "Mn"]), max_size=5)
    | st.sampled_from(["", "base", "1e999", "-0", "../../etc/passwd", "\0", "x" * 3000, "1-" * 99, "0-99999999999"])
)  # fmt: skip
RUBBISH = st.recursive(
    SCALARS, lambda of: st.lists(of, max_size=4) | st.dictionaries(st.text(max_size=4), of, max_size=3), max_leaves=6
)
USUAL = st.sampled_from(
    ["a cat", "a cat\na dog", 1, 2, "1, 2", "1-3", [1, 2], ["a cat"], ["base", "tcd"], None, "", True]
)
VALUES = st.lists(USUAL | RUBBISH, min_size=10, max_size=10)
# What a visitor's browser or program reaches, each with the number of arguments it takes.
DOORS: dict[str, tuple[Callable[..., Any], int]] = {
    "/compare": (api.comparing(SCREEN), 8),
    "/sweep": (api.sweeping(SCREEN), 6),
    "compare screen": (compare.comparison(SCREEN), 10),
    "sweep screen": (sweep.sweeping(SCREEN), 7),
    "cost": (sweep.estimate(SCREEN), 6),
}


def clean(told: str) -> None:
    assert "Traceback (most recent" not in told
    assert "site-packages" not in told
    assert "hypersd/" not in told
    assert "test_malformed" not in told


async def answers(door: Callable[..., Any], values: list[Any]) -> list[Any]:
    told = door(*values)
    if isinstance(told, str):
        return [told]
    try:
        return [str(item)[:100_000] async for item in told]
    except gr.Error as problem:
        return [str(problem)]


def knock(times: int) -> None:
    """`times` calls spread over all doors; anything but an answer or a `gr.Error` fails."""
    with asyncio.Runner() as runner:

        @given(st.sampled_from(sorted(DOORS)), VALUES)
        @settings(max_examples=times, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        def one(name: str, values: list[Any]) -> None:
            door, count = DOORS[name]
            told = runner.run(answers(door, values[:count]))
            assert told
            for item in told:
                clean(item)

        one()


def megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def test_hundreds_of_malformed_calls_are_answered() -> None:
    knock(300)


@pytest.mark.slow
def test_ten_thousand_malformed_calls_are_answered_and_leave_nothing_behind() -> None:
    knock(500)
    before = megabytes()
    for _ in range(20):  # hypothesis remembers a run's calls while it lasts; it is not what is measured here
        knock(500)
    assert megabytes() - before < GROWTH_MB


# The same through the door that the network reaches


@pytest.fixture(scope="module")
def demo() -> Iterator[gr.Blocks]:
    with served(ui.build(Blank(), METHODS, credits="")) as app:
        yield app


def post(demo: gr.Blocks, number: int, body: Any) -> str:
    """All that the server says to one call, sent as it is, however wrong."""
    base, name = f"{address(demo)}gradio_api/queue/", f"rubbish{number}"
    functions = [d["id"] for d in demo.config["dependencies"] if d["api_name"] in ("compare", "sweep")]
    asked = {"data": body, "fn_index": functions[number % 2], "session_hash": name}
    sent = json.dumps(asked)  # ascii, so that half surrogate pairs and infinities travel too
    joined = requests.post(f"{base}join", data=sent, headers={"Content-Type": "application/json"}, timeout=60)
    told = joined.text
    assert joined.status_code in (200, 400, 422), told[:300]
    if joined.status_code == 200:
        with requests.get(f"{base}data?session_hash={name}", stream=True, timeout=60) as stream:
            for line in map(bytes.decode, stream.iter_lines()):
                told += line
                if "process_completed" in line:
                    break
            else:
                raise AssertionError(f"no end: {told[-300:]}")
    return told


def over_http(demo: gr.Blocks, times: int) -> None:
    numbers = iter(range(10**9))

    @given(VALUES | RUBBISH)
    @settings(max_examples=times, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def one(body: Any) -> None:
        number = next(numbers)
        clean(post(demo, number, body[: 8 - number % 2] if isinstance(body, list) else body))

    one()
    whole = post(demo, 0, ["a cat", 1, 2, ["lcm"], None, "", False, None])
    assert '"success":true' in whole.replace(" ", "")


@pytest.mark.parametrize("body", ["\ud800", {"\ud800": 1}, ["\ud800"], 7], ids=["text", "name", "item", "number"])
def test_half_a_surrogate_pair_is_refused_or_answered(demo: gr.Blocks, body: Any) -> None:
    clean(post(demo, 0, body))


def test_malformed_calls_over_http_are_answered(demo: gr.Blocks) -> None:
    over_http(demo, 25)


@pytest.mark.slow
def test_hundreds_of_malformed_calls_over_http_are_answered(demo: gr.Blocks) -> None:
    over_http(demo, 400)
