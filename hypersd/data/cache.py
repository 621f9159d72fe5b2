"""Samples -> a cache of latents and text states, each encoded once.

A cache is a folder named by what decides its content: the encoders' weights, the transform and the samples themselves.
Another configuration lies beside it and nothing is overwritten. The bytes of its files depend on nothing else: a
process killed at any moment, or several that share the work, leave what one undisturbed process would have left.

Latents are kept as means of the autoencoder's posterior, with `posterior="sample"` its deviations as well. Means alone
are the default: of the emoji model's latents, whose variance is 1, the posterior deviates by 0.0125, and its teacher
learned from means; sampling adds next to nothing and would double the latents on disk. Everything is stored as float16,
which rounds these latents by 0.0002 (bfloat16 by 0.0017); what does not fit its range is refused by name.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from hypersd.data.dataset import MANIFEST, ROWS, Dataset, texts_of
from hypersd.data.files import DataError, digest, lines, make_folder, publish, publish_text, sweep, whole
from hypersd.data.sources import Sample, Source
from hypersd.data.survey import In, Row, Survey, ahead, judge, look, opened, picture_digest, square
from hypersd.records import InputError, whole_number

FORMAT = 1  # to be raised when the same configuration would give other bytes
REJECTED = "rejected.jsonl"
TEXTS = 1000  # captions in a file
REJECTS = 0.2  # the largest share of samples that may be left out
SIDE_MAX = 1 << 14

Tick = Callable[[int], Any]  # told how many samples are done
Write = Callable[[str, Tick, Path], Any]  # fills the file at the path; the name is what it will be called


class Encoder(Protocol):
    """What is asked of a base model."""

    @property
    def picture_px(self) -> int:
        """Side of the square pictures it draws, in pixels."""

    @property
    def encoders_sha256(self) -> str:
        """One hash over the weights of autoencoder and text encoder, and the tokenizer; the denoiser has no part."""

    @property
    def dtype(self) -> torch.dtype: ...

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [n, height, width, 3] -> the posterior's mean and standard deviation, float32 [n, c, h, w] each,
        scaled as the network wants its latents: `decode` of the mean gives the picture back."""

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """States [n, tokens, width]."""


@dataclass(frozen=True)
class Transform:
    """What is made of a picture: upright, on white, its centre square, resized (Lanczos) to the backbone's side.

    `flip` caches each picture mirrored as well. Pictures whose shorter side is below `smallest` pixels (None: the
    backbone's side) are left out, since enlarged ones teach blur. `posterior` is mean or sample.
    """

    flip: bool = False
    smallest: int | None = None
    posterior: str = "mean"

    def __post_init__(self) -> None:
        if self.posterior not in ("mean", "sample"):
            raise InputError(f"posterior must be mean or sample, got {self.posterior!r}")
        if self.smallest is not None:
            object.__setattr__(self, "smallest", whole_number(self.smallest, "smallest", 1, SIDE_MAX))

    @property
    def moments(self) -> tuple[str, ...]:
        return ("mean", "std") if self.posterior == "sample" else ("mean",)


def prepare(
    source: Source,
    encoder: Encoder,
    cache: Path,
    transform: Transform | None = None,
    *,
    rank: int = 0,
    world: int = 1,
    batch: int = 16,
    rejects: float = REJECTS,
) -> Dataset:
    """Encode what is not encoded yet, into a folder below `cache`; a finished one is opened at once.

    With `world` processes each does its share first, then what is still missing, and returns a complete cache: nobody
    waits for anybody. Where two happen to do the same file, both write the same bytes.

    Raises:
        SourceError: the source cannot be read.
        DataError: too many samples are of no use, or the disk is full; what was finished stays.
    """
    return _Work(source, encoder, cache, transform or Transform(), rank, world, batch).run(rejects)


