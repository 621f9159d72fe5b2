"""Drawing what a plan wants and reading it back: one PNG a picture, each with its provenance.

A picture is either whole or not there, so a run that was killed goes on where it was; pictures are equal whenever they
are drawn, so what a run measures does not depend on how often it was stopped. Several processes share the work.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hypersd.backbone import Backbone
from hypersd.evaluate.plan import Arm, Plan
from hypersd.generate import draw
from hypersd.pictures import read_png, save_png
from hypersd.records import InputError

TOGETHER = 24  # prompts


def path(folder: Path, arm: Arm, number: int, index: int) -> Path:
    """Where the `index`-th picture of prompt `number` lies."""
    return folder / "pictures" / str(arm) / f"{number:04d}-{index}.png"


def cells(plan: Plan) -> Iterator[tuple[Arm, int, int]]:
    """(arm, prompt, seed) of every picture. All methods draw some prompts before the next ones come, so that a run that
    is stopped early has something to compare, and a network that is not kept is not made again for each prompt."""
    prompts = range(len(plan.prompts))
    for first in prompts[::TOGETHER]:
        yield from product(plan.arms, prompts[first : first + TOGETHER], range(plan.seeds))


def possible(plan: Plan, backbone: Backbone) -> Plan:
    """The plan without the methods that cannot draw on this backbone, say because their adapter is not there; why not
    is told as a method's own refusal is."""
    problems: dict[str, str] = {}
    for method in {arm.method: None for arm in plan.arms if arm.method != plan.reference.method}:
        first = next(arm for arm in plan.arms if arm.method == method)
        try:
            draw(backbone, plan.request(0, 0, first), plan.methods[method])
        except InputError as problem:
            problems[method] = f"{method}: {problem}"
    arms = tuple(arm for arm in plan.arms if arm.method not in problems)
    return replace(plan, arms=arms, impossible=(*plan.impossible, *problems.values()))


def fill(plan: Plan, folder: Path, backbone: Backbone, process: int = 0, processes: int = 1) -> int:
    """Draw every picture that is not there yet, or those of this process's noises; returns how many.

    A process draws its noises by all arms, so that all processes have the same to do and none draws what another does.
    """
    mine = [cell for cell in cells(plan) if (cell[1] * plan.seeds + cell[2]) % processes == process]
    missing = [cell for cell in mine if not path(folder, *cell).exists()]
    for arm, number, index in tqdm(missing, desc="draw", unit="picture", disable=not missing):
        target = path(folder, arm, number, index)
        target.parent.mkdir(parents=True, exist_ok=True)
        panel = draw(backbone, plan.request(number, index, arm), plan.methods[arm.method])
        half = target.with_name(f".{target.stem}.{process}.png")
        save_png(panel, half)
        os.replace(half, target)
    return len(missing)


@dataclass(frozen=True)
class Drawn:
    """All pictures of one arm: pixels uint8 [prompts, seeds, h, w, 3], seconds [prompts, seeds] as they were drawn,
    network calls a picture, and the hash of the adapter that drew them."""

    pixels: Tensor
    seconds: np.ndarray
    nfe: int
    adapter_sha256: str | None


def read(plan: Plan, folder: Path, arm: Arm, base_sha256: str) -> Drawn:
    """The pictures of one arm, each checked against its own provenance and against the plan.

    Raises:
        InputError: a picture is missing, damaged, or was not drawn for this plan.
    """
    pixels, seconds, calls, adapters = [], [], set(), set()
    for number in range(len(plan.prompts)):
        for index in range(plan.seeds):
            file, request = path(folder, arm, number, index), plan.request(number, index, arm)
            try:
                panel = read_png(file)
            except InputError as problem:
                raise InputError(f"{file}: {problem}; delete it and run the same command again") from None
            found = (panel.prompt, panel.seed, panel.steps, panel.method, panel.base_sha256)
            if found != (request.prompt, request.seed, request.steps, arm.method, base_sha256):
                raise InputError(f"{file} was not drawn for this plan; delete it and run the same command again")
            pixels.append(np.frombuffer(panel.pixels, np.uint8).reshape(panel.height, panel.width, 3))
            seconds.append(panel.seconds)
            calls.add(panel.nfe)
            adapters.add(panel.adapter_sha256)
    if len(adapters) > 1 or len(calls) > 1:
        raise InputError(
            f"the pictures of {arm} in {folder} were drawn by several adapters; choose a new folder with --out"
        )
    shape = (len(plan.prompts), plan.seeds)
    stacked = torch.from_numpy(np.stack(pixels)).unflatten(0, shape)
    return Drawn(stacked, np.reshape(seconds, shape), calls.pop(), adapters.pop())
