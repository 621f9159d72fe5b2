"""A picture carries its provenance to disk and back, or none of it when that is asked."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from samples import panel

from hypersd.pictures import (
    check_png_path,
    contact_sheet,
    from_image,
    read_png,
    read_png_provenance,
    save_png,
    to_image,
)
from hypersd.records import InputError


def test_a_saved_panel_comes_back_whole(tmp_path: Path) -> None:
    drawn = panel()
    save_png(drawn, tmp_path / "x.png")
    assert read_png(tmp_path / "x.png") == drawn
    assert read_png_provenance(str(tmp_path / "x.png")) == drawn.provenance()


def test_open_files_do_as_well_as_paths() -> None:
    drawn, file = panel(), io.BytesIO()
    save_png(drawn, file)
    file.seek(0)
    assert read_png(file) == drawn


def test_other_programs_find_the_provenance_as_utf8_text() -> None:
    file = io.BytesIO()
    save_png(panel(), file)
    assert b"iTXthypersd\0" in file.getvalue()
    assert "naïve 猫 🐈".encode() in file.getvalue()
    with Image.open(io.BytesIO(file.getvalue())) as image:
        assert json.loads(image.info["hypersd"])["steps"] == 25


def test_without_metadata_only_pixels_are_left() -> None:
    drawn, file = panel(), io.BytesIO()
    save_png(drawn, file, metadata=False)
    with Image.open(file) as image:
        assert image.info == {}
        assert image.tobytes() == drawn.pixels
    chunks = {file.getvalue()[at : at + 4] for at in chunk_starts(file.getvalue())}
    assert chunks == {b"IHDR", b"IDAT", b"IEND"}
    with pytest.raises(InputError, match="holds no hypersd provenance"):
        read_png(file)


def chunk_starts(data: bytes) -> list[int]:
    at, starts = 8, []
    while at < len(data):
        starts.append(at + 4)
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return starts


def test_changed_pixels_are_noticed(tmp_path: Path) -> None:
    drawn = panel()
    image = to_image(drawn)
    image.putpixel((0, 0), (255, 255, 255))
    with pytest.raises(InputError, match="changed after it was drawn"):
        from_image(image, drawn.provenance())
    with pytest.raises(InputError, match="changed after it was drawn"):
        from_image(to_image(drawn).resize((4, 4)), drawn.provenance())


def test_a_missing_field_is_named() -> None:
    drawn = panel()
    provenance = drawn.provenance()
    del provenance["seed"]
    with pytest.raises(InputError, match="the provenance has no 'seed'"):
        from_image(to_image(drawn), provenance)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n", b"cut"])
def test_what_is_not_a_png_is_refused(content: bytes) -> None:
    if content == b"cut":
        file = io.BytesIO()
        save_png(panel(64, 64), file)
        content = file.getvalue()[:-40]
    with pytest.raises(InputError, match="not a readable PNG"):
        read_png_provenance(io.BytesIO(content))


@pytest.mark.parametrize("text", ["[1]", "{", "null"])
def test_provenance_that_is_none_is_refused(text: str) -> None:
    from PIL.PngImagePlugin import PngInfo

    file, chunks = io.BytesIO(), PngInfo()
    chunks.add_itxt("hypersd", text)
    to_image(panel()).save(file, "PNG", pnginfo=chunks)
    with pytest.raises(InputError, match="holds no hypersd provenance"):
        read_png_provenance(file)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a readable PNG"):
        read_png(tmp_path / "none.png")


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("x.jpg", r"saved as PNG, got 'x\.jpg'; name it x\.png"),
        ("x", r"name it x\.png"),
        ("none/x.png", "the folder .*none does not exist"),
        ("folder.png", r"folder\.png is a folder"),
        ("x" * 300 + ".png", r"cannot be written \(File name too long\)"),
    ],
)
def test_a_path_that_cannot_be_written_is_told_before_drawing(tmp_path: Path, path: str, sentence: str) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match=sentence):
        check_png_path(tmp_path / path)
    assert check_png_path(tmp_path / "x.PNG") == tmp_path / "x.PNG"


def test_failing_to_write_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        save_png(panel(), tmp_path / "none" / "x.png")


def test_a_contact_sheet_holds_every_panel_with_its_caption() -> None:
    panels = [panel(40, 30, method=name, steps=steps) for name in ("base", "tcd") for steps in (1, 4, 25)]
    sheet = contact_sheet(panels, columns=3)
    one = contact_sheet(panels[:1])
    assert sheet.width > 2.5 * one.width
    assert sheet.height > 1.6 * one.height
    found = sum(sheet.crop((x, y, x + 40, y + 30)).tobytes() == panels[0].pixels
                for y in range(sheet.height - 30) for x in range(8, sheet.width - 40))  # fmt: skip
    assert found == 6
    captioned = one.crop((0, 38, *one.size)).convert("L")
    assert min(captioned.tobytes()) < 100  # there is ink below the picture


def test_captions_differ_with_what_they_say() -> None:
    assert contact_sheet([panel(steps=1)]).tobytes() != contact_sheet([panel(steps=4)]).tobytes()


def test_an_empty_sheet_is_refused() -> None:
    with pytest.raises(InputError, match="at least one panel"):
        contact_sheet([])
    with pytest.raises(InputError, match="columns must be 1 or more"):
        contact_sheet([panel()], columns=0)
