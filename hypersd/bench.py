"""How fast it is, in ratios: `python -m hypersd bench`. Everything interleaved in one process, medians of rounds.

The limit of a drawing is its bare network calls and one decoding; what a Panel takes beyond that is ours to answer for.
Timings vary between machines and minutes, so quote the ratios.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

from hypersd.backbone import Backbone
from hypersd.generate import draw
from hypersd.methods import find
from hypersd.records import Request


def run(name: str, rounds: int = 7) -> dict[str, float]:
    """Seconds of each kind of work on backbone `name`, and the ratios that matter. Medians over `rounds`."""
    started = time.perf_counter()
    backbone = Backbone.load(name)
    figures = {"load_seconds": time.perf_counter() - started}
    started = time.perf_counter()
    draw(backbone, Request("a happy cat", 1, 25), find("base"))
    figures["first_picture_seconds"] = time.perf_counter() - started
    work = _work(backbone)
    taken: dict[str, list[float]] = {label: [] for label in work}
    for _ in tqdm(range(rounds), desc="bench", unit="round"):
        for label, call in work.items():
            started = time.perf_counter()
            call()
            taken[label].append(time.perf_counter() - started)
    figures |= {label: statistics.median(values) for label, values in taken.items()}
    for steps in (1, 25):
        limit = steps * figures["network_call_guided_seconds"] + figures["decode_seconds"]
        figures[f"picture_{steps}_steps_over_limit"] = figures[f"picture_{steps}_steps_seconds"] / limit
    figures["one_step_over_25_steps"] = figures["picture_1_steps_seconds"] / figures["picture_25_steps_seconds"]
    figures["peak_memory_gb"] = _peak_bytes() / 1e9
    return figures


def _work(backbone: Backbone) -> dict[str, Callable[[], Any]]:
    x, _ = backbone.noise(1)
    states = backbone.embed(["", "a happy cat"])

    @torch.inference_mode()
    def call() -> None:
        backbone.predict(torch.cat([x, x]), 500, states)

    return {
        "network_call_guided_seconds": call,
        "decode_seconds": lambda: backbone.decode(x),
        "picture_1_steps_seconds": lambda: draw(backbone, Request("a happy cat", 1, 1), find("base")),
        "picture_25_steps_seconds": lambda: draw(backbone, Request("a happy cat", 1, 25), find("base")),
    }


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux, bytes on macOS
