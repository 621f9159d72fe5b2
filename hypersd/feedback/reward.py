"""A reward model from preferences: how much a picture will be liked, given its prompt.

    python -m hypersd reward

A scorer tells whether a picture shows its text; what people like beyond that is a linear function of the same features
(a score of cosine and head). Two pictures' difference in score is the logit of the share that prefers the first
(Bradley and Terry 1952, as in ImageReward, arXiv:2304.05977, and PickScore, arXiv:2305.01569, with soft labels for ties
and split votes). All prompts weigh alike, however many pairs they have. What judges in the end is accuracy on prompts
that were not learned from.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hypersd import intervals, scores
from hypersd.checkpoint import sha256
from hypersd.emoji import scorer
from hypersd.feedback.pairs import Preferences
from hypersd.folders import read_tensors
from hypersd.records import InputError, Problem
from hypersd.train import Recipe, Run, Step

RECIPE = Recipe(updates=600, batch=32, lr=6e-4, warmup=20, cooldown=300, weight_decay=0.2, ema=0.98)
EVERY, PATIENCE = 25, 8  # updates between two looks at the held-out pairs, looks without a better one until it ends
CARD, LOOKS = "reward.json", "looks.json"


class Reward(Protocol):
    """Scores pictures of prompts; the higher the better. Differentiable in the pictures.

    `threshold` is what preferred pictures reach on average: more is not asked for (UniFL, arXiv:2404.05595).
    """

    @property
    def name(self) -> str: ...
    @property
    def threshold(self) -> float: ...
    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """float [n, 3, h, w] in -1..1 -> [n]"""
        ...


class Preferred(nn.Module):
    """A scorer with a head for what its cosine does not say. The text encoder is frozen."""

    def __init__(self, judge: scorer.Scorer) -> None:
        super().__init__()
        self.scorer, self.head = judge, nn.Linear(scorer.SPACE, 1, bias=False)
        nn.init.zeros_(self.head.weight)  # it begins as the scorer
        self.scorer.requires_grad_(True).text.text_model.requires_grad_(False)

    def train(self, mode: bool = True) -> Preferred:
        super().train(mode)
        self.scorer.image.eval()  # batches are too small to be normalised by themselves
        return self

    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        """float [n, 3, h, w] in -1..1 and the states of n texts [n, 256] -> scores [n]"""
        features = self.scorer.features(x)
        texts = F.normalize(self.scorer.text.text_projection(states).float(), dim=1)
        cosine = (F.normalize(features, dim=1) * texts).sum(1)
        return scorer.inverse_temperature(self.scorer.scale) * cosine + self.head(features).squeeze(1)


# --------------------------------------------------------------------------------------------- the objective


class Preferring:
    """The objective: tell which of two pictures of a prompt is preferred."""

    def __init__(self, preferences: Preferences, judge: scorer.Scorer, seed: int = 0, start: str = "") -> None:
        torch.manual_seed(seed)
        self.preferences, self.start = preferences, start
        self.reward = Preferred(judge).train()
        self.pictures = preferences.pictures
        self.texts = sorted({row.prompt for row in preferences.rows})
        self.states = scorer.text_states(judge, self.texts)
        place = {text: number for number, text in enumerate(self.texts)}
        rows = preferences.rows
        self.ends = torch.tensor([[row.first, row.second] for row in rows])
        self.text = torch.tensor([place[row.prompt] for row in rows])
        self.share = torch.tensor([row.share for row in rows])
        self.train_rows = torch.tensor(preferences.split("train"))
        often = torch.bincount(self.text[self.train_rows], minlength=len(self.texts))
        weight = 1.0 / often[self.text].clamp_min(1)  # prompts weigh alike
        self.weight = weight / weight[self.train_rows].mean()

    def modules(self) -> dict[str, nn.Module]:
        return {"reward": self.reward}

    def describe(self) -> dict[str, Any]:
        return {"preferences": self.preferences.digest, "start": self.start}

    def losses(self, step: Step) -> Iterator[tuple[str, Tensor]]:
        rows = self.train_rows[step.rows(len(self.train_rows))]
        gap = self._gap(rows, step)
        loss = F.binary_cross_entropy_with_logits(gap, self.share[rows], weight=self.weight[rows])
        yield "reward", loss

    def _gap(self, rows: Tensor, step: Step | None = None) -> Tensor:
        """Score of the first picture less that of the second, from one pass over both. [rows]

        In a training `step` both of a pair are moved alike, so that neither gains by it and none is learned by heart.
        """
        x = self.pictures[self.ends[rows].T.flatten()].float()
        if step is not None:
            x = moved(x, *(step.uniform(name).float().repeat(2) for name in ("mirror", "scale", "right", "down")))
        first, second = self.reward(x, self.states[self.text[rows]].repeat(2, 1)).chunk(2)
        return first - second

    @torch.inference_mode()
    def accuracy(self, split: str, batch: int = 128) -> intervals.Estimate:
        """Share of decided pairs of a split told right, as a mean over prompts with its interval over prompts."""
        numbers = [n for n in self.preferences.split(split) if self.preferences.rows[n].share != 0.5]
        right: dict[int, list[float]] = {}
        for first in range(0, len(numbers), batch):
            rows = torch.tensor(numbers[first : first + batch])
            told = self._gap(rows) > 0
            for text, good in zip(self.text[rows].tolist(), (told == (self.share[rows] > 0.5)).tolist(), strict=True):
                right.setdefault(text, []).append(float(good))
        values = np.array([np.mean(of_prompt) for of_prompt in right.values()])
        return intervals.estimate(values, intervals.draws(len(values))) if len(values) else _nothing()

    @torch.inference_mode()
    def sheet(self, folder: Path, step: int) -> dict[str, float]:
        """Accuracy on the prompts that it learns from and on those that choose the moment to stop."""
        return {f"accuracy_{split}": self.accuracy(split).value for split in ("train", "validation")}

    @torch.inference_mode()
    def threshold(self) -> float:
        """The mean score of the preferred pictures of the validation split."""
        numbers = [n for n in self.preferences.split("validation") if self.preferences.rows[n].share != 0.5]
        liked = [
            (r.first if r.share > 0.5 else r.second, r.prompt) for r in (self.preferences.rows[n] for n in numbers)
        ]
        x = self.pictures[[picture for picture, _ in liked]].float()
        states = self.states[[self.texts.index(prompt) for _, prompt in liked]]
        return float(self.reward(x, states).mean())


def moved(x: Tensor, mirror: Tensor, scale: Tensor, right: Tensor, down: Tensor) -> Tensor:
    """Pictures mirrored or not, 0.85 to 1.2 times as large, shifted by up to an eighth, white outside.

    x [n, 3, h, w] in -1..1; the others [n] in 0..1.
    """
    zoom, zero = 1 / (0.85 + 0.35 * scale), torch.zeros_like(scale)
    across = torch.stack([zoom * torch.where(mirror < 0.5, -1.0, 1.0), zero, (right - 0.5) / 4], 1)
    along = torch.stack([zero, zoom, (down - 0.5) / 4], 1)
    grid = F.affine_grid(torch.stack([across, along], 1), list(x.shape), align_corners=False)
    return F.grid_sample(x - 1, grid, align_corners=False) + 1


def _nothing() -> intervals.Estimate:
    return intervals.Estimate(np.nan, np.nan, np.nan, 0)


# ------------------------------------------------------------------------------------------------- the best


@dataclass(frozen=True)
class Look:
    """What was measured of the averaged weights after so many updates."""

    step: int
    value: float


def keep_best(run: Run, by: str, *, every: int = EVERY, patience: int | None = PATIENCE) -> Look:
    """Train, look every so many updates, and end with the averaged weights that measured highest `by` on the sheet.

    The start counts too, and of equals the first. Ends early after `patience` looks without a better one; with None the
    looks only tell, and it ends with its recipe and the averages of then. Killed and started again it goes on, to the
    same end.

    Raises:
        Problem: a measure was not finite.
        Stopped: a signal came.
    """
    file, best = run.folder / LOOKS, run.folder / "best.safetensors"
    looks = _of_first([look for look in looks_in(run.folder) if look.step <= run.step])
    while True:
        due = run.step % every == 0 or run.step >= run.recipe.updates  # a run that was killed may be in between
        if due and (not looks or looks[-1].step < run.step):
            value = _of_first((run.measures if run.measures else run.draw()).get(by))
            if not np.isfinite(value):
                raise Problem(f"{by} is {value} after {run.step} updates in {run.folder}; nothing was written")
            better = all(value > look.value for look in looks)
            looks.append(Look(run.step, value))
            if run.processes.is_main_process:
                if better:
                    _save(run, best)
                file.write_text(json.dumps([asdict(look) for look in looks]), encoding="utf-8")
        chosen = max(looks, key=lambda look: (look.value, -look.step), default=Look(run.step, -np.inf))
        behind = sum(look.step > chosen.step for look in looks)
        if run.step >= run.recipe.updates or (patience is not None and behind >= patience):
            break
        run.advance(until=(run.step // every + 1) * every)
    if patience is None:
        return looks[-1]
    run.processes.wait_for_everyone()
    _load(run, best)
    return chosen


def looks_in(folder: Path) -> list[Look]:
    """What was measured in a run's folder so far, the start first."""
    file = folder / LOOKS
    return [Look(**look) for look in json.loads(file.read_text(encoding="utf-8"))] if file.exists() else []


