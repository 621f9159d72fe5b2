"""A method, a base model and captioned latents -> a LoRA: what METHODS says of the training, put together and run.

    python -m hypersd distill tscd --backbone emoji

Every stage of the method is one `train.Run` in a folder of its own. It starts from the LoRA of the stage before, with
a new optimizer, and ends with a file that the app shows by itself. The network is in memory once: teacher, student and
target are roles of it (roles.py), and so is the trunk of the adversary.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from hypersd import __version__, adapters, adversary, methods
from hypersd.backbone import Backbone
from hypersd.generate import denoise, grid, trajectory
from hypersd.methods import METHODS, Method, Stage
from hypersd.methods.base import Places
from hypersd.network import call
from hypersd.records import Adapter, InputError, Request, real_number, whole_number
from hypersd.roles import Roles
from hypersd.schedule import Level, Segments
from hypersd.solvers import ddim_step
from hypersd.train import Diverged, Recipe, RecipeChanged, Run, Step, check_tensorboard, differences, mixed, processes

SHEET_STEPS = (1, 2, 4, 8)
TEACHER_STEPS = 50  # of the pictures that students are measured against


@dataclass(frozen=True)
class Settings:
    """What is the same in every stage. `guidance` is the teacher's scale, drawn from the range for each latent.

    `start` is the timestep at which score distillation, and a drawing in one step, begins; None for the last one.
    """

    rank: int
    guidance: tuple[float, float]
    points: int = 40
    start: int | None = None
    pure_noise: bool = True  # the noisiest training latent is noise alone, as it is when drawing
    autocast: bool = False  # the network computes in bfloat16 whatever its weights are, where there are units for it
    prompts: tuple[str, ...] = ("a happy cat", "a red sports car", "a cosy house in the snow", "a bunch of flowers")

    def __post_init__(self) -> None:
        whole_number(self.rank, "rank", 1, 1024)
        low, high = (real_number(g, "guidance", 1.0, 30.0) for g in self.guidance)  # below 1 it would guide away
        object.__setattr__(self, "guidance", (low, high))
        if self.start is not None:
            object.__setattr__(self, "start", whole_number(self.start, "start", 1, 10**6))
        if low > high:
            raise InputError(f"the guidance range runs from {low:g} down to {high:g}; type {high:g}-{low:g}")


class Preset(NamedTuple):
    settings: Settings
    recipe: Recipe
    dtype: torch.dtype = torch.bfloat16  # of the frozen base; a small one stays in float32 for the sake of its LoRA


EMOJI_PROMPTS = "grinning face, cat face, red heart, rocket, pizza, banana, owl, house, bus, robot, rose, crown"
_EMOJI = Settings(rank=16, guidance=(4.0, 4.0), autocast=True, prompts=tuple(EMOJI_PROMPTS.split(", ")))
_LARGE = Settings(rank=64, guidance=(7.5, 7.5))
_SMALL_RECIPE = Recipe(updates=600, batch=32, lr=1e-3, warmup=30, cooldown=200, weight_decay=0.0, ema=0.98)
_LARGE_RECIPE = Recipe(updates=6000, batch=64, lr=1e-5, warmup=200, weight_decay=0.0, ema=0.995, accumulate=8)
PRESETS = {  # by backbone: for a folder of your own, those of sd15
    "emoji": Preset(_EMOJI, _SMALL_RECIPE, torch.float32),
    "sd15": Preset(_LARGE, _LARGE_RECIPE),
    "sdxl": Preset(_LARGE, replace(_LARGE_RECIPE, lr=5e-6)),
}
JUDGED = (0.02, 0.98)  # of all timesteps: where scores are compared (DMD, section 4)
EMPTY = 0.1  # share of empty captions where guidance is kept, as the base models were trained with
ORIGIN = ("licence", "release")  # in a card's recipe: what holds of all that begins with the file, too
BEGINNINGS, MOST = 0.5, 8  # share of score distillation that starts from noise alone; steps whose places get the rest
ADVERSARIAL_BETAS = (0.0, 0.99)  # of AdamW where there is an adversary (SDXL-Lightning, section 3.6)


class Batch(Protocol):
    @property
    def latents(self) -> Tensor | None: ...
    @property
    def states(self) -> Tensor: ...


class Data(Protocol):
    """What is asked of training data; `data.Dataset` is one. Equal digests mean equal samples."""

    @property
    def digest(self) -> str: ...
    @property
    def empty(self) -> Tensor: ...
    def __len__(self) -> int: ...
    def take(self, rows: Tensor, draws: Step | None = None) -> Batch: ...


# --------------------------------------------------------------------------------------------- the objective


class Distillation:
    """The objective of one stage, and the `methods.base.Training` that its losses see."""

    def __init__(
        self, backbone: Backbone, data: Data, method: Method, stage: Stage, settings: Settings, seed: int = 0
    ) -> None:
        assert method.losses is not None, "find() gives methods that are trained"
        settings = own_settings(method, settings)
        self.backbone, self.data, self.method, self.stage, self.settings = backbone, data, method, stage, settings
        self.schedule = backbone.schedule
        last = len(self.schedule) - 1
        self.start = last if settings.start is None else whole_number(settings.start, "start", 1, last)
        self.segments = Segments.of(stage.segments, settings.points, len(self.schedule))
        self.network = backbone.unet
        self.roles = Roles(self.network)
        torch.manual_seed(seed)
        self.roles.add("student", rank=settings.rank)
        self.roles.add("ema", rank=settings.rank, trainable=False)
        self.roles.copy("student", "ema")
        for role in method.learners[1:]:
            self.roles.add(role, rank=settings.rank)
        self.adversary = adversary.Adversary(self.network).to(backbone.device) if stage.adversarial else None
        self.start_sha256 = ""
        self.inherited: dict[str, str] = {}

    def start_from(self, file: adapters.AdapterFile, *, chosen: bool = False) -> None:
        """Begin with the LoRA of an earlier stage, or of anybody.

        One that was `chosen` by hand may have been trained on another base of the same layers: a base that is trained
        further, or tuned, is near enough to what it was for its LoRAs to be where training begins.

        Raises:
            InputError: it does not fit this base, or was trained on another one and not chosen.
        """
        if file.card.base_sha256 != self.backbone.network_sha256:
            other = f"{file.path.name} was trained on another base than {self.backbone.name}"
            if not chosen:
                raise InputError(f"{other}; train it again, or begin with it all the same: --begin {file.path}")
            logging.getLogger(__name__).warning("%s: training only begins with it", other)
        for role in ("student", "ema"):
            self.roles[role].load_adapter(adapters.load(file.path))
        self.start_sha256 = file.sha256
        self.inherited = inherited(file.card, *ORIGIN)

    def modules(self) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {role: self.roles[role] for role in self.method.learners}
        return found | {"adversary": self.adversary} if self.adversary else found

    def averages(self) -> dict[str, nn.Module]:
        return {"student": self.roles["ema"]}

    def shard(self) -> None:
        self.roles.shard()

    def describe(self) -> dict[str, Any]:
        return {
            **chosen(self.method, self.stage, self.settings),
            "base_sha256": self.backbone.network_sha256,
            "data": self.data.digest,
            "start": self.start_sha256,
            **self.inherited,
        }

    def losses(self, step: Step) -> Iterator[tuple[str, Tensor]]:
        assert self.method.losses is not None
        return self.method.losses(self, step)

    # ------------------------------------------------------------------------- what a method's loss may ask for

    def places(self, step: Step) -> Places:
        """Captioned latents noised to solver points; the noise of the noisiest is not mixed with any latent."""
        batch = self._batch = self.data.take(step.rows(len(self.data)), step)
        assert batch.latents is not None, "checked when the data was opened"
        x0, device = batch.latents.to(self.backbone.device), self.backbone.device
        noise = step.randn("noise", x0.shape[1:])
        if self.stage.offset_noise:
            noise += self.stage.offset_noise * step.randn("offset", (x0.shape[1], 1, 1))
        noise = noise.to(device)
        start, previous, end = self.segments.draw(step.uniform("start"), step.uniform("end"))
        top = self.segments.top(start)
        t, t_prev, t_end, t_top = (self.segments.timesteps[i].to(device) for i in (start, previous, end, top))
        self._guidance = self._draw_guidance(step).to(device)
        x_t = self.schedule.diffuse(x0, noise, t)
        if self.settings.pure_noise:
            x_t = torch.where((t == len(self.schedule) - 1).view(-1, 1, 1, 1), noise, x_t)
        states = batch.states
        if self.method.keeps_guidance:
            states = torch.where((step.uniform("empty") < EMPTY).view(-1, 1, 1), self.data.empty.to(states), states)
        return Places(x_t, t, t_prev, t_end, t_top, states.to(device, self.backbone.dtype))

    def _draw_guidance(self, step: Step) -> Tensor:
        low, high = self.settings.guidance
        return (low + (high - low) * step.uniform("guidance")).float().view(-1, 1, 1, 1)

    def teacher_step(self, at: Places) -> Tensor:
        x0, eps = self.guided(at.x_t, at.t, at.states)
        return ddim_step(x0, eps, self.level(at.t), self.level(at.t_prev))

    @torch.no_grad()
    def guided(self, x_t: Tensor, t: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        with self.roles.wear():
            if self.settings.guidance == (1.0, 1.0):
                output = self._call(x_t, t, states)
            else:  # arXiv:2207.12598, eq. 6, both halves in one batch
                empty = self.data.empty.to(states).expand_as(states)
                twice = (torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([empty, states]))
                unconditional, conditional = self._call(*twice).chunk(2)
                output = unconditional + self._guidance * (conditional - unconditional)
        return self.schedule.split(output, x_t, t)

    def estimate(
        self, role: str, x_t: Tensor, t: Tensor, states: Tensor, *, learn: bool | None = None
    ) -> tuple[Tensor, Tensor]:
        with self.roles.wear(role), torch.set_grad_enabled(role == "student" if learn is None else learn):
            return self.schedule.split(self._call(x_t, t, states), x_t, t)

    def beginnings(self, step: Step) -> Places:
        batch = self._batch = self.data.take(step.rows(len(self.data)), step)
        device = self.backbone.device
        x_t = step.randn("beginning", self.backbone.latent_shape).to(device)
        t = torch.full((len(x_t),), self.start, device=device)
        end = torch.zeros_like(t)
        self._guidance = self._draw_guidance(step).to(device)
        return Places(x_t, t, end, end, t, batch.states.to(device, self.backbone.dtype))

    def visits(self, step: Step) -> Places:
        at = self.beginnings(step)
        assert self._batch.latents is not None, "checked when the data was opened"
        later = torch.tensor([t for t, _ in grid(self.schedule, self.method, MOST)][1:])
        drawn = later[(step.uniform("visit") * len(later)).long()].to(at.t.device)
        t = torch.where(step.uniform("begin").to(at.t.device) < BEGINNINGS, at.t, drawn)
        x_t = self.schedule.diffuse(self._batch.latents.to(at.x_t.device), at.x_t, t)
        return at._replace(x_t=torch.where((t == at.t).view(-1, 1, 1, 1), at.x_t, x_t), t=t)

    def teacher_sample(self, at: Places, steps: int) -> Tensor:
        def estimate(x_t: Tensor, t: int) -> tuple[Tensor, Tensor]:
            return self.guided(x_t, torch.full_like(at.t, t), at.states)

        base = METHODS["base"]
        *_, last = trajectory(self.schedule, base, grid(self.schedule, base, steps), at.x_t, estimate)
        return last.x

    def anywhere(self, x0: Tensor, step: Step, stream: str) -> tuple[Tensor, Tensor, Tensor]:
        low, high = (int(share * len(self.schedule)) for share in JUDGED)
        t = (low + (high - low) * step.uniform(f"{stream} t")).long().to(x0.device)
        noise = step.randn(stream, x0.shape[1:]).to(x0)
        return self.schedule.diffuse(x0, noise, t), t, noise

    def level(self, t: Tensor) -> Level:
        return self.schedule.level(t)

    def fool(self, fake: Tensor, at: Places, step: Step) -> Tensor:
        self._fake = self._features(fake, at, step)
        return adversary.fool(self._adversary(self._fake))

    def tell(self, real: Tensor, at: Places, step: Step) -> Tensor:
        with torch.no_grad():
            seen = self._features(real, at, step)
        return adversary.tell(self._adversary([f.detach() for f in self._fake]), self._adversary(seen))

    @property
    def _adversary(self) -> adversary.Adversary:
        assert self.adversary is not None, "a stage whose loss asks for an adversary gives it a weight"
        return self.adversary

    def _features(self, x: Tensor, at: Places, step: Step) -> list[Tensor]:
        """What the bare base sees in x, at t_end, after it was noised to a timestep inside its segment."""
        t = at.t_end + (step.uniform("judged").to(x.device) * (at.t_top - at.t_end)).long()
        ratio = self.level(t).alpha / self.level(at.t_end).alpha  # DDPM, eq. 4, between two levels
        noised = ratio * x + (1 - ratio**2).clamp_min(0) ** 0.5 * step.randn("judged noise", x.shape[1:]).to(x)
        with self.roles.wear(), self._arithmetic():
            return adversary.features(self.network, noised.to(self.backbone.dtype), t, at.states)

    def _call(self, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        with self._arithmetic():
            return call(self.network, x_t.to(self.backbone.dtype), t, states).float()

    def _arithmetic(self) -> torch.autocast:
        return mixed(self.backbone.device.type, self.settings.autocast)

    # ------------------------------------------------------------------------------------------ while it trains

    @torch.no_grad()  # not inference mode: what FSDP gathers for the first time in it would be unfit for training
    def sheet(self, folder: Path, step: int) -> dict[str, float]:
        """A grid: fixed prompts in rows; 1, 2, 4, 8 steps of the student and 50 of the teacher in columns.

        Returns the mean squared distance of the student's latents to the teacher's from the same noise.
        """
        row, goals = replace(self.method, adapted=False), self._teacher(folder.parent)
        pictures, distance = [], {f"to_teacher_{n}": 0.0 for n in SHEET_STEPS}
        for number, prompt in enumerate(self.settings.prompts):
            for n in SHEET_STEPS:
                with self.roles.wear("student"):
                    x = denoise(self.backbone, Request(prompt, number, n, guidance=1.0), row, start=self.start).x
                pictures.append(self.backbone.decode(x)[0])
                error = float((x - goals[number]).square().mean())
                distance[f"to_teacher_{n}"] += error / len(self.settings.prompts)
            pictures.append(self.backbone.decode(goals[number][None])[0])
        columns = len(SHEET_STEPS) + 1
        grid = torch.cat([torch.cat(pictures[i : i + columns], 1) for i in range(0, len(pictures), columns)])
        if processes().is_main_process:
            Image.fromarray(grid.numpy()).save(folder / "sheet.png")
        return distance

    def _teacher(self, folder: Path) -> Tensor:
        """Where the guided base ends after 50 steps, [prompts, c, h, w]; kept in `folder` for the other stages."""
        low, high = self.settings.guidance
        key = f"{self.backbone.network_sha256} {self.settings.prompts} {low} {high} {TEACHER_STEPS}"
        path = folder / f"teacher-{hashlib.sha256(key.encode()).hexdigest()[:12]}.npy"
        if path.exists():
            return torch.from_numpy(np.load(path)).to(self.backbone.device)
        base, g = METHODS["base"], (low + high) / 2
        prompts = tqdm(self.settings.prompts, desc="teacher", unit="picture")
        with self.roles.wear():
            ends = [denoise(self.backbone, Request(p, i, TEACHER_STEPS, g), base).x for i, p in enumerate(prompts)]
        drawn = torch.cat(ends)
        if processes().is_main_process:
            staging = path.with_suffix(".tmp.npy")
            np.save(staging, drawn.cpu().numpy())
            os.replace(staging, path)  # killed while it writes, it would leave half a file that counts as whole
        return drawn


# ----------------------------------------------------------------------------------------------- stage by stage


def find(name: str) -> Method:
    """A method that is trained; InputError with the names of all of them."""
    return methods.find(name, {name: row for name, row in METHODS.items() if row.losses})


def preset(backbone: str) -> Preset:
    return PRESETS.get(backbone, PRESETS["sd15"])


def presets() -> str:
    """PRESETS as a table in Markdown, which the README shows."""
    heads = ["backbone", "rank", "teacher's guidance", "updates a stage", "batch", "in parts of", "learning rate",
             "rising, falling over", "weight decay", "average", "base in"]  # fmt: skip
    rows = [heads, ["---"] * len(heads)]
    for name, (settings, recipe, dtype) in PRESETS.items():
        guidance = "-".join(f"{g:g}" for g in sorted(set(settings.guidance)))
        part, falls = recipe.batch // recipe.accumulate, recipe.cooldown or "never"
        told = (settings.rank, guidance, recipe.updates, recipe.batch, part, f"{recipe.lr:g}",
                f"{recipe.warmup}, {falls}", f"{recipe.weight_decay:g}", recipe.ema,
                str(dtype).removeprefix("torch."))  # fmt: skip
        rows.append([f"`{name}`", *map(str, told)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def loader(backbone: str) -> Callable[[], Backbone]:
    """A function that loads the base for training, on a GPU if there is one."""
    from diffusers.models.attention_processor import AttnProcessor

    own = processes().device  # each of several has its own GPU
    device = str(own) if own.type == "cuda" else "cpu"

    def load() -> Backbone:
        loaded = Backbone.load(backbone, device=device, dtype=preset(backbone).dtype)
        if not loaded.trainable:
            raise InputError(f"{loaded.name} can be drawn with, not trained; choose emoji, sd15, sdxl or the like")
        if device == "cpu":  # the fused kernel's backward is slow here
            loaded.unet.set_attn_processor(AttnProcessor())
        return loaded

    return load


def own_settings(method: Method, settings: Settings) -> Settings:
    return replace(settings, guidance=(1.0, 1.0)) if method.keeps_guidance else settings


def chosen(method: Method, stage: Stage, settings: Settings) -> dict[str, Any]:
    """Of what decides a stage beside its recipe, all that is known before base and data are opened."""
    return {"method": method.name, "stage": asdict(stage), "settings": asdict(own_settings(method, settings))}


def inherited(card: Adapter, *names: str) -> dict[str, str]:
    return {name: card.recipe[name] for name in names if name in card.recipe}


def stage_recipe(recipe: Recipe, stage: Stage) -> Recipe:
    return replace(recipe, betas=ADVERSARIAL_BETAS) if stage.adversarial else recipe


def run(
    method: Method,
    load: Callable[[], Backbone],
    open_data: Callable[[Backbone], Data],
    settings: Settings,
    recipe: Recipe,
    runs: Path,
    out: Path,
    *,
    name: str | None = None,
    begin: adapters.AdapterFile | None = None,
    minutes: float | None = None,
    checkpointing: bool = False,
    tensorboard: bool = False,
) -> list[adapters.AdapterFile]:
    """Train every stage of a method that has no file in `out` yet, each from the one before.

    Args:
        load: gives the base model anew for each stage; the roles of the last one are gone by then.
        open_data: captioned latents for it.
        runs: folder of the runs, one below it a stage; the same call goes on where it was stopped.
        out: where the LoRA files go; `name`, the method's own if not given, is their row in the app.
        begin: the LoRA that the first stage starts from; by default of the method that this one goes on from.
        minutes: stop after so long, of all stages together.
        checkpointing: keep no activations but compute them again; the run stays the same, and can be changed midway.
        tensorboard: losses and measures also as TensorBoard reads them, in the runs' folders.

    Raises:
        InputError: the data holds no pictures where they are needed, or fewer than a batch; a folder cannot be written
            to; `name` is taken; TensorBoard is not installed.
        RecipeChanged: a stage was begun or finished with other settings.
    """
    name = check_name(name or method.name, method)
    for folder in (runs, out):
        check_folder(folder)
    if tensorboard:
        check_tensorboard()
    labels = [f"{name}-{stage.segments}" if len(method.stages) > 1 else name for stage in method.stages]
    for stage, label in zip(method.stages, labels, strict=True):
        _check_recipe(out / f"{label}.safetensors", {**asdict(stage_recipe(recipe, stage)),
                                                     **chosen(method, stage, settings)})  # fmt: skip
    beginning = begin or _beginning(method, out)
    files: list[adapters.AdapterFile] = []
    started = time.monotonic()
    for stage, label in zip(method.stages, labels, strict=True):
        gc.collect()  # the last stage's network hangs in a circle of references
        backbone = load()
        data = check_data(open_data(backbone), recipe, method)
        objective = Distillation(backbone, data, method, stage, settings, recipe.seed)
        if first := files[-1] if files else beginning:
            tqdm.write(f"{label}: begins with {first.path}")
            objective.start_from(first, chosen=first is begin)
        if checkpointing:
            objective.roles.checkpointing()
        left = None if minutes is None else minutes - (time.monotonic() - started) / 60
        place = (runs / label, out / f"{label}.safetensors")
        file = _finish(objective, stage_recipe(recipe, stage), *place, name, left, tensorboard=tensorboard)
        del backbone, data, objective
        if file is None:
            break
        files.append(file)
    return files


def _beginning(method: Method, out: Path) -> adapters.AdapterFile | None:
    """The adapter of another method that this one goes on from, if it goes on from one.

    Raises:
        InputError: it has not been trained yet.
    """
    if not method.begins_with:
        return None
    fitting = [f for f in adapters.found(out) if (f.card.method, f.card.segments) == (method.begins_with, 1)]
    for file in fitting:
        if file.card.name == method.begins_with:
            return file
    others = "".join(f"begin with another one, --begin {file.path.stem}, or " for file in fitting[:1])
    raise InputError(
        f"{method.name} goes on from {method.begins_with}'s adapter for 1 segment, and there is none of that name in "
        f"{out}; {others}train it first: python -m hypersd distill {method.begins_with}"
    )


def _finish(
    objective: Distillation,
    recipe: Recipe,
    folder: Path,
    path: Path,
    name: str,
    minutes: float | None,
    *,
    tensorboard: bool,
) -> adapters.AdapterFile | None:
    """The LoRA file of a stage: the one that is there, or what its training ends with; None if time was up."""
    if path.is_file() and (done := _finished(path, objective, recipe)):
        return done
    training = Run(objective, recipe, folder, tensorboard=tensorboard)
    try:
        in_time = training.advance(minutes=minutes)
    except Diverged as problem:
        raise Diverged(f"{problem}: --lr {recipe.lr / 2:g} --name {name}-slower") from problem
    if not in_time:
        tqdm.write(f"{folder.name}: {training.step} of {recipe.updates} updates done; run this again to go on")
        return None
    if training.processes.is_main_process:
        adapters.save(path, objective.roles["ema"].adapter(), card(training, name))
    training.processes.wait_for_everyone()
    return adapters.inspect(path)


def _finished(path: Path, objective: Distillation, recipe: Recipe) -> adapters.AdapterFile | None:
    """The file of a stage that was trained for as long as is asked for now; None if there is more to do.

    Raises:
        RecipeChanged: it was trained in another way.
    """
    _check_recipe(path, {**asdict(recipe), **objective.describe()}, whole=True)
    file = adapters.inspect(path)
    return file if file.card.updates >= recipe.updates else None


def _check_recipe(path: Path, now: dict[str, Any], *, whole: bool = False) -> None:
    """RecipeChanged if a file is there that was trained in another way; `now` says all of it, or what is known."""
    if not path.is_file():
        return
    there = adapters.inspect(path).card
    if differs := differences({k: v for k, v in there.recipe.items() if whole or k in now}, now):
        raise RecipeChanged(
            f"{path} was trained with another recipe ({differs}); go back to it, or leave it where it is and choose "
            f"another row or folder, such as --name {there.name}-new or --out runs/lora"
        )


def check_name(name: str, method: Method) -> str:
    """A row's name that can be part of a file's name, and belongs to no other method."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,63}", name, re.ASCII):
        raise InputError(f"a name has letters, digits, '.', '_' and '-', got {name[:80]!r}; type {method.name}-new")
    if name in METHODS and name != method.name:
        raise InputError(f"{name} is the name of another method; type {method.name}-new")
    return name


