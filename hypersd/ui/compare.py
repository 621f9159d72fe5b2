"""The first screen: one prompt and one noise, drawn by every method side by side."""

from __future__ import annotations

import html
import json
import math
import secrets
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from hypersd.engine import Draw, News, Shelf, plan, stream
from hypersd.pictures import Sheet
from hypersd.records import NAG_SCALE, InputError, Request
from hypersd.sweep import MethodRow, allowed_steps, spans
from hypersd.ui import prompts
from hypersd.ui.board import Board, State, address, permalink, sheet
from hypersd.ui.history import History, remember

QUICK_STEPS = (1, 2, 4, 8, 25)
SHEETS_BYTES = 64 << 20  # for the contact sheets of everybody together, so that crowds cannot fill the memory
FORGOTTEN = "There is no picture to put on a sheet, or it was put away; draw it first"


@dataclass(frozen=True)
class Screen:
    """What the screen needs to know; `reference` is the (method, steps) every panel is held against. `sheets` are the
    pictures last shown to each visitor, by a key that only the visitor's session holds."""

    draw: Draw
    methods: Mapping[str, MethodRow]
    reference: tuple[str, int]
    sheets: Shelf[Sheet] = field(default_factory=lambda: Shelf(SHEETS_BYTES))


def build(demo: gr.Blocks, screen: Screen, history: History) -> Fields:
    """Lay the screen out inside the open Blocks `demo` and wire it."""
    taken = gr.State("")
    fields = _form(screen)
    notice = gr.HTML("", elem_id="hs-notice")
    viewer = gr.HTML({}, html_template=VIEWER_HTML, js_on_load=VIEWER_JS, elem_id="hs-viewer", apply_default_css=False)
    parcel = gr.HTML({}, html_template="", js_on_load=PARCEL_JS, apply_default_css=False)
    _wire_run(screen, fields, [notice, viewer, taken, *history.outputs])
    viewer.sheet(parcel_of(screen), taken, [notice, parcel], **QUIET)
    viewer.facts(facts_of(screen), taken, [notice, parcel], **QUIET)
    retried = viewer.retry(with_steps, None, [fields.steps, fields.quick], **QUIET)
    retried.then(None, js="() => hypersd.again()", api_visibility="private")

    def from_address(page: gr.Request) -> list[Any]:
        return restore(dict(page.query_params), list(screen.methods))

    opened = demo.load(from_address, None, fields.restored, **QUIET)
    allowed = json.dumps([spans(allowed_steps(row)) for row in screen.methods.values()])
    ready = f"() => {{ hypersd.allowed = {allowed}; hypersd.able(); hypersd.opened('compare'); }}"
    opened.then(None, js=ready, api_visibility="private")
    return fields


VIEWER_HTML = "<div class='hs-viewer'></div>"
VIEWER_JS = """
hypersd.mount(element.querySelector('.hs-viewer'), () => props.value, watch,
  { sheet: () => trigger('sheet'), facts: () => trigger('facts'), retry: (steps) => trigger('retry', { steps }) });
"""
PARCEL_JS = "watch('value', () => hypersd.save(props.value));"
VISITORS = 4  # served at once: drawings take turns, and who waits for a download must not hold the others up
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}


@dataclass(frozen=True)
class Fields:
    prompt: gr.Textbox
    steps: gr.Number
    quick: gr.Radio
    seed: gr.Number
    names: gr.CheckboxGroup
    reference: gr.CheckboxGroup
    guidance: gr.Textbox
    negative: gr.Textbox
    nag: gr.Textbox
    trail: gr.Checkbox
    go: gr.Button
    stop: gr.Button

    @property
    def inputs(self) -> list[Any]:
        return [
            self.prompt, self.seed, self.steps, self.names, self.reference, self.guidance, self.negative, self.nag
        ]  # fmt: skip

    @property
    def restored(self) -> list[Any]:
        """What `restore` gives values for."""
        return [*self.inputs, self.quick]


def _form(screen: Screen) -> Fields:
    with gr.Column(elem_id="hs-form"):
        with gr.Row(elem_id="hs-ask"):
            prompt = gr.Textbox(
                prompts.EXAMPLES[0], label="Prompt", placeholder="Describe a small picture", max_lines=3, lines=1,
                elem_id="hs-prompt", scale=8, autofocus=True,
            )  # fmt: skip
            dice = gr.Button("Surprise me", elem_id="hs-dice", scale=0, min_width=132)
            go = gr.Button("Compare", variant="primary", elem_id="hs-go", scale=0, min_width=132)
            stop = gr.Button("Stop", variant="stop", elem_id="hs-stop", scale=0, min_width=132)
        gr.Examples(
            [[text] for text in prompts.EXAMPLES], prompt, label="Try", elem_id="hs-examples",
            cache_examples=False, api_visibility="private",
        )  # fmt: skip
        fields = _settings(screen, prompt, go, stop)
    dice.click(lambda: prompts.surprise(secrets.randbelow(2**32)), None, prompt, **QUIET)
    return fields


