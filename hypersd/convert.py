"""A LoRA file with another program's names, at another strength, or put on top of another one.

    python -m hypersd convert tscd-4 --kohya --out comfy.safetensors
    python -m hypersd convert feedback.safetensors --onto tscd-4 --scale 0.5 --out half.safetensors

What feedback taught a LoRA lies in its run's folder as feedback.safetensors: on top of its parent at a scale of 1 it is
what `refine` left, at 0 the parent, and in between as much of it as is liked.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from hypersd import adapters
from hypersd.adapters import AdapterFile
from hypersd.feedback.refl import added
from hypersd.records import InputError, real_number


def convert(
    file: AdapterFile, out: Path, *, scale: object = 1.0, onto: AdapterFile | None = None, kohya: bool = False
) -> AdapterFile:
    """Write `scale` times a LoRA, beside the ranks of `onto` if that is given, which then names the method and the row.

    Raises:
        InputError: the scale is not from -10 to 10, both were trained on different bases, or `out` is one of them.
        AdapterError: it could not be read or written.
    """
    strength = real_number(scale, "scale", -10.0, 10.0)
    if out.resolve() in {given.path.resolve() for given in (file, onto) if given}:
        raise InputError(f"{out} is what is read; choose another name for what is written")
    if onto and onto.card.base_sha256 != file.card.base_sha256:
        raise InputError(f"{file.path.name} and {onto.path.name} were trained on different bases; they do not add up")
    lora = _times(adapters.load(file.path), strength)
    made = {"converted": {"lora": file.sha256, "scale": strength, "onto": onto.sha256 if onto else ""}}
    card = replace(file.card, recipe={**file.card.recipe, **made})
    if onto:
        # Both are drawn at the one scale that the card names.
        lora = added(adapters.load(onto.path), _times(lora, file.card.scale / onto.card.scale))
        card = replace(onto.card, rank=onto.card.rank + file.card.rank, recipe={**onto.card.recipe, **made})
    return adapters.save(out, lora, card, kohya=kohya)


def _times(lora: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    return {name: tensor * scale if name.endswith("lora_B") else tensor for name, tensor in lora.items()}
