"""A LoRA file with another program's names, at another strength, or put on top of another one.

    python -m hypersd convert tscd-4 --kohya --out comfy.safetensors
    python -m hypersd convert feedback.safetensors --onto tscd-4 --scale 0.5 --out half.safetensors

What feedback taught a LoRA lies in its run's folder as feedback.safetensors: on top of its parent at a scale of 1 it is
what `refine` left, at 0 the parent before any feedback, and in between as much of it as is liked.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from hypersd import adapters
from hypersd.adapters import AdapterFile
from hypersd.distill import ORIGIN, inherited
from hypersd.feedback.refl import added, learned_rank, parted
from hypersd.records import Adapter, InputError, real_number


def convert(
    file: AdapterFile,
    out: Path,
    *,
    scale: object = 1.0,
    onto: AdapterFile | None = None,
    kohya: bool = False,
    name: str | None = None,
) -> AdapterFile:
    """Write `scale` times a LoRA, beside the ranks of `onto` if that is given, which then says what the card says.

    With `kohya` the scale that the card names is multiplied in: other programs do not read it. `name` is the row in
    the app, by default the one that it had.

    Raises:
        InputError: the scale is not from -10 to 10; both were trained on different bases, or stand under different
            licences; `out` is there already or ends in another way than .safetensors.
        AdapterError: a file could not be read or written.
    """
    strength = real_number(scale, "scale", -10.0, 10.0)
    if out.suffix != ".safetensors":
        raise InputError(f"{out} is no name for a LoRA file; choose one that ends in .safetensors")
    if out.exists():
        raise InputError(f"{out} is there already; choose another name, or remove it")
    lora, card = _times(adapters.load(file.path), strength), file.card
    if onto:
        lora, card = _on_top(lora, file, onto)
    made = {"lora": file.sha256, "scale": strength, "onto": onto.sha256 if onto else ""}
    card = replace(card, name=name or card.name, recipe={**card.recipe, "converted": made})
    if kohya:
        lora, card = _times(lora, card.scale), replace(card, scale=1.0)
    return adapters.save(out, lora, card, kohya=kohya)


def _on_top(lora: dict[str, Tensor], file: AdapterFile, onto: AdapterFile) -> tuple[dict[str, Tensor], Adapter]:
    if onto.card.base_sha256 != file.card.base_sha256:
        raise InputError(f"{file.path.name} and {onto.path.name} were trained on different bases; they do not add up")
    if not onto.card.scale:
        raise InputError(f"{onto.path.name} is drawn at a scale of 0, at which nothing on top of it would count")
    ours, theirs = (inherited(each.card, *ORIGIN) for each in (file, onto))
    if ours and theirs and ours != theirs:
        raise InputError(f"{file.path.name} and {onto.path.name} stand under different licences: {ours}, {theirs}")
    below, rank = adapters.load(onto.path), onto.card.rank
    recipe = {key: value for key, value in onto.card.recipe.items() if key != "asked"} | ours
    if learned_rank(file.card) == file.card.rank:  # feedback's part alone, of all turns: where those of `onto` were
        below, _ = parted(below, learned_rank(onto.card))
        rank -= learned_rank(onto.card)
        recipe["asked"] = file.card.recipe["asked"]
    # Both are drawn at the one scale that the card names.
    both = added(below, _times(lora, file.card.scale / onto.card.scale))
    return both, replace(onto.card, rank=rank + file.card.rank, recipe=recipe)


def _times(lora: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    return {name: tensor * scale if name.endswith("lora_B") else tensor for name, tensor in lora.items()}
