"""Panels as files: PNG with the provenance inside, read back, and contact sheets of many panels."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError

from hypersd import __version__
from hypersd.records import InputError, Panel

CHUNK = "hypersd"  # keyword of the iTXt chunk that holds Panel.provenance() as JSON
PANEL_PX = 256  # on a contact sheet, so that small pictures can be judged and captions read
CAPTION_PX, GAP = 18, 16


def to_image(panel: Panel) -> Image.Image:
    """The panel as an RGB picture of width x height pixels."""
    return Image.frombytes("RGB", (panel.width, panel.height), panel.pixels)


def from_image(image: Image.Image, provenance: Mapping[str, Any]) -> Panel:
    """A panel from a picture and its provenance.

    Raises:
        InputError: a field is missing, or the pixels are not the ones that the provenance was written for.
    """
    try:
        known = [
            f.name for f in fields(Panel)[1:] if f.default is MISSING or f.name in provenance
        ]  # older files have less
        panel = Panel(pixels=image.convert("RGB").tobytes(), **{name: provenance[name] for name in known})
    except KeyError as error:
        raise InputError(f"the provenance has no {error}; use a PNG that hypersd saved with its metadata") from None
    if (panel.width, panel.height) != image.size or panel.pixels_sha256 != provenance.get("pixels_sha256"):
        raise InputError("the picture was changed after it was drawn; use the PNG as hypersd saved it")
    return panel


def save_png(panel: Panel, target: str | Path | BinaryIO, *, metadata: bool = True) -> None:
    """Write the panel to a path or an open binary file, with its provenance unless `metadata` is False.

    Raises:
        InputError: the path cannot be written.
    """
    chunks = PngImagePlugin.PngInfo()
    if metadata:
        chunks.add_itxt(CHUNK, json.dumps(panel.provenance(), ensure_ascii=False, sort_keys=True))
    _write_png(to_image(panel), target, chunks)


def read_png_provenance(source: str | Path | BinaryIO) -> dict[str, Any]:
    """What `save_png` wrote beside the pixels.

    Raises:
        InputError: not a readable PNG, or it holds no provenance.
    """
    return _read(source)[1]


def read_png(source: str | Path | BinaryIO) -> Panel:
    """The panel that `save_png` wrote, pixels checked against their hash. Raises InputError like its parts."""
    return from_image(*_read(source))


def check_png_path(path: str | Path) -> Path:
    """The path if a PNG can be written there, so that one learns of a mistake before drawing; else InputError."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise InputError(f"pictures are saved as PNG, got {path.name!r}; name it {path.stem or 'picture'}.png")
    try:
        if path.is_dir():
            raise InputError(f"{path} is a folder; name a file in it such as {path / 'picture.png'}")
        if not path.parent.is_dir():
            raise InputError(f"the folder {path.parent} does not exist; make it or choose another")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise InputError(f"{path} cannot be written; choose another folder")
    except OSError as error:  # for example a name longer than the file system takes
        raise InputError(f"{path.name[:80]} cannot be written ({error.strerror}); choose another name") from None
    return path


@dataclass(frozen=True)
class Sheet:
    """Panels to be shown together, row by row; None is a place without a picture.

    `columns` None puts all in one row. `rows` and `heads` name rows and columns, where they should be named. `link` is
    the query string that draws all of it again.
    """

    panels: Sequence[Panel | None]
    columns: int | None = None
    title: str = ""
    rows: Sequence[str] = ()
    heads: Sequence[str] = ()
    link: str = ""

    @property
    def size(self) -> int:
        """Bytes of all its pixels."""
        return sum(len(panel.pixels) for panel in self.panels if panel)

    def record(self) -> dict[str, Any]:
        """All that is known of the sheet but its pixels, ready for JSON; `panels` are provenances."""
        known = [panel and panel.provenance() for panel in self.panels]
        named = {"title": self.title, "link": self.link, "rows": list(self.rows), "columns": list(self.heads)}
        return {"version": __version__, **named, "panels": known}


def save_sheet(sheet: Sheet, target: str | Path | BinaryIO, *, metadata: bool = True) -> None:
    """Write a contact sheet as PNG, with `Sheet.record()` inside unless `metadata` is False.

    Raises:
        InputError: the path cannot be written, or there is no panel.
    """
    chunks = PngImagePlugin.PngInfo()
    if metadata:
        chunks.add_itxt(CHUNK, json.dumps(sheet.record(), ensure_ascii=False, sort_keys=True))
    _write_png(contact_sheet(sheet), target, chunks)


