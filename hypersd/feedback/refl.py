"""Reward feedback: a distilled LoRA learns what is liked (ReFL, arXiv:2304.05977; Hyper-SD, arXiv:2404.13686, 3.2).

    python -m hypersd refine tscd-4

What is learned is a LoRA of its own on top of the distilled one, which stays as it is; a LoRA that was refined before
goes on with the part that feedback taught it, so that no turn of the loop makes it longer. Each reward asks for no
more than its threshold, ReLU(alpha - r) (eq. 13). The distillation loss stays on, since a reward alone leads away from
pictures (trainers' experience: colours too rich, then noise). A reward that is not optimised picks the update to keep
and ends the run.

Two ways to get a picture that a gradient flows through: `reuse` decodes the clean latent that the distillation step has
just estimated, at no further network call; `rollout` draws as the student will be drawn with, from noise to a random
step, and lets that one step learn. Structure is asked of `reuse` only, where the real picture and its mask are known.

Silent in the paper and chosen here: thresholds are what preferred pictures reach, weights below.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hypersd import adapters, distill
from hypersd.adapters import AdapterFile
from hypersd.backbone import Backbone
from hypersd.feedback.reward import Look, Reward, keep_best, looks_in
from hypersd.feedback.structure import Structure
from hypersd.generate import denoise, grid, trajectory
from hypersd.methods import Stage, as_made
from hypersd.methods.tcd import trajectories
from hypersd.records import Adapter, InputError, Problem, Request
from hypersd.train import Recipe, Run, Step, processes

MODES = ("reuse", "rollout")
RECIPE = Recipe(updates=200, batch=16, lr=2e-4, warmup=10, cooldown=50, weight_decay=0.0, ema=0.95)
EVERY, PATIENCE = 20, 4
RANK = 8  # of a first turn's LoRA


@dataclass(frozen=True)
class Asked:
    """How the rewards enter: `weight` of all, how many pictures of a batch are decoded for them, the LoRA's rank.

    `steps` is the step count that `rollout` draws with and that the held-out reward looks at.
    """

    steps: int
    mode: str = "reuse"
    weight: float = 0.05
    structure: float = 0.0
    pictures: int = 4
    rank: int = RANK

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InputError(f"the mode must be one of {', '.join(MODES)}, got {self.mode[:40]!r}")


class Refinement(distill.Distillation):
    """The objective: the method's own loss, with a LoRA that is learned on top of one that is not, and rewards."""

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
        """`prompts` are what `picker` looks at; none of them may be learned from.

        Raises:
            InputError: the parent is of a method that is not known, or of another base, or has learned from feedback
                with another rank; no reward is given.
        """
        method = as_made(distill.find(parent.card.method), parent.card)
        if not rewards and not structure:
            raise InputError("no reward is given, so there is nothing to refine for")
        stage = Stage(segments=parent.card.segments, offset_noise=0.0)
        super().__init__(backbone, data, replace(method, learners=("student",)), stage,
                         replace(settings, rank=asked.rank, prompts=tuple(prompts)), seed)  # fmt: skip
        self.parent, self.rewards, self.asked, self.picker = parent, list(rewards), asked, picker
        self.structure = structure
        self.start = min(self.start, parent.card.start)
        self.inherited = distill.inherited(parent.card, *distill.ORIGIN, "spacing")
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
        at = self.places(step)
        prediction, target = trajectories(self, at)
        kept = (prediction - target).square().mean()
        count = min(self.asked.pictures, len(at.t))
        if self.asked.mode == "reuse":
            assert self._x0 is not None, "the student has just made an estimate"
            pictures, captions = self.backbone.picture(self._x0[:count]), self._captions(count)
            wrong = self._lost_structure(pictures, step, count)
        else:
            pictures, captions = self._rolled_out(step, count)
            wrong = pictures.new_zeros(())
        missing = sum((r.threshold - r(pictures, captions)).relu().mean() for r in self.rewards)  # eq. 13
        yield "student", kept + self.asked.weight * missing + self.asked.structure * wrong

    def _captions(self, count: int) -> list[str]:
        captions: list[str] = self._batch.captions[:count]  # type: ignore[attr-defined]
        return captions

    def _lost_structure(self, pictures: Tensor, step: Step, count: int) -> Tensor:
        """Eq. 14, against the masks of the real pictures; 0 where no structure is asked for."""
        if self.structure is None or not self.asked.structure:
            return pictures.new_zeros(())
        return self.structure(pictures, self.data.masks(step.rows(len(self.data))[:count])).mean()  # type: ignore[attr-defined]

    def _rolled_out(self, step: Step, count: int) -> tuple[Tensor, list[str]]:
        """The student's own drawing from noise to a random step, which alone learns; what it then has in mind.

        The step is the same for the whole update: processes that share the base call the network equally often.
        """
        at = self.beginnings(step)
        x_t, states, captions = at.x_t[:count], at.states[:count], self._captions(count)
        jumps = grid(self.schedule, self.method, self.asked.steps, self.start)
        last = int(torch.randint(len(jumps), (), generator=Step(step.index, step.recipe).generator("rollout")))
        noises = (step.randn(f"rollout {n}", x_t.shape[1:])[:count].to(x_t) for n in range(len(jumps)))

        def estimate(x_t: Tensor, t: int) -> tuple[Tensor, Tensor]:
            where = torch.full((count,), t, device=x_t.device)
            return self.estimate("student", x_t, where, states, learn=t == jumps[last][0])

        *_, taken = trajectory(self.schedule, self.method, jumps[: last + 1], x_t, estimate, noises.__next__)
        return self.backbone.picture(taken.x0), captions

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
        return {"picked": float(self.picker(pictures, prompts).mean()), **told, "moved": moved}

    @torch.no_grad()
    def drawn(self, *, refined: bool = True) -> Tensor:
        """Latents of the prompts at the step count asked for, a noise of its own for each. [prompts, c, h, w]"""
        row = replace(self.method, adapted=False)
        with self.roles.wear(*(["parent", "student"] if refined else self._before)):
            return torch.cat([
                denoise(self.backbone, Request(prompt, number, self.asked.steps, guidance=1.0), row, start=self.start).x
                for number, prompt in enumerate(self.settings.prompts)
            ])  # fmt: skip


@dataclass(frozen=True)
class Refined:
    """The new LoRA, when it was kept, and what the picker said of its parent and of it."""

    file: AdapterFile
    look: Look
    before: float


def run(objective: Refinement, recipe: Recipe, folder: Path, path: Path, name: str, **told: Any) -> Refined:
    """Refine, keep what the picker likes best, write one LoRA that is parent and feedback together.

    The feedback alone lies beside the run, in `folder`, to be merged at another scale.

    Raises:
        Problem: nothing was better than the parent, so nothing was written; or a reward was not finite.
        Diverged: the loss was not finite.
    """
    training = Run(objective, recipe, folder)
    look = keep_best(training, "picked", every=EVERY, patience=PATIENCE)
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
    training.processes.wait_for_everyone()
    return Refined(adapters.inspect(path), look, before)


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