def _settings(screen: Screen, prompt: gr.Textbox, go: gr.Button, stop: gr.Button) -> Fields:
    names, titles = list(screen.methods), [row.title for row in screen.methods.values()]
    with gr.Row(elem_id="hs-settings"):
        with gr.Row(elem_id="hs-steps-group"):
            quick = gr.Radio([(str(n), n) for n in QUICK_STEPS], value=4, label="Steps", elem_id="hs-quick")
            steps = gr.Number(4, label="Any number", precision=0, elem_id="hs-steps", min_width=84)
        with gr.Row(elem_id="hs-seed-group"):
            seed = gr.Number(1, label="Seed", precision=0, elem_id="hs-seed", min_width=120)
            new_seed = gr.Button("New seed", elem_id="hs-new-seed", scale=0, min_width=96)
        with gr.Row(elem_id="hs-methods-group"):
            ticked = gr.CheckboxGroup(
                list(zip(titles, names, strict=True)), value=names, label="Methods", elem_id="hs-methods",
                visible=len(names) > 1,
            )  # fmt: skip
            title, count = screen.methods[screen.reference[0]].title, screen.reference[1]
            reference = gr.CheckboxGroup(
                [(f"{title}, {count} steps", "yes")], value=["yes"], label="Reference", elem_id="hs-reference"
            )
    with gr.Accordion("More", open=False, elem_id="hs-more"), gr.Row():
        # Text, since Gradio's number field turns empty into 0 when it is first shown, and 0 is a guidance.
        guidance = gr.Textbox(
            "", label="Guidance", info="0 to 30; empty: each method's own", elem_id="hs-guidance",
            max_lines=1,
        )  # fmt: skip
        negative = gr.Textbox(
            "", label="Negative prompt", info="What should not be there", placeholder="red",
            elem_id="hs-negative", max_lines=2,
        )  # fmt: skip
        nag = gr.Textbox(
            f"{NAG_SCALE:g}", label="How far from it", info="1 to 20 without guidance; empty: none",
            elem_id="hs-nag", max_lines=1,
        )  # fmt: skip
        trail = gr.Checkbox(
            False, label="Show every step", info="A strip under each panel of what the network had in mind",
            elem_id="hs-trail",
        )  # fmt: skip
    pick = f"(n) => {{ hypersd.able(n); return {list(QUICK_STEPS)}.includes(n) ? n : null; }}"
    quick.input(None, quick, steps, js="(n) => n", **QUIET)
    steps.change(None, steps, quick, js=pick, **QUIET)
    new_seed.click(None, None, seed, js="() => Math.floor(Math.random() * 1e6)", **QUIET)
    return Fields(prompt, steps, quick, seed, ticked, reference, guidance, negative, nag, trail, go, stop)


def _wire_run(screen: Screen, fields: Fields, outputs: list[Any]) -> None:
    past = outputs[3]
    run = gr.on(
        [fields.go.click, fields.prompt.submit, fields.steps.submit, fields.seed.submit, fields.guidance.submit],
        comparison(screen),
        [*fields.inputs, fields.trail, past],
        outputs,
        js="(...given) => { hypersd.begin('compare'); return given; }",
        preprocess=False,  # whatever came goes to `Request`, where the sentences about wrong input are written
        api_visibility="private",
        show_progress="hidden",
        concurrency_id="draw",
        concurrency_limit=VISITORS,
        trigger_mode="once",
    )
    run.then(None, js="() => hypersd.settle('compare')", api_visibility="private")
    fields.stop.click(None, cancels=[run], api_visibility="private", queue=False)


