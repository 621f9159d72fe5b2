"""python -m hypersd reward, segmenter, refine, loop: what each takes and does; the lines to print, as they come about.

What an action needs is imported when it runs, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hypersd.records import InputError, whole_number

if TYPE_CHECKING:
    from hypersd.adapters import AdapterFile
    from hypersd.feedback.refl import Asked, Base
    from hypersd.feedback.structure import Structure
    from hypersd.study.definition import Study
    from hypersd.study.votes import Store
    from hypersd.train import Recipe

Lines = Iterator[str]
MANY = 10**9
CHANGED = {  # of the preset's recipe
    "updates": "at most so many",
    "batch": "latents an update",
    "accumulate": "micro-batches an update: less memory, the same gradient",
}


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
    parser.add_argument("--weight", default=0.05, help="of the rewards (default: %(default)s)")
    parser.add_argument("--rank", type=int, help="of the feedback's LoRA (default: 8, or what the parent has already)")
    parser.add_argument("--pictures", default=4, help="of each batch, decoded for the rewards (default: %(default)s)")
    parser.add_argument("--lr", type=float, help="learning rate (default: the preset's)")
    for option, what in CHANGED.items():
        parser.add_argument(f"--{option}", type=int, help=f"{what} (default: the preset's)")
    parser.add_argument("--checkpointing", action="store_true", help="take less memory and more time: activations are "
                        "computed again instead of kept")  # fmt: skip
    parser.add_argument("--out", help="folder of the LoRA files (default: beside the backbone, where the app looks)")


def refine_arguments(parser: argparse.ArgumentParser) -> None:
    _refining_arguments(parser)
    parser.add_argument("--reward", action="append", default=[], help="folder of a reward model or of a scorer; may be "
                        "given more than once (default: assets/emoji-reward)")  # fmt: skip
    parser.add_argument("--picker", required=True, help="folder of a reward that is not optimised and picks the update")
    parser.add_argument("--prompts", help="what the picker looks at and nothing learns from: a text file, one prompt a "
                        "line (default: the embedded model's)")  # fmt: skip
    parser.add_argument("--structure", default=0.0, help="weight of the structure loss (default: none)")
    parser.add_argument("--likeness", default=0.0, help="weight of the likeness of all drawings together to real "
                        "pictures, with --mode rollout (default: none)")  # fmt: skip
    parser.add_argument("--segmenter", default="assets/emoji-segmenter", help="of the structure loss: ours, or a "
                        "Mask2Former or MaskFormer, a folder or on the hub (default: %(default)s)")  # fmt: skip
    parser.add_argument("--runs", default="runs/refine", help="folder of the run (default: %(default)s)")
    parser.add_argument("--name", help="of its row in the app (default: the parent's and -refined)")


def refine_run(given: argparse.Namespace) -> Lines:
    from hypersd import distill
    from hypersd.feedback import refl, reward

    folder, parent, asked = _parent(given)
    name = distill.check_name(given.name or f"{parent.card.name}-refined", distill.find(parent.card.method))
    path = folder / f"{name}-{parent.card.segments}.safetensors"
    runs = Path(given.runs) / path.stem
    for place in (folder, runs):
        distill.check_folder(place)
    texts = _looked_at(given.backbone, given.prompts)
    recipe = _recipe(given)
    find = _segmenter(given, asked, parent)
    *rewards, picker = (reward.load(Path(place)) for place in (*_rewards(given), given.picker))
    objective = _base(given).refinement(parent, rewards, asked, recipe, picker=picker, prompts=texts, structure=find)
    made = refl.run(objective, recipe, runs, path, name)
    told = f"the picker says {made.look.value:.3f}, of the parent {made.before:.3f}"
    yield f"{path}: after {made.look.step} updates {told}"
    if made.strength is not None:
        best, error = made.strength
        so = f"python -m hypersd convert {shlex.quote(str(made.file.path))} --scale {best:.2f} --out FILE"
        what = so if abs(best - 1) > 2 * error else "no other is beyond chance"
        yield f"its drawings are most like real pictures at {best:.2f} ± {error:.2f} of its strength; {what}"


def _looked_at(backbone: str, file: str | None) -> list[str]:
    """The prompts that the picker judges by. Raises InputError: none are given, and the base has none of its own."""
    from hypersd.evaluate import plan

    if file:
        return [prompt.text for prompt in plan.read(Path(file))]
    if backbone != "emoji":
        raise InputError(
            f"{backbone[:80]} has no prompts of its own for the picker; write some that are no captions of your data, "
            "one a line, and give the file: --prompts FILE"
        )
    return _own()[::4]


def _own() -> list[str]:
    """The embedded model's prompts that nothing is trained on."""
    from hypersd.emoji import prompts

    return [prompt.text for prompt in prompts.load() if prompt.set == "colour"]


