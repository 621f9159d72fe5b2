"""Frozen prompts in rows, methods at step counts in columns, one noise a row: a sheet on which nothing was picked.

python -m hypersd sheet --arms base@25,hyper@1,hyper@4 --sets seen --limit 8 --out sheet.png
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hypersd.backbone import load_best
from hypersd.evaluate.plan import Arm, Plan, arm
from hypersd.generate import draw
from hypersd.methods import find
from hypersd.pictures import Sheet, check_png_path, save_sheet
from hypersd.records import InputError

WIDEST = 12  # columns


def arms(text: str) -> list[Arm]:
    """Columns as they are typed, such as "base@25,hyper@1".

    Raises:
        InputError: one has no step count, or there are none or too many.
    """
    found = [arm(part.strip()) for part in text.split(",") if part.strip()]
    if not 1 <= len(found) <= WIDEST:
        raise InputError(f"a sheet has 1 to {WIDEST} columns, got {len(found)}; give --arms with commas")
    return found


def make(plan: Plan, columns: Sequence[Arm], out: Path, backbone: str, **holding: Any) -> None:
    """Draw the plan's prompts in these columns and write the sheet, its provenance inside. `holding` is `load_best`'s.

    Raises:
        InputError: a method is unknown here or was not made for so many steps, or the path cannot be written.
    """
    out, methods = check_png_path(out), dict(plan.methods)
    squares = [
        (plan.request(number, 0, arm), find(arm.method, methods))
        for number in range(len(plan.prompts))
        for arm in columns
    ]
    for request, method in squares[: len(columns)]:
        method.check(request)
    model = load_best(backbone, **holding)
    panels = [draw(model, request, method) for request, method in tqdm(squares, desc="sheet", unit="picture")]
    heads = [f"{methods[arm.method].title}, {arm.steps}" for arm in columns]
    rows = [prompt.text for prompt in plan.prompts]
    save_sheet(Sheet(panels, columns=len(columns), rows=rows, heads=heads), out)