def contact_sheet(sheet: Sheet, *, scale: int | None = None) -> Image.Image:
    """The sheet drawn: a title, names of rows and columns, and below each panel its method, steps, NFE and seconds.

    `scale` enlarges the pixels; None makes every panel at least PANEL_PX wide. InputError without panels or columns.
    """
    drawn = [panel for panel in sheet.panels if panel]
    columns = len(sheet.panels) if sheet.columns is None else sheet.columns
    if not drawn:
        raise InputError("a contact sheet needs at least one panel")
    if columns < 1:
        raise InputError(f"columns must be 1 or more, got {columns}")
    scale = scale or -(-PANEL_PX // max(panel.width for panel in drawn))
    return _Layout(sheet, drawn, min(columns, len(sheet.panels)), scale).picture()


class _Layout:
    """Where everything lies on a contact sheet, in pixels of the finished picture."""

    def __init__(self, sheet: Sheet, drawn: Sequence[Panel], columns: int, scale: int) -> None:
        self.sheet, self.columns = sheet, columns
        self.font, self.bold = ImageFont.load_default(CAPTION_PX), ImageFont.load_default(CAPTION_PX + 4)
        captions = [_caption(panel) for panel in drawn]
        self.width = max(*(panel.width * scale for panel in drawn), *(self.wide(text) for text in captions))
        self.height = max(panel.height for panel in drawn) * scale
        self.rows = [self.wrap(text, 11 * CAPTION_PX) for text in sheet.rows]
        self.side = GAP + max((self.wide(text) for text in self.rows), default=-GAP)
        self.pitch = self.width + GAP, self.height + int(2.9 * CAPTION_PX) + GAP
        self.heading = self.wrap(sheet.title, self.side + columns * self.pitch[0] - GAP, self.bold)
        self.heads = GAP + (self.heading.count("\n") + 1.6) * (CAPTION_PX + 6) * bool(sheet.title)
        self.top = int(self.heads + 1.8 * CAPTION_PX * bool(sheet.heads))

    def picture(self) -> Image.Image:
        lines = -(-len(self.sheet.panels) // self.columns)
        size = GAP + self.side + self.columns * self.pitch[0], self.top + lines * self.pitch[1]
        image = Image.new("RGB", size, "white")
        pen = ImageDraw.Draw(image)
        pen.multiline_text((GAP, GAP), self.heading, fill="black", font=self.bold)
        for number, text in enumerate(self.sheet.heads):
            pen.text((self.place(number)[0], self.heads), text, fill="black", font=self.font)
        for number, text in enumerate(self.rows):
            pen.multiline_text((GAP, self.place(number * self.columns)[1]), text, fill="black", font=self.font)
        for number, panel in enumerate(self.sheet.panels):
            self.paste(image, pen, panel, self.place(number))
        return image

    def paste(self, image: Image.Image, pen: ImageDraw.ImageDraw, panel: Panel | None, place: tuple[int, int]) -> None:
        x, y = place
        if panel is None:
            pen.rectangle((x, y, x + self.width - 1, y + self.height - 1), fill="#eeeeee")
            return
        size = round(panel.width * self.height / panel.height), self.height  # smaller pictures as tall as the others
        image.paste(to_image(panel).resize(size, Image.Resampling.NEAREST), place)
        pen.multiline_text((x, y + self.height + 3), _caption(panel), fill="black", font=self.font)

    def place(self, number: int) -> tuple[int, int]:
        row, column = divmod(number, self.columns)
        return GAP + self.side + column * self.pitch[0], self.top + row * self.pitch[1]

    def wide(self, text: str) -> int:
        pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
        return int(pen.multiline_textbbox((0, 0), text, font=self.font)[2]) + 1

    def wrap(self, text: str, width: int, font: Any = None) -> str:
        """`text` in lines of at most `width` pixels where its words allow that; at most six lines."""
        lines, letters = [""], max(1, int(width / (0.6 * CAPTION_PX)))
        for word in re.findall(rf"\S{{1,{letters}}}", _drawable(text)):
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and (font or self.font).getlength(longer) > width:
                lines.append(word)
            else:
                lines[-1] = longer
        return "\n".join(lines[:6])


def _caption(panel: Panel) -> str:
    return f"{panel.method}, {panel.steps} step{'s' * (panel.steps != 1)}\n{panel.nfe} NFE, {panel.seconds:.2f} s"


def _drawable(text: str) -> str:
    """Without what the built-in font has no letters for; the metadata keep all of it."""
    return "".join(letter if ord(letter) < 0x250 or letter in "–—‘’“”…·×" else "▯" for letter in text)


def _write_png(image: Image.Image, target: str | Path | BinaryIO, chunks: PngImagePlugin.PngInfo) -> None:
    encoded = io.BytesIO()
    image.save(encoded, format="PNG", pnginfo=chunks)
    if not isinstance(target, str | Path):
        target.write(encoded.getvalue())
        return
    try:
        Path(target).write_bytes(encoded.getvalue())
    except OSError as error:
        raise InputError(f"{target} cannot be written ({error.strerror}); choose another place") from None


def _read(source: str | Path | BinaryIO) -> tuple[Image.Image, dict[str, Any]]:
    try:
        with Image.open(source, formats=["PNG"]) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise InputError(f"not a readable PNG ({type(error).__name__}); choose a PNG that hypersd saved") from None
    try:
        provenance = json.loads(image.info.get(CHUNK, ""))
    except (ValueError, TypeError):
        provenance = None
    if not isinstance(provenance, dict):
        raise InputError("this PNG holds no hypersd provenance; choose one that was saved with its metadata")
    return image, provenance
