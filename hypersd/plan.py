"""What a training will take, before it is begun.

    python -m hypersd plan --backbone sdxl --gpus 8
    python -m hypersd distill tscd --backbone emoji --dry-run

The first is found on paper (cost.py), the second by doing two updates on made-up latents.
"""

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

from hypersd import cost
from hypersd.backbone import Backbone
from hypersd.distill import Distillation, Settings, preset, stage_recipe
from hypersd.methods import Method, Stage
from hypersd.records import InputError, real_number, whole_number
from hypersd.train import Recipe, Run, Step


@dataclass(frozen=True)
class Gpu:
    """By its maker's data sheet: TFLOP/s of dense products in bfloat16, summed in float32, and GB of memory."""

    name: str
    peak: float
    memory: float


GPUS = {
    "a100": Gpu("NVIDIA A100 SXM 80 GB", 312.0, 80.0),
    "h100": Gpu("NVIDIA H100 SXM", 989.4, 80.0),
    "h200": Gpu("NVIDIA H200 SXM", 989.4, 141.0),
    "l40s": Gpu("NVIDIA L40S", 362.05, 48.0),
    "rtx4090": Gpu("NVIDIA RTX 4090", 165.2, 24.0),
}
UTILISATION = 0.35  # a guess, and told as one; --dry-run on the GPU says what it is
PAPER_STAGES, PAPER_HOURS, PAPER_BATCH = 4, 200.0, 512  # A100 hours a stage of TSCD (Hyper-SD, section 4.1)


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


def dry_run(
    method: Method, backbone: Backbone, settings: Settings, recipe: Recipe, *, checkpointing: bool = False
) -> Iterator[str]:
    """The plan of a training, line by line: parts, sizes, network calls of an update, seconds."""
    stages = len(method.stages)
    yield f"{method.name} on {backbone.name}, {stages} stage(s) of {recipe.updates:,} updates of {recipe.batch}"
    for stage in method.stages:
        yield f"  {stage.segments} segment(s): MSE x {stage.mse:g}, adversarial x {stage.adversarial:g}"
    stage = method.stages[-1]
    base = sum(p.numel() for p in backbone.unet.parameters())
    objective = Distillation(backbone, MadeUp.of(backbone, recipe.batch), method, stage, settings)
    if checkpointing:
        objective.roles.checkpointing()
    parts = {name: sum(p.numel() for p in m.parameters()) for name, m in objective.modules().items()}
    yield from _parts(base, backbone.unet.dtype, parts)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(objective, stage_recipe(recipe, stage), Path(folder))
        run.update()
        started = time.monotonic()
        with counted(objective.network) as calls:
            run.update()
        seconds = time.monotonic() - started
    network = cost.read(str(backbone.folder), backbone.dtype)
    flops = _update(network, method, stage, settings, range(1, 2)).flops(recipe.batch, recipe.accumulate)
    yield (
        f"an update: {calls['with gradient']} network call(s) with gradient, {calls['without gradient']} without, "
        f"{calls['samples']:,} samples in all; {seconds:.2f} s, {flops / seconds / 1e12:.3g} TFLOP/s"
    )
    if backbone.device.type == "cuda":
        yield f"peak of the GPU's memory so far: {torch.cuda.max_memory_allocated(backbone.device) / 1e9:.1f} GB"
    averages = [_update(network, method, stage, settings) for stage in method.stages]
    all_flops = recipe.updates * sum(update.flops(recipe.batch, recipe.accumulate) for update in averages)
    minutes = seconds * all_flops / flops / 60
    time_ = f"{minutes / 60:.1f} h" if minutes >= 60 else f"{minutes:.1f} min"
    yield f"in all about {time_} here, pictures and checkpoints not counted"


def _update(
    network: cost.Network, method: Method, stage: Stage, settings: Settings, indices: range = cost.PERIOD
) -> cost.Update:
    guided = settings.guidance != (1.0, 1.0)
    return cost.update(network, method, stage, settings.rank, guided=guided, indices=indices)


def _parts(base: int, dtype: torch.dtype, learners: dict[str, int]) -> Iterator[str]:
    """What is in memory whatever the batch."""
    held = f"{base * dtype.itemsize / 1e9:.2f} GB in {str(dtype).removeprefix('torch.')}"
    yield f"base     {base / 1e6:10.1f} M parameters, frozen, in memory once: {held}"
    for name, count in learners.items():
        held = f"{cost.COPIES * count * 4 / 1e9:.2f} GB"
        yield f"{name:<9}{count / 1e6:10.1f} M parameters, with gradient, optimizer and average: {held}"


# ----------------------------------------------------------------------------------------------------- on paper


@dataclass(frozen=True)
class Machines:
    """What a training would run on; `price` is of one GPU for an hour, in any currency."""

    gpu: Gpu
    count: int = 1
    utilisation: float = UTILISATION
    price: float | None = None

    @classmethod
    def of(cls, gpu: str, count: object, utilisation: object = None, price: object = None) -> Machines:
        """Raises InputError: no such GPU, or a number out of its range."""
        if gpu not in GPUS:
            raise InputError(f"gpu must be one of {', '.join(GPUS)}, got {gpu[:40]!r}")
        dear = None if price is None else real_number(price, "price per hour", 0.0, 1e6)
        share = real_number(UTILISATION if utilisation is None else utilisation, "utilisation", 0.01, 1.0)
        return cls(GPUS[gpu], whole_number(count, "gpus", 1, 100_000), share, dear)

    @property
    def flops(self) -> float:
        """FLOP/s of all together."""
        return self.count * self.utilisation * self.gpu.peak * 1e12

    def takes(self, flops: float) -> str:
        """Hours, GPU hours and, where there is a price, what they cost."""
        hours = flops / self.flops / 3600
        told = f"{hours:,.1f} h, {hours * self.count:,.1f} GPU hours"
        return told if self.price is None else f"{told}, which cost {hours * self.count * self.price:,.0f}"


