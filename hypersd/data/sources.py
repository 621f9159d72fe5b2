"""Pictures and captions as they lie on disk: a folder, parquet files, webdataset tars, or a list of prompts.

    source = open_source("my/pictures")

A source is cut into pieces of about a thousand samples, each read front to back: several processes can share them, and
one that is killed loses a piece at most. Nothing is judged here; that is the survey's work.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import os
import posixpath
import tarfile
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from hypersd.records import InputError, Problem

PIECE = 1000  # samples; tars keep the size they were made with
PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "picture", "image_bytes", "bytes", "path", "file_name")
CAPTION_COLUMNS = ("caption", "text", "prompt", "captions", "txt", "description")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # the layout of Hugging Face's imagefolder


class SourceError(InputError):
    """What was given as training data cannot be used; the message names the file or column and what to do."""


@dataclass(frozen=True)
class Sample:
    """One picture with the captions that it is known by, any one of which describes it."""

    key: str  # where it lies below the source's root: "cats/1.png", "a.tar/0017", "b.parquet/3", "prompts.txt/5"
    captions: tuple[str, ...]  # cleaned, none of them empty
    picture: bytes | Image.Image | None = None  # a picture file's content, or pixels; None where there are prompts only


class Source(Protocol):
    """Samples in a fixed order, in pieces."""

    @property
    def pictures(self) -> bool:
        """False if there are prompts only."""

    def stamps(self) -> list[str]:
        """A text for each piece that changes when what it is read from changes: names, sizes, times of change."""
        ...

    def read(self, piece: int) -> Iterator[Sample]:
        """The samples of one piece, in order. Raises SourceError if they cannot be told apart from rubbish."""
        ...


@dataclass(frozen=True)
class Columns:
    """What the columns are called where that is not one of the usual names."""

    image: str | None = None
    caption: str | None = None

    def find_image(self, names: Iterable[str], where: str) -> str:
        return _column(list(names), self.image, IMAGE_COLUMNS, "image", where)

    def find_caption(self, names: Iterable[str], where: str) -> str:
        return _column(list(names), self.caption, CAPTION_COLUMNS, "caption", where)


def open_source(path: str | Path, *, image_column: str | None = None, caption_column: str | None = None) -> Source:
    """What lies at `path`, by its kind: a folder of pictures, .parquet, .tar, or prompts as .txt or .jsonl.

    Raises:
        SourceError: nothing is there, nothing of use is there, or several kinds are.
    """
    path, columns = Path(path), Columns(image_column, caption_column)
    if path.is_file():
        root, files = path.parent, [path]
    elif path.is_dir():
        root, files = path, sorted(f for f in path.rglob("*") if f.is_file() and not _hidden(f.relative_to(path)))
    else:
        raise SourceError(f"{path} is not there; give a folder of pictures, or a .parquet, .tar, .txt or .jsonl file")
    parquet = tuple(f for f in files if f.suffix == ".parquet" and f.name not in METADATA)
    tars = tuple(f for f in files if f.name.endswith((".tar", ".tar.gz", ".tgz")))
    pictures = tuple(f.relative_to(root).as_posix() for f in files if f.suffix.lower() in PICTURES)
    if path.is_file() and path.suffix in (".txt", ".jsonl"):
        return Prompts(path, columns)
    found = {"parquet files": parquet, "tar files": tars, "picture files": pictures if path.is_dir() else ()}
    kinds = [f"{len(some)} {kind}" for kind, some in found.items() if some]
    if len(kinds) > 1:
        raise SourceError(f"{path} holds {' and '.join(kinds)}; give a folder or file of one kind")
    if parquet:
        return Parquet(root, parquet, columns)
    if tars:
        return Tars(root, tars, columns)
    if pictures and path.is_dir():
        return Folder(root, pictures, columns)
    what = f"a folder with {len(files)} files, none of them" if path.is_dir() else "not"
    raise SourceError(
        f"{path} is {what} a picture ({', '.join(PICTURES)}), .parquet or .tar, nor a .txt or .jsonl list"
    )


# ------------------------------------------------------------------------------------------------- the kinds


@dataclass(frozen=True)
class Folder:
    """Picture files, each with a .txt of the same name beside it, or listed in metadata.jsonl, .csv or .parquet."""

    root: Path
    names: tuple[str, ...]  # of picture files below the root
    columns: Columns = field(default_factory=Columns)
    pictures = True

    @cached_property
    def listed(self) -> dict[str, tuple[str, ...]]:
        """The captions that metadata files give, by the picture's path below the root."""
        found: dict[str, tuple[str, ...]] = {}
        for file in sorted(f for name in METADATA for f in self.root.rglob(name)):
            rows, where = list(_records(file)), file.relative_to(self.root)
            names = list(dict.fromkeys(name for row in rows for name in row))
            picture = _column(names, self.columns.image, ("file_name", "image", "path"), "image", str(where))
            caption = self.columns.find_caption(names, str(where))
            for row in rows:
                path = posixpath.normpath((where.parent / str(row.get(picture))).as_posix())
                found[path] = texts(row.get(caption))
        return found

    @cached_property
    def paths(self) -> list[str]:
        return sorted({*self.names, *self.listed})  # a listed picture that is not there shall be counted, not forgotten

    def stamps(self) -> list[str]:
        known = signature(sorted(self.listed.items()))
        return [
            signature(known, *(stamp(self.root, path, path.rpartition(".")[0] + ".txt") for path in part))
            for part in in_parts(self.paths)
        ]

    def read(self, piece: int) -> Iterator[Sample]:
        for path in in_parts(self.paths)[piece]:
            file = self.root / path
            beside = file.with_suffix(".txt")
            captions = self.listed.get(path) or (texts(_text(beside)) if beside.is_file() else ())
            yield Sample(path, captions, read_bytes(file))


