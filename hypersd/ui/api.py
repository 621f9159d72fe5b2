"""The endpoint for programs: `Client(url).predict(prompt="a red apple", steps=4, api_name="/compare")`."""

# No `from __future__ import annotations` here: Gradio makes the endpoint's documentation from the real types.
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import gradio as gr

from hypersd.engine import plan, stream
from hypersd.records import InputError, Request
from hypersd.ui.board import Board
from hypersd.ui.compare import Screen

Answer = list[dict[str, Any]]


def add(screen: Screen) -> None:
    """Publish /compare inside an open Blocks. It waits in the same queue as the people in front of the screen."""
    gr.api(endpoint(screen), api_name="compare", concurrency_id="draw", concurrency_limit=1)


def endpoint(screen: Screen) -> Callable[..., AsyncGenerator[Answer, None]]:
    """The function behind /compare, a generator: one more panel in each answer, all of them in the last."""

    async def compare(
        prompt: str,
        seed: int = 0,
        steps: int = 4,
        methods: list[str] | None = None,
        guidance: float | None = None,
        negative_prompt: str = "",
        reference: bool = False,
    ) -> AsyncGenerator[Answer, None]:
        """Draw one prompt from one noise with several methods (None: all of them), and the reference if asked for.

        Each panel is {method, title, reference, problem, png, provenance}: `png` is a data address with the provenance
        inside, `problem` a sentence where a method cannot draw this request.
        """
        try:
            names = list(screen.methods) if methods is None else methods
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise InputError(f"methods must be a list of names from {', '.join(screen.methods)}")
            request = Request(prompt, seed, steps, guidance, negative_prompt=negative_prompt)
            cells = plan(request, names, screen.methods, screen.reference if reference else None)
        except InputError as problem:
            raise gr.Error(str(problem), print_exception=False) from None
        board = Board(cells, "")
        async with aclosing(board.follow(stream(cells, screen.draw))) as told:
            async for news in told:
                if any(item.drawing for item in news):
                    yield answer(board)
        yield answer(board)

    # What a caller gets is the last answer, so that is the type to document.
    compare.__annotations__["return"] = Answer
    return compare


def answer(board: Board) -> Answer:
    """The panels that are finished or known to be impossible, in order."""
    return [
        {
            "method": tile["method"],
            "title": tile["title"],
            "reference": tile["reference"],
            "problem": tile["text"],
            "png": tile.get("src", ""),
            "provenance": tile.get("facts", {}),
        }
        for tile in board.tiles
        if tile["phase"] in ("done", "problem")
    ]