@dataclass
class _Work:
    """One process's part of `prepare`."""

    source: Source
    encoder: Encoder
    cache: Path
    transform: Transform
    rank: int
    world: int
    batch: int

    def run(self, rejects: float) -> Dataset:
        survey = self.survey()
        survey.check(rejects)
        config = self.config(survey)
        folder = self.cache / digest(config)
        pieces = {f"latents-{i:05d}.safetensors": (i, rows) for i, rows in enumerate(survey.pieces) if rows}
        texts = list(_batches(texts_of(row for rows in survey.pieces for row in rows), TEXTS))
        chunks = {f"states-{i:05d}.safetensors": chunk for i, chunk in enumerate(texts)}
        latents = {name: len(rows) for name, (_, rows) in pieces.items() if self.source.pictures}
        states = {name: len(chunk) for name, chunk in chunks.items()}
        self.check_room(folder, latents, states)
        self.each(folder, latents, "latents", lambda name, *to: self.encode(*pieces[name], *to))
        self.each(folder, states, "captions", lambda name, *to: self.embed(chunks[name], *to))
        publish_text(folder / ROWS, lines(row for rows in survey.pieces for row in rows))
        publish_text(folder / REJECTED, lines(survey.rejected))
        manifest = {
            "digest": folder.name,
            "config": config,
            "views": (1 + self.transform.flip) * self.source.pictures,
            "latents": latents,
            "states": states,
            "bytes": {name: (folder / name).stat().st_size for name in (*latents, *states, ROWS, REJECTED)},
        }
        publish_text(folder / MANIFEST, json.dumps(manifest, indent=1))
        if self.rank == 0:
            tqdm.write(f"{folder}: {survey.kept:,} samples ready; left out: {survey.told()}")
        return Dataset(folder)

    def survey(self) -> Survey:
        """Look at every sample once; the notes are good for as long as the source's files do not change."""
        stamps = self.source.stamps()
        folder = self.cache / f"survey-{digest(stamps)}"
        names = {f"{piece:05d}.jsonl": piece for piece in range(len(stamps))}

        def note(name: str, tick: Tick, path: Path) -> None:
            samples = ahead(look, self.source.read(names[name]))
            path.write_text(lines(_counted(samples, tick)), encoding="utf-8")

        self.each(folder, dict.fromkeys(names, 0), "survey", note)
        return judge((folder / name for name in names), self.transform.smallest or self.encoder.picture_px)

    def config(self, survey: Survey) -> dict[str, Any]:
        """Everything that decides the bytes of a cache."""
        return {
            "format": FORMAT,
            "encoders": self.encoder.encoders_sha256,
            "dtype": str(self.encoder.dtype),
            "side": self.encoder.picture_px,
            **asdict(self.transform),
            "samples": digest(survey.pieces),
        }

    def check_room(self, folder: Path, latents: dict[str, int], states: dict[str, int]) -> None:
        """DataError before hours are spent, if what is missing will not fit on the disk."""
        make_folder(folder)
        pictures, texts = (sum(n for name, n in c.items() if not whole(folder / name)) for c in (latents, states))
        need = 0
        if pictures:
            side, copies = self.encoder.picture_px, (1 + self.transform.flip) * len(self.transform.moments)
            blank = torch.full((1, side, side, 3), 255, dtype=torch.uint8)
            need += pictures * 2 * copies * self.encoder.encode(blank)[0].numel()
        if texts:
            need += texts * 2 * self.encoder.embed([""]).numel()
        if need > (free := shutil.disk_usage(folder).free):
            raise DataError(
                f"the cache needs {need / 1e9:,.2f} GB more and {folder} has room for {free / 1e9:,.2f}; "
                "make room, or choose another folder for the cache"
            )

    def each(self, folder: Path, counts: dict[str, int], what: str, write: Write) -> None:
        """Publish every file that is not there, one's own share first; `counts` are the samples in each, if known."""
        make_folder(folder)
        sweep(folder)
        order = list(dict.fromkeys([*list(counts)[self.rank :: self.world], *reversed(counts)]))
        total = sum(counts.values()) or None
        with tqdm(total=total, desc=what, dynamic_ncols=True, disable=self.rank > 0, delay=1) as bar:
            for name in order:
                if whole(folder / name):
                    bar.update(counts[name])
                else:
                    publish(folder / name, partial(write, name, bar.update))

    @torch.inference_mode()
    def encode(self, piece: int, rows: list[Row], tick: Tick, path: Path) -> None:
        """The kept samples of one piece: float16 [rows, views, c, h, w] of each moment."""
        kept = {row["at"]: row for row in rows}
        samples = ((sample, kept[at]) for at, sample in enumerate(self.source.read(piece)) if at in kept)
        found: dict[str, list[Tensor]] = {"mean": [], "std": []}
        for part in _batches(_counted(ahead(self.pixels, samples), tick), self.batch):
            pixels = torch.from_numpy(np.stack(part))  # [batch, side, side, 3]
            views = [pixels, pixels.flip(2)] if self.transform.flip else [pixels]
            means, stds = zip(*(self.encoder.encode(view) for view in views), strict=True)
            found["mean"].append(torch.stack(means, 1).cpu())
            found["std"].append(torch.stack(stds, 1).cpu())
        keys = [row["key"] for row in rows]
        save_file({name: _half(torch.cat(found[name]), "latents", keys) for name in self.transform.moments}, path)

    def pixels(self, given: tuple[Sample, Row]) -> np.ndarray:
        sample, row = given
        if picture_digest(sample.picture) != row["picture"]:
            raise DataError(f"{sample.key} changed while the cache was being made; run the same command again")
        return square(opened(sample.picture), self.encoder.picture_px)

    @torch.inference_mode()
    def embed(self, texts: list[str], tick: Tick, path: Path) -> None:
        """States of some captions: float16 [texts, tokens, width]."""
        parts = [self.encoder.embed(part).cpu() for part in _batches(_counted(texts, tick), self.batch)]
        save_file({"states": _half(torch.cat(parts), "states", texts)}, path)


def _half(values: Tensor, what: str, names: Sequence[str]) -> Tensor:
    """As float16; DataError names the first row that is not finite in it."""
    half = values.to(torch.float16)
    bad = ~torch.isfinite(half).flatten(1).all(1)
    if bad.any():
        raise DataError(
            f"the {what} of {names[int(bad.int().argmax())]!r} are not finite in float16; load the backbone in float32"
        )
    return half.contiguous()


def _counted(items: Iterable[In], tick: Tick) -> Iterator[In]:
    for item in items:
        yield item
        tick(1)


def _batches(items: Iterable[In], size: int) -> Iterator[list[In]]:
    iterator = iter(items)
    while part := list(islice(iterator, size)):
        yield part
