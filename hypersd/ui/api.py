"""The endpoints for programs: `Client(url).predict(prompt="a red apple", steps=4, api_name="/compare")`."""

# No `from __future__ import annotations` here: Gradio makes the endpoints' documentation from the real types.
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import gradio as gr

from hypersd import sweep as grids
from hypersd.engine import plan, stream
from hypersd.records import InputError, Request
from hypersd.ui.board import Board, State
from hypersd.ui.compare import VISITORS, Screen
from hypersd.ui.sweep import cells

Answer = list[dict[str, Any]]


def add(screen: Screen) -> None:
    """Publish /compare and /sweep inside an open Blocks. They wait in the same queue as the people at the screen."""
    for endpoint in (comparing(screen), sweeping(screen)):
        gr.api(endpoint, api_name=endpoint.__name__, concurrency_id="draw", concurrency_limit=VISITORS)


def comparing(screen: Screen) -> Callable[..., AsyncGenerator[Answer, None]]:
    """The function behind /compare, a generator: one more panel in each answer, all of them in the last."""

    async def compare(
        prompt: str,
        seed: int = 0,
        steps: int = 4,
        methods: list[str] | None = None,
        guidance: float | None = None,
        negative_prompt: str = "",
        reference: bool = False,
        nag: float | None = None,
    ) -> AsyncGenerator[Answer, None]:
        """Draw one prompt from one noise with several methods (None: all of them), and the reference if asked for.

        Guidance above 1 leads away from the negative prompt; where a method has none, `nag` does, 1 to 20.

        Each panel is {method, title, reference, problem, unread, png, provenance}: `png` is a data address with the
        provenance inside, `problem` a sentence where a method cannot draw this request, `unread` the end of a prompt
        that is longer than the model reads.
        """
        try:
            names = list(screen.methods) if methods is None else methods
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise InputError(f"methods must be a list of names from {', '.join(screen.methods)}")
            request = Request(prompt, seed, steps, guidance, negative_prompt=negative_prompt, nag=nag)
            board = Board(plan(request, names, screen.methods, screen.reference if reference else None), "")
        except InputError as problem:
            raise gr.Error(str(problem), print_exception=False) from None
        async with aclosing(_answers(screen, board)) as told:
            async for answer in told:
                yield answer

    return _documented(compare)


def sweeping(screen: Screen) -> Callable[..., AsyncGenerator[Answer, None]]:
    """The function behind /sweep, a generator: one more picture in each answer, all of them in the last."""

    async def sweep(
        prompts: list[str],
        steps: list[int] = [1, 2, 4, 8],  # noqa: B006 (never changed, and shown in the documentation)
        seeds: list[int] = [0],  # noqa: B006
        methods: list[str] | None = None,
        guidance: float | None = None,
        negative_prompt: str = "",
    ) -> AsyncGenerator[Answer, None]:
        """Draw a grid: every prompt, seed and method (None: all of them) with every number of steps, at most 64.

        The answer lists the pictures row by row, few steps first. Each is {prompt, seed, steps, calls, method, title,
        problem, unread, png, provenance}: `png` is a data address with the provenance inside, `problem` a sentence
        where a method cannot draw it, `calls` the network passes it costs. Pictures drawn before cost nothing.
        """
        try:
            names = list(screen.methods) if methods is None else methods
            grid = grids.plan(
                prompts, seeds, steps, names, screen.methods, guidance=guidance, negative_prompt=negative_prompt
            )
        except InputError as problem:
            raise gr.Error(str(problem), print_exception=False) from None
        board = Board(cells(grid, screen.methods), "", measure=False)
        asked = [
            {"prompt": s.request.prompt, "seed": s.request.seed, "steps": s.request.steps, "calls": s.calls}
            for s in grid.squares
        ]
        async with aclosing(_answers(screen, board, asked)) as told:
            async for answer in told:
                yield answer

    return _documented(sweep)


def _documented(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    # What a caller gets is the last answer, so that is the type to document.
    endpoint.__annotations__["return"] = Answer
    return endpoint


async def _answers(screen: Screen, board: Board, asked: list[State] | None = None) -> AsyncGenerator[Answer, None]:
    """Draw what is on the board: an answer after each picture, and the whole at the end."""
    async with aclosing(board.follow(stream(board.cells, screen.draw))) as told:
        async for news in told:
            if any(item.drawing for item in news):
                yield _answer(board, asked)
    yield _answer(board, asked)


def _answer(board: Board, asked: list[State] | None) -> Answer:
    """The panels that are finished or known to be impossible, in order; each with what was asked, in a sweep."""
    return [
        {
            **(asked[number] if asked else {"reference": tile["reference"]}),
            "method": tile["method"],
            "title": tile["title"],
            "problem": tile["text"],
            "unread": tile.get("unread", ""),
            "png": tile.get("src", ""),
            "provenance": tile.get("facts", {}),
        }
        for number, tile in enumerate(board.tiles)
        if tile["phase"] in ("done", "problem")
    ]
