"""python -m hypersd reward, segmenter, refine, loop: what each takes and does; the lines to print, as they come about.

What an action needs is imported when it runs, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hypersd.records import real_number, whole_number

if TYPE_CHECKING:
    from hypersd.adapters import AdapterFile
    from hypersd.feedback.refl import Asked
    from hypersd.study.definition import Study
    from hypersd.study.votes import Store
    from hypersd.train import Recipe

Lines = Iterator[str]
MANY = 10**9


class Action(NamedTuple):
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Lines]


def reward_arguments(parser: argparse.ArgumentParser) -> None:
    _votes_arguments(parser)
    known = "Pick-a-Pic, ImageReward, HPD v2 or v3, or what study export writes"
    parser.add_argument("--pairs", action="append", default=[], help=f"files instead of votes, also several: {known}")
    parser.add_argument("--constructed", action="store_true", help="pairs of known order: artwork over drawn ones")
    parser.add_argument("--limit", default=1000, help="constructed: captions (default: %(default)s)")
    parser.add_argument("--engine", default="torch", help="constructed: torch or openvino (default: %(default)s)")
    parser.add_argument("--runs", default="runs/reward", help="folder of the run (default: %(default)s)")
    parser.add_argument("--out", default="runs/reward/out", help="folder of the reward model (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all randomness (default: %(default)s)")


def _votes_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--database", help="votes: file or URL (default: DATABASE_URL, else runs/study/study.db)")
    parser.add_argument(
        "--study", help="votes: the study's definition (default: HYPERSD_STUDY, else assets/study.yaml)"
    )
    parser.add_argument(
        "--images", default="runs/study/images", help="votes: the study's pictures (default: %(default)s)"
    )
    parser.add_argument("--least", default=200, help="decided pairs that are needed (default: %(default)s)")
    parser.add_argument("--annotators", default=2, help="people who must have voted (default: %(default)s)")


def reward_run(given: argparse.Namespace) -> Lines:
    from hypersd.feedback import pairs, reward

    least = whole_number(given.least, "least", 1, MANY)
    parts = [pairs.read(Path(file)) for file in given.pairs]
    if given.constructed:
        from hypersd.feedback import known

        limit = whole_number(given.limit, "limit", 3, MANY)
        parts.append(known.emoji(Path("runs/emoji/artwork"), limit, given.engine))
    if not parts:
        from hypersd.study.pairs import gather

        store, study = _study_of(given)
        parts.append(pairs.of_votes(gather(store, study), Path(given.images), annotators=_annotators(given)))
    found = pairs.check(pairs.join(*parts), least)
    recipe = replace(reward.RECIPE, seed=given.seed)
    card = reward.train(found, Path(given.runs) / found.digest[:8], Path(given.out), recipe)
    yield f"{given.out}: {reward.describe(card)}"


def _annotators(given: argparse.Namespace) -> int:
    return whole_number(given.annotators, "annotators", 1, MANY)


def _study_of(given: argparse.Namespace) -> tuple[Store, Study]:
    from hypersd.study import command

    given.action, given.receipt = "export", None
    return command.opened(given)


def segmenter_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--artwork", default="runs/emoji/artwork", help="pictures and masks (default: %(default)s)")
    parser.add_argument("--runs", default="runs/segmenter", help="folder of the run (default: %(default)s)")
    parser.add_argument("--out", default="assets/emoji-segmenter", help="where it goes (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="stop after so long; the same command goes on from there")


def segmenter_run(given: argparse.Namespace) -> Lines:
    from hypersd.feedback import structure

    found = structure.train(Path(given.artwork), Path(given.runs), Path(given.out), minutes=given.minutes)
    yield f"{given.out}: overlaps the masks of held-out pictures by {100 * found:.1f} %"


def _refining_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("parent", help="the LoRA to refine, a file's name in the LoRA folder, such as tscd-4")
    parser.add_argument("--backbone", default="emoji", help="emoji, sd15, sdxl or a folder (default: %(default)s)")
    parser.add_argument(
        "--data", help="captioned pictures: a folder, parquet or tar files (default: the emoji artwork)"
    )
    parser.add_argument("--steps", type=int, help="steps to draw with (default: one a segment of the parent)")
    parser.add_argument("--mode", default="reuse", help="reuse or rollout (default: %(default)s)")
    parser.add_argument("--weight", type=float, default=0.05, help="of the rewards (default: %(default)s)")
    parser.add_argument("--rank", type=int, help="of the feedback's LoRA (default: 8, or what the parent has already)")
    parser.add_argument("--updates", type=int, help="at most so many (default: the preset's)")
    parser.add_argument("--out", help="folder of the LoRA files (default: beside the backbone, where the app looks)")


def refine_arguments(parser: argparse.ArgumentParser) -> None:
    _refining_arguments(parser)
    parser.add_argument("--reward", action="append", default=[], help="folder of a reward model or of a scorer; may be "
                        "given more than once (default: assets/emoji-reward)")  # fmt: skip
    parser.add_argument("--picker", required=True, help="folder of a reward that is not optimised and picks the update")
    parser.add_argument("--prompts", help="what the picker looks at: a text file, one prompt a line")
    parser.add_argument("--structure", type=float, default=0.0, help="weight of the structure loss (default: none)")
    parser.add_argument("--segmenter", default="assets/emoji-segmenter", help="of the structure loss")
    parser.add_argument("--runs", default="runs/refine", help="folder of the run (default: %(default)s)")
    parser.add_argument("--name", help="of its row in the app (default: the parent's and -refined)")
    parser.add_argument("--checkpointing", action="store_true", help="keep no activations but compute them again")


def refine_run(given: argparse.Namespace) -> Lines:
    from hypersd import distill
    from hypersd.adapters import beside, found, named
    from hypersd.emoji import prompts, training
    from hypersd.evaluate import plan
    from hypersd.feedback import refl, reward, structure

    folder = Path(given.out) if given.out else beside(given.backbone)[1]
    parent = named(found(folder), given.parent)
    name = distill.check_name(given.name or f"{parent.card.name}-refined", distill.find(parent.card.method))
    asked = _asked(given, parent)
    looked_at = (
        plan.read(Path(given.prompts)) if given.prompts else [p for p in prompts.load() if p.set == "colour"][::4]
    )
    rewards = [reward.load(Path(place)) for place in given.reward or ["assets/emoji-reward"]]
    settings, _, _ = distill.preset(given.backbone)
    backbone = distill.loader(given.backbone)()
    data = training.opener(given.data, Path("runs/distill") / Path(given.backbone).name)(backbone)
    objective = refl.Refinement(
        backbone, data, parent, rewards, settings, asked, picker=reward.load(Path(given.picker)),
        prompts=[p.text for p in looked_at],
        structure=structure.Outline(Path(given.segmenter)) if given.structure else None,
    )  # fmt: skip
    if given.checkpointing:
        objective.roles.checkpointing()
    path = folder / f"{name}-{parent.card.segments}.safetensors"
    made = refl.run(objective, _refining(given), Path(given.runs) / path.stem, path, name)
    told = f"the picker says {made.look.value:.3f}, of the parent {made.before:.3f}"
    yield f"{path}: after {made.look.step} updates {told}"


def _asked(given: argparse.Namespace, parent: AdapterFile) -> Asked:
    from hypersd.feedback import loop
    from hypersd.feedback.refl import RANK, Asked, learned_rank

    rank = learned_rank(parent.card) or RANK if given.rank is None else given.rank
    return Asked(loop.steps_for(parent, given.steps), given.mode, real_number(given.weight, "weight", 0.0, 100.0),
                 structure=getattr(given, "structure", 0.0), rank=rank)  # fmt: skip


def _refining(given: argparse.Namespace) -> Recipe:
    from hypersd.feedback import refl

    return refl.RECIPE if given.updates is None else replace(refl.RECIPE, updates=given.updates)


def loop_arguments(parser: argparse.ArgumentParser) -> None:
    _refining_arguments(parser)
    _votes_arguments(parser)
    parser.add_argument("--runs", default="runs/loop", help="folder of all that lies on the way (default: %(default)s)")


def loop_run(given: argparse.Namespace) -> Lines:
    from hypersd import distill
    from hypersd.adapters import beside, found, named
    from hypersd.emoji import prompts, training
    from hypersd.feedback import loop

    folder = Path(given.out) if given.out else beside(given.backbone)[1]
    parent = named(found(folder), given.parent)
    own = [p.text for p in prompts.load() if p.set == "colour"] if given.backbone == "emoji" else []
    settings = loop.Settings(
        _asked(given, parent),
        least=whole_number(given.least, "least", 1, MANY),
        annotators=_annotators(given),
        prompts=tuple(own[::4]),
        unseen=tuple(own[2::4]),
        refine=_refining(given),
    )
    store, study = _study_of(given)
    cached = Path("runs/distill") / Path(given.backbone).name
    parts = (distill.loader(given.backbone), training.opener(given.data, cached), settings, Path(given.runs), folder)
    learned = distill.preset(given.backbone).settings
    yield from loop.run(store, study, Path(given.images), parent, *parts, training=learned)


ACTIONS = {
    "reward": Action(reward_arguments, reward_run),
    "segmenter": Action(segmenter_arguments, segmenter_run),
    "refine": Action(refine_arguments, refine_run),
    "loop": Action(loop_arguments, loop_run),
}