def _of_first(mine: Any) -> Any:
    """What the first of several processes has: it alone draws, so that all see the same looks and stop together."""
    (theirs,) = broadcast_object_list([mine])
    return theirs


def _save(run: Run, path: Path) -> None:
    staging = path.with_suffix(".tmp")
    tensors = {f"{n}/{k}": v.clone() for n, average in run.average.items() for k, v in average.items()}
    save_file(tensors, staging)
    staging.replace(path)


def _load(run: Run, path: Path) -> None:
    """Networks and averages both become what was kept."""
    kept = load_file(path)
    for name, network in run.networks.items():
        state = {k.removeprefix(f"{name}/"): v for k, v in kept.items() if k.startswith(f"{name}/")}
        network.load_state_dict(state)
        for key, tensor in run.average[name].items():
            tensor.copy_(state[key])


# ------------------------------------------------------------------------------------------- train, keep, read


@dataclass(frozen=True)
class Card:
    """What a reward model says of itself: what it learned from, how often it is right on prompts it never saw."""

    preferences: str
    sources: dict[str, int]
    updates: int
    accuracy: float
    low: float
    high: float
    prompts: int
    ceiling: float | None
    threshold: float
    seed: int


def train(
    preferences: Preferences, folder: Path, out: Path, recipe: Recipe = RECIPE, *, start: Path | None = None
) -> Card:
    """Learn from the train split, stop by the validation split, report on the test split, write to `out`.

    Args:
        folder: of the run; the same call goes on there.
        start: folder of the scorer to begin with, emoji's "a" if not given.

    Raises:
        ArtworkError: there is no such scorer.
        RecipeChanged: the folder was begun with other preferences.
    """
    begun = start or scorer.ASSETS / "emoji-scorer-a"
    objective = Preferring(preferences, scorer.load(begun), recipe.seed, _hash(begun))
    run = Run(objective, recipe, folder)
    look = keep_best(run, "accuracy_validation")
    objective.reward.eval()
    split = "test" if any(preferences.rows[n].share != 0.5 for n in preferences.split("test")) else "validation"
    found = objective.accuracy(split)
    card = Card(
        preferences=preferences.digest,
        sources=preferences.sources,
        updates=look.step,
        accuracy=found.value,
        low=found.low,
        high=found.high,
        prompts=found.prompts,
        ceiling=preferences.ceiling,
        threshold=objective.threshold(),
        seed=recipe.seed,
    )
    if run.processes.is_main_process:
        export(objective.reward, out, card)
    run.processes.wait_for_everyone()
    return card