def on_paper(name: str, method: Method, settings: Settings, recipe: Recipe, machines: Machines) -> Iterator[str]:
    """The plan of a training on GPUs that need not be here, line by line, with all that it assumes.

    Raises:
        InputError: no such network, or a batch that cannot be shared.
    """
    micro = len(recipe.parts(0, machines.count)[0])
    pieces = recipe.batch // micro
    dtype = preset(name).dtype
    network = cost.read(name, dtype)
    updates = [_update(network, method, stage, settings) for stage in method.stages]
    yield (
        f"{method.name} on {name}, {len(updates)} stage(s) of {recipe.updates:,} updates of {recipe.batch}, on "
        f"{machines.count} {machines.gpu.name}: {micro} latent(s) at a time, {recipe.accumulate} time(s) an update"
    )
    learners = dict.fromkeys(method.learners, network.lora(settings.rank))
    if any(stage.adversarial for stage in method.stages):
        learners["adversary"] = network.judging
    yield from _parts(network.parameters, dtype, learners)
    yield from _activations(updates, micro, network.bytes + 4 * cost.COPIES * sum(learners.values()), machines.gpu)
    if machines.count > 1:
        spared = network.bytes * (1 - 1 / machines.count)
        yield f"shared among the GPUs (fsdp.yaml), the base takes {spared / 1e9:.2f} GB less of each one's memory"
    for update in dict.fromkeys(updates):  # stages that cost the same are told of once
        alike = [str(s.segments) for s, u in zip(method.stages, updates, strict=True) if u == update]
        yield from _calls(f"{', '.join(alike)} segment(s)", update, recipe.batch, pieces, network.learning.forward)
    flops = [update.flops(recipe.batch, pieces) for update in updates]
    pace = recipe.batch * machines.flops / flops[-1]
    yield f"in the last stage {pace:,.1f} latents/s, {pace / recipe.batch:.3g} updates/s"
    yield f"in all {machines.takes(recipe.updates * sum(flops))}"
    if method.name == "tscd":
        yield from _papers(updates, micro, machines)
    yield from _assumptions(machines)


def _activations(updates: list[cost.Update], micro: int, fixed: int, gpu: Gpu) -> Iterator[str]:
    """What the hungriest stage keeps for its backward pass, and whether that fits."""
    for number, how in enumerate(("without", "with")):
        kept = max(micro * update.kept[number] + update.fixed for update in updates)
        whole = (fixed + kept) / 1e9
        fits = "fits into" if whole < gpu.memory else "does not fit into"
        yield (
            f"activations {how} checkpointing: {kept / 1e9:.2f} GB, with the above {whole:.1f} GB, "
            f"which {fits} the {gpu.memory:g} GB of a GPU"
        )
    again = max(update.again / update.flops(1) for update in updates)
    yield f"checkpointing (--checkpointing) costs {100 * again:.0f} % more FLOPs"


def _calls(stage: str, update: cost.Update, batch: int, pieces: int, forward: float) -> Iterator[str]:
    yield f"{stage}, network calls of an average update and TFLOP a latent of the batch:"
    for work in update.work:
        yield (
            f"  {work.label:<22}{work.launches:5.1f} call(s){work.latents:6.1f} latent(s)"
            f"{work.launches * work.forward / 1e12:10.3f} forward{work.launches * work.backward / 1e12:10.3f} backward"
        )
    flops = update.flops(batch, pieces)
    yield f"  in all {flops / 1e12:,.1f} TFLOP an update, {flops / batch / forward:.2f} forward passes for a latent"


def _papers(updates: list[cost.Update], micro: int, machines: Machines) -> Iterator[str]:
    """The paper's schedule is given in hours of A100s; at equal utilisation they buy equal FLOPs."""
    each = PAPER_HOURS * 3600 * machines.utilisation * GPUS["a100"].peak * 1e12
    bought = ", ".join(f"{each / update.flops(PAPER_BATCH, PAPER_BATCH // micro):,.0f}" for update in updates)
    yield (
        f"the paper: {PAPER_STAGES} stages of {PAPER_HOURS:g} A100 hours with batches of {PAPER_BATCH}, at this "
        f"utilisation {bought} updates a stage; here {machines.takes(PAPER_STAGES * each)}"
    )


def _assumptions(machines: Machines) -> Iterator[str]:
    yield "assumed:"
    yield f"  {machines.gpu.peak:g} TFLOP/s a GPU by its data sheet, dense bfloat16"
    yield f"  {machines.utilisation:.0%} of them are used; distill --dry-run on such a GPU says how many are"
    yield "  GPUs share a batch without waiting for each other; the gradients that they exchange are LoRAs'"
    yield "  latents and states come from a cache; sample sheets and checkpoints are not counted"
    yield "  products count, norms and activations do not; a kernel's scratch memory is left out"
    yield f"  {'no price was given' if machines.price is None else f'{machines.price:g} a GPU hour, as given'}"
