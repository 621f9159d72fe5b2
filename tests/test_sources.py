"""Samples come out of every layout alike; what cannot be read is named."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from hypersd.data import Sample, SourceError, open_source, sources

COUNT = 5


def png(number: int = 0, size: tuple[int, int] = (20, 24)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (40 * number % 256, 100, 200)).save(buffer, "PNG")
    return buffer.getvalue()


def in_folder(folder: Path, captions: bool = True) -> Path:
    folder.mkdir(parents=True)
    for i in range(COUNT):
        (folder / f"{i}.png").write_bytes(png(i))
        if captions:
            (folder / f"{i}.txt").write_text(f" a  thing\n{i} ", encoding="utf-8")
    return folder


def in_metadata(folder: Path, kind: str) -> Path:
    in_folder(folder / "train", captions=False)
    rows = [{"file_name": f"{i}.png", "text": f"a thing {i}"} for i in range(COUNT)]
    with (folder / "train" / f"metadata.{kind}").open("w", newline="") as file:
        if kind == "csv":
            writer = csv.DictWriter(file, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


def in_parquet(folder: Path, kind: str) -> Path:
    import pyarrow as pa
    import pyarrow.parquet

    in_folder(folder / "pictures", captions=False)
    cells: dict[str, Callable[[int], object]] = {
        "bytes": png,
        "struct": lambda i: {"bytes": png(i), "path": None},
        "path": lambda i: f"pictures/{i}.png",
    }
    table = pa.table(
        {"image": [cells[kind](i) for i in range(COUNT)], "caption": [f"a thing {i}" for i in range(COUNT)]}
    )
    pyarrow.parquet.write_table(table, folder / "all.parquet", row_group_size=2)
    return folder / "all.parquet"


def in_tar(folder: Path, kind: str) -> Path:
    folder.mkdir(parents=True)
    for shard, numbers in enumerate([(0, 1, 2), (3, 4)]):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for i in numbers:
                text = f"a thing {i}" if kind == "txt" else json.dumps({"prompt": f"a thing {i}"})
                for ending, body in (("png", png(i)), (kind, text.encode()), ("npy", b"?")):
                    member = tarfile.TarInfo(f"dir/{i}.{ending}")
                    member.size = len(body)
                    archive.addfile(member, io.BytesIO(body))
    return folder


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "folder": in_folder,
    "jsonl": lambda folder: in_metadata(folder, "jsonl"),
    "csv": lambda folder: in_metadata(folder, "csv"),
    "parquet bytes": lambda folder: in_parquet(folder, "bytes"),
    "parquet struct": lambda folder: in_parquet(folder, "struct"),
    "parquet path": lambda folder: in_parquet(folder, "path"),
    "tar txt": lambda folder: in_tar(folder, "txt"),
    "tar json": lambda folder: in_tar(folder, "json"),
}


def samples(path: Path, **columns: str) -> list[Sample]:
    source = open_source(path, **columns)
    return [sample for piece in range(len(source.stamps())) for sample in source.read(piece)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [2, 1000])
def test_every_layout_gives_the_same_samples(
    layout: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "PIECE", size)
    found = samples(LAYOUTS[layout](tmp_path / "data"))
    assert [s.captions for s in found] == [(f"a thing {i}",) for i in range(COUNT)]
    assert [s.picture for s in found] == [png(i) for i in range(COUNT)]
    assert len({s.key for s in found}) == COUNT


def test_prompts_have_no_pictures_and_may_be_lists(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffa cat\r\n\r\n a  dog \n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": ["a cat", "", "a pet"], "id": 3}\n"a dog"\n{"text": null}\n')
    assert [s.captions for s in samples(tmp_path / "a.txt")] == [("a cat",), ("a dog",)]
    assert [s.captions for s in samples(tmp_path / "b.jsonl", caption_column="text")] == [("a cat", "a pet"), (), ()]
    assert all(s.picture is None for s in samples(tmp_path / "a.txt"))
    assert not open_source(tmp_path / "a.txt").pictures


def test_a_listed_picture_that_is_not_there_is_a_sample_all_the_same(tmp_path: Path) -> None:
    folder = in_metadata(tmp_path / "data", "jsonl")
    (folder / "train" / "3.png").unlink()
    assert [s.picture == b"" for s in samples(folder)] == [False, False, False, True, False]


def test_hidden_files_and_folders_are_no_samples(tmp_path: Path) -> None:
    folder = in_folder(tmp_path / "data")
    in_folder(folder / ".thumbnails")
    (folder / ".0.png").write_bytes(png())
    assert len(samples(folder)) == COUNT


@pytest.mark.parametrize("layout", ["folder", "jsonl", "parquet struct", "tar txt"])
def test_stamps_change_with_the_files_and_only_then(layout: str, tmp_path: Path) -> None:
    path = LAYOUTS[layout](tmp_path / "data")
    before = open_source(path).stamps()
    assert open_source(path).stamps() == before
    touched = {"folder": "1.txt", "jsonl": "train/metadata.jsonl", "parquet struct": "all.parquet", "tar txt": "1.tar"}
    file = tmp_path / "data" / touched[layout]
    changed = file.read_bytes().replace(b"thing 1", b"thing one") if layout == "jsonl" else file.read_bytes() + b" "
    if layout == "parquet struct":
        changed = changed[:-1]
    file.write_bytes(changed)
    assert open_source(path).stamps() != before


def near_metadata(folder: Path) -> Path:
    in_folder(folder, captions=False)
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "captoin": "a thing"}\n')
    return folder


def near_parquet(folder: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet

    folder.mkdir()
    pyarrow.parquet.write_table(pa.table({"Image": [png()], "captoin": ["a thing"]}), folder / "a.parquet")
    return folder


def near_tar(folder: Path) -> Path:
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as archive:
        for name, body in (("0.png", png()), ("0.json", b'{"captoin": "a thing"}')):
            member = tarfile.TarInfo(name)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    return folder


def near_prompts(folder: Path) -> Path:
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"captoin": "a thing"}\n')
    return folder / "a.jsonl"


@pytest.mark.parametrize("build", [near_metadata, near_parquet, near_tar, near_prompts])
def test_a_near_miss_in_a_columns_name_is_named_and_can_be_given(build: Callable[[Path], Path], tmp_path: Path) -> None:
    path = build(tmp_path / "data")
    names = {"image_column": "Image"} if build is near_parquet else {}
    with pytest.raises(SourceError, match=r"no caption column .*'captoin'.*caption_column"):
        samples(path, **names)
    assert samples(path, caption_column="captoin", **names)[0].captions == ("a thing",)
    if names:
        with pytest.raises(SourceError, match=r"no image column .*is it 'Image'\?.*image_column"):
            samples(path)


def damage(folder: Path, how: str) -> Path:
    """Something that cannot be used, and where."""
    if how == "parquet":
        path = in_parquet(folder, "bytes")
        path.write_bytes(path.read_bytes()[:-30])
    elif how == "tar":
        path = in_tar(folder, "txt") / "1.tar"
        path.write_bytes(path.read_bytes()[:2000])
    elif how == "no tar":
        folder.mkdir()
        path = folder / "a.tar"
        path.write_bytes(b"<html>not found</html>" * 50)
    elif how == "both":
        path = in_folder(folder)
        (path / "a.tar").write_bytes(b"")
    elif how == "latin":
        path = in_folder(folder)
        (path / "2.txt").write_bytes("Kätzchen".encode("latin-1"))
    elif how == "json":
        folder.mkdir()
        path = folder / "a.jsonl"
        path.write_text('{"text": "a cat"}\n{"text": "a dog"\n')
    else:
        path = folder
        if how == "empty":
            folder.mkdir()
    return path


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("parquet", "all.parquet is damaged or not a parquet file .*download it again"),
        ("tar", "1.tar is damaged or cut off .*download it again"),
        ("no tar", "a.tar is damaged or cut off at its start"),
        ("both", "1 tar files and 5 picture files; give a folder or file of one kind"),
        ("latin", r"2.txt is not UTF-8 text \(byte 1\); save it as UTF-8"),
        ("json", "line 2 of a.jsonl is not JSON"),
        ("empty", "a folder with 0 files, none of them a picture"),
        ("absent", "is not there; give a folder of pictures"),
    ],
)
def test_what_cannot_be_used_is_named(how: str, told: str, tmp_path: Path) -> None:
    path = damage(tmp_path / "data", how)
    with pytest.raises(SourceError, match=told):
        samples(path)