@dataclass(frozen=True)
class Parquet:
    """Rows with a caption and a picture: bytes, a path, or Hugging Face's struct of both."""

    root: Path
    files: tuple[Path, ...]
    columns: Columns = field(default_factory=Columns)
    pictures = True

    @cached_property
    def spans(self) -> list[tuple[Path, list[int], int]]:
        """(file, row groups, number of the first row) of each piece."""
        pieces: list[tuple[Path, list[int], int]] = []
        for file in self.files:
            table, first, groups, rows = open_parquet(file), 0, [], 0
            for group in range(table.num_row_groups):
                groups.append(group)
                rows += table.metadata.row_group(group).num_rows
                if rows >= PIECE or group + 1 == table.num_row_groups:
                    pieces.append((file, groups, first))
                    first, groups, rows = first + rows, [], 0
        return pieces

    def stamps(self) -> list[str]:
        return [signature(stamp(self.root, self._name(f)), groups, repr(self.columns)) for f, groups, _ in self.spans]

    def read(self, piece: int) -> Iterator[Sample]:
        file, groups, number = self.spans[piece]
        table, name = open_parquet(file), self._name(file)
        image = self.columns.find_image(table.schema_arrow.names, name)
        caption = self.columns.find_caption(table.schema_arrow.names, name)
        try:
            for batch in table.iter_batches(64, row_groups=groups, columns=[image, caption]):
                for row in batch.to_pylist():
                    yield Sample(f"{name}/{number}", texts(row[caption]), self._picture(file.parent, row[image]))
                    number += 1
        except (OSError, ValueError) as error:  # pyarrow's own errors are of these
            raise SourceError(f"{name} is damaged at row {number} ({error}); download it again") from error

    def _name(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix()

    @staticmethod
    def _picture(folder: Path, cell: object) -> bytes:
        """The content of a picture's cell; b"" if there is none."""
        content, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, Mapping) else (cell, cell)
        if isinstance(content, bytes):
            return content
        return read_bytes(folder / path) if isinstance(path, str) and path else b""


@dataclass(frozen=True)
class Tars:
    """Webdataset: files of one name up to its first dot are one sample: 17.jpg with 17.txt, or a caption in 17.json."""

    root: Path
    files: tuple[Path, ...]
    columns: Columns = field(default_factory=Columns)
    pictures = True

    def stamps(self) -> list[str]:
        names = [file.relative_to(self.root).as_posix() for file in self.files]
        return [signature(stamp(self.root, name), repr(self.columns)) for name in names]

    def read(self, piece: int) -> Iterator[Sample]:
        file = self.files[piece]
        name, key, captioned = file.relative_to(self.root).as_posix(), "", False
        columns: dict[str, None] = {}
        try:
            with tarfile.open(file) as archive:
                members = (m for m in archive if m.isfile() and not posixpath.basename(m.name).startswith("."))
                for key, group in groupby(members, _sample_name):
                    parts = {m.name.rpartition(".")[2].lower(): _content(archive, m) for m in group}
                    captions, names = self._captions(parts)
                    captioned |= bool(captions)
                    columns |= dict.fromkeys(names)
                    picture = next((parts[p[1:]] for p in PICTURES if p[1:] in parts), None)
                    if picture is not None or captions:
                        yield Sample(f"{name}/{key}", captions, picture or b"")
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            where = f"after {key}" if key else "at its start"
            raise SourceError(f"{name} is damaged or cut off {where} ({error}); download it again") from error
        if columns and not captioned:
            self.columns.find_caption(columns, f"the .json files in {name}")

    def _captions(self, parts: Mapping[str, bytes]) -> tuple[tuple[str, ...], list[str]]:
        """The captions of one sample, and what its .json knows."""
        for ending in ("txt", "caption", "text"):
            if ending in parts and self.columns.caption in (None, ending):
                return texts(parts[ending].decode("utf-8-sig", "replace")), []
        try:
            known = json.loads(parts.get("json", b"{}"))
        except ValueError:
            return (), []
        known = known if isinstance(known, dict) else {}
        wanted = [self.columns.caption] if self.columns.caption else CAPTION_COLUMNS
        return next((texts(known[name]) for name in wanted if name in known), ()), list(known)