def _rewards(given: argparse.Namespace) -> list[str]:
    """Where the rewards are that are optimised. Raises InputError: the picker is one of them."""
    rewards = given.reward or ["assets/emoji-reward"]
    if Path(given.picker).resolve() in [Path(place).resolve() for place in rewards]:
        raise InputError(
            f"--picker {given.picker} is a reward that is optimised, so it would like whatever was made; choose "
            "another, such as assets/emoji-scorer-a"
        )
    return rewards


def _segmenter(given: argparse.Namespace, asked: Asked, parent: AdapterFile) -> Structure | None:
    """What the structure loss goes by, if one is asked for and the data can be asked for what it needs."""
    if not asked.structure:
        return None
    from hypersd.distill import find
    from hypersd.emoji import training
    from hypersd.feedback import refl, structure

    loaded = structure.load(given.segmenter, given.backbone)
    refl.check_structure(asked, find(parent.card.method), loaded.asks in training.tells(given.data))
    return loaded


def _parent(given: argparse.Namespace) -> tuple[Path, AdapterFile, Asked]:
    """The folder of LoRA files, the one that is refined, and for what."""
    from hypersd.adapters import beside, found, named
    from hypersd.feedback import loop
    from hypersd.feedback.refl import RANK, Asked, learned_rank

    folder = Path(given.out) if given.out else beside(given.backbone)[1]
    parent = named(found(folder), given.parent)
    rank = learned_rank(parent.card) or RANK if given.rank is None else given.rank
    steps = loop.steps_for(parent, given.steps)
    more = {name: getattr(given, name, 0.0) for name in ("structure", "likeness")}
    return folder, parent, Asked(steps, given.mode, given.weight, pictures=given.pictures, rank=rank, **more)


def _base(given: argparse.Namespace) -> Base:
    from hypersd import distill
    from hypersd.emoji import training
    from hypersd.feedback.refl import Base

    open_data = training.opener(given.data, Path("runs/distill") / Path(given.backbone).name)
    settings = distill.preset(given.backbone).settings
    return Base(distill.loader(given.backbone), open_data, settings, given.checkpointing)


def _recipe(given: argparse.Namespace) -> Recipe:
    from hypersd.feedback import refl

    changed = {name: value for name in ("lr", *CHANGED) if (value := getattr(given, name)) is not None}
    return replace(refl.RECIPE, **changed)


def loop_arguments(parser: argparse.ArgumentParser) -> None:
    _refining_arguments(parser)
    _votes_arguments(parser)
    parser.add_argument("--runs", default="runs/loop", help="folder of all that lies on the way (default: %(default)s)")


def loop_run(given: argparse.Namespace) -> Lines:
    from hypersd.feedback import loop

    folder, parent, asked = _parent(given)
    own = _own() if given.backbone == "emoji" else []
    settings = loop.Settings(
        asked,
        least=whole_number(given.least, "least", 1, MANY),
        annotators=_annotators(given),
        prompts=tuple(own[::4]),
        unseen=tuple(own[2::4]),
        refine=_recipe(given),
    )
    store, study = _study_of(given)
    yield from loop.run(store, study, Path(given.images), parent, _base(given), settings, Path(given.runs), folder)


ACTIONS = {
    "reward": Action(reward_arguments, reward_run),
    "segmenter": Action(segmenter_arguments, segmenter_run),
    "refine": Action(refine_arguments, refine_run),
    "loop": Action(loop_arguments, loop_run),
}