def check_folder(folder: Path) -> None:
    """Make it if need be; InputError if nothing can be written there, said before the training and not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as problem:
        raise InputError(f"nothing can be written to {folder} ({problem.strerror}); choose another folder") from problem


def check_data(data: Data, recipe: Recipe, method: Method) -> Data:
    """The data again. Raises InputError: it is less than a batch, or prompts alone, and the method needs pictures."""
    if len(data) < recipe.batch:
        raise InputError(f"the data holds {len(data)} samples, fewer than a batch of {recipe.batch}; choose --batch")
    if method.pictures and data.take(torch.tensor([0])).latents is None:
        others = ", ".join(name for name, row in METHODS.items() if row.losses and not row.pictures)
        raise InputError(
            f"the data holds prompts only, and {method.name} learns from pictures with captions; prompts are enough "
            f"for {others}"
        )
    return data


def card(training: Run, name: str) -> Adapter:
    """What the LoRA file of a finished stage says of itself."""
    objective = training.objective
    assert isinstance(objective, Distillation)
    method = objective.method
    return Adapter(
        name=name,
        method=method.name,
        backbone=objective.backbone.name,
        base_sha256=objective.backbone.network_sha256,
        segments=objective.stage.segments,
        rank=objective.settings.rank,
        guidance=method.guidance,
        eta=method.eta,
        updates=training.step,
        data=objective.data.digest,
        start=objective.start,
        commit=commit(),
        recipe={**asdict(training.recipe), **objective.describe()},
    )


def commit() -> str:
    """The git commit of this package, "-dirty" behind it if files were changed; the version where there is no git."""
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
        )  # fmt: skip
    except OSError:
        return __version__
    return told.stdout.strip() or __version__
