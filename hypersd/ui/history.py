"""What was drawn in this browser, kept by the browser: comparisons and sweeps, newest first, each with its link."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
from typing import Any

import gradio as gr

from hypersd import pictures
from hypersd.records import Panel
from hypersd.ui.board import Board, State, address

LENGTH = 24
LIST_HTML = "<div class='hs-past'></div>"
LIST_JS = """
const draw = () => hypersd.past(element.querySelector('.hs-past'), props.value, (item) => trigger('select', item));
watch('value', draw);
draw();
"""


@dataclass(frozen=True)
class History:
    """`past` lives in the browser; `shown` is the list of it, laid out by `build`."""

    past: gr.BrowserState
    shown: gr.HTML

    @property
    def outputs(self) -> list[Any]:
        return [self.past, self.shown]


def prepare() -> History:
    """Inside an open Blocks: what both screens write to, not yet laid out."""
    past = gr.BrowserState([], storage_key="hypersd-history", secret="hypersd-history")
    shown = gr.HTML([], html_template=LIST_HTML, js_on_load=LIST_JS, apply_default_css=False, render=False)
    return History(past, shown)


def build(demo: gr.Blocks, history: History, quiet: dict[str, Any]) -> None:
    """Lay the list out here and fill it from the browser; `quiet` are the settings of events without a spinner."""
    with gr.Accordion("History of this browser", open=False, elem_id="hs-past"):
        history.shown.render()
        forget = gr.Button("Forget all", size="sm", elem_id="hs-forget")
    demo.load(lambda kept: kept, history.past, history.shown, **quiet)
    forget.click(lambda: ([], []), None, history.outputs, **quiet)


def remember(past: Any, board: Board, title: str, detail: str) -> list[State]:
    """The history with what is on the board in front, equal links merged; what the browser sent is not trusted.

    `title` and `detail` are the two lines of the entry, and its picture is the first finished one.
    """
    if not board.panels:
        return entries(past)
    entry = {"link": board.link, "title": title, "detail": detail, "at": int(time.time())}
    picture = {"picture": thumbnail(board.panels[0])}
    return [{**entry, **picture}, *(old for old in entries(past) if old["link"] != board.link)][:LENGTH]


def entries(past: Any) -> list[State]:
    """What of it can be shown: entries with two lines and a link."""
    rows = past if isinstance(past, list) else []
    return [row for row in rows if isinstance(row, dict) and all(isinstance(row.get(key), str) for key in WORDS)]


WORDS = ("link", "title", "detail")


def thumbnail(panel: Panel, side: int = 64) -> str:
    """A small WebP as a data address, about 1 kB."""
    file = io.BytesIO()
    pictures.to_image(panel).resize((side, side)).save(file, "WEBP", quality=70)
    return address(file.getvalue(), "image/webp")
