"""The loop: votes -> pairs -> a reward model -> a LoRA that is liked better, beside the old one, to be voted on.

    python -m hypersd loop tscd-4

The new row of the app carries the digest of the votes that made it. Two reward models learn from the votes of
different prompts: one leads, the other, which is never optimised, says when to stop and which update to keep.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import yaml

from hypersd import distill, evaluate, intervals
from hypersd.adapters import AdapterFile
from hypersd.backbone import Backbone
from hypersd.emoji.prompts import Prompt
from hypersd.evaluate import report
from hypersd.evaluate.measures import Metric, scored
from hypersd.evaluate.plan import TEACHER, Arm, Plan
from hypersd.feedback import pairs, refl, reward
from hypersd.feedback.pairs import Preferences
from hypersd.feedback.refl import Asked, Base, Refinement
from hypersd.methods import discover
from hypersd.records import InputError, Problem
from hypersd.study.definition import Study
from hypersd.study.pairs import gather
from hypersd.study.votes import Store
from hypersd.train import Recipe

LEAST = 200  # decided pairs of pictures
SEEDS = 2  # drawings of a prompt when old and new are compared
CHANCE = 0.5


@dataclass(frozen=True)
class Settings:
    """How much is asked for. `prompts` are looked at by the reward that picks, beside those of the validation split.

    `unseen` are of no other use than to compare old and new at the end, beside those of the test split; `artwork` are
    the real pictures, `teacher` the steps of the base model that both are measured against.
    """

    asked: Asked
    least: int = LEAST
    annotators: int = 2
    prompts: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    artwork: Path = Path("runs/emoji/artwork")
    teacher: int = 25
    reward: Recipe = reward.RECIPE
    refine: Recipe = refl.RECIPE


def run(
    store: Store,
    study: Study,
    images: Path,
    parent: AdapterFile,
    base: Base,
    settings: Settings,
    runs: Path,
    out: Path,
    *,
    start: Path | None = None,
) -> Iterator[str]:
    """Lines to print, as things come about; at the end the new LoRA lies in `out`.

    Args:
        parent: the distilled LoRA that is to be refined.
        runs: everything on the way lies in a folder below, named by the votes; the same call goes on there.
        start: the scorer that rewards begin with.

    Raises:
        Problem: too few votes, and how many are missing; a reward that is no better than chance; nothing was liked
            better than the parent.
        InputError: a folder cannot be written to; the data holds no pictures, or fewer than a batch.
    """
    votes = gather(store, study)
    found = pairs.of_votes(votes, images, annotators=settings.annotators)
    yield f"{len(votes.compared)} votes on {len(found.rows)} pairs of pictures, {found.decided} of them decided"
    pairs.check(found, settings.least)
    folder = runs / found.digest[:8]
    for place in (folder, out):
        distill.check_folder(place)
    rewards = yield from taught(found, folder, settings.reward, start)
    new = yield from refined(found, rewards, parent, base, settings, folder, out)
    gc.collect()  # the network that learned hangs in a circle of references; what follows is drawn as the app draws it
    unseen = list(dict.fromkeys((*_prompts(found, "test"), *settings.unseen)))
    yield from evaluated(base.load(), parent, new, rewards, unseen, settings, folder)
    yield ballot(study, folder, parent, new.card.name, settings.asked.steps)


def taught(
    found: Preferences, folder: Path, recipe: Recipe, start: Path | None
) -> Generator[str, None, list[reward.Trained]]:
    """The reward that leads and the one that picks, each of the votes on one half of the prompts."""
    rewards = []
    for number, name in enumerate(("leads", "picks")):
        out = folder / f"reward-{name}"
        card = reward.train(half(found, number), folder / name, out, replace(recipe, seed=number), start=start)
        yield f"the reward that {name} is {reward.describe(card)}"
        if card.accuracy <= CHANCE:
            raise Problem(
                f"the reward that {name} is right on {100 * card.accuracy:.0f} % of the pairs it never saw, no better "
                "than a coin; collect more votes, or votes that agree more"
            )
        rewards.append(reward.Trained(out))
    return rewards


def refined(
    found: Preferences,
    rewards: Sequence[reward.Trained],
    parent: AdapterFile,
    base: Base,
    settings: Settings,
    folder: Path,
    out: Path,
) -> Generator[str, None, AdapterFile]:
    """The new LoRA in `out`, named by the votes, and how often it is liked better."""
    leads, picks = rewards
    prompts = [*_prompts(found, "validation"), *settings.prompts]
    objective = base.refinement(parent, [leads], settings.asked, settings.refine, picker=picks, prompts=prompts)
    name = f"{parent.card.name}-{found.digest[:8]}"
    path = out / f"{name}-{parent.card.segments}.safetensors"
    made = refl.run(objective, settings.refine, folder / "refine", path, name, votes=found.digest)
    yield (
        f"{path}: after {made.look.step} updates the reward that was not optimised says {made.look.value:.3f}, "
        f"of {parent.path.name} it says {made.before:.3f}"
    )
    yield won(objective, picks)
    return made.file


def _prompts(found: Preferences, split: str) -> list[str]:
    return sorted({row.prompt for row in found.rows if row.split == split})


def half(found: Preferences, number: int) -> Preferences:
    """One of two halves of the prompts that are learned from; the other splits are in both."""
    rows = tuple(row for row in found.rows if row.split != "train" or _bit(row.prompt) == number)
    if not any(row.split == "train" and row.share != 0.5 for row in rows):
        raise Problem("all decided pairs are of the same few prompts; collect votes on more prompts")
    return replace(found, rows=rows)


def _bit(prompt: str) -> int:
    return hashlib.sha256(f"half {prompt}".encode()).digest()[0] % 2


@torch.no_grad()
def won(objective: Refinement, picker: reward.Reward) -> str:
    """How often the new picture of a prompt scores higher than the old one from the same noise, over prompts."""
    prompts = list(objective.settings.prompts)
    scores = [picker(objective.backbone.picture(objective.drawn(refined=new)), prompts) for new in (True, False)]
    better = refl.share_better(*(one.tolist() for one in scores))
    found = intervals.estimate(better, intervals.draws(len(better)))
    return (
        f"on {len(prompts)} prompts that were not learned from the new picture is liked better in "
        f"{100 * found.value:.0f} % [{100 * found.low:.0f}, {100 * found.high:.0f}] (the picking reward's word)"
    )


def evaluated(
    backbone: Backbone,
    parent: AdapterFile,
    new: AdapterFile,
    rewards: Sequence[reward.Reward],
    prompts: Sequence[str],
    settings: Settings,
    folder: Path,
) -> Iterator[str]:
    """Old and new LoRA by `hypersd.evaluate` on prompts that neither learned from nor were picked by: lines to print.

    The report lies in a folder below `folder`; what both rewards say is in it, marked as no independent evidence.
    """
    if len(prompts) < 2:  # a study of few prompts, on a base without prompts of its own
        yield "old and new LoRA were not evaluated: no two prompts are left that nothing had looked at"
        return
    steps = settings.asked.steps
    after, before = Arm(new.card.name, steps), Arm(parent.card.name, steps)
    teacher = Arm(TEACHER, settings.teacher)
    wanted = Plan(
        tuple(Prompt("held out", text, text) for text in prompts), SEEDS, (teacher, before, after), teacher,
        methods=discover([parent, new], backbone.network_sha256), rivals=((after, before),),
    )  # fmt: skip
    place = folder / f"evaluation-{new.sha256[:8]}"
    try:
        metrics = [*evaluate.chosen(None, quick=True), *_spoken(rewards)]
        page = evaluate.run_on(backbone, wanted, place, metrics, settings.artwork)
    except InputError as problem:  # a library that is not installed: the LoRA is there all the same
        yield f"old and new LoRA were not evaluated: {problem}"
        return
    if page is None:  # one of several processes, and not the first
        return
    yield f"on {len(prompts)} prompts that nothing had looked at, new less old (all of it: {page}):"
    content = json.loads((place / "report.json").read_text(encoding="utf-8"))
    yield from (f"  {line}" for line in report.beside(content, after, before))


def _spoken(rewards: Sequence[reward.Reward]) -> list[Metric]:
    """What the rewards say of a picture, as metrics that nobody takes for independent evidence."""
    roles = {"leads": "the new LoRA was trained to raise it", "picks": "it chose the update that was kept"}

    def spoken(said: reward.Reward, role: str, why: str) -> Metric:
        return Metric(f"reward_{role}", f"the reward that {role}", 1, scored(lambda: said), optimised=why)

    return [spoken(said, *role) for said, role in zip(rewards, roles.items(), strict=True)]


def ballot(study: Study, folder: Path, parent: AdapterFile, name: str, steps: int) -> str:
    """Write the study again with the new arm in it, and say how to open it."""
    told = asdict(study)
    arm = f"{name}@{steps}"
    told["arms"] = [*study.arms, arm]
    file = folder / "study.yaml"
    plain = yaml.safe_load(yaml.dump(_plain(told)))
    file.write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return f"let people vote on {arm} and its parent: HYPERSD_STUDY={file} python app.py"


def _plain(value: object) -> object:
    """Tuples as lists, all the way down."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def steps_for(parent: AdapterFile, steps: int | None) -> int:
    """The step count to refine for: what was asked, or one step a segment.

    Raises:
        InputError: it does not divide into the parent's segments.
    """
    count = parent.card.segments if steps is None else steps
    if count % parent.card.segments:
        raise InputError(
            f"{parent.path.stem} has {parent.card.segments} segments, so steps must be a multiple of that, got {count}"
        )
    return count
