"""A line above everything that says what is being downloaded before pictures can be drawn, or why it could not be."""

from __future__ import annotations

import html
from typing import Any

import gradio as gr

from hypersd.engine import Coming, Draw
from hypersd.ui.compare import QUIET

SECONDS = 2.0  # between two looks of a page, which stop once everything is in place


def build(demo: gr.Blocks, draw: Draw) -> None:
    """Lay the line out inside the open Blocks `demo`; it takes no room while there is nothing to say."""
    line = gr.HTML("", elem_id="hs-coming", apply_default_css=False)
    timer = gr.Timer(SECONDS, active=False)

    def look() -> list[Any]:
        coming = draw.coming
        return [said(coming or Coming()), gr.Timer(active=coming is not None)]

    demo.load(look, None, [line, timer], **QUIET)
    timer.tick(look, None, [line, timer], **QUIET)


def said(coming: Coming) -> str:
    """As HTML. A screen reader is told of a failure, and not every two seconds how far a download is."""
    text = html.escape(coming.text[:1].upper() + coming.text[1:])
    if coming.failed:
        return f"<p class='hs-failed' role='status'>{text}.</p>"
    meter = "" if coming.share is None else f"<progress value='{coming.share:.3f}'></progress>"
    return f"<p>{text}.{meter}</p>" if text else ""
