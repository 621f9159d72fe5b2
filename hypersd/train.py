"""The one training loop: optimise, clip, average, log, checkpoint, resume.

An `Objective` says what is trained and what the losses are; nothing in this file knows which. All randomness is a pure
function of (seed, step, stream), so a run that was killed and resumed is the run that was never killed, bit for bit
on the same machine with the same number of threads.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pandas
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, reduce
from torch import Tensor, nn
from tqdm import tqdm

from hypersd import checkpoint
from hypersd.muon import Muon, has_bfloat16
from hypersd.records import InputError, Problem, whole_number

_EXTENDABLE = {"updates", "cooldown"}  # they lie ahead; a change of anything else would belie what was done


class Diverged(Problem, ArithmeticError):
    """The loss or its gradient is not finite. The same run would end there again; another one needs a lower rate."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM came. All is saved, and whoever trains next after this run must not begin."""


class RecipeChanged(Problem, ValueError):
    """The run folder was started with another recipe; the message names what differs."""


@dataclass(frozen=True)
class Recipe:
    """How to optimise. The rate rises over `warmup` updates, stays, and falls to zero over the last `cooldown`."""

    updates: int
    batch: int
    lr: float
    warmup: int = 200
    cooldown: int = 0
    weight_decay: float = 0.01
    ema: float = 0.999
    clip: float = 1.0
    seed: int = 0
    precision: str = "fp32"  # fp32 | bf16: the network's, where there are units for it; weights and losses stay fp32
    optimizer: str = "adamw"  # adamw | muon
    accumulate: int = 1  # micro-batches an update: less memory, the same gradient
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW; adversarial losses want a short first memory

    def __post_init__(self) -> None:
        for name, low in (("updates", 1), ("batch", 1), ("accumulate", 1), ("seed", 0)):
            whole_number(getattr(self, name), name, low, 2**31)
        if not 0 < self.lr < math.inf:
            raise InputError(f"the learning rate must be above 0, got {self.lr:g}; type 1e-4")

    def rate(self, step: int) -> float:
        """Learning rate of update `step`, counted from 0."""
        rising = min(1.0, (step + 1) / max(1, self.warmup))
        falling = min(1.0, (self.updates - step) / self.cooldown) if self.cooldown else 1.0
        return self.lr * rising * falling

    def parts(self, process: int, processes: int) -> list[range]:
        """The places of the batch that one of several processes works on, micro-batch by micro-batch.

        Raises:
            InputError: the batch does not divide into equal micro-batches.
        """
        pieces = processes * self.accumulate
        if self.batch % pieces:
            raise InputError(
                f"a batch of {self.batch} cannot be cut into {pieces} equal parts "
                f"({processes} processes x {self.accumulate} accumulated); choose a multiple of {pieces}"
            )
        size = self.batch // pieces
        first = process * self.accumulate
        return [range(i * size, (i + 1) * size) for i in range(first, first + self.accumulate)]


@runtime_checkable
class Bringing(Protocol):
    """A network that is not learned by the recipe's optimizer."""

    def optimizer(self) -> torch.optim.Optimizer: ...


