"""A picture carries its provenance to disk and back, or none of it when that is asked."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from samples import panel

from hypersd.pictures import (
    Sheet,
    check_png_path,
    contact_sheet,
    from_image,
    read_png,
    read_png_provenance,
    save_png,
    save_sheet,
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


def grid_of(count: int, **more: Any) -> Sheet:
    return Sheet([panel(40, 30, steps=steps) for steps in range(1, count + 1)], **more)


def test_a_contact_sheet_holds_every_panel_with_its_caption() -> None:
    sheet = contact_sheet(grid_of(6, columns=3), scale=1)
    one = contact_sheet(grid_of(1), scale=1)
    assert sheet.width > 2.5 * one.width
    assert sheet.height > 1.6 * one.height
    assert len(found(sheet, 1)) == 6
    (x, y), *_ = found(one, 1)
    assert (x + 40, y + 30) < one.size
    captioned = one.crop((0, y + 32, *one.size)).convert("L")
    assert min(captioned.tobytes()) < 100  # there is ink below the picture


def found(sheet: Image.Image, scale: int) -> list[tuple[int, int]]:
    """Where the picture of `panel(40, 30)` lies on a sheet."""
    pixels = to_image(panel(40, 30)).resize((40 * scale, 30 * scale), Image.Resampling.NEAREST).tobytes()
    places = [(x, y) for y in range(sheet.height - 30 * scale + 1) for x in range(sheet.width - 40 * scale + 1)]
    return [(x, y) for x, y in places if sheet.getpixel((x, y)) == (0, 0, 99)
            and sheet.crop((x, y, x + 40 * scale, y + 30 * scale)).tobytes() == pixels]  # fmt: skip


def test_small_pictures_are_enlarged_by_whole_numbers_so_that_they_can_be_judged() -> None:
    assert len(found(contact_sheet(grid_of(1), scale=3), 3)) == 1
    assert contact_sheet(Sheet([panel(128, 128)])).width >= 256
    assert contact_sheet(Sheet([panel(512, 512)])).width < 2 * 512


def test_a_picture_of_half_the_side_is_as_tall_as_the_others() -> None:
    assert len(found(contact_sheet(Sheet([panel(40, 30), panel(80, 60)]), scale=1), 2)) == 1


def test_captions_and_names_differ_with_what_they_say() -> None:
    assert ink(contact_sheet(grid_of(1))) != ink(contact_sheet(Sheet([panel(40, 30, steps=4)])))
    plain = contact_sheet(grid_of(2, columns=1))
    for more in ({"title": "a cat"}, {"rows": ["seed 1", "seed 2"]}, {"heads": ["1 step"]}):
        named = contact_sheet(grid_of(2, columns=1, **more))
        assert (named.width >= plain.width, named.height >= plain.height) == (True, True)
        assert ink(named) != ink(plain)


def ink(image: Image.Image) -> bytes:
    return image.convert("L").resize((64, 64)).tobytes()


def test_a_place_without_a_picture_is_left_empty_and_the_others_stay_where_they_are() -> None:
    sheet = contact_sheet(Sheet([None, panel(40, 30)], columns=2), scale=1)
    ((x, _),) = found(sheet, 1)
    assert x > sheet.width / 2


@pytest.mark.parametrize("title", ["", "word " * 200, "x" * 500, "猫 🐈 naïve\n\0"], ids=len)
def test_titles_of_any_kind_fit(title: str) -> None:
    sheet = contact_sheet(grid_of(2, title=title, rows=[title], columns=1))
    assert sheet.height < 2000
    assert sheet.width < 1000


def test_a_sheet_carries_everything_that_is_known_of_it() -> None:
    drawn, file = Sheet([panel(), None], 1, "a 猫", ["seed 1", "seed 2"], ["4 steps"], "?prompts=a"), io.BytesIO()
    save_sheet(drawn, file)
    with Image.open(file) as image:
        known = json.loads(image.info["hypersd"])
    assert known == drawn.record()
    assert known["panels"] == [panel().provenance(), None]
    assert (known["title"], known["link"]) == ("a 猫", "?prompts=a")
    assert (known["rows"], known["columns"]) == (["seed 1", "seed 2"], ["4 steps"])
    bare = io.BytesIO()
    save_sheet(drawn, bare, metadata=False)
    with Image.open(bare) as image:
        assert image.info == {}


def test_an_empty_sheet_is_refused() -> None:
    with pytest.raises(InputError, match="at least one panel"):
        contact_sheet(Sheet([None]))
    with pytest.raises(InputError, match="columns must be 1 or more"):
        contact_sheet(Sheet([panel()], columns=0))
