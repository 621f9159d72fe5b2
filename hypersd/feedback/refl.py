"""Reward feedback: a distilled LoRA learns what is liked (ReFL, arXiv:2304.05977; Hyper-SD, arXiv:2404.13686, 3.2).

    python -m hypersd refine tscd-4

What is learned is a LoRA of its own on top of the distilled one, which stays as it is; a LoRA that was refined before
goes on with the part that feedback taught it, so that no turn of the loop makes it longer. Each reward asks for no
more than its threshold, ReLU(alpha - r) (eq. 13). A reward that is not optimised picks the update to keep and ends the
run.

A reward alone leads away from pictures (trainers' experience: colours too rich, then noise), so there is an anchor. It
is the consistency loss that the parent's method was distilled with, at the teacher's guidance of then: LCM's to the
clean picture, the others' along the trajectory. Adversary and score distillation are not gone on with: `hyper` is held
by the consistency that it went on from. A `dmd`, which knows no timestep but the one it begins at, is held to its own
pictures there.

Two ways to get a picture that a gradient flows through: `reuse` decodes the clean latent that the anchor has just
estimated, at no further network call; `rollout` draws as the student will be drawn with, from noise to a random
step, and lets that one step learn. Structure is asked of `reuse` only, where the real picture and its mask are known.
Likeness (likeness.py) is asked of whole drawings, so with it a rollout goes to its end, in any number of steps that the
parent is drawn in, half of the time in the fewest. It is no property of single pictures, which is all that the picker
sees: such a refinement ends with its recipe, and says at which strength of the whole LoRA it would be nearest.

Silent in the paper and chosen here: the anchor, likeness, thresholds are what preferred pictures reach, weights below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from accelerate.utils import gather
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from hypersd import adapters, distill
from hypersd.adapters import AdapterFile
from hypersd.backbone import Backbone
from hypersd.feedback import likeness
from hypersd.feedback.likeness import REAL, SEEN, STRENGTHS, Eye, Likeness, Strength
from hypersd.feedback.reward import Look, Reward, keep_best, looks_in
from hypersd.feedback.structure import Structure
from hypersd.generate import denoise, grid, trajectory
from hypersd.methods import METHODS, Method, Stage, as_made, discover
from hypersd.methods.base import Losses
from hypersd.records import Adapter, InputError, Problem, Request, real_number, whole_number
from hypersd.train import Recipe, Run, Step, processes, sharding

MODES = ("reuse", "rollout")
RECIPE = Recipe(updates=200, batch=16, lr=2e-4, warmup=10, cooldown=50, weight_decay=0.0, ema=0.95)
EVERY, PATIENCE = 20, 4
RANK = 8  # of a first turn's LoRA


@dataclass(frozen=True)
class Asked:
    """How the rewards enter: `weight` of all, `structure` and `likeness` those of these losses, the LoRA's rank.

    `pictures` of the whole batch are decoded for them. `steps` is the step count that `rollout` draws with and that the
    held-out reward looks at.
    """

    steps: int
    mode: str = "reuse"
    weight: float = 0.05
    structure: float = 0.0
    likeness: float = 0.0
    pictures: int = 4
    rank: int = RANK

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InputError(f"the mode must be one of {', '.join(MODES)}, got {self.mode[:40]!r}")
        for name in ("weight", "structure", "likeness"):
            object.__setattr__(self, name, real_number(getattr(self, name), name, 0.0, 100.0))
        object.__setattr__(self, "pictures", whole_number(self.pictures, "pictures", 1, 2**31))
        if self.structure and self.mode != "reuse":
            raise InputError(f"{self.mode} draws no picture whose structure is known; type --mode reuse")
        if self.likeness and self.mode != "rollout":
            raise InputError(f"{self.mode} draws nothing to its end, so likeness cannot be told; type --mode rollout")


@runtime_checkable
class Pictured(Protocol):
    """Data that has its pictures, not only their latents: float32 [rows, 3, h, w] in -1..1."""

    def pixels(self, rows: Tensor) -> Tensor: ...


class Refinement(distill.Distillation):
    """The objective: rewards and an anchor, for a LoRA that is learned on top of one that is not."""

    def __init__(
        self,
        backbone: Backbone,
        data: distill.Data,
        parent: AdapterFile,
        rewards: Sequence[Reward],
        settings: distill.Settings,
        asked: Asked,
        *,
        picker: Reward,
        prompts: Sequence[str],
        structure: Structure | None = None,
        seed: int = 0,
    ) -> None:
        """`prompts` are what `picker` looks at; none of them may be learned from. The teacher's guidance is that of
        the parent's card, `settings` say it only where that does not.

        Raises:
            InputError: the parent is of a method that is not known, or of another base, or has learned from feedback
                with another rank, or at a guidance that cannot be; no reward is given; structure is asked of a parent
                or of data without any.
        """
        method = as_made(distill.find(parent.card.method), parent.card)
        if not rewards and not structure:
            raise InputError("no reward is given, so there is nothing to refine for")
        check_base(parent, backbone)
        self.consistency = consistency(method)
        check_structure(asked, method, structure is not None and hasattr(data, structure.asks))
        super().__init__(
            backbone, data, replace(method, learners=("student",)), Stage(segments=parent.card.segments),
            replace(settings, rank=asked.rank, prompts=tuple(prompts), guidance=taught_at(parent) or settings.guidance),
            seed,
        )  # fmt: skip
        self.parent, self.rewards, self.asked, self.picker = parent, list(rewards), asked, picker
        self.structure = structure
        self.start = min(self.start, parent.card.start)
        self.inherited = distill.inherited(parent.card, *distill.ORIGIN, "spacing")
        self.likeness = self._likeness() if asked.likeness else None
        self._wear(adapters.load(parent.path), learned_rank(parent.card))
        self._x0: Tensor | None = None
        self._first: Tensor | None = None

    def _wear(self, parent: dict[str, Tensor], learned: int) -> None:
        """The parent's distilled ranks as one role that stays; what feedback taught it, if it did, to go on with."""
        if learned and learned != self.asked.rank:
            raise InputError(
                f"{self.parent.path.name} has learned from feedback with rank {learned} and goes on with it, "
                f"got rank {self.asked.rank}; leave --rank out"
            )
        distilled, taught = parted(parent, learned)
        self.roles.add("parent", rank=self.parent.card.rank - learned, trainable=False)
        self.roles["parent"].load_adapter(distilled)
        self._before = ["parent"]
        if learned:
            self.roles.add("before", rank=learned, trainable=False)
            self._before.append("before")
            for role in ("before", "student", "ema"):
                self.roles[role].load_adapter(taught)

    def _likeness(self) -> Likeness:
        """To real pictures themselves where the data has them, else to what the autoencoder gives back of them.

        Raises InputError: none of the rewards tells looks.
        """
        self.eye = next((r for r in self.rewards if isinstance(r, Eye)), None)
        if self.eye is None:
            told = ", ".join(r.name for r in self.rewards)
            raise InputError(
                f"likeness goes by what a reward's scorer sees of a picture, and none of {told} tells it; leave "
                "--likeness out, or add --reward: the folder of a reward model or of a scorer, clip, pick or hps"
            )
        segments, suggested = self.parent.card.segments, self.method.steps.suggested
        counts = sorted({self.asked.steps, *(count for count in suggested if count % segments == 0)})
        chosen = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(0))[:REAL]
        parts = tqdm(chosen.split(16), desc="real pictures", disable=not processes().is_main_process)
        return Likeness(counts, torch.cat([self._real(rows) for rows in parts]))

    @torch.no_grad()
    def _real(self, rows: Tensor) -> Tensor:
        """Looks of the real pictures of these rows [rows, k]."""
        assert self.eye, "likeness is asked for"
        if isinstance(self.data, Pictured):
            return self.eye.looks(self.data.pixels(rows).to(self.backbone.device))
        latents = self.data.take(rows).latents
        if latents is None:
            raise InputError("the data holds prompts only, and likeness is to real pictures; leave --likeness out")
        return self.eye.looks(self.backbone.picture(latents.to(self.backbone.device)))

    def modules(self) -> dict[str, nn.Module]:
        return super().modules() | ({"likeness": self.likeness} if self.likeness else {})

    def describe(self) -> dict[str, Any]:
        told = super().describe()
        named = {r.name: r.threshold for r in self.rewards}
        return {**told, "parent": self.parent.sha256, "rewards": named, "asked": asdict(self.asked),
                "picker": self.picker.name}  # fmt: skip

    def estimate(
        self, role: str, x_t: Tensor, t: Tensor, states: Tensor, *, learn: bool | None = None
    ) -> tuple[Tensor, Tensor]:
        learns = role == "student" if learn is None else learn
        with self.roles.wear("parent", role), torch.set_grad_enabled(learns):
            x0, eps = self.schedule.split(self._call(x_t, t, states), x_t, t)
        if learns:
            self._x0 = x0
        return x0, eps

    def losses(self, step: Step) -> Iterator[tuple[str, Tensor]]:
        """Each part of a batch decodes those of its places that are among the first `pictures` of the whole batch, and
        weighs them so that all parts together have the mean over these."""
        loss = self._anchor(step)
        asked, whole = self.asked, step.recipe.batch
        count = sum(place < asked.pictures for place in step.part)
        share = whole / len(step.part) / min(asked.pictures, whole)
        follow = None
        if asked.mode == "rollout" and (count or sharding()):  # processes that share the base call it equally often
            steps, last = self._how_far(step)
            pictures, captions = self._rolled_out(step, count or 1, steps, last)
            share = share if count else 0.0
            loss = loss + asked.weight * share * self._missing(pictures, captions)
            if self.likeness and self.eye:
                looks = self.eye.looks(pictures)
                loss = loss + asked.likeness * share * self.likeness(looks, steps).sum()
                follow = share * self.likeness.follow(looks, steps).sum()
        elif count:
            assert self._x0 is not None, "the student has just made an estimate"
            pictures = self.backbone.picture(self._x0[:count])
            loss = loss + asked.weight * share * self._missing(pictures, self._captions(count))
            loss = loss + asked.structure * share * self._lost_structure(pictures, step, count)
        yield "student", loss
        if self.likeness:
            yield "likeness", 0.0 * self.likeness.gaps.sum() if follow is None else follow

    def _anchor(self, step: Step) -> Tensor:
        """What keeps the student near what it was distilled to be."""
        if self.consistency:
            return next(self.consistency(self, step))[1]
        at = self.beginnings(step)
        with self.roles.wear(*self._before), torch.no_grad():
            before, _ = self.schedule.split(self._call(at.x_t, at.t, at.states), at.x_t, at.t)
        x0, _ = self.estimate("student", at.x_t, at.t, at.states)
        return (x0 - before).square().mean()

    def _missing(self, pictures: Tensor, captions: list[str]) -> Tensor:
        """By how much rewards fall short of their thresholds (eq. 13), summed over rewards and pictures."""
        return sum(((r.threshold - r(pictures, captions)).relu().sum() for r in self.rewards), pictures.new_zeros(()))

    def _captions(self, count: int) -> list[str]:
        captions: list[str] = self._batch.captions[:count]  # type: ignore[attr-defined]
        return captions

    def _lost_structure(self, pictures: Tensor, step: Step, count: int) -> Tensor:
        """Eq. 14, against the real pictures, summed over pictures; 0 where no structure is asked for."""
        if self.structure is None or not self.asked.structure:
            return pictures.new_zeros(())
        truth = getattr(self.data, self.structure.asks)(step.rows(len(self.data))[:count])
        return self.structure(pictures, truth).sum()

    def _how_far(self, step: Step) -> tuple[int, int]:
        """In how many steps an update draws, and the one of them, from 0, that learns and ends the drawing.

        The same for the whole update: processes that share the base call the network equally often.
        """
        draws = Step(step.index, step.recipe).generator("rollout")
        if not self.likeness:
            return self.asked.steps, int(torch.randint(self.asked.steps, (), generator=draws))
        fewest, *more = self.likeness.counts
        which = int(torch.randint(2 * len(more) or 1, (), generator=draws))
        steps = more[which] if which < len(more) else fewest
        return steps, steps - 1

    def _rolled_out(
        self, step: Step, count: int, steps: int, last: int, role: str = "student"
    ) -> tuple[Tensor, list[str]]:
        """Drawings of a role's own from noise to step `last` of `steps`, the only one at which a student learns: what
        it then has in mind, and of which captions."""
        at = self.beginnings(step)
        x_t, states, captions = at.x_t[:count], at.states[:count], self._captions(count)
        jumps = grid(self.schedule, self.method, steps, self.start)
        noises = (step.randn(f"rollout {n}", x_t.shape[1:])[:count].to(x_t) for n in range(len(jumps)))

        def estimate(x_t: Tensor, t: int) -> tuple[Tensor, Tensor]:
            where = torch.full((count,), t, device=x_t.device)
            return self.estimate(role, x_t, where, states, learn=role == "student" and t == jumps[last][0])

        *_, taken = trajectory(self.schedule, self.method, jumps[: last + 1], x_t, estimate, noises.__next__)
        return self.backbone.picture(taken.x0), captions

    @torch.no_grad()
    def strength(self, recipe: Recipe) -> Strength:
        """At how many times its strength the whole LoRA draws what is most like real pictures.

        The squared gap of drawings of the captions that would come next, in each number of steps, which weighs as often
        as updates draw in it. All strengths draw the same captions from the same noises.
        """
        assert self.likeness and self.eye, "likeness is asked for"
        fewest, *more = self.likeness.counts
        weights = {count: 0.5 / len(more) for count in more} | {fewest: 0.5 if more else 1.0}
        here, size = processes(), min(self.asked.pictures, recipe.batch // recipe.accumulate)
        rounds = -(-SEEN // (size * here.num_processes))  # each process draws a share, all of them equally many
        first = recipe.updates + here.process_index * rounds
        steps = [Step(first + index, recipe, range(size)) for index in range(rounds)]
        real = torch.cat([self.likeness.of(self._real(step.rows(len(self.data)))) for step in steps])
        apart: dict[float, list[tuple[float, Tensor]]] = {strength: [] for strength in STRENGTHS}
        tried = list(product(STRENGTHS, weights))
        for strength, count in tqdm(tried, desc="strength", disable=not here.is_main_process):
            with self.roles.at(strength):
                drawn = (self._rolled_out(step, size, count, count - 1, "ema")[0] for step in steps)
                looks = torch.cat([self.likeness.of(self.eye.looks(pictures)) for pictures in drawn])
            apart[strength].append((weights[count], gather((looks - real).to(here.device)).cpu()))
        return likeness.strength(apart)

    # ------------------------------------------------------------------------------------------ while it trains

    @torch.no_grad()
    def sheet(self, folder: Path, step: int) -> dict[str, float]:
        """What both rewards say of the picker's prompts, and how far latents moved away from the parent's.

        The sheet has the parent's pictures in its left column, the refined ones beside them.
        """
        latents = self.drawn()
        if self._first is None:
            self._first = self.drawn(refined=False)
        pictures = self.backbone.picture(latents)
        prompts = list(self.settings.prompts)
        told = {f"reward_{r.name}": float(r(pictures, prompts).mean()) for r in self.rewards}
        shown = [torch.cat([self.backbone.decode(z[None])[0] for z in pair], 1)
                 for pair in zip(self._first[:12], latents[:12], strict=True)]  # fmt: skip
        if processes().is_main_process:
            Image.fromarray(torch.cat(shown).numpy()).save(folder / "sheet.png")
        moved = float((latents - self._first).square().mean())
        if self.likeness:
            told |= {f"gap_{count}": gap for count, gap in self.likeness.squared().items()}
        return {"picked": float(self.picker(pictures, prompts).mean()), **told, "moved": moved}

    @torch.no_grad()
    def drawn(self, *, refined: bool = True) -> Tensor:
        """Latents of the prompts as the app draws them at the step count asked for, a noise of its own for each.

        [prompts, c, h, w]
        """
        row = replace(self.method, adapted=False)  # the network wears it already
        with self.roles.wear(*(["parent", "student"] if refined else self._before)):
            return torch.cat([
                denoise(self.backbone, Request(prompt, number, self.asked.steps), row, start=self.start).x
                for number, prompt in enumerate(self.settings.prompts)
            ])  # fmt: skip


def check_base(parent: AdapterFile, backbone: Backbone) -> None:
    """InputError if the app does not draw with a LoRA on this base, so that it would not with what is made of it."""
    row = discover([parent], backbone.network_sha256).get(parent.card.name)
    if row is not None and row.adapters:
        return
    if parent.card.base_sha256 != backbone.network_sha256:
        raise InputError(
            f"{parent.path.name} was trained on another base than {backbone.name}; train it again, beginning with it: "
            f"python -m hypersd distill {parent.card.method} --begin {parent.path}"
        )
    raise InputError(f"{parent.path.name} calls itself {parent.card.name!r}, which is another method's; train it again")


def taught_at(parent: AdapterFile) -> tuple[float, float] | None:
    """The guidance of the teacher that the parent had, which the anchor goes on with; None if its card does not say."""
    match parent.card.recipe.get("settings"):
        case {"guidance": [low, high]}:
            return low, high
    return None


def consistency(method: Method) -> Losses | None:
    """The loss that taught a method's student consistency, or the student it went on from; None if nothing did."""
    taught = METHODS[method.begins_with] if method.begins_with else method
    return taught.losses if taught.learners == ("student",) else None


def check_structure(asked: Asked, method: Method, known: bool) -> None:
    """InputError where structure is asked for and cannot be told: the method draws from noise alone, or of the data's
    pictures nothing is `known`."""
    if asked.structure and consistency(method) is None:
        raise InputError(f"{method.name} redraws no picture, so none whose structure is known; leave --structure out")
    if asked.structure and not known:
        raise InputError(
            "the structure of these pictures is not known; give a folder of COCO as --data and a model of transformers "
            "as --segmenter, or refine the embedded model on its artwork"
        )


@dataclass(frozen=True)
class Base:
    """On what a LoRA is refined: `load` gives the base model, `open_data` captioned latents for it.

    With `checkpointing` no activations are kept but computed again; a run stays the same.
    """

    load: Callable[[], Backbone]
    open_data: Callable[[Backbone], distill.Data]
    settings: distill.Settings
    checkpointing: bool = False

    def refinement(
        self, parent: AdapterFile, rewards: Sequence[Reward], asked: Asked, recipe: Recipe, **given: Any
    ) -> Refinement:
        """Raises InputError as `Refinement` does, which `given` is for; or the data holds no pictures, or too few."""
        backbone = self.load()
        data = distill.check_data(self.open_data(backbone), recipe, distill.find(parent.card.method))
        made = Refinement(backbone, data, parent, rewards, self.settings, asked, seed=recipe.seed, **given)
        if self.checkpointing:
            made.roles.checkpointing()
        return made


@dataclass(frozen=True)
class Refined:
    """The new LoRA, when it was kept, what the picker said of its parent and of it, and with likeness the `strength`
    at which it would draw what is most like real pictures."""

    file: AdapterFile
    look: Look
    before: float
    strength: Strength | None


def run(objective: Refinement, recipe: Recipe, folder: Path, path: Path, name: str, **told: Any) -> Refined:
    """Refine, keep what the picker likes best (with likeness, the last), write one LoRA: the parent with its feedback.

    The feedback alone lies beside the run, in `folder`, to be put on top at another scale (convert.py).

    Raises:
        Problem: nothing was better than the parent, so nothing was written; or a reward was not finite.
        Diverged: the loss was not finite.
    """
    training = Run(objective, recipe, folder)
    look = keep_best(training, "picked", every=EVERY, patience=None if objective.likeness else PATIENCE)
    before = looks_in(folder)[0].value
    if look.step == 0:
        raise Problem(
            f"in {training.step} updates nothing was liked better than {objective.parent.path.name} by the reward that "
            f"was not optimised ({before:.3f} at the start); nothing was written"
        )
    if training.processes.is_main_process:
        feedback = objective.roles["ema"].adapter()
        made = card(objective, training, name, look, told)
        adapters.save(folder / "feedback.safetensors", feedback, replace(made, rank=objective.asked.rank))
        adapters.save(path, added(objective.roles["parent"].adapter(), feedback), made)
    strength = objective.strength(recipe) if objective.likeness else None
    training.processes.wait_for_everyone()
    return Refined(adapters.inspect(path), look, before, strength)


def card(objective: Refinement, training: Run, name: str, look: Look, told: dict[str, Any]) -> Adapter:
    """The parent's card, but for what is new."""
    parent = objective.parent.card
    return replace(
        parent,
        name=name,
        rank=parent.rank - learned_rank(parent) + objective.asked.rank,
        updates=look.step,
        data=objective.data.digest,
        commit=distill.commit(),
        recipe={**asdict(training.recipe), **objective.describe(), **told},
    )


def added(*loras: dict[str, Tensor]) -> dict[str, Tensor]:
    """One LoRA whose every layer adds what all of them add: their ranks side by side."""
    names = {name for lora in loras for name in lora}
    along = {"lora_A": 0, "lora_B": 1}
    return {
        name: torch.cat([lora[name] for lora in loras if name in lora], along[name.rsplit(".", 1)[1]]) for name in names
    }


def parted(lora: dict[str, Tensor], last: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What `added` put side by side: a LoRA without its last ranks, and these."""
    cuts = {n: t.tensor_split([t.shape[d] - last], d) for n, t in lora.items() for d in [0 if n.endswith("A") else 1]}
    return {name: cut[0] for name, cut in cuts.items()}, {name: cut[1] for name, cut in cuts.items()}


def learned_rank(card: Adapter) -> int:
    """How many of a LoRA's ranks, the last ones, feedback taught it; 0 if it was never refined."""
    asked = card.recipe.get("asked")
    return int(asked.get("rank", 0)) if isinstance(asked, dict) else 0


def share_better(after: Sequence[float], before: Sequence[float]) -> np.ndarray:
    """1 where a prompt's new picture scores higher than its old one, 0.5 where equal, else 0."""
    gap = np.asarray(after) - np.asarray(before)
    return (np.sign(gap) + 1) / 2