class Step:
    """One micro-batch's place in the run: which rows of the data, which random numbers.

    `part` are its places in the update's batch: all of them, or a slice under accumulation or in one of several
    processes. `randn` and `uniform` give each place the numbers that it has in the whole batch, however that is cut.
    """

    def __init__(self, index: int, recipe: Recipe, part: range | None = None) -> None:
        self.index, self.recipe = index, recipe
        self.part = range(recipe.batch) if part is None else part

    def generator(self, stream: str) -> torch.Generator:
        """A fresh CPU generator for this (seed, step, stream), and for where the part begins."""
        return _generator(self.recipe.seed, self.index, stream, *([self.part.start] if self.part.start else []))

    def rows(self, count: int) -> Tensor:
        """The part's row numbers out of `count`; every row once an epoch, epochs shuffled anew. int64 [part]"""
        places = [self.index * self.recipe.batch + place for place in self.part]
        return torch.stack([_shuffled(self.recipe.seed, place // count, count)[place % count] for place in places])

    def randn(self, stream: str, shape: Sequence[int]) -> Tensor:
        """Standard normal, float32 [part, *shape]."""
        return torch.stack([torch.randn(*shape, generator=g) for g in self._generators(stream)])

    def uniform(self, stream: str) -> Tensor:
        """Uniform in [0, 1), float64 [part]."""
        return torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in self._generators(stream)])

    def _generators(self, stream: str) -> Iterator[torch.Generator]:
        return (_generator(self.recipe.seed, self.index, stream, "place", place) for place in self.part)


def _generator(*key: object) -> torch.Generator:
    digest = hashlib.sha256(" ".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def mixed(device: str, wanted: bool = True) -> torch.autocast:
    """Context in which networks compute in bfloat16, if that is `wanted` and the device has units for it."""
    return torch.autocast(device, torch.bfloat16, enabled=wanted and has_bfloat16(device))


@lru_cache(maxsize=4)
def _shuffled(seed: int, epoch: int, count: int) -> Tensor:
    return torch.randperm(count, generator=_generator(seed, "epoch", epoch))


class Objective(Protocol):
    """What to train. `modules` are optimised and saved, each under its own optimizer, each with an average.

    An objective that needs an average while it trains (a target network) offers `averages() -> {name: module}`: the
    average of module `name` then lives in that module's tensors. One with a large frozen part offers `shard()`, which
    leaves each process a share of it; from then on every process draws the sheets, and only the first one writes.
    """

    def modules(self) -> dict[str, nn.Module]: ...

    def losses(self, step: Step) -> Iterator[tuple[str, Tensor]]:
        """Yield (name of the module it trains, mean loss over the part) one after the other for one micro-batch.

        Each loss is differentiated, and its graph freed, before the next is asked for. It reaches the named module
        only. A module that no loss of an update names rests.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Everything besides the recipe that decides the result, as JSON: sizes, weights, the data's digest."""
        ...

    def sheet(self, folder: Path, step: int) -> dict[str, float]:
        """Write samples drawn with the averaged weights to `folder`; returns measures for the log."""
        ...


class Run:
    """An objective, a recipe and a folder. `advance` does the rest, as often as it is called."""

    def __init__(self, objective: Objective, recipe: Recipe, folder: Path, *, tensorboard: bool = False) -> None:
        self.objective, self.recipe, self.folder = objective, recipe, folder
        self.processes = processes()
        self.parts = recipe.parts(self.processes.process_index, self.processes.num_processes)
        self.networks = objective.modules()
        self.sharded = sharding() and hasattr(objective, "shard")
        if self.sharded:
            objective.shard()  # type: ignore[attr-defined]
        self.optimizers = {name: _optimizer(m, recipe) for name, m in self.networks.items()}
        kept: dict[str, nn.Module] = getattr(objective, "averages", dict)()
        self.average = {
            name: kept[name].state_dict() if name in kept else {k: v.clone() for k, v in m.state_dict().items()}
            for name, m in self.networks.items()
        }
        self.step = 0
        self.log: list[dict[str, float]] = []
        self.measures: dict[str, float] = {}  # of the last sheet
        self._resume()
        self._board = _board(folder, self.step) if tensorboard and self.processes.is_main_process else None

    # ------------------------------------------------------------------------------------------- one update

    def update(self) -> dict[str, float]:
        """Gradients of the whole batch, then one optimizer step a module, then the averages.

        Returns the losses, and the lengths of the gradients before clipping.
        """
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        losses = self._gradients()
        entry = {"step": float(self.step)}
        for name, loss in losses.items():
            weights = _trainable(self.networks[name])
            length = float(nn.utils.clip_grad_norm_(weights, self.recipe.clip))
            if not math.isfinite(loss + length):
                raise Diverged(
                    f"update {self.step}: {name} loss {loss:g}, gradient norm {length:g}; going on in {self.folder} "
                    f"would end there again, so begin anew with a learning rate below {self.recipe.lr:g}"
                )
            entry |= {name: loss, f"{name}/norm": length}
            for group in self.optimizers[name].param_groups:
                if not group.get("own"):
                    group["lr"] = self.recipe.rate(self.step)
            self.optimizers[name].step()
        self._move_average(losses)
        self.step += 1
        return entry

    def _gradients(self) -> dict[str, float]:
        """Fill the gradients of every module with a loss in this update; returns the losses, over all processes."""
        sums: dict[str, Tensor] = {}
        for part in self.parts:
            for name, loss in self.objective.losses(Step(self.step, self.recipe, part)):
                share = loss * (len(part) / self.recipe.batch)
                share.backward(inputs=_trainable(self.networks[name]))  # one player's loss reaches no other player
                sums[name] = sums.get(name, 0) + share.detach()
        if self.processes.num_processes > 1:
            for name in sums:
                gradients = [p.grad for p in _trainable(self.networks[name]) if p.grad is not None]
                parts = torch.cat([sums[name].reshape(1), *(g.flatten() for g in gradients)])
                together = reduce(parts.to(self.processes.device), "sum")  # a small model on the CPU beside GPUs, too
                sums[name] = together[0]
                for mine, whole in zip(gradients, together[1:].split([g.numel() for g in gradients]), strict=True):
                    mine.copy_(whole.view_as(mine))
        return {name: float(loss) for name, loss in sums.items()}

    @torch.no_grad()
    def _move_average(self, learned: Iterable[str]) -> None:
        """Exponential moving average with a short memory at first, so that the start is forgotten.

        The average of a module that rests does so too: its memory is counted in updates of the module.
        """
        keep = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        for name in learned:
            network = self.networks[name]
            new = network.state_dict()
            floats = [k for k, v in new.items() if v.is_floating_point()]
            torch._foreach_lerp_([self.average[name][k] for k in floats], [new[k] for k in floats], 1 - keep)
            for key in new.keys() - set(floats):
                self.average[name][key].copy_(new[key])

    # --------------------------------------------------------------------------------------------- the loop

    def advance(
        self,
        *,
        until: int | None = None,
        minutes: float | None = None,
        save_every: float = 3.0,
        sheet_every: float = 10.0,
    ) -> bool:
        """Train until the recipe is done (True) or time is up (False); always ends on a checkpoint.

        With `until` the recipe counts as done at that update, for now. `minutes`, `save_every` and `sheet_every` are
        wall-clock minutes and never change the result.

        Raises:
            Stopped: a signal came, in whichever update, the last one too.
        """
        goal = self.recipe.updates if until is None else min(until, self.recipe.updates)
        started = saved = drawn = time.monotonic()
        with (
            _Signals() as signals,
            tqdm(
                total=self.recipe.updates,
                initial=self.step,
                unit="update",
                desc=self.folder.name,
                dynamic_ncols=True,
                mininterval=2.0,
            ) as bar,
        ):
            while self.step < goal:
                try:
                    self.log.append(self.update())
                except Diverged:
                    self._write_log()  # what led there, up to the last finite update
                    raise
                bar.set_postfix({k: f"{v:.3g}" for k, v in self._recent(50).items()}, refresh=False)
                bar.update()
                self._show(self.log[-1])
                now = time.monotonic()
                late = minutes is not None and now - started > 60 * minutes
                enough, due = self._any(signals.came or late, now - drawn > 60 * sheet_every)
                if due:
                    self.draw()
                    drawn = time.monotonic()
                if now - saved > 60 * save_every:
                    self.save()
                    saved = time.monotonic()
                if enough:
                    break
            self.save()
            (stopped,) = self._any(signals.came)
        if stopped:
            done = f"{self.folder.name}: stopped after {self.step} of {self.recipe.updates} updates"
            raise Stopped(f"{done}; run the same command again to go on")
        self.draw()
        return self.step >= goal

    def _any(self, *mine: bool) -> list[bool]:
        """Whether each is true in any process, so that all stop, and draw, at the same update."""
        if self.processes.num_processes == 1:
            return list(mine)
        return (reduce(torch.tensor(mine, dtype=torch.float32, device=self.processes.device), "sum") > 0).tolist()

    def draw(self) -> dict[str, float]:
        """The sample sheet and the loss curve; the objective's measures go to measures.jsonl."""
        if not (self.processes.is_main_process or self.sharded):
            return {}
        with self.averaged():
            measures = self.measures = self.objective.sheet(self.folder, self.step)
        if not self.processes.is_main_process:
            return measures
        with (self.folder / "measures.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.step, **measures}) + "\n")
        plot(self.log, self.folder / "loss.png")
        self._show(measures)
        if self._board:
            self._board.flush()
        tqdm.write(f"{self.folder.name} {self.step}: " + "  ".join(f"{k} {v:.4g}" for k, v in measures.items()))
        return measures

    def _show(self, told: dict[str, float]) -> None:
        """Losses, lengths and measures after so many updates, to whoever looks at TensorBoard."""
        if self._board:
            for name in told.keys() - {"step"}:
                self._board.add_scalar(name, told[name], self.step)

    def averaged(self) -> _Averaged:
        """Context in which the networks hold their averages and are in eval mode."""
        return _Averaged(self.networks, self.average)

    def _recent(self, count: int) -> dict[str, float]:
        tail = self.log[-count:]
        names = [key for n in self.networks for key in (n, f"{n}/norm")]
        return {n: sum(e[n] for e in tail if n in e) / max(1, sum(n in e for e in tail)) for n in names}

    # ------------------------------------------------------------------------------------- saving, resuming

    def save(self) -> None:
        """Publish a checkpoint, and the log as log.jsonl and log.csv."""
        if not self.processes.is_main_process:
            return
        tensors: dict[str, Tensor] = {}
        for name, network in self.networks.items():
            tensors |= dict(checkpoint.flatten(f"network/{name}", network.state_dict()))
            tensors |= dict(checkpoint.flatten(f"average/{name}", self.average[name]))
            moments = self.optimizers[name].state_dict()["state"]
            tensors |= dict(checkpoint.flatten(f"optimizer/{name}", {str(k): v for k, v in moments.items()}))
        state = {
            "recipe": asdict(self.recipe),
            "objective": self.objective.describe(),
            "log": self.log,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        checkpoint.save(self.folder / "checkpoints", self.step, tensors, state)
        self._write_log()

    def _write_log(self) -> None:
        if not self.processes.is_main_process:
            return
        if self._board:
            self._board.flush()
        log = pandas.DataFrame(self.log)
        log.to_json(self.folder / "log.jsonl", orient="records", lines=True)
        log.to_csv(self.folder / "log.csv", index=False)

    def _resume(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        found = checkpoint.latest(self.folder / "checkpoints", tqdm.write)
        if found is None:
            return
        self._same_recipe(found.state)
        tree = _unflatten(found.tensors)
        for name, network in self.networks.items():
            network.load_state_dict(tree["network"][name])
            for key, tensor in self.average[name].items():
                tensor.copy_(tree["average"][name][key])
            layout = self.optimizers[name].state_dict()
            layout["state"] = {int(k): v for k, v in tree.get("optimizer", {}).get(name, {}).items()}
            self.optimizers[name].load_state_dict(layout)
        self.step, self.log = found.step, found.state["log"]
        if found.state["threads"] != torch.get_num_threads():
            tqdm.write(
                f"note: {self.folder.name} ran on {found.state['threads']} threads and resumes on "
                f"{torch.get_num_threads()}; the last bits will differ from an unbroken run"
            )
        tqdm.write(f"{self.folder.name}: resumed at update {self.step} of {self.recipe.updates}")

    def _same_recipe(self, state: dict[str, Any]) -> None:
        later = {f.name: f.default for f in fields(Recipe) if f.default is not MISSING}  # options it may not know yet
        then = {**later, **state["recipe"], **state["objective"]}
        if differs := differences(then, {**asdict(self.recipe), **self.objective.describe()}):
            raise RecipeChanged(
                f"{self.folder} was started with another recipe ({differs}); "
                f"go back to it, or delete the folder to start anew"
            )


def processes() -> PartialState:
    """This process of how many, as `accelerate launch` or torchrun set it up, and its device."""
    return PartialState(cpu=not torch.cuda.is_available())  # not told so, each of several on CPUs takes itself for all


def sharding() -> bool:
    """Whether `accelerate launch` was told to divide what is large among the processes (FSDP)."""
    return processes().num_processes > 1 and parse_flag_from_env("ACCELERATE_USE_FSDP")


def differences(then: dict[str, Any], now: dict[str, Any]) -> str:
    """What keeps a training from being the same as an earlier one: "batch: 8 then, 16 now"; "" if nothing does.

    Both are recipe and objective in one dictionary, as JSON or on the way there.
    """
    then, now = _plain(then), _plain(now)
    found = [
        f"{k}: {then.get(k)} then, {now.get(k)} now"
        for k in sorted(now.keys() | then.keys())
        if now.get(k) != then.get(k) and k not in _EXTENDABLE
    ]
    return "; ".join(found)[:300]


def _plain(tree: dict[str, Any]) -> dict[str, Any]:
    """{"stage": {"mse": 1.0}} -> {"stage.mse": 1.0}, with lists for tuples: what JSON makes of it, one level deep."""
    flat: dict[str, Any] = {}
    for key, value in json.loads(json.dumps(tree)).items():
        flat |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def check_tensorboard() -> None:
    """Raises InputError: it is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise InputError("TensorBoard is not installed; type: pip install tensorboard") from None


def _board(folder: Path, step: int) -> Any:
    """TensorBoard's writer, which no longer shows what came after `step` before the run was stopped."""
    check_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1)


def _optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's, or the one that a network brings along, whose groups are marked "own" if their rate is, too."""
    if isinstance(network, Bringing):
        return network.optimizer()
    if recipe.optimizer == "muon":
        return Muon(network, recipe.lr, recipe.weight_decay)
    trainable = _trainable(network)
    return torch.optim.AdamW(trainable, lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True)


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _unflatten(flat: dict[str, Tensor]) -> dict[str, Any]:
    """Undo `checkpoint.flatten`: three levels by slash, parameter names below keep their dots."""
    tree: dict[str, Any] = {}
    for name, tensor in flat.items():
        *path, leaf = name.split("/")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = tensor
    return tree


class _Averaged:
    def __init__(self, networks: dict[str, nn.Module], average: dict[str, dict[str, Tensor]]) -> None:
        self.networks, self.average = networks, average

    def __enter__(self) -> None:
        self.live = {n: {k: v.detach().clone() for k, v in m.state_dict().items()} for n, m in self.networks.items()}
        for name, network in self.networks.items():
            network.load_state_dict(self.average[name])
            network.eval()

    def __exit__(self, *_: object) -> None:
        for name, network in self.networks.items():
            network.load_state_dict(self.live[name])
            network.train()


class _Signals:
    """Ctrl-C and SIGTERM finish the update under way, save, and end; a second Ctrl-C ends at once."""

    def __enter__(self) -> _Signals:
        self.came = False
        try:
            self.old = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: whoever runs us there stops us by `minutes`
            self.old = {}
        return self

    def _note(self, number: int, _frame: object) -> None:
        if self.came:
            os._exit(128 + number)
        self.came = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)


def plot(log: list[dict[str, float]], path: Path) -> None:
    """The losses of a run, smoothed over 1 % of it, as a PNG."""
    from matplotlib.figure import Figure  # only training plots

    names = sorted({k for e in log[:5] + log[-5:] for k in e if k != "step" and "/" not in k})
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for name in names:
        steps, values = zip(*((e["step"], e[name]) for e in log if name in e), strict=True)
        width = max(1, len(values) // 100)
        smooth = [sum(values[i : i + width]) / width for i in range(0, len(values) - width + 1, width)]
        axes.plot([steps[min(i * width, len(steps) - 1)] for i in range(len(smooth))], smooth, label=name)
    axes.set(xlabel="update", ylabel="loss", yscale="log")
    if names:  # a run that was only looked at has no losses yet
        axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