@dataclass(frozen=True)
class Prompts:
    """Captions without pictures: a line each in .txt, an object or a text a line in .jsonl."""

    file: Path
    columns: Columns = field(default_factory=Columns)
    pictures = False

    def stamps(self) -> list[str]:
        return [signature(stamp(self.file.parent, self.file.name), repr(self.columns))]

    def read(self, piece: int) -> Iterator[Sample]:
        if self.file.suffix == ".txt":
            rows = [{"caption": line} for line in _text(self.file).split("\n") if line.strip()]
            column = "caption"
        else:
            rows = list(_records(self.file))
            column = self.columns.find_caption(dict.fromkeys(n for row in rows for n in row), self.file.name)
        for number, row in enumerate(rows, 1):
            yield Sample(f"{self.file.name}/{number}", texts(row.get(column)))


# ------------------------------------------------------------------------------------------------ small parts


def texts(value: object) -> tuple[str, ...]:
    """The captions in a cell: one text, or a list of them. Whitespace folded, NFC, what is then empty left out."""
    many = value if isinstance(value, list | tuple) else [value]
    return tuple(clean for text in many if isinstance(text, str) and (clean := _clean(text)))


def _clean(text: str) -> str:
    kept = "".join(" " if unicodedata.category(c) in ("Cc", "Cs") else c for c in text)  # half surrogates are no text
    return " ".join(unicodedata.normalize("NFC", kept).split())


def _column(names: Sequence[str], given: str | None, usual: Sequence[str], what: str, where: str) -> str:
    """The column called `given`, or by the first of the usual names that is there; SourceError names the nearest."""
    wanted = [given] if given else list(usual)
    for name in wanted:
        if name in names:
            return name
    lower = {name.lower(): name for name in names}
    near = [lower[hit] for name in wanted for hit in difflib.get_close_matches(name.lower(), lower, 1, 0.7)]
    hint = f"; is it {near[0]!r}?" if near else ";"
    raise SourceError(
        f"{where} has no {what} column {' or '.join(map(repr, wanted[:4]))}, it has {', '.join(names) or 'none'}{hint} "
        f"Give its name as {what}_column, or rename it"
    )


def _records(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a table, however it is written. A .jsonl line that is a text alone is a caption."""
    if file.suffix == ".parquet":
        yield from open_parquet(file).read().to_pylist()
    elif file.suffix == ".csv":
        yield from csv.DictReader(_text(file).splitlines())
    else:
        for number, line in enumerate(_text(file).split("\n"), 1):
            if line.strip():
                yield _record(file, number, line)


def _record(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise SourceError(f"line {number} of {file.name} is not JSON ({error}); mend or remove it") from None
    if isinstance(row, str):
        return {"caption": row}
    if not isinstance(row, dict):
        raise SourceError(f'line {number} of {file.name} must be an object such as {{"caption": "a cat"}}')
    return row


def open_parquet(file: Any) -> Any:
    """A parquet file, given by its path or as an opened one with a name. SourceError if it is none, or if nothing here
    can read one."""
    try:
        import pyarrow.parquet  # 150 MB that only readers of parquet need
    except ImportError:
        raise SourceError("parquet files need pyarrow; install it with: pip install pyarrow") from None
    try:
        return pyarrow.parquet.ParquetFile(file, pre_buffer=not isinstance(file, Path))  # in as few reads as may be
    except Problem:  # of whoever reads it for pyarrow
        raise
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:120]
        raise SourceError(f"{file.name} is damaged or not a parquet file ({reason}); download it again") from error


def read_bytes(file: Path) -> bytes:
    """A file's content, nothing if it is not there. SourceError if the system will not give it."""
    try:
        return file.read_bytes() if file.is_file() else b""
    except OSError as error:
        raise SourceError(f"{file} cannot be read ({error.strerror}); mend that, or move it away") from error


def _text(file: Path) -> str:
    try:
        return read_bytes(file).decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise SourceError(f"{file} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def _sample_name(member: tarfile.TarInfo) -> str:
    folder, name = posixpath.split(member.name)
    return posixpath.join(folder, name.partition(".")[0])


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """A member's bytes; nothing for what is neither picture nor text, which is not worth reading."""
    opened = archive.extractfile(member)
    wanted = member.name.lower().endswith((*PICTURES, ".txt", ".caption", ".text", ".json"))
    return opened.read() if opened and wanted else b""


def in_parts(paths: Sequence[str]) -> list[Sequence[str]]:
    return [paths[first : first + PIECE] for first in range(0, len(paths), PIECE)]


def stamp(root: Path, *paths: str) -> str:
    """Names, sizes and times of change, without reading a byte of the files."""
    found = []
    for path in paths:
        try:
            status = os.stat(root / path)
            found.append(f"{path} {status.st_size} {status.st_mtime_ns}")
        except FileNotFoundError:
            found.append(f"{path} is not there")
    return "\n".join(found)


def _hidden(path: Path) -> bool:
    """Whether the file or a folder above it is what file managers and version control leave behind."""
    return any(part.startswith(".") for part in path.parts)


def signature(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
