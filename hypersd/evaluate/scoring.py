"""From drawn pictures to one value a prompt, method, step count and metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from hypersd import quality
from hypersd.emoji import artwork
from hypersd.emoji.prompts import Prompt
from hypersd.evaluate import gallery, judges
from hypersd.evaluate.judges import Artwork, Judge
from hypersd.evaluate.measures import METRICS, Evidence, Metric, Texts, Train, measured
from hypersd.evaluate.plan import Arm, Plan

NO_REAL = "there are no real pictures of these prompts"


@dataclass(frozen=True)
class Yardstick:
    """All that pictures are measured with; a sentence in place of what is not there."""

    judge: Judge | str
    reward: Judge | str
    real: Artwork | str
    train: Train | str

    @classmethod
    def load(cls, folder: Path, metrics: Sequence[Metric]) -> Yardstick:
        """The judges in `assets` and the artwork in `folder`; the training pictures only if a metric wants them."""
        judge, real = judges.load("measure"), judges.real(folder)
        return cls(judge, judges.load("reward"), real, _train(judge, real, METRICS["memorised"] in metrics))

    def record(self) -> dict[str, str]:
        """Who judged, for the report."""
        each = {"measure": self.judge, "reward": self.reward}
        return {name: "not there" if isinstance(judge, str) else judge.sha256 for name, judge in each.items()}


def _train(judge: Judge | str, real: Artwork | str, wanted: bool) -> Train | str:
    if isinstance(judge, str) or isinstance(real, str):
        return judge if isinstance(judge, str) else str(real)
    if not wanted:
        return "the training pictures were not looked at"
    features = judge.pictures(real.train())
    return Train(features, quality.closeness(features))


@dataclass
class Scores:
    """`values[metric][arm]` is float64 [prompts], NaN where there is none; `single[metric][arm][set]` are figures of a
    whole set; `missing[metric][sentence]` are the sets that could not be measured, and why."""

    prompts: Sequence[Prompt]
    values: dict[str, dict[Arm, NDArray[np.float64]]] = field(default_factory=dict)
    single: dict[str, dict[Arm, dict[str, float]]] = field(default_factory=dict)
    missing: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    nfe: dict[Arm, int] = field(default_factory=dict)
    seconds: dict[Arm, NDArray[np.float64]] = field(default_factory=dict)
    adapters: dict[Arm, str | None] = field(default_factory=dict)

    def note(self, metric: Metric, arm: Arm, name: str, numbers: Sequence[int], found: Tensor | str) -> None:
        if isinstance(found, str):
            sets = self.missing.setdefault(metric.name, {}).setdefault(found, [])
            if name not in sets:
                sets.append(name)
        elif found.ndim:
            empty = np.full(len(self.prompts), np.nan)
            self.values.setdefault(metric.name, {}).setdefault(arm, empty)[list(numbers)] = found.numpy()
        else:
            self.single.setdefault(metric.name, {}).setdefault(arm, {})[name] = float(found)


def score(plan: Plan, folder: Path, base_sha256: str, yard: Yardstick, metrics: Sequence[Metric]) -> Scores:
    """Measure every arm on every set of prompts. Pictures are read and judged an arm at a time."""
    scores = Scores(plan.prompts)
    texts = {name: texts_of(yard.judge, [plan.prompts[i] for i in numbers]) for name, numbers in plan.sets.items()}
    rewards = {name: texts_of(yard.reward, [plan.prompts[i] for i in numbers]) for name, numbers in plan.sets.items()}
    real = {name: real_of(yard, [plan.prompts[i] for i in numbers]) for name, numbers in plan.sets.items()}
    teacher: tuple[Tensor, Tensor | str] | None = None
    for arm in tqdm([plan.reference, *(arm for arm in plan.arms if arm != plan.reference)], desc="measure", unit="arm"):
        drawn = gallery.read(plan, folder, arm, base_sha256)
        scores.nfe[arm], scores.seconds[arm], scores.adapters[arm] = drawn.nfe, drawn.seconds, drawn.adapter_sha256
        features, rewarded = look(yard.judge, drawn.pixels), look(yard.reward, drawn.pixels)
        looks = looks_of(yard.judge, drawn.pixels) if METRICS["kernel_distance"] in metrics else "not looked at"
        teacher = teacher or (drawn.pixels, features)
        for name, numbers in plan.sets.items():
            evidence = Evidence(
                prompts=[plan.prompts[i] for i in numbers],
                pixels=drawn.pixels[numbers],
                features=_rows(features, numbers),
                texts=texts[name],
                looks=_rows(looks, numbers),
                real=real[name][0],
                real_looks=real[name][1],
                train=yard.train,
                teacher_pixels=teacher[0][numbers],
                teacher_features=_rows(teacher[1], numbers),
                rewarded=_rows(rewarded, numbers),
                reward_texts=rewards[name],
            )
            for metric in metrics:
                scores.note(metric, arm, name, numbers, measured(metric, evidence))
    return scores


def look(judge: Judge | str, pixels: Tensor) -> Tensor | str:
    """uint8 [prompts, seeds, h, w, 3] -> features [prompts, seeds, d]."""
    return judge if isinstance(judge, str) else judge.pictures(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])


def looks_of(judge: Judge | str, pixels: Tensor) -> Tensor | str:
    """uint8 [prompts, seeds, h, w, 3] -> looks [prompts, seeds, k]."""
    return judge if isinstance(judge, str) else judge.looks(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])


def texts_of(judge: Judge | str, prompts: Sequence[Prompt]) -> Texts | str:
    """Drawings of known things are told apart from all labels of the artwork, others from the other prompts."""
    if isinstance(judge, str):
        return judge
    pool = sorted({row.label for row in artwork.read_manifest()} if prompts[0].picture else {p.own for p in prompts})
    asked, own = judge.texts([p.text for p in prompts]), judge.texts([p.own for p in prompts])
    return Texts(asked, own, judge.texts(pool))


def real_of(yard: Yardstick, prompts: Sequence[Prompt]) -> tuple[Tensor | str, Tensor | str]:
    """Features [prompts, d] and looks [prompts, k] of the real picture of each prompt."""
    if not all(prompt.picture for prompt in prompts):
        return NO_REAL, NO_REAL
    if isinstance(yard.real, str) or isinstance(yard.judge, str):
        reason = yard.real if isinstance(yard.real, str) else str(yard.judge)
        return reason, reason
    pictures = yard.real.of([prompt.picture for prompt in prompts])
    return yard.judge.pictures(pictures), yard.judge.looks(pictures)


def _rows(features: Tensor | str, numbers: Sequence[int]) -> Tensor | str:
    return features if isinstance(features, str) else features[torch.tensor(numbers)]


def flat(scores: Scores, metrics: Mapping[str, Metric]) -> dict[str, list[object]]:
    """Columns of the per-prompt table: one row a prompt and arm."""
    arms = list(scores.nfe)
    columns: dict[str, list[object]] = {
        "set": [prompt.set for _ in arms for prompt in scores.prompts],
        "prompt": [prompt.text for _ in arms for prompt in scores.prompts],
        "method": [arm.method for arm in arms for _ in scores.prompts],
        "steps": [arm.steps for arm in arms for _ in scores.prompts],
        "nfe": [scores.nfe[arm] for arm in arms for _ in scores.prompts],
    }
    nothing = np.full(len(scores.prompts), np.nan)
    for name in metrics:
        if name in scores.values:
            columns[name] = [float(v) for arm in arms for v in scores.values[name].get(arm, nothing)]
    return columns
