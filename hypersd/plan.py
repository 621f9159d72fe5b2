"""What a training will take, found by doing two updates of it on made-up latents: `hypersd distill ... --dry-run`."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hypersd.backbone import Backbone
from hypersd.distill import Distillation, Settings, stage_recipe
from hypersd.methods import Method
from hypersd.train import Recipe, Run, Step


@dataclass(frozen=True)
class MadeUp:
    """Random latents with one caption, in the place of training data."""

    latents_: Tensor
    empty: Tensor
    states_: Tensor
    digest: str = "made up"

    @classmethod
    def of(cls, backbone: Backbone, count: int) -> MadeUp:
        latents = torch.randn(count, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
        empty, states = backbone.embed(["", "a happy cat"]).float().cpu().chunk(2)
        return cls(latents, empty, states)

    def __len__(self) -> int:
        return len(self.latents_)

    def take(self, rows: Tensor, draws: Step | None = None) -> _Batch:
        return _Batch(self.latents_[rows], self.states_.expand(len(rows), -1, -1))


@dataclass(frozen=True)
class _Batch:
    latents: Tensor
    states: Tensor


@contextmanager
def counted(network: nn.Module) -> Iterator[Counter[str]]:
    """How often the network is called: {"with gradient": launches, "without gradient": .., "samples": ..}."""
    calls: Counter[str] = Counter()

    def note(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls["with gradient" if torch.is_grad_enabled() else "without gradient"] += 1
        calls["samples"] += len(inputs[0])

    hook = network.register_forward_pre_hook(note)
    try:
        yield calls
    finally:
        hook.remove()


def dry_run(method: Method, backbone: Backbone, settings: Settings, recipe: Recipe) -> Iterator[str]:
    """The plan of a training, line by line: parts, sizes, network calls of an update, seconds."""
    stages = len(method.stages)
    yield f"{method.name} on {backbone.name}, {stages} stage(s) of {recipe.updates:,} updates of {recipe.batch}"
    for stage in method.stages:
        yield f"  {stage.segments} segment(s): MSE x {stage.mse:g}, adversarial x {stage.adversarial:g}"
    stage = method.stages[-1]
    base = sum(p.numel() for p in backbone.unet.parameters())
    width = backbone.unet.dtype.itemsize
    objective = Distillation(backbone, MadeUp.of(backbone, recipe.batch), method, stage, settings)
    parts = {name: sum(p.numel() for p in m.parameters()) for name, m in objective.modules().items()}
    yield f"base     {base / 1e6:10.1f} M parameters, frozen, in memory once: {base * width / 1e9:.2f} GB"
    for name, count in parts.items():
        # float32: the weights, their gradient, AdamW's two moments, the average
        yield f"{name:<9}{count / 1e6:10.1f} M parameters, with optimizer and average: {count * 4 * 5 / 1e9:.2f} GB"
    with tempfile.TemporaryDirectory() as folder:
        run = Run(objective, stage_recipe(recipe, stage), Path(folder))
        run.update()
        started = time.monotonic()
        with counted(objective.network) as calls:
            run.update()
        seconds = time.monotonic() - started
    yield (
        f"an update: {calls['with gradient']} network call(s) with gradient, {calls['without gradient']} without, "
        f"{calls['samples']:,} samples in all; {seconds:.2f} s"
    )
    if backbone.device.type == "cuda":
        yield f"peak of the GPU's memory so far: {torch.cuda.max_memory_allocated(backbone.device) / 1e9:.1f} GB"
    minutes = seconds * recipe.updates * stages / 60
    time_ = f"{minutes / 60:.1f} h" if minutes >= 60 else f"{minutes:.1f} min"
    yield f"in all about {time_} here, pictures and checkpoints not counted"
