"""Somebody who likes warm colours: pictures, votes and rewards with a taste that can be measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hypersd.feedback.pairs import SIDE, Preference, Preferences
from hypersd.study.pairs import split_of

WORDS = ("a", "happy", "cat", "dog", "red", "heart")
PROMPTS = tuple(f"a {x} {y} {z}" for x in WORDS[1:] for y in WORDS[1:] for z in WORDS[1:3])  # 50, in all three splits


def warmth(pixels: Tensor) -> Tensor:
    """Red less blue, float [n, 3, h, w] -> [n]"""
    return (pixels[:, 0] - pixels[:, 2]).mean((1, 2))


class Warm:
    """The reward itself, without a model between."""

    name, threshold = "warm", 100.0

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        assert len(pixels) == len(prompts)
        return warmth(pixels)


class Broken(Warm):
    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return warmth(pixels) * torch.nan


def preferences(count: int = 240, *, agreement: float = 1.0) -> Preferences:
    """Two random pictures a pair, of which the warmer one is preferred by so many: at 0.5 any of the two."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randint(60, 190, (2 * count, 1, 1, 3), generator=generator)
    texture = torch.randint(-50, 50, (2 * count, 8, 8, 3), generator=generator)
    pictures = (base + texture.repeat_interleave(SIDE // 8, 1).repeat_interleave(SIDE // 8, 2)).clamp(0, 255)
    pictures = (pictures.permute(0, 3, 1, 2) / 127.5 - 1).half()
    red = warmth(pictures.float())
    agrees = torch.rand(count, generator=generator) < agreement
    rows = []
    for n in range(count):
        better = bool(red[2 * n] > red[2 * n + 1]) == bool(agrees[n])
        prompt = PROMPTS[n % len(PROMPTS)]
        rows.append(Preference(prompt, 2 * n, 2 * n + 1, float(better), "made up", split_of(prompt)))
    return Preferences(pictures, tuple(rows))
