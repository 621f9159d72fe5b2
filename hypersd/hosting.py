"""Hugging Face's ZeroGPU: there a drawing borrows a GPU for some seconds; everywhere else nothing here does anything.

A borrowed GPU comes with a process of its own that inherits the model and sends back the finished panel. So on ZeroGPU
steps are not told while they are made: no progress, no strip of steps, and a stop takes effect after the picture.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

from hypersd.records import Panel, Request
from hypersd.sweep import MethodRow, calls

SECONDS, SECONDS_A_CALL, SECONDS_MAX = 5.0, 0.1, 60  # asked for generously: visitors have a few minutes a day


def gpu_draw(
    methods: Mapping[str, MethodRow], paint: Callable[..., Panel] | None = None
) -> Callable[..., Panel] | None:
    """A `draw` for the engine that borrows a GPU for each picture, or None where no GPUs are lent.

    Args:
        methods: the table of methods; a method travels by its name.
        paint: as `generate.draw`, which is the default.
    """
    lender = _lender()
    if lender is None:
        return None
    model: list[Any] = []  # read by the borrowed process, which is forked when it is full

    def painted(request: Request, name: str) -> Panel:
        return (paint or _generate())(model[0], request, methods[name])

    def seconds(request: Request, name: str) -> int:
        return min(SECONDS_MAX, math.ceil(SECONDS + SECONDS_A_CALL * calls(request, methods[name])))

    lent = lender.GPU(painted, duration=seconds)
    if lent is painted:  # the package is there, but this is not ZeroGPU
        return None

    def draw(backbone: Any, request: Request, method: MethodRow, *, on_step: Any = None) -> Panel:
        model[:] = [backbone]
        return lent(request, method.name)

    return draw


def _lender() -> Any:
    """The package `spaces`, which Hugging Face installs on its own machines; None elsewhere."""
    try:
        return importlib.import_module("spaces")
    except ImportError:
        return None


def _generate() -> Callable[..., Panel]:
    from hypersd import generate

    return generate.draw
