"""What the viewer in the browser is told: the state of every panel as plain JSON, growing as the news come in."""

from __future__ import annotations

import asyncio
import base64
import io
import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any
from urllib.parse import urlencode

import numpy as np
from PIL import Image

from hypersd import metrics, pictures
from hypersd.engine import Cell, Drawing, News
from hypersd.records import Panel, Request

State = dict[str, Any]  # JSON for the browser


class Board:
    """The panels of one comparison. `state` is what the browser shows; `panels` are the finished ones.

    `measure` says whether distances between all pairs are wanted; `more` goes into the state as it is.
    """

    def __init__(self, cells: Sequence[Cell], link: str, *, measure: bool = True, more: State | None = None) -> None:
        self.cells, self.measure, self.more = cells, measure, more or {}
        self.drawings: dict[int, Drawing] = {}
        self.numbers: State = {}
        self.status = "running"
        self.link = link
        self.tiles = [_tile(cell) for cell in cells]

    @property
    def panels(self) -> list[Panel]:
        return [self.drawings[i].panel for i in sorted(self.drawings)]

    @property
    def state(self) -> State:
        return {"status": self.status, "link": self.link, "tiles": self.tiles, "numbers": self.numbers, **self.more}

    async def follow(self, told: AsyncGenerator[list[News], None]) -> AsyncGenerator[list[News], None]:
        """Pass the news on once they are on the board; closing this closes `told`, and with it the drawing."""
        async with aclosing(told) as all_news:
            async for news in all_news:
                await asyncio.to_thread(self.hear, news)  # PNGs and SSIM of large panels take a while
                yield news

    def hear(self, news: Sequence[News]) -> None:
        # New lists and dicts instead of changed ones: what was yielded before must stay as it was.
        for item in news:
            tile = dict(self.tiles[item.cell])
            if item.loading is not None:
                tile.update(phase="loading", coming=item.loading)
            if item.progress:
                tile.update(phase="drawing", step=item.progress.step, steps=item.progress.steps)
            if item.problem:
                tile.update(phase="problem", text=item.problem)
            if item.drawing:
                tile.update(_finished(item.drawing))
                if self.measure:
                    self._measure(item.cell, item.drawing)
                self.drawings[item.cell] = item.drawing
            self.tiles = [tile if i == item.cell else old for i, old in enumerate(self.tiles)]

    def finish(self) -> None:
        self.status = "done"

    def _measure(self, cell: int, drawing: Drawing) -> None:
        for other, earlier in self.drawings.items():
            a, b = sorted((cell, other))
            self.numbers = {**self.numbers, f"{a}-{b}": distances(earlier.panel, drawing.panel)}


def distances(a: Panel, b: Panel) -> State:
    """MAE, PSNR (None when infinite) and SSIM (None below its window) of two panels; a larger one is averaged down."""
    size = min(a.width, b.width), min(a.height, b.height)
    x, y = (np.asarray(pictures.to_image(panel).resize(size, Image.Resampling.BOX)) for panel in (a, b))
    psnr = metrics.psnr(x, y)
    return {
        "mae": round(metrics.mae(x, y), 2),
        "psnr": None if math.isinf(psnr) else round(psnr, 2),
        "ssim": round(metrics.ssim(x, y), 4) if min(x.shape[:2]) >= 11 else None,
    }


def permalink(request: Request, methods: Sequence[str], reference: bool) -> str:
    """The query string that restores a comparison, even after the server has been restarted."""
    query: dict[str, str | int | float] = {"prompt": request.prompt, "seed": request.seed, "steps": request.steps}
    query["methods"] = ",".join(methods)
    if request.guidance is not None:
        query["guidance"] = f"{request.guidance:g}"
    if request.negative_prompt:
        query["negative"] = request.negative_prompt
    if request.nag is not None:
        query["nag"] = f"{request.nag:g}"
    if not reference:
        query["reference"] = 0
    return "?" + urlencode(query)


def sheet(taken: pictures.Sheet) -> str:
    """A contact sheet as a PNG data address, the provenance of each panel inside."""
    file = io.BytesIO()
    pictures.save_sheet(taken, file)
    return address(file.getvalue(), "image/png")


def png(panel: Panel) -> str:
    """The panel as a PNG data address, its provenance inside."""
    file = io.BytesIO()
    pictures.save_png(panel, file)
    return address(file.getvalue(), "image/png")


def address(data: bytes, kind: str) -> str:
    """Bytes as an address that holds them."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _tile(cell: Cell) -> State:
    return {
        "method": cell.method,
        "title": cell.title,
        "reference": cell.reference,
        "asked": cell.request.steps,
        "allowed": cell.allowed,
        "nearest": cell.nearest,
        "phase": "problem" if cell.problem else "waiting",
        "text": cell.problem,
        "coming": "",
        "step": 0,
        "steps": cell.request.steps,
    }


def _finished(drawing: Drawing) -> State:
    panel = drawing.panel
    return {
        "phase": "done",
        "src": png(panel),
        "trail": [_plain(panel, pixels) for pixels in drawing.trail],
        "kept": drawing.kept,
        "unread": drawing.unread,
        "facts": panel.provenance(),
        "alt": f"{panel.prompt}, drawn by {panel.method} in {panel.steps} step{'s' * (panel.steps != 1)}",
        "name": f"{panel.method}-{panel.steps}-steps-seed-{panel.seed}.png",
    }


def _plain(panel: Panel, pixels: bytes) -> str:
    file = io.BytesIO()
    Image.frombytes("RGB", (panel.width, panel.height), pixels).save(file, "PNG")
    return address(file.getvalue(), "image/png")
