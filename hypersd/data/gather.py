"""An index of the web -> captioned squares to train on, as webdataset tars that `open_source` reads.

    python -m hypersd gather INDEX... --out FOLDER      parquet files, folders, or addresses: https://.., hf://datasets/..

Hyper-SD (arXiv:2404.13686) learns from parts of LAION and COYO, chosen as for SDXL-Lightning (arXiv:2402.13929, section
3.6): both sides above 1024 pixels, LAION's aesthetic score above 5.5, sharp by the Laplacian, captions cleaned,
centre squares. Differs from the papers: sides of exactly 1024 count; where they give no figure, watermarks are below
0.5 as for Stable Diffusion 1.5, unsafe is below 0.1 as for Stable Diffusion 2, and the Laplacian's variance is about
100 or more in the square that is kept; pictures that come twice are left out.

Each piece of the index becomes a tar of its own and a note of what was left out, both hidden until all pieces are
there; then pictures that came before are dropped, in the order of the index, and the tars are shown. The bytes depend
on the index, the settings and what the servers answer: a process killed at any moment, or several that share the work,
leave what one undisturbed process would have left.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from hypersd.checkpoint import flush
from hypersd.data.download import Lost
from hypersd.data.files import DataError, make_folder, publish, publish_text, sweep
from hypersd.data.index import Entry, Index, clean_caption, letters
from hypersd.data.survey import UNREADABLE, ahead, opened, square
from hypersd.quality import sharpness
from hypersd.records import InputError, real_number, whole_number
from hypersd.scores import Scorer

FORMAT = 1  # to be raised when the same index and answers would give other bytes
HIDDEN, LOCK = ".pieces", "lock"
SETTINGS, REPORT = "settings.json", "report.json"
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # of Pillow's decoders, some of which start other programs
PIXELS = 50_000_000  # of a picture before it is decoded
QUALITY = 95  # of the JPEGs that are kept
LETTERS = 0.6  # the least share of letters in a caption
DOWN = 50  # so many addresses in a row without an answer: it is the network, not the index
REASONS = {  # in the order in which they are looked for
    "no address": "the row names no picture",
    "too small": "its shorter side is below the smallest that is wanted",
    "not scored": "the index gives no score for what is asked for",
    "aesthetic": "not above the aesthetic score",
    "watermark": "likely to have a watermark",
    "unsafe": "likely to be unsafe",
    "no caption": "its caption is too short, or mostly not letters, once cleaned",
    "not allowed": "the address is not http, or of a private network",
    "unreachable": "nobody answered, twice",
    "too slow": "it took too long, twice",
    "gone": "the server has no such picture",
    "opted out": "its owner's server asks not to be used so (X-Robots-Tag)",
    "too large": "too many bytes or pixels",
    "unreadable": "what came is not a whole picture",
    "turned out small": "smaller than the index says",
    "blurred": "not sharp enough",
    "same picture": "came before",
    "nearly the same": "came before, but for a few bits of its perceptual hash",
}
UNASKED = tuple(REASONS)[: list(REASONS).index("not allowed") + 1]  # reasons for which nobody is asked

Fetch = Callable[[str], bytes]
Notes = dict[str, Any]  # {"rows", "rejected": {reason: [count, number of the first]}, "kept": [[number, sha256, look]]}


@dataclass(frozen=True)
class Wanted:
    """What is kept. None asks nothing of a score; `sharpness` is log10 of 1 + the Laplacian's variance; `near` is the
    number of bits of 64 up to which two pictures are nearly the same.

    Raises:
        InputError: a value is out of its range.
    """

    side: int = 512
    smallest: int = 1024
    aesthetic: float | None = 5.5
    watermark: float | None = 0.5
    unsafe: float | None = 0.1
    sharpness: float = 2.0
    near: int = 4
    shortest: int = 5

    def __post_init__(self) -> None:
        for name, low, high in (("side", 8, 4096), ("smallest", 1, 1 << 14), ("near", 0, 16), ("shortest", 1, 500)):
            object.__setattr__(self, name, whole_number(getattr(self, name), name, low, high))
        object.__setattr__(self, "sharpness", real_number(self.sharpness, "sharpness", 0.0, 10.0))
        for name, most in (("aesthetic", 10.0), ("watermark", 1.0), ("unsafe", 1.0)):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value in (None, "off") else real_number(value, name, 0.0, most))
        if self.smallest < self.side:
            raise InputError(
                f"smallest is {self.smallest} pixels and side {self.side}: enlarged pictures teach blur; "
                f"choose --smallest {self.side} or more"
            )


@dataclass(frozen=True)
class Picture:
    """One picture that is kept: the square as a JPEG, its caption, what finds it again, and what goes beside it."""

    number: int
    jpeg: bytes
    caption: str
    sha256: str  # of the file that came
    look: str  # perceptual hash, 16 hexadecimal digits
    about: dict[str, Any]


def gather(
    index: Index, out: Path, wanted: Wanted, fetch: Fetch, scorer: Scorer | None = None, threads: int = 32
) -> dict[str, Any]:
    """Do what is not done yet, and return the report; several processes may be given the same folder.

    `fetch` answers with the file at an address or raises `Lost`. `scorer` gives the aesthetic score where the index
    gives none.

    Raises:
        InputError: the index lacks a column that is asked for, or `out` was begun with other settings.
        DataError: the disk is full, or the network is down; what was finished stays.
    """
    return _Work(index, out, wanted, fetch, scorer, threads).run()


@dataclass
class _Work:
    index: Index
    out: Path
    wanted: Wanted
    fetch: Fetch
    scorer: Scorer | None
    threads: int
    hidden: Path = field(init=False)  # where pieces lie until all are there

    def __post_init__(self) -> None:
        self.hidden = self.out / HIDDEN

    def run(self) -> dict[str, Any]:
        check_columns(self.index, self.wanted, self.scorer)
        make_folder(self.hidden)
        self.settle()
        pieces = range(len(self.index.spans))
        sweep(self.out)
        sweep(self.hidden)
        with Claims.at(self.hidden / LOCK) as claims:
            for wait in (False, True):  # first what nobody does, then what somebody may have died of
                for piece in pieces:
                    with claims.of(piece, wait) as mine:
                        if mine and not self.noted(piece).is_file():
                            self.collect(piece)
            notes = [json.loads(self.noted(piece).read_text(encoding="utf-8")) for piece in pieces]
            came = repeated([tuple(row) for piece in notes for row in piece["kept"]], self.wanted.near)
            for piece in pieces:
                with claims.of(piece, wait=True):
                    self.show(piece, {number for number, *_ in notes[piece]["kept"]}, came)
        report = summary(notes, came)
        publish_text(self.out / REPORT, json.dumps(report, indent=1))
        return report

    def noted(self, piece: int) -> Path:
        return self.hidden / f"{piece:05d}.json"

    def settle(self) -> None:
        """Write down what decides the bytes, or make sure that it is what was written down."""
        files, scored = self.index.stamps, self.scorer is not None
        now = {"format": FORMAT, **asdict(self.wanted), "scored": scored, "rows": self.index.rows, "index": files}
        file = self.out / SETTINGS
        if file.is_file() and (then := json.loads(file.read_text(encoding="utf-8"))) != now:
            changed = [name for name in now if then.get(name) != now[name]]
            both = zip(then["index"], files, strict=False)
            if other := [new[0] for old, new in both if old[0] == new[0] and old != new]:
                raise InputError(
                    f"{other[0]} is not the file that it was when {self.out} was begun; choose another folder with "
                    "--out to gather it anew"
                )
            raise InputError(
                f"{self.out} was begun with another {', '.join(changed)}; choose another folder with --out"
            )
        publish_text(file, json.dumps(now, indent=1))

    def collect(self, piece: int) -> None:
        """All rows of one piece: a tar of what is kept, then the notes, which say that both are whole."""
        rejected, kept = dict[str, list[int]](), list[tuple[int, str, str]]()

        def write(path: Path) -> None:
            silent = 0
            with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive, self.bar(piece) as bar:
                for number, made in ahead(self.make, self.index.read(piece), self.threads):
                    made = self.score(made) if isinstance(made, Picture) else made
                    if isinstance(made, Picture):
                        _add(archive, made)
                        kept.append((number, made.sha256, made.look))
                    else:
                        rejected.setdefault(made, [0, number])[0] += 1
                    silent = check_network(silent, made if isinstance(made, str) else "")
                    bar.set_postfix(kept=len(kept), refresh=False)
                    bar.update()

        publish(self.hidden / f"{piece:05d}.tar", write)
        notes = {"rows": self.index.spans[piece].rows, "rejected": rejected, "kept": kept}
        publish_text(self.noted(piece), json.dumps(notes))

    def bar(self, piece: int) -> Any:
        text = f"piece {piece + 1} of {len(self.index.spans)}"
        return tqdm(total=self.index.spans[piece].rows, desc=text, dynamic_ncols=True, leave=False, delay=1)

    def make(self, entry: Entry) -> tuple[int, Picture | str]:
        """The picture of a row, or the reason why there is none."""
        if reason := before(entry, self.wanted, scoring=self.scorer is not None):
            return entry.number, reason
        caption = clean_caption(entry.caption)
        if len(caption) < self.wanted.shortest or letters(caption) < LETTERS:
            return entry.number, "no caption"
        try:
            content = self.fetch(entry.url) if entry.picture is None else entry.picture
            return entry.number, look_at(content, entry, caption, self.wanted)
        except Lost as lost:
            return entry.number, lost.reason

    @torch.inference_mode()
    def score(self, picture: Picture) -> Picture | str:
        """The same with an aesthetic score if it has none; one at a time, for a batch may change the last bits."""
        if self.scorer is None or self.wanted.aesthetic is None or "aesthetic" in picture.about:
            return picture
        pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(picture.jpeg)))).permute(2, 0, 1)[None] / 127.5 - 1
        found = round(float(self.scorer(pixels.to(next(self.scorer.parameters()).device), [picture.caption])), 3)
        if found <= self.wanted.aesthetic:
            return "aesthetic"
        picture.about["aesthetic"] = found
        return picture

    def show(self, piece: int, kept: set[int], came: dict[int, str]) -> None:
        """Move a finished tar to where it is read from, without what came before."""
        tar, shown = self.hidden / f"{piece:05d}.tar", self.out / f"{piece:05d}.tar"
        if not kept <= came.keys() and not shown.is_file():
            if not tar.is_file():
                raise DataError(f"{shown} is gone; to have it made again remove {self.noted(piece)}")
            if kept & came.keys():
                publish(shown, partial(_copy, tar, {_name(number) for number in came}))
            else:
                os.replace(tar, shown)
                flush(self.out)
        tar.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ what is judged


def check_columns(index: Index, wanted: Wanted, scorer: Scorer | None) -> None:
    """InputError if a score is asked for that a file has no column for."""
    for name in ("aesthetic", "watermark", "unsafe"):
        missing = index.lacks(name) if getattr(wanted, name) is not None else []
        if missing and not (name == "aesthetic" and scorer):
            other = "--score to find it out, or " if name == "aesthetic" else ""
            raise InputError(f"{missing[0]} has no column for {name}; give {other}--{name} off to ask nothing of it")


def before(entry: Entry, wanted: Wanted, scoring: bool = False) -> str | None:
    """Why a row is left out by what the index says; None if it is worth its download."""
    if not (entry.url or entry.picture):
        return "no address"
    said = entry.numbers
    if any(said.get(name, wanted.smallest) < wanted.smallest for name in ("width", "height")):
        return "too small"
    asked = [name for name in ("aesthetic", "watermark", "unsafe") if getattr(wanted, name) is not None]
    if any(name not in said and not (name == "aesthetic" and scoring) for name in asked):
        return "not scored"
    if wanted.aesthetic is not None and said.get("aesthetic", np.inf) <= wanted.aesthetic:
        return "aesthetic"
    if wanted.watermark is not None and said["watermark"] >= wanted.watermark:
        return "watermark"
    return "unsafe" if wanted.unsafe is not None and said["unsafe"] >= wanted.unsafe else None


def look_at(content: bytes, entry: Entry, caption: str, wanted: Wanted) -> Picture | str:
    """The square of a picture file, or why it is left out."""
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        if min(size := image.size) < wanted.smallest:
            return "turned out small"
        if size[0] * size[1] > PIXELS:
            return "too large"
        pixels = square(opened(image), wanted.side)
    except UNREADABLE:
        return "unreadable"
    sharp = round(float(sharpness(torch.from_numpy(pixels)[None])), 3)
    if sharp < wanted.sharpness:
        return "blurred"
    jpeg = io.BytesIO()
    Image.fromarray(pixels).save(jpeg, "JPEG", quality=QUALITY, subsampling=0)
    sha256, look = hashlib.sha256(content).hexdigest(), look_of(pixels)
    about = {
        "url": entry.url,
        "caption": entry.caption,
        "licence": entry.licence,
        **entry.numbers,
        "size": size,
        "sharpness": sharp,
        "sha256": sha256,
        "look": look,
    }
    return Picture(entry.number, jpeg.getvalue(), caption, sha256, look, about)


def look_of(pixels: np.ndarray) -> str:
    """A perceptual hash (Zauner 2010): which of the 64 lowest frequencies but the mean are above their median.

    uint8 [side, side, 3] -> 16 hexadecimal digits.
    """
    grey = np.asarray(Image.fromarray(pixels).convert("L").resize((32, 32), Image.Resampling.LANCZOS), np.float64)
    wave = np.cos(np.pi / 32 * (np.arange(32) + 0.5) * np.arange(1, 9)[:, None])  # DCT-II, [frequency, place]
    found = (wave @ grey @ wave.T).round(6).flatten()
    return f"{int(''.join('01'[int(bit)] for bit in found > np.median(found)), 2):016x}"


def repeated(kept: Iterable[tuple[int, str, str]], near: int) -> dict[int, str]:
    """Which of (number, sha256, look) came before, and how: compared with all that were kept until then.

    Two of 64 bits that differ in at most `near` agree in one of `near` + 1 parts, so only those are compared.
    """
    edges = [64 * i // (near + 1) for i in range(near + 2)]
    files, came = set[str](), dict[int, str]()
    parts: list[dict[int, list[int]]] = [{} for _ in edges[1:]]
    for number, sha256, look in kept:
        bits = int(look, 16)
        places = [
            part.setdefault((bits >> low) & ((1 << (high - low)) - 1), [])
            for part, low, high in zip(parts, edges, edges[1:], strict=False)
        ]
        if sha256 in files:
            came[number] = "same picture"
        elif any((bits ^ other).bit_count() <= near for place in places for other in place):
            came[number] = "nearly the same"
        else:
            files.add(sha256)
            for place in places:
                place.append(bits)
    return came


def check_network(silent: int, reason: str) -> int:
    """How many addresses in a row did not answer, one row later. DataError if they are too many to be true."""
    if reason in UNASKED:
        return silent
    silent = silent + 1 if reason in ("unreachable", "too slow") else 0
    if silent >= DOWN:
        raise DataError(
            f"none of {silent} addresses in a row answered; check the network and run the same command again"
        )
    return silent


# -------------------------------------------------------------------------------------------------- what is told


def summary(notes: Sequence[Notes], came: dict[int, str]) -> dict[str, Any]:
    """All rows by what became of them: `rows` is `kept` and every count in `rejected` together."""
    count, first = Counter[str](), dict[str, int]()
    for reason, (times, number) in (item for piece in notes for item in piece["rejected"].items()):
        count[reason] += times
        first.setdefault(reason, number)
    for number, reason in came.items():
        count[reason] += 1
        first.setdefault(reason, number)
    shards = {f"{i:05d}.tar": sum(row[0] not in came for row in piece["kept"]) for i, piece in enumerate(notes)}
    return {
        "rows": sum(piece["rows"] for piece in notes),
        "kept": sum(shards.values()),
        "rejected": {reason: {"rows": count[reason], "first": first[reason]} for reason in REASONS if count[reason]},
        "shards": {name: samples for name, samples in shards.items() if samples},
    }


def table(report: dict[str, Any]) -> str:
    """The report for people: a line each reason, with its rows, its share and the number of the first such row."""
    every = report["rows"]
    lines = [f"{'rows of the index':<18} {every:>12,}"]
    for reason, found in report["rejected"].items():
        share = f"{found['rows'] / every:.1%}"
        lines.append(f"{reason:<18} {found['rows']:>12,} {share:>7}  {REASONS[reason]}, such as row {found['first']}")
    share = f"{report['kept'] / every:.1%}" if every else ""
    return "\n".join([*lines, f"{'kept':<18} {report['kept']:>12,} {share:>7}  in {len(report['shards']):,} tars"])


# ------------------------------------------------------------------------------------------------- files and locks


def _name(number: int) -> str:
    return f"{number:09d}"


def _add(archive: tarfile.TarFile, made: Picture) -> None:
    about = json.dumps(made.about).encode()
    for ending, content in (("jpg", made.jpeg), ("txt", made.caption.encode()), ("json", about)):
        _put(archive, f"{_name(made.number)}.{ending}", content)


def _put(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # time, owner and mode are the same for all
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _copy(tar: Path, without: set[str], path: Path) -> None:
    with tarfile.open(tar) as old, tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as new:
        for member in old:
            content = old.extractfile(member)
            if content and member.name.partition(".")[0] not in without:
                _put(new, member.name, content.read())


@dataclass(frozen=True)
class Claims:
    """Who does which piece: a byte of a file locked for each, which the system gives back when a process dies.

    Where a file system has no locks everything is everybody's: the same bytes, only slower.
    """

    file: int

    @classmethod
    @contextmanager
    def at(cls, path: Path) -> Iterator[Claims]:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            yield cls(file)
        finally:
            os.close(file)

    @contextmanager
    def of(self, piece: int, wait: bool) -> Iterator[bool]:
        """Hold a piece; False if another process holds it and is not waited for."""
        mine = self._lock(piece, wait)
        try:
            yield mine
        finally:
            if mine:
                self._unlock(piece)

    def _lock(self, piece: int, wait: bool) -> bool:
        try:
            import fcntl
        except ImportError:  # Windows
            return True
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, piece)
        except OSError as error:
            return error.errno not in (errno.EACCES, errno.EAGAIN)
        return True

    def _unlock(self, piece: int) -> None:
        try:
            import fcntl

            fcntl.lockf(self.file, fcntl.LOCK_UN, 1, piece)
        except (ImportError, OSError):
            return
