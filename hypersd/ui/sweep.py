"""The second screen: a grid of step counts against methods, prompts and seeds, as in the figures of the papers."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import gradio as gr

from hypersd import sweep
from hypersd.engine import Cell, cell, stream
from hypersd.pictures import Sheet
from hypersd.records import InputError
from hypersd.ui import prompts
from hypersd.ui.board import Board, State
from hypersd.ui.compare import PARCEL_JS, QUIET, VISITORS, Screen, facts_of, first_of, parcel_of, say
from hypersd.ui.history import History, remember

GRID_HTML = "<div class='hs-viewer hs-sweep'></div>"
GRID_JS = """
hypersd.mountGrid(element.querySelector('.hs-viewer'), () => props.value, watch,
  { sheet: () => trigger('sheet'), facts: () => trigger('facts') });
"""


@dataclass(frozen=True)
class Fields:
    prompts: gr.Textbox
    steps: gr.Textbox
    seeds: gr.Textbox
    names: gr.CheckboxGroup
    guidance: gr.Textbox
    negative: gr.Textbox
    go: gr.Button
    stop: gr.Button
    cost: gr.HTML

    @property
    def inputs(self) -> list[Any]:
        return [self.prompts, self.seeds, self.steps, self.names, self.guidance, self.negative]


def build(demo: gr.Blocks, screen: Screen, tabs: gr.Tabs, history: History) -> Fields:
    """Lay the screen out inside its tab and wire it. A link with `prompts` in it opens this tab."""
    fields = _form(screen)
    notice = gr.HTML("", elem_id="hs-sweep-notice")
    grid = gr.HTML({}, html_template=GRID_HTML, js_on_load=GRID_JS, elem_id="hs-grid", apply_default_css=False)
    taken = gr.State("")
    parcel = gr.HTML({}, html_template="", js_on_load=PARCEL_JS, apply_default_css=False)
    _wire(screen, tabs, fields, history, [notice, grid, taken, *history.outputs])
    grid.sheet(parcel_of(screen), taken, [notice, parcel], **QUIET)
    grid.facts(facts_of(screen), taken, [notice, parcel], **QUIET)

    def from_address(page: gr.Request) -> list[Any]:
        query = dict(page.query_params)
        return [opens(query), *restore(query, list(screen.methods))]

    opened = demo.load(from_address, None, [tabs, *fields.inputs], **QUIET)
    opened.then(None, js="() => hypersd.opened('sweep')", api_visibility="private")
    return fields


def opens(query: Mapping[str, str]) -> Any:
    """The tab that a link belongs to; a bare address changes nothing."""
    return gr.Tabs(selected="sweep") if "prompts" in query else gr.skip()


def _form(screen: Screen) -> Fields:
    names, titles = list(screen.methods), [row.title for row in screen.methods.values()]
    # With one method there is nothing to hold against it but other prompts.
    first = "\n".join(prompts.EXAMPLES[: 1 if len(names) > 1 else 3])
    with gr.Column(elem_id="hs-sweep-form"):
        with gr.Row(elem_id="hs-sweep-ask"):
            texts = gr.Textbox(
                first, label="Prompts, one a line", placeholder="Describe small pictures, one a line", lines=2,
                max_lines=8, elem_id="hs-sweep-prompts", scale=8,
            )  # fmt: skip
            go = gr.Button("Draw the grid", variant="primary", elem_id="hs-sweep-go", scale=0, min_width=140)
            stop = gr.Button("Stop", variant="stop", elem_id="hs-sweep-stop", scale=0, min_width=140)
        with gr.Row(elem_id="hs-sweep-settings"):
            steps = gr.Textbox("1, 2, 4, 8, 25", label="Steps", max_lines=1, elem_id="hs-sweep-steps", min_width=180)
            seeds = gr.Textbox("1", label="Seeds", max_lines=1, elem_id="hs-sweep-seeds", min_width=120)
            ticked = gr.CheckboxGroup(
                list(zip(titles, names, strict=True)), value=names, label="Methods", elem_id="hs-sweep-methods",
                visible=len(names) > 1,
            )  # fmt: skip
        with gr.Accordion("More", open=False, elem_id="hs-sweep-more"), gr.Row():
            guidance = gr.Textbox(
                "", label="Guidance", info="0 to 30; empty: each method's own", max_lines=1,
                elem_id="hs-sweep-guidance",
            )  # fmt: skip
            negative = gr.Textbox(
                "", label="Negative prompt", info="What should not be there; counts with a guidance above 1",
                max_lines=2, elem_id="hs-sweep-negative",
            )  # fmt: skip
        cost = gr.HTML("", elem_id="hs-sweep-cost", apply_default_css=False)
    return Fields(texts, steps, seeds, ticked, guidance, negative, go, stop, cost)


def _wire(screen: Screen, tabs: gr.Tabs, fields: Fields, history: History, outputs: list[Any]) -> None:
    quiet: dict[str, Any] = {**QUIET, "preprocess": False, "trigger_mode": "always_last"}
    gr.on(
        [tabs.select, *(field.change for field in fields.inputs)], estimate(screen), fields.inputs, fields.cost, **quiet
    )
    run = gr.on(
        [fields.go.click, fields.steps.submit, fields.seeds.submit, fields.guidance.submit],
        sweeping(screen),
        [*fields.inputs, history.past],
        outputs,
        js="(...given) => { hypersd.begin('sweep'); return given; }",
        preprocess=False,  # whatever came goes to `sweep.plan`, where the sentences about wrong input are written
        api_visibility="private",
        show_progress="hidden",
        concurrency_id="draw",
        concurrency_limit=VISITORS,
        trigger_mode="once",
    )
    run.then(None, js="() => hypersd.settle('sweep')", api_visibility="private")
    run.then(estimate(screen), fields.inputs, fields.cost, **quiet)
    stopped = fields.stop.click(None, cancels=[run], api_visibility="private", queue=False)
    stopped.then(estimate(screen), fields.inputs, fields.cost, **quiet)


def estimate(screen: Screen) -> Callable[..., str]:
    """The function behind the line that says what the grid will cost, or why there cannot be one."""

    def told(texts: Any, seeds: Any, steps: Any, names: Any, guidance: Any, negative: Any) -> str:
        try:
            grid = planned(screen, texts, seeds, steps, names, guidance, negative)
        except InputError as problem:
            return say(str(problem))
        return say(str(sweep.cost(grid, screen.draw.pace, screen.draw.has)))

    return told


def sweeping(screen: Screen) -> Callable[..., AsyncGenerator[tuple[Any, ...], None]]:
    """The function behind "Draw the grid", a generator; closing it ends the computation at the next network call."""

    async def run(
        texts: Any, seeds: Any, steps: Any, names: Any, guidance: Any, negative: Any, past: Any
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        try:
            grid = planned(screen, texts, seeds, steps, names, guidance, negative)
        except InputError as problem:
            yield say(str(problem)), {"status": "refused"}, *[gr.skip()] * 3
            return
        board = Board(cells(grid, screen.methods), permalink(grid), measure=False, more=shape(grid))
        key = secrets.token_urlsafe(8)
        yield "", board.state, key, gr.skip(), gr.skip()
        async with aclosing(board.follow(stream(board.cells, screen.draw))) as told:
            async for news in told:
                kept: Any = gr.skip()
                if first_of(news, board):
                    kept = remember(past, board, *_entry(grid))
                screen.sheets.put(key, sheet_of(grid, board))
                yield gr.skip(), board.state, gr.skip(), kept, kept
        board.finish()
        yield gr.skip(), board.state, *[gr.skip()] * 3

    return run


def _entry(grid: sweep.Grid) -> tuple[str, str]:
    """The two lines of the history's entry."""
    texts = list(dict.fromkeys(square.request.prompt for square in grid.squares))
    more = f" and {len(texts) - 1} more" if len(texts) > 1 else ""
    counts = ", ".join(map(str, grid.columns))
    return texts[0] + more, f"sweep of {len(grid.squares)}, {counts} step{'s' * (counts != '1')}"


