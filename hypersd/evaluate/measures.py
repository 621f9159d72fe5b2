"""METRICS, the table of measures: one row each, from everything that is known of an arm to one value a prompt.

Primary, named before anything was measured: R-precision, kernel distance, distance to the teacher, diversity. Their
differences are tested; the others' are only where `--rivals` asks for two arms. Kernel distance was defined anew, by
what the judge's stages see, after the one by its embedding had failed on the ladder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from hypersd import quality, scores
from hypersd.emoji.prompts import Prompt
from hypersd.records import InputError

T = TypeVar("T")
BATCH = 16  # pictures that a published score looks at together
CANDIDATES = 100  # texts that a picture is told apart from, its own included


class Missing(Exception):
    """This cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Texts:
    """Texts as a judge reads them: what was asked for [prompts, d], what a picture of it should be recognised as
    [prompts, d], and the others it could be taken for [m, d]."""

    asked: Tensor
    own: Tensor
    pool: Tensor


@dataclass(frozen=True)
class Train:
    """The training pictures' features [n, d], and how near to one a picture counts as a copy."""

    features: Tensor
    closeness: float


@dataclass(frozen=True)
class Evidence:
    """One arm on one set of prompts: pixels uint8 [prompts, seeds, h, w, 3] and what the judges make of them.

    What could not be had is the sentence that says why.
    """

    prompts: Sequence[Prompt]
    pixels: Tensor
    features: Tensor | str  # [prompts, seeds, d]
    texts: Texts | str
    looks: Tensor | str  # [prompts, seeds, k]
    real: Tensor | str  # [prompts, d]
    real_looks: Tensor | str  # [prompts, k]
    train: Train | str
    teacher_pixels: Tensor | str
    teacher_features: Tensor | str
    rewarded: Tensor | str = "no reward scorer"  # [prompts, seeds, d]
    reward_texts: Texts | str = "no reward scorer"


@dataclass(frozen=True)
class Metric:
    """`better` is 1 where more is better, -1 where less is, 0 where it only describes. Shown times `scale`.

    `optimised` says what was trained to raise it, so that nobody takes it for independent evidence. `measure` answers
    with one value a prompt, or with one for the set, which then has no interval.
    """

    name: str
    title: str
    better: int
    measure: Callable[[Evidence], Tensor]
    primary: bool = False
    scale: float = 1.0
    digits: int = 3
    optimised: str = ""
    published: bool = False  # its weights come from elsewhere, so it is measured when asked for


def get(thing: T | str) -> T:
    """The thing, or Missing with the reason in its place."""
    if isinstance(thing, str):
        raise Missing(thing)
    return thing


def measured(metric: Metric, evidence: Evidence) -> Tensor | str:
    """float64 [prompts] or [], or the sentence that says why not."""
    try:
        return metric.measure(evidence).double()
    except (Missing, ValueError) as reason:
        return str(reason)


def _each(values: Tensor, like: Tensor) -> Tensor:
    """Values of single pictures [prompts * seeds] -> their mean a prompt."""
    return values.double().reshape(like.shape[:2]).mean(1)


def _by_seed(measure: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Evidence], Tensor]:
    """One drawing a prompt at a time, so that as many drawn pictures as real ones are compared; then the mean."""

    def run(e: Evidence) -> Tensor:
        features, real = get(e.features), get(e.real)
        return torch.stack([measure(features[:, seed], real) for seed in range(features.shape[1])]).mean(0)

    return run


def _r_precision(features: Tensor, texts: Texts) -> Tensor:
    seeds, candidates = features.shape[1], min(CANDIDATES, len(texts.pool))
    if candidates < 2:
        raise Missing("R-precision needs at least 2 different texts")
    # The same others for all drawings of a prompt and for all methods: what differs is the picture.
    wins = [
        quality.r_precision(features[:, seed], texts.own, candidates, seed=0, pool=texts.pool) for seed in range(seeds)
    ]
    return torch.stack(wins).mean(0)


