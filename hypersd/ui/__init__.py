"""The screens. No logic lives here: pictures come from the `draw` that is handed in.

ui.serve(ui.build(engine, METHODS))
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import gradio as gr
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from hypersd import folders
from hypersd.engine import Draw
from hypersd.pool import Missing, Pool
from hypersd.sweep import MethodRow
from hypersd.ui import api, coming, compare, history, measured, prompts, results, study, sweep

log = logging.getLogger(__name__)
HERE = Path(__file__).parent
CREDITS = HERE.parents[1] / "assets" / "CREDITS.md"
FONTS = ["-apple-system", "BlinkMacSystemFont", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
MONO = ["ui-monospace", "SF Mono", "Cascadia Code", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]

ABOUT = "Panels that show the same noise start from it. Times are wall time here, with the weights in memory."

QUEUE: dict[str, Any] = {"max_size": 32, "default_concurrency_limit": 1, "api_open": False}
LAUNCH: dict[str, Any] = {
    "max_file_size": "1mb",  # nothing is uploaded here
    "allowed_paths": [],
    "strict_cors": True,
    "show_error": False,  # what a visitor should read is said by the app itself
    "enable_monitoring": False,
    "run_history": False,
    "ssr_mode": False,
    "mcp_server": False,  # unless GRADIO_MCP_SERVER asks for it
    "state_session_capacity": 2000,
    "footer_links": [],
}


def build(
    draw: Draw,
    methods: Mapping[str, MethodRow],
    *,
    reference: tuple[str, int] = ("base", 25),
    credits: str | None = None,
    pool: Pool | Missing | None = None,
    backbone: str = "emoji",
) -> gr.Blocks:
    """The app, not yet served. Nothing is drawn or loaded by building it.

    Args:
        draw: paints one panel; an `engine.Engine`, or a fake one in tests.
        methods: the rows to offer, in the order of their panels.
        reference: method and step count that every panel is held against.
        credits: Markdown for the footer; None reads assets/CREDITS.md, which is the embedded model's.
        pool: the blind study with its pictures; None for no tabs of it.
        backbone: of which licence and published figures are shown.
    """
    with gr.Blocks(title="hypersd", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True) as demo:
        gr.HTML(_read("header.html"), elem_id="hs-header", apply_default_css=False)
        coming.build(demo, draw)
        screen, past = compare.Screen(draw, methods, reference), history.prepare()
        with gr.Tabs(elem_id="hs-tabs") as tabs:
            with gr.Tab("Compare", id="compare"):
                one = compare.build(demo, screen, past)
            with gr.Tab("Sweep", id="sweep", render_children=True):  # there before it is opened: links fill it
                many = sweep.build(demo, screen, tabs, past)
            if pool:
                with gr.Tab("Study", id="study"):
                    study.build(demo, tabs, pool)
                with gr.Tab("Results", id="results", render_children=True) as seen:
                    results.build(seen, pool)
        history.build(demo, past, compare.QUIET)
        _wire_past(past, tabs, one, many, list(methods))
        tabs.select(
            None, [one.prompt, many.prompts], many.prompts,
            js=f"(prompt, prompts) => hypersd.carry(prompt, prompts, {json.dumps(prompts.EXAMPLES[0])})",
            **compare.QUIET,
        )  # fmt: skip
        api.add(screen)
        gr.HTML(f"<p>{ABOUT}</p>", elem_id="hs-footer", apply_default_css=False)
        if figures := measured.page(folders.measured(backbone)):
            with gr.Accordion("Measured: quality and seconds of every method", open=False, elem_id="hs-measured"):
                gr.HTML(figures, apply_default_css=False)
        own = _credits() if credits is None and backbone == "emoji" else credits or ""
        with gr.Accordion("Models and licences", open=False, elem_id="hs-credits"):
            gr.Markdown(f"{_licences(backbone, methods)}\n\n{own}".strip())
    return demo


def _wire_past(past: history.History, tabs: gr.Tabs, one: compare.Fields, many: sweep.Fields, known: list[str]) -> None:
    """Choosing an entry of the history opens its screen, fills it and draws."""

    def chosen(event: gr.EventData) -> list[Any]:
        query = dict(parse_qsl(str(event.link).lstrip("?")))
        tab = gr.Tabs(selected="sweep" if "prompts" in query else "compare")
        return [tab, *compare.restore(query, known), *sweep.restore(query, known)]

    filled = past.shown.select(chosen, None, [tabs, *one.restored, *many.inputs], **compare.QUIET)
    filled.then(None, js="() => hypersd.chosen()", api_visibility="private")


def serve(demo: gr.Blocks, **more: Any) -> tuple[Any, str, str]:
    """Launch with the settings that a public page wants; `more` are further arguments of `launch`."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    demo.queue(**QUEUE)
    handlers = {"exception_handlers": {RequestValidationError: _refuse}}
    settings = {**LAUNCH, "mcp_server": _mcp(), "theme": _theme(), "head": _head(), "app_kwargs": handlers, **more}
    app, local, share = demo.launch(**settings)
    return app, local, share


async def _refuse(request: Request, problem: Exception) -> JSONResponse:
    """Say that a body is not a call. FastAPI's own answer repeats the body, and fails on half a surrogate pair."""
    return JSONResponse({"detail": "This is not a call that the app knows; its /config names them."}, 422)


def _mcp() -> bool:
    """Whether the endpoints are offered as tools of the Model Context Protocol too."""
    if os.environ.get("GRADIO_MCP_SERVER", "").lower() not in ("1", "true"):
        return False
    if find_spec("mcp") is None:
        log.warning("GRADIO_MCP_SERVER asks for MCP, which is not installed; serving without it. "
                    "Type: pip install 'gradio[mcp]'")  # fmt: skip
        return False
    return True


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _head() -> str:
    scripts = "".join(f"<script>\n{_read(name)}\n</script>" for name in ("page.js", "viewer.js", "grid.js", "study.js"))
    # Not as launch(css=...): that puts each rule under the page's content, and ours look at the body as well.
    return f"<style>\n{_read('style.css')}\n{_read('study.css')}\n</style>{scripts}"


def _theme() -> gr.themes.Base:
    # Fonts of the reader's own system: nothing is fetched.
    sans, mono = ([gr.themes.Font(name) for name in names] for names in (FONTS, MONO))
    return gr.themes.Base(primary_hue="indigo", neutral_hue="stone", font=sans, font_mono=mono)


def _licences(backbone: str, methods: Mapping[str, MethodRow]) -> str:
    """As Markdown: what the base model may be used for, and what was learned on top of it."""
    lines = [
        "| drawn with | licence |",
        "| --- | --- |",
        f"| the base model, {Path(backbone).name} | {folders.licence(backbone)} |",
    ]
    return "\n".join(lines + [f"| {row.title} | {row.licence} |" for row in methods.values() if row.adapted])


def _credits() -> str:
    return CREDITS.read_text(encoding="utf-8") if CREDITS.is_file() else ""
