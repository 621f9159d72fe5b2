"""What an index of pictures says: parquet files as LAION and COYO publish them, or rows that hold the picture.

| column | LAION-5B and its aesthetic subsets | COYO-700M |
|---|---|---|
| address, text | URL, TEXT | url, text |
| size in pixels | WIDTH, HEIGHT | width, height |
| aesthetic, 1 to 10 | aesthetic, or AESTHETIC_SCORE | aesthetic_score_laion_v2 |
| watermark, 0 to 1 | pwatermark | watermark_score |
| unsafe, 0 to 1 | punsafe; NSFW in words before there was that | nsfw_score_opennsfw2 |
| text and picture agree | similarity | clip_similarity_vitb32 |
| licence | LICENSE | |

An index is cut into pieces of rows, each read by itself; a row has the same number whoever reads it. Its files lie on
this disk or elsewhere on the web (remote.py).
"""

from __future__ import annotations

import html
import math
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hypersd.data import remote
from hypersd.data.remote import Remote
from hypersd.data.sources import CAPTION_COLUMNS, IMAGE_COLUMNS, Columns, SourceError, open_parquet
from hypersd.records import Problem

COLUMNS = {  # ours -> theirs in small letters, the first that is there
    "url": ("url", "image_url"),
    "width": ("width", "original_width"),
    "height": ("height", "original_height"),
    "aesthetic": ("aesthetic", "aesthetic_score", "aesthetic_score_laion_v2"),
    "watermark": ("pwatermark", "watermark_score", "watermark"),
    "unsafe": ("punsafe", "nsfw_score_opennsfw2", "nsfw_score", "nsfw"),
    "similarity": ("similarity", "clip_similarity_vitb32", "clip_similarity_vitl14"),
    "licence": ("license", "licence"),
}
NUMBERS = ("width", "height", "aesthetic", "watermark", "unsafe", "similarity")
UNSAFE = {"UNLIKELY": 0.0, "UNSURE": 0.5, "NSFW": 1.0}  # LAION-400M's words


@dataclass(frozen=True)
class Entry:
    """One row of an index: an address or the picture itself, its text as it stands there, and what is said of it."""

    number: int  # of the row, counted through all files
    url: str
    picture: bytes | None
    caption: str
    numbers: dict[str, float]  # of NUMBERS, those that are known
    licence: str | None


@dataclass(frozen=True)
class Span:
    """A piece: (row group, first row in it, how many) of a file; `number` is the first one's number."""

    file: Path | Remote
    parts: tuple[tuple[int, int, int], ...]
    number: int

    @property
    def rows(self) -> int:
        return sum(count for *_, count in self.parts)


@dataclass
class Index:
    """Parquet files in pieces of `rows` rows; the last of each file may be shorter.

    Raises:
        SourceError: a file is damaged, or has no column of texts, or none of addresses or pictures.
    """

    files: tuple[Path | Remote, ...]
    rows: int
    _held: tuple[tuple[Path | Remote, int], Any] | None = field(default=None, repr=False)

    @cached_property
    def spans(self) -> list[Span]:
        found: list[Span] = []
        number = 0
        for file in self.files:
            about, parts, room = _opened(file).metadata, list[tuple[int, int, int]](), self.rows
            for group in range(about.num_row_groups):
                first, size = 0, about.row_group(group).num_rows
                while first < size:
                    count = min(room, size - first)
                    parts.append((group, first, count))
                    first, room = first + count, room - count
                    if not room:
                        found.append(Span(file, tuple(parts), number))
                        number, parts, room = number + self.rows, [], self.rows
            if parts:
                found.append(Span(file, tuple(parts), number))
                number += found[-1].rows
        return found

    @cached_property
    def known(self) -> dict[Path | Remote, dict[str, str]]:
        """For each file what its columns are called, by our names for them."""
        return {file: _columns(_opened(file).schema_arrow.names, file.name) for file in self.files}

    @property
    def stamps(self) -> list[list[Any]]:
        """For each file its name, and then what changes when its content does, ready for JSON."""
        return [
            [file.name, file.stat().st_size] if isinstance(file, Path) else [file.name, file.size, file.tag]
            for file in self.files
        ]

    def lacks(self, name: str) -> list[str]:
        """The files that say nothing about it."""
        return [file.name for file, columns in self.known.items() if name not in columns]

    def read(self, piece: int) -> Iterator[Entry]:
        span = self.spans[piece]
        columns, number = self.known[span.file], span.number
        folder = span.file.parent if isinstance(span.file, Path) else None
        for group, first, count in span.parts:
            for batch in self._group(span.file, group).slice(first, count).to_batches(64):
                for row in batch.to_pylist():
                    yield _entry(number, {ours: row[theirs] for ours, theirs in columns.items()}, folder)
                    number += 1

    def _group(self, file: Path | Remote, group: int) -> Any:
        """The wanted columns of a row group; the last one is kept, since LAION's hold many pieces."""
        if self._held is None or self._held[0] != (file, group):
            self._held = None  # two at once may not fit
            try:
                table = _opened(file).read_row_group(group, columns=list(self.known[file].values()))
            except Problem:  # of a server's
                raise
            except (OSError, ValueError) as error:
                raise SourceError(f"{file.name} is damaged ({error}); download it again") from error
            self._held = ((file, group), table)
        return self._held[1]