def comparison(screen: Screen) -> Callable[..., AsyncGenerator[tuple[Any, ...], None]]:
    """The function behind Compare, a generator; closing it ends the computation at the next network call."""

    async def run(
        prompt: Any, seed: Any, steps: Any, names: Any, reference: Any, guidance: Any, negative: Any, nag: Any,
        trail: Any, past: Any,
    ) -> AsyncGenerator[tuple[Any, ...], None]:  # fmt: skip
        try:
            away = _or_none(nag) if _or_none(negative) else None  # its field is not even there
            request = Request(prompt, seed, steps, _or_none(guidance), negative_prompt=negative or "", nag=away)
            cells = plan(request, _names(names), screen.methods, screen.reference if reference else None)
        except InputError as problem:
            yield say(str(problem)), {"status": "refused"}, gr.skip(), gr.skip(), gr.skip()
            return
        board = Board(cells, permalink(request, _names(names), bool(reference)))
        key = secrets.token_urlsafe(8)
        yield "", board.state, key, gr.skip(), gr.skip()
        async with aclosing(board.follow(stream(cells, screen.draw, trail=bool(trail)))) as told:
            async for news in told:
                kept: Any = gr.skip()
                if first_of(news, board):
                    kept = remember(past, board, request.prompt, _detail(request, len(names)))
                screen.sheets.put(key, sheet_of(request, board))
                yield gr.skip(), board.state, gr.skip(), kept, kept
        board.finish()
        yield gr.skip(), board.state, *[gr.skip()] * 3

    return run


def first_of(news: Sequence[News], board: Board) -> bool:
    """Whether the board's first picture is among these news: from then on it is worth remembering."""
    return len(board.panels) == 1 and any(item.drawing for item in news)


def _detail(request: Request, methods: int) -> str:
    """The second line of the history's entry."""
    counted = f"{methods} methods, " if methods > 1 else ""
    return f"{counted}{request.steps} step{'s' * (request.steps != 1)}, seed {request.seed}"


def say(text: str) -> str:
    """A calm sentence below the prompt; a screen reader says it too."""
    return f"<p role='status'>{html.escape(text[:1].upper() + text[1:])}.</p>" if text else ""


def _or_none(value: Any) -> Any:
    return None if isinstance(value, str) and not value.strip() else value


def _names(names: Any) -> Sequence[str]:
    if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names):
        return names
    raise InputError("methods must be a list of names")


def sheet_of(request: Request, board: Board) -> Sheet:
    """The finished panels as a contact sheet."""
    return Sheet(board.panels, title=f"{request.prompt} · seed {request.seed}", link=board.link)


def parcel_of(screen: Screen) -> Callable[[str], tuple[str, State]]:
    """From a visitor's key to a contact sheet for the browser's downloads, or a sentence why there is none."""
    return lambda key: _parcel(screen.sheets.get(key), "png", sheet)


def facts_of(screen: Screen) -> Callable[[str], tuple[str, State]]:
    """The same without the pixels: everything that is known of the panels, as JSON."""
    return lambda key: _parcel(screen.sheets.get(key), "json", lambda known: address(_json(known), "application/json"))


def _json(known: Sheet) -> bytes:
    return json.dumps(known.record(), ensure_ascii=False, indent=1).encode()


def _parcel(taken: Sheet | None, ending: str, pack: Callable[[Sheet], str]) -> tuple[str, State]:
    first = next(filter(None, taken.panels), None) if taken else None
    if taken is None or first is None:
        return say(FORGOTTEN), {}
    return "", {"name": f"hypersd-seed-{first.seed}.{ending}", "src": pack(taken), "nonce": secrets.token_hex(4)}


def with_steps(event: gr.EventData) -> list[Any]:
    """The number of steps that an impossible panel proposes, for the field and for the buttons beside it."""
    steps = _figure(str(event.steps))
    return [steps, steps if steps in QUICK_STEPS else None]


def restore(query: Mapping[str, str], known: Sequence[str]) -> list[Any]:
    """Values for the form from a permalink's query, `gr.skip()` for what it does not say or says wrongly."""
    if "prompts" in query:  # a sweep's link
        return [gr.skip()] * 9
    names = [name for name in known if name in query.get("methods", "").split(",")]
    steps = _figure(query.get("steps"))
    return [
        query.get("prompt", gr.skip()),
        _figure(query.get("seed")),
        steps,
        names or gr.skip(),
        ([] if query["reference"] == "0" else ["yes"]) if "reference" in query else gr.skip(),
        query.get("guidance", gr.skip()),
        query.get("negative", gr.skip()),
        query.get("nag", "" if "negative" in query else gr.skip()),
        steps if steps in QUICK_STEPS else gr.skip() if steps == gr.skip() else None,
    ]


def _figure(text: str | None) -> Any:
    try:
        number = float(text or "")
    except ValueError:
        return gr.skip()
    return int(number) if number.is_integer() else number if math.isfinite(number) else gr.skip()
