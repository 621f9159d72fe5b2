"""Panels as files: PNG with the provenance inside, read back, and contact sheets of many panels."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError

from hypersd.records import InputError, Panel

CHUNK = "hypersd"  # keyword of the iTXt chunk that holds Panel.provenance() as JSON
CAPTION_PX = 11


def to_image(panel: Panel) -> Image.Image:
    """The panel as an RGB picture of width x height pixels."""
    return Image.frombytes("RGB", (panel.width, panel.height), panel.pixels)


def from_image(image: Image.Image, provenance: Mapping[str, Any]) -> Panel:
    """A panel from a picture and its provenance.

    Raises:
        InputError: a field is missing, or the pixels are not the ones that the provenance was written for.
    """
    try:
        panel = Panel(pixels=image.convert("RGB").tobytes(), **{f.name: provenance[f.name] for f in fields(Panel)[1:]})
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


def contact_sheet(panels: Sequence[Panel], columns: int | None = None, *, gap: int = 8) -> Image.Image:
    """Panels in rows of `columns` (default: all in one row), each with method, steps, NFE and seconds below it.

    Cells are as wide as the widest panel or caption. Raises InputError without panels or columns.
    """
    if not panels:
        raise InputError("a contact sheet needs at least one panel")
    columns = len(panels) if columns is None else columns
    if columns < 1:
        raise InputError(f"columns must be 1 or more, got {columns}")
    font = ImageFont.load_default(CAPTION_PX)
    captions = [f"{p.method}, {p.steps} steps\n{p.nfe} NFE, {p.seconds:.2f} s" for p in panels]
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    widest = max(ruler.multiline_textbbox((0, 0), caption, font=font)[2] for caption in captions)
    width = max(*(p.width for p in panels), int(widest) + 1)
    height = max(p.height for p in panels)
    pitch_x, pitch_y = width + gap, height + 3 * CAPTION_PX + gap
    rows = -(-len(panels) // columns)
    sheet = Image.new("RGB", (min(columns, len(panels)) * pitch_x + gap, rows * pitch_y + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for place, (panel, caption) in enumerate(zip(panels, captions, strict=True)):
        x, y = gap + place % columns * pitch_x, gap + place // columns * pitch_y
        sheet.paste(to_image(panel), (x, y))
        pen.multiline_text((x, y + height + 2), caption, fill="black", font=font)
    return sheet


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