def open_index(places: Sequence[str | Path], rows: int) -> Index:
    """The index in these parquet files, or in folders of them, in the order of their names; any may be addresses.

    Raises:
        SourceError: there is none.
        DataError: a server cannot be reached.
    """
    files: list[Path | Remote] = []
    for place in places:
        files += remote.find(str(place)) if remote.is_remote(place) else _local(Path(place))
    return Index(tuple(files), rows)


def _local(place: Path) -> list[Path]:
    found = sorted(place.rglob("*.parquet")) if place.is_dir() else [place]
    if not found or not all(file.is_file() for file in found):
        raise SourceError(
            f"{place} is neither a parquet file nor a folder of them; download the index first, or give its address, "
            "https://.. or hf://datasets/.."
        )
    return found


def _opened(file: Path | Remote) -> Any:
    return open_parquet(file if isinstance(file, Path) else file.open())


def _columns(names: Sequence[str], where: str) -> dict[str, str]:
    small = {name.lower(): name for name in reversed(names)}
    found = {
        ours: small[hit] for ours, theirs in COLUMNS.items() if (hit := next((t for t in theirs if t in small), ""))
    }
    text = next((c for c in CAPTION_COLUMNS if c in small), None)
    found["caption"] = small[text] if text else Columns().find_caption(names, where)
    if "url" not in found:
        picture = next((c for c in IMAGE_COLUMNS if c in small), None)
        found["picture"] = small[picture] if picture else Columns().find_image(names, where)
    return found


def _entry(number: int, row: Mapping[str, Any], folder: Path | None) -> Entry:
    numbers = {name: value for name in NUMBERS if (value := _number(row.get(name))) is not None}
    text, licence = row["caption"], row.get("licence")
    return Entry(
        number,
        row["url"] if isinstance(row.get("url"), str) else "",
        _picture(row["picture"], folder) if "picture" in row else None,
        text if isinstance(text, str) else "",
        numbers,
        licence if isinstance(licence, str) else None,
    )


def _number(value: object) -> float | None:
    if isinstance(value, str):
        return UNSAFE.get(value.strip().upper())
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _picture(cell: object, folder: Path | None) -> bytes:
    """The content of a cell, or of the file it names below the index's folder and nowhere else; else nothing."""
    content, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, Mapping) else (cell, cell)
    if isinstance(content, bytes):
        return content
    if folder is None:
        return b""
    try:
        file = (folder / path).resolve() if isinstance(path, str) else folder
        return file.read_bytes() if file.is_file() and file.is_relative_to(folder.resolve()) else b""
    except (OSError, ValueError):  # not to be read, or no path at all
        return b""


# ------------------------------------------------------------------------------------------------------ captions

LONGEST = 2000  # characters of a caption that are looked at
TAG = re.compile(r"</?[a-zA-Z][^<>]*>|<!--.*?-->")
EMAIL = re.compile(r"[\w.+-]+@[\w-]+(\.[\w-]+)+")
LINK = re.compile(
    r"\b(?:https?://|www\.)[^\s()\[\]{}]+|\b[\w-]+(?:\.[\w-]+)*\.(?:com|net|org|info|co|io|ru|de|fr|uk)\b(?:/\S*)?",
    re.I,
)
EMPTY = re.compile(r"\(\s*\)|\[\s*\]|\{\s*\}")
EDGES = " \t-–—|,;:/\\•·*_~#>"


def clean_caption(text: str) -> str:
    """A caption as a text encoder should read it: no HTML, addresses, e-mail or control characters; NFC, one line.

    Cleaning once is enough: what it returns is left as it is.
    """
    text = text[:LONGEST]
    while (cleaner := _cleaner(text)) != text:  # an entity may hold an entity
        text = cleaner
    return text


def _cleaner(text: str) -> str:
    text = TAG.sub(" ", html.unescape(text))
    text = "".join(_printable(c) for c in unicodedata.normalize("NFC", text))
    text = EMPTY.sub(" ", LINK.sub(" ", EMAIL.sub(" ", text)))
    return " ".join(text.split()).strip(EDGES)


def _printable(character: str) -> str:
    """Joiners stay, which emoji and many scripts need; other characters that print nothing, or a box, do not."""
    if character in "\u200c\u200d" or character.isspace():
        return character
    return "" if unicodedata.category(character)[0] == "C" or character == "\ufffd" else character


def letters(text: str) -> float:
    """The share of letters, with the marks on them, among all that is not space; 0 for nothing."""
    solid = [c for c in text if not c.isspace()]
    return sum(unicodedata.category(c)[0] in "LM" for c in solid) / len(solid) if solid else 0.0