def _hash(folder: Path) -> str:
    return "-".join(sha256(file)[:8] for file in sorted(folder.rglob("*.safetensors")))


def export(reward: Preferred, folder: Path, card: Card) -> None:
    """The scorer's files, head.safetensors in fp16, and the card."""
    scorer.export(reward.scorer, folder)
    save_file({"weight": reward.head.weight.detach().to(torch.float16)}, folder / "head.safetensors")
    (folder / "head.safetensors").chmod(0o644)
    (folder / CARD).write_text(json.dumps(asdict(card), indent=1) + "\n", encoding="utf-8")


class Trained:
    """A `Reward` that was read from a folder: frozen, on the CPU."""

    def __init__(self, folder: Path) -> None:
        """Raises InputError: there is no reward model in `folder`; ArtworkError: it is of another text encoder."""
        try:
            self.card = Card(**json.loads((folder / CARD).read_text(encoding="utf-8")))
            head = read_tensors(folder / "head.safetensors")["weight"]
        except (OSError, ValueError, TypeError, KeyError) as error:  # InputError is a ValueError
            raise InputError(
                f"there is no whole reward model in {folder} ({type(error).__name__}); "
                "train one with: python -m hypersd reward"
            ) from None
        self.name, self.threshold = folder.name, self.card.threshold
        self.model = Preferred(scorer.load(folder))
        self.model.head.weight.data.copy_(head)
        self.model.requires_grad_(False).eval()
        self._states: dict[str, Tensor] = {}

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        if unknown := sorted(set(prompts) - self._states.keys()):
            states = scorer.text_states(self.model.scorer, unknown)
            self._states |= {text: state.clone() for text, state in zip(unknown, states, strict=True)}
        return self.model(pixels.float().cpu(), torch.stack([self._states[prompt] for prompt in prompts]))

    def looks(self, pixels: Tensor) -> Tensor:
        return self.model.scorer.looks(pixels.float().cpu())


