"""A training update of ours beside the usual LCM-LoRA update, in turn: `python -m hypersd bench --training`.

The usual update is what the published training scripts of LCM-LoRA (arXiv:2311.05556) do, step by step: a network of
its own for the teacher, a student in PEFT layers, teacher's halves called one after the other, and pictures and
captions encoded anew in every update. Both sides see the same network, latents, batch, rank, precision and clipping.
"""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hypersd import bench
from hypersd.backbone import Backbone
from hypersd.distill import Distillation, Settings, find, loader, preset
from hypersd.methods.lcm import HUBER
from hypersd.network import call
from hypersd.plan import MadeUp, counted
from hypersd.records import whole_number
from hypersd.roles import LAYERS
from hypersd.solvers import ddim_step, lcm_step
from hypersd.train import Recipe, Run, has_bfloat16, mixed

OURS = ("lcm", "tcd", "tscd")


class Usual:
    """The usual LCM-LoRA update. `online`: pictures and captions are encoded in it, else they come from a cache."""

    def __init__(self, backbone: Backbone, data: MadeUp, settings: Settings, recipe: Recipe, *, online: bool) -> None:
        from peft import LoraConfig

        self.backbone, self.data, self.settings, self.recipe, self.online = backbone, data, settings, recipe, online
        self.teacher = copy.deepcopy(backbone.unet)
        if settings.autocast and has_bfloat16(
            backbone.device.type
        ):  # mixed precision: what does not learn is kept in half
            self.teacher.to(torch.bfloat16)
        self.student: Any = copy.deepcopy(backbone.unet)
        self.student.add_adapter(LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=list(LAYERS)))
        self.trained = [p for p in self.student.parameters() if p.requires_grad]
        for p in self.trained:
            p.data = p.data.float()  # what learns stays in full precision
        self.optimizer = torch.optim.AdamW(self.trained, lr=recipe.lr, weight_decay=recipe.weight_decay)
        side = backbone.picture_px
        self.pixels = torch.randint(256, (recipe.batch, side, side, 3), dtype=torch.uint8)

    def update(self) -> float:
        """One optimizer step; returns the loss."""
        batch, schedule = self.recipe.batch, self.backbone.schedule
        x0, states = self._encoded()
        empty = self.data.empty.expand_as(states)
        grid = torch.linspace(0, len(schedule) - 1, self.settings.points + 1).round().long()
        place = torch.randint(1, len(grid), (batch,))
        t, t_prev = grid[place], grid[place - 1]
        x_t = schedule.diffuse(x0, torch.randn_like(x0), t)
        prediction = self._clean(self.student, x_t, t, states)
        with torch.no_grad():
            conditional = self._call(self.teacher, x_t, t, states)
            unconditional = self._call(self.teacher, x_t, t, empty)
            guided = unconditional + self.settings.guidance[0] * (conditional - unconditional)
            solved, eps = schedule.split(guided, x_t, t)
            x_prev = ddim_step(solved, eps, schedule.level(t), schedule.level(t_prev))
            target = self._clean(self.student, x_prev, t_prev, states)
        loss = (((prediction - target).square() + HUBER**2).sqrt() - HUBER).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    @torch.no_grad()
    def _encoded(self) -> tuple[Tensor, Tensor]:
        if not self.online:
            rows = torch.arange(self.recipe.batch)
            cached = self.data.take(rows)
            return cached.latents, cached.states
        with self._arithmetic():
            mean, deviation = self.backbone.encode(self.pixels)
        tokens = self.backbone.tokenizer(
            ["a happy cat"] * self.recipe.batch, padding="max_length", truncation=True, return_tensors="pt"
        )
        states = self.backbone.text_encoder(tokens.input_ids.to(self.backbone.device))[0]
        return mean + deviation * torch.randn_like(mean), states.float()

    def _clean(self, unet: Any, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        x0, _ = self.backbone.schedule.split(self._call(unet, x_t, t, states), x_t, t)
        return lcm_step(x_t, x0, t.view(-1, 1, 1, 1), self.backbone.schedule.level(t))

    def _call(self, unet: Any, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        with self._arithmetic():
            return call(unet, x_t.to(unet.dtype), t, states.to(unet.dtype)).float()

    def _arithmetic(self) -> torch.autocast:
        return mixed(self.backbone.device.type, self.settings.autocast)


def run(name: str, rounds: object = 9, batch: int | None = None) -> dict[str, Any]:
    """Seconds of an update of each of our methods over the usual one's, cached and online; bytes and calls of both.

    Raises:
        InputError: rounds is no whole number from 3 to 1,000.
    """
    rounds = whole_number(rounds, "rounds", 3, 1000)
    settings, recipe, _ = preset(name)
    recipe = replace(recipe, batch=batch or recipe.batch, accumulate=1)
    with tempfile.TemporaryDirectory() as folder:
        work, parts = _work(name, settings, recipe, Path(folder))
        counts = {label: _calls(part, work[label]) for label, part in parts.items()}
        taken = bench.in_turn(work, rounds)
    rows = [
        bench.Row(f"{method}-{usual}", f"the usual update, {usual} / {method}'s", [usual], [method], "more")
        for method in OURS
        for usual in ("cached", "online")
    ]
    return {
        "machine": bench.machine(),
        "backbone": name,
        "rounds": rounds,
        "batch": recipe.batch,
        "ratios": {row.name: {"title": row.title, "good": row.good, **bench._ratio(row, taken)} for row in rows},
        "updates": counts,
    }


def _work(
    name: str, settings: Settings, recipe: Recipe, folder: Path
) -> tuple[dict[str, Callable[[int], Any]], dict[str, list[nn.Module]]]:
    """What is timed, by name, and the networks that it keeps in memory."""
    load = loader(name)
    backbone = load()
    data = MadeUp.of(backbone, recipe.batch)
    work: dict[str, Callable[[int], Any]] = {}
    parts: dict[str, list[nn.Module]] = {}
    for label in ("cached", "online"):
        usual = Usual(backbone, data, settings, recipe, online=label == "online")
        work[label], parts[label] = _update(usual), [usual.teacher, usual.student]
    for method in OURS:
        row = find(method)
        # The last stage: with an adversary, where the method has one.
        objective = Distillation(load(), data, row, row.stages[-1], settings)
        training = Run(objective, recipe, folder / method)
        work[method], parts[method] = _update(training), [objective.network]
    return work, parts


def _update(side: Usual | Run) -> Callable[[int], Any]:
    return lambda _number: side.update()


def _calls(networks: list[nn.Module], update: Callable[[int], Any]) -> dict[str, float]:
    """Network calls of one update, and the megabytes of the networks that stay in memory for it."""
    with ExitStack() as hooks:
        counts = [hooks.enter_context(counted(network)) for network in networks]
        update(-1)
    sums = sum(counts, Counter[str]())
    weights = {p.data_ptr(): p.numel() * p.element_size() for n in networks for p in n.parameters()}
    kinds = ("with gradient", "without gradient", "samples")
    return {**{kind: sums[kind] for kind in kinds}, "parameter_mb": sum(weights.values()) / 1e6}


def table(content: dict[str, Any]) -> str:
    """The ratios, calls and bytes as lines of text."""
    lines = [f"{row['title']:<40} {row['value']:6.2f}  [{row['low']:.2f}, {row['high']:.2f}]"
             for row in content["ratios"].values()]  # fmt: skip
    lines += [
        f"{label:<10} {c['with gradient']:.0f} call(s) with gradient, {c['without gradient']:.0f} without, "
        f"{c['samples']:.0f} samples, {c['parameter_mb']:.0f} MB of parameters"
        for label, c in content["updates"].items()
    ]
    return "\n".join(lines)