def planned(screen: Screen, texts: Any, seeds: Any, steps: Any, names: Any, guidance: Any, negative: Any) -> sweep.Grid:
    """`sweep.plan` of what the form holds; an empty guidance is none."""
    given = None if isinstance(guidance, str) and not guidance.strip() else guidance
    return sweep.plan(
        texts, seeds, steps, names, screen.methods, guidance=given, negative_prompt="" if negative is None else negative
    )


def cells(grid: sweep.Grid, methods: Mapping[str, sweep.MethodRow]) -> list[Cell]:
    """What the engine is asked for, in the order of the squares."""
    return [cell(square.request, methods[square.method]) for square in grid.squares]


def shape(grid: sweep.Grid) -> State:
    """What the browser needs beside the tiles to lay out the grid."""
    rows = [{"title": row.title, "detail": row.detail} for row in grid.rows]
    return {"caption": grid.caption, "rows": rows, "columns": list(grid.columns)}


def sheet_of(grid: sweep.Grid, board: Board) -> Sheet:
    """The grid as a contact sheet, places without a picture left empty."""
    return Sheet(
        [board.drawings[i].panel if i in board.drawings else None for i in range(len(grid.squares))],
        columns=len(grid.columns),
        title=grid.caption,
        rows=[" · ".join(filter(None, row)) for row in grid.rows],
        heads=[f"{n} step{'s' * (n != 1)}" for n in grid.columns],
        link=board.link,
    )


def permalink(grid: sweep.Grid) -> str:
    """The query string that restores a sweep, even after the server has been restarted."""
    first = grid.squares[0].request
    requests = [square.request for square in grid.squares]
    query: dict[str, str] = {
        "prompts": "\n".join(dict.fromkeys(request.prompt for request in requests)),
        "seeds": ",".join(dict.fromkeys(str(request.seed) for request in requests)),
        "steps": ",".join(map(str, grid.columns)),
        "methods": ",".join(dict.fromkeys(square.method for square in grid.squares)),
    }
    if first.guidance is not None:
        query["guidance"] = f"{first.guidance:g}"
    if first.negative_prompt:
        query["negative"] = first.negative_prompt
    return "?" + urlencode(query)


def restore(query: Mapping[str, str], known: list[str]) -> list[Any]:
    """Values for the form from a permalink's query, `gr.skip()` for what it does not say."""
    if "prompts" not in query:  # a comparison's link, or none
        return [gr.skip()] * 6
    names = [name for name in known if name in query.get("methods", "").split(",")]
    plain = [query.get(key, gr.skip()) for key in ("prompts", "seeds", "steps")]
    return [*plain, names or gr.skip(), query.get("guidance", gr.skip()), query.get("negative", gr.skip())]
