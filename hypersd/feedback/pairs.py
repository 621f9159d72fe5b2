"""Preferences to learn from: the votes of a study, published files, and pairs whose order is known beforehand.

    votes, files, artwork -> Preferences -> reward

Every row says where it comes from, and in which split its prompt is; a prompt is never in two.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hypersd.emoji.autoencoder import to_float
from hypersd.emoji.scorer import SIDE, shrink
from hypersd.records import InputError, Problem
from hypersd.study import quality
from hypersd.study.pairs import Votes, pairs, split_of

STRICTER = ("train", "validation", "test")  # splits, each kept cleaner than those before it


@dataclass(frozen=True)
class Preference:
    """Of two pictures of one prompt, `share` of those asked prefer the first: 1 all, 0 nobody, 0.5 undecided.

    `first` and `second` are numbers of pictures; `source` says who was asked, or how the order is known.
    """

    prompt: str
    first: int
    second: int
    share: float
    source: str
    split: str


@dataclass(frozen=True)
class Preferences:
    """Pictures as reward models see them, float16 [n, 3, SIDE, SIDE] in -1..1, and what is known of pairs of them.

    `ceiling` is how often one annotator agrees with the majority of the others, where that is known: no reward model
    can be expected to do better.
    """

    pictures: Tensor
    rows: tuple[Preference, ...]
    ceiling: float | None = None

    def split(self, name: str) -> list[int]:
        """Numbers of the rows of a split."""
        return [number for number, row in enumerate(self.rows) if row.split == name]

    @property
    def decided(self) -> int:
        return sum(row.share != 0.5 for row in self.rows)

    @property
    def sources(self) -> dict[str, int]:
        """How many rows each source gave."""
        return dict(sorted(Counter(row.source for row in self.rows).items()))

    @cached_property
    def digest(self) -> str:
        """Names these preferences: equal digests mean equal pictures, prompts and shares."""
        key = hashlib.sha256(self.pictures.numpy().tobytes())
        for row in self.rows:
            key.update(json.dumps(list(vars(row).values())).encode())
        return key.hexdigest()


class Shown:
    """Pictures by content, so that one that was compared ten times is kept and looked at once."""

    def __init__(self) -> None:
        self._number: dict[bytes, int] = {}
        self._pixels: list[Tensor] = []

    def add(self, picture: Image.Image) -> int:
        """The number of a picture, shrunk by areas, and never stretched: what is not square is cut."""
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        square = picture.convert("RGB").crop((left, top, left + side, top + side))
        pixels = shrink(to_float(np.asarray(square)[None]))[0].half()  # not rounded to bytes, as what is drawn is not
        key = hashlib.sha256(pixels.numpy().tobytes()).digest()
        if key not in self._number:
            self._number[key] = len(self._pixels)
            self._pixels.append(pixels)
        return self._number[key]

    def tensor(self) -> Tensor:
        return torch.stack(self._pixels) if self._pixels else torch.empty(0, 3, SIDE, SIDE).half()


def apart(rows: Iterable[Preference]) -> tuple[Preference, ...]:
    """The rows with each prompt in one split: of several the strictest, so that nothing is learned from a prompt that
    is judged by anywhere."""
    rows = tuple(rows)
    strictest: dict[str, str] = {}
    for row in rows:
        strictest[row.prompt] = max(strictest.get(row.prompt, row.split), row.split, key=STRICTER.index)
    return tuple(replace(row, split=strictest[row.prompt]) for row in rows)


def join(*parts: Preferences) -> Preferences:
    """All of them, each prompt in one split; the ceiling is that of the first that knows one."""
    rows, before = [], 0
    for part in parts:
        rows += [
            Preference(r.prompt, r.first + before, r.second + before, r.share, r.source, r.split) for r in part.rows
        ]
        before += len(part.pictures)
    known = [part.ceiling for part in parts if part.ceiling is not None]
    return Preferences(torch.cat([part.pictures for part in parts]), apart(rows), known[0] if known else None)


def check(found: Preferences, least: int = 1) -> Preferences:
    """`found`, if a reward can be learned from it.

    Raises:
        Problem: too few decided pairs, and how many are missing; or a split without any.
    """
    if found.decided < least:
        undecided = len(found.rows) - found.decided
        aside = f" ({undecided} more are ties, or votes that cancel out)" if undecided else ""
        raise Problem(
            f"{found.decided} pairs of pictures have a preferred one{aside}, {least} are needed: "
            f"{least - found.decided} are missing"
        )
    for name in ("train", "validation"):
        if not any(found.rows[number].share != 0.5 for number in found.split(name)):
            raise Problem(f"no decided pair is in the {name} split; collect votes on more prompts")
    return found


# ------------------------------------------------------------------------------------------------------ votes


def of_votes(votes: Votes, images: Path, *, annotators: int = 2) -> Preferences:
    """What the votes of a study say that its filter lets through; ties and contradictions stay, as shares.

    Args:
        images: folder of the study's pictures, each <sha256 of its pixels>.png.
        annotators: at least so many must have voted.

    Raises:
        Problem: fewer did.
        InputError: a picture is missing or not the one that was shown.
    """
    from hypersd.study.export import read_picture

    people = len({one.annotator for one in votes.compared})
    if people < annotators:
        raise Problem(
            f"the votes that count are by {people} annotator{'s' * (people != 1)}, {annotators} are needed: "
            f"one person's taste is not a preference; type --annotators {max(people, 1)} to learn it all the same"
        )
    shown, rows = Shown(), []
    for pair in pairs(votes, ties=True):
        first, second = (
            shown.add(Image.open(io.BytesIO(read_picture(images, item.image_sha256))))
            for item in (pair.chosen, pair.rejected)
        )
        if first != second:  # two methods may have drawn the same
            share = (pair.votes_for + pair.ties / 2) / pair.n_votes
            rows.append(Preference(pair.prompt, first, second, share, "votes", pair.split))
    kept = votes.table.where(quality.used(votes.table, list(votes.judged)))
    return Preferences(shown.tensor(), tuple(rows), quality.ceiling(kept)[0])


# ------------------------------------------------------------------------------------------------------ files

Row = tuple[str, Any, Any, float]  # prompt, the two pictures as bytes or paths, share that prefers the first


def read(path: Path) -> Preferences:
    """Preferences from a file as published data sets have them, or from a folder of such files.

    Known are Pick-a-Pic and plain preferences (parquet), ImageReward, HPD v2 and v3 (JSON). Files that are named after
    a split belong to it, others are split by prompt; a prompt of several splits is in the strictest.

    Raises:
        InputError: there is no such file, or its columns are none of these.
    """
    files = sorted(f for f in path.rglob("*") if f.suffix in (".parquet", ".json")) if path.is_dir() else [path]
    shown, rows = Shown(), []
    for file in files:
        for name, (prompt, first, second, share) in _rows(file):
            split = file.stem if file.stem in STRICTER else split_of(prompt)
            better, worse = (shown.add(_opened(end, file)) for end in (first, second))
            rows.append(Preference(prompt, better, worse, share, name, split))
    if not rows:
        raise InputError(f"{path} holds no preferences; name a parquet or JSON file, or a folder of them")
    return Preferences(shown.tensor(), apart(rows))


def _rows(file: Path) -> Iterator[tuple[str, Row]]:
    """(name of the format, row) of a file."""
    try:
        if file.suffix == ".parquet":
            import pyarrow.parquet as pq

            content: list[dict[str, Any]] = pq.read_table(file).to_pylist()
        else:
            content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise InputError(f"{file} cannot be read ({type(error).__name__}); copy it again") from None
    if not isinstance(content, list) or not content:
        return
    for name, (columns, rows_of) in FILES.items():
        if isinstance(content[0], dict) and columns <= content[0].keys():
            try:
                yield from ((name, row) for entry in content for row in rows_of(entry))
            except (KeyError, TypeError, IndexError, ValueError):
                raise InputError(f"{file}: a row is not as {name} files have it; copy it again") from None
            return
    known = "; ".join(f"{name}: {', '.join(sorted(columns))}" for name, (columns, _) in FILES.items())
    raise InputError(f"{file} has none of the columns that are known ({known})")


def _pickapic(row: Mapping[str, Any]) -> Iterable[Row]:
    if row.get("has_label", True):
        yield row["caption"], row["jpg_0"], row["jpg_1"], float(row["label_0"])


def _preference(row: Mapping[str, Any]) -> Iterable[Row]:
    yield row["prompt"], row["chosen"]["bytes"], row["rejected"]["bytes"], (1 + row["margin"]) / 2


def _imagereward(row: Mapping[str, Any]) -> Iterable[Row]:
    """A ranking is as many pairs; the lower rank is the better one."""
    ends = list(zip(row["generations"], row["ranking"], strict=True))
    for number, (first, better) in enumerate(ends):
        for second, worse in ends[number + 1 :]:
            yield row["prompt"], first, second, 0.5 + 0.5 * ((worse > better) - (worse < better))


def _hpdv2(row: Mapping[str, Any]) -> Iterable[Row]:
    first, second = row["file_path"]
    yield row["prompt"], first, second, 0.5 + 0.5 * (row["human_preference"][0] - row["human_preference"][1])


def _hpdv2_test(row: Mapping[str, Any]) -> Iterable[Row]:
    yield from _imagereward({"prompt": row["prompt"], "generations": row["image_path"], "ranking": row["rank"]})


def _hpdv3(row: Mapping[str, Any]) -> Iterable[Row]:
    yield row["prompt"], row["path1"], row["path2"], float(row["confidence"])


FILES: dict[str, tuple[set[str], Callable[[Mapping[str, Any]], Iterable[Row]]]] = {
    "Pick-a-Pic": ({"caption", "jpg_0", "jpg_1", "label_0"}, _pickapic),
    "preferences": ({"prompt", "chosen", "rejected", "margin"}, _preference),
    "ImageReward": ({"prompt", "generations", "ranking"}, _imagereward),
    "HPD v2": ({"prompt", "file_path", "human_preference"}, _hpdv2),
    "HPD v2 test": ({"prompt", "image_path", "rank"}, _hpdv2_test),
    "HPD v3": ({"prompt", "path1", "path2", "confidence"}, _hpdv3),
}


def _opened(end: Any, file: Path) -> Image.Image:
    """A picture from its bytes, or from a path that is relative to the file or to the folder above it."""
    try:
        if isinstance(end, bytes):
            return Image.open(io.BytesIO(end))
        places = [folder / end for folder in (file.parent, file.parent.parent)]
        return Image.open(next((place for place in places if place.is_file()), places[0]))
    except OSError as error:
        what = "a picture in it" if isinstance(end, bytes) else str(end)
        raise InputError(f"{file}: {what} cannot be opened ({type(error).__name__}); copy the data again") from None


# ------------------------------------------------------------------------------------------------ known order


def constructed(prompts: Sequence[str], ladder: Mapping[str, Tensor]) -> Preferences:
    """Pairs that need no annotator: every rung of the ladder is worse than those before it.

    Args:
        ladder: name -> pictures of all prompts, uint8 [prompts, h, w, 3], the best rung first; say real pictures, the
            teacher's, few-step ones, corrupted ones. Each row is labelled with the names of its two rungs.
    """
    shown, rows = Shown(), []
    numbers = {name: [shown.add(Image.fromarray(p.numpy())) for p in pictures] for name, pictures in ladder.items()}
    names = list(ladder)
    for place, better in enumerate(names):
        for worse in names[place + 1 :]:
            source = f"constructed: {better} over {worse}"
            ends = zip(prompts, numbers[better], numbers[worse], strict=True)
            rows += [Preference(p, a, b, 1.0, source, split_of(p)) for p, a, b in ends if a != b]
    return Preferences(shown.tensor(), tuple(rows))