class Aligned:
    """A `Reward` that asks only whether the picture shows its text: the cosine of one of the two emoji scorers."""

    threshold = 1.0

    def __init__(self, folder: Path) -> None:
        """Raises ArtworkError if it was not trained."""
        self.name, self.model = folder.name, scorer.load(folder)
        self._texts: dict[str, Tensor] = {}

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        for prompt in sorted(set(prompts) - self._texts.keys()):
            self._texts[prompt] = scorer.embed_texts(self.model, [prompt])[0].clone()
        texts = torch.stack([self._texts[prompt] for prompt in prompts])
        return (self.model.pictures(pixels.float().cpu()) * texts).sum(1)

    def looks(self, pixels: Tensor) -> Tensor:
        return self.model.looks(pixels.float().cpu())


def load(folder: Path) -> Reward:
    """The reward model, or the plain scorer, in a folder; or a published score by its name.

    Raises InputError and ArtworkError as these do.
    """
    if str(folder) in scores.PUBLISHED:
        return scores.load(str(folder))
    if (folder / "scorer.json").is_file() and not (folder / CARD).is_file():
        return Aligned(folder)
    return Trained(folder)


def describe(card: Card) -> str:
    """One sentence for people."""
    against = f", people agree in {100 * card.ceiling:.1f} %" if card.ceiling is not None else ""
    return (
        f"right on {100 * card.accuracy:.1f} % [{100 * card.low:.1f}, {100 * card.high:.1f}] of the pairs of "
        f"{card.prompts} prompts it never saw{against}; {card.updates} updates, "
        f"{', '.join(f'{count} {source}' for source, count in card.sources.items())}"
    )