def _alignment(features: Tensor, texts: Texts) -> Tensor:
    return _each(quality.alignment(features.flatten(0, 1), _repeat(texts.asked, features)), features)


def _repeat(rows: Tensor, like: Tensor) -> Tensor:
    return rows.repeat_interleave(like.shape[1], 0)


def _memorised(e: Evidence) -> Tensor:
    features, train = get(e.features), get(e.train)
    near = quality.nearest(features.flatten(0, 1), train.features) < train.closeness
    return _each(near, features)


def _colour(e: Evidence) -> Tensor:
    asked = [quality.colour_asked(prompt.text) for prompt in e.prompts]
    if not any(asked):
        raise Missing("no prompt of this set asks for one colour")
    flat = [colour for colour in asked for _ in range(e.pixels.shape[1])]
    return _each(quality.colour_right(e.pixels.flatten(0, 1), flat), e.pixels)


def scored(load: Callable[[], Callable[[Tensor, Sequence[str]], Tensor]]) -> Callable[[Evidence], Tensor]:
    """What a score or a reward says, picture by picture: it takes float [n, 3, h, w] in -1..1 and n texts."""

    @torch.inference_mode()
    def run(e: Evidence) -> Tensor:
        try:
            scorer = load()
        except InputError as reason:
            raise Missing(str(reason)) from None
        prompts = [p.text for p in e.prompts for _ in range(e.pixels.shape[1])]
        pixels = e.pixels.flatten(0, 1).permute(0, 3, 1, 2)
        parts = [
            scorer(part.float() / 127.5 - 1, prompts[i : i + BATCH])
            for i, part in zip(range(0, len(prompts), BATCH), pixels.split(BATCH), strict=True)
        ]
        return _each(torch.cat(parts), e.pixels)

    return run


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("r_precision", "R-precision@1, %", 1, lambda e: _r_precision(get(e.features), get(e.texts)),
               primary=True, scale=100, digits=1),
        Metric("kernel_distance", "kernel distance × 1000", -1,
               lambda e: quality.kernel_distance(*quality.standardised(get(e.looks), get(e.real_looks))),
               primary=True, scale=1000, digits=1),
        Metric("teacher_feature", "feature distance to teacher", -1,
               lambda e: quality.feature_distance(get(e.features), get(e.teacher_features)).mean(1), primary=True),
        Metric("diversity", "diversity", 1, lambda e: quality.diversity(get(e.features)), primary=True),
        Metric("image_text", "image-text score", 1, lambda e: _alignment(get(e.features), get(e.texts))),
        Metric("reward", "reward scorer's score", 1, lambda e: _alignment(get(e.rewarded), get(e.reward_texts)),
               optimised="scorer a is the reward of the feedback stage"),
        Metric("precision", "precision, %", 1, _by_seed(quality.precision), scale=100, digits=1),
        Metric("recall", "recall, %", 1, _by_seed(quality.recall), scale=100, digits=1),
        Metric("density", "density", 1, _by_seed(quality.density)),
        Metric("coverage", "coverage, %", 1, _by_seed(quality.coverage), scale=100, digits=1),
        Metric("teacher_pixel", "pixel distance to teacher", -1,
               lambda e: quality.pixel_distance(e.pixels, get(e.teacher_pixels)).mean(1), digits=1),
        Metric("colour", "colour words, %", 1, _colour, scale=100, digits=1),
        Metric("memorised", "memorised, %", -1, _memorised, scale=100, digits=1),
        Metric("sharpness", "sharpness", 0, lambda e: _each(quality.sharpness(e.pixels.flatten(0, 1)), e.pixels),
               digits=2),
        Metric("frechet", "Fréchet distance of as many pictures as prompts", -1,
               lambda e: torch.tensor(quality.frechet_distance(get(e.features)[:, 0], get(e.real)))),
        *(Metric(row.name, row.title, 1, scored(partial(scores.load, row.name)), optimised=row.optimised,
                 published=True)
          for row in scores.PUBLISHED.values()),
    )
}  # fmt: skip
