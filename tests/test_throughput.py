"""Our training updates beside the usual LCM-LoRA update: the same task, fewer launches, one copy of the base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hypersd import throughput
from hypersd.distill import loader, preset
from hypersd.plan import MadeUp
from hypersd.throughput import Usual


@pytest.fixture(scope="module")
def content(tiny_folder: Path) -> dict[str, Any]:
    return throughput.run(str(tiny_folder), 3, batch=4)


def test_each_side_is_counted_and_timed(content: dict[str, Any]) -> None:
    """Four samples a latent on both sides, in four launches or in three; an adversary sees two more."""
    usual = {"with gradient": 1, "without gradient": 3, "samples": 16}
    assert {k: content["updates"]["cached"][k] for k in usual} == usual
    assert content["updates"]["online"] == content["updates"]["cached"]
    ours = {"with gradient": 1, "without gradient": 2, "samples": 16}
    for method in ("lcm", "tcd"):
        assert {k: content["updates"][method][k] for k in ours} == ours
    assert set(content["ratios"]) == {f"{m}-{u}" for m in throughput.OURS for u in ("cached", "online")}
    assert all(0 < row["low"] <= row["value"] <= row["high"] for row in content["ratios"].values())
    assert "the usual update, cached / tcd's" in throughput.table(content)


def test_ours_keeps_one_base_and_its_roles(content: dict[str, Any], tiny_folder: Path) -> None:
    base = sum(p.numel() * p.element_size() for p in loader(str(tiny_folder))().unet.parameters()) / 1e6
    usual, ours = content["updates"]["cached"]["parameter_mb"], content["updates"]["tcd"]["parameter_mb"]
    adapter = usual - 2 * base  # of the usual: two copies of the base, one adapter
    assert adapter > 0
    assert ours == pytest.approx(base + 2 * adapter)  # of ours: one base, student and average


@pytest.mark.parametrize("online", [True, False])
def test_the_usual_update_trains_its_adapter_only(tiny_folder: Path, online: bool) -> None:
    backbone = loader(str(tiny_folder))()
    settings, recipe, _ = preset(str(tiny_folder))
    usual = Usual(backbone, MadeUp.of(backbone, 4), settings, replace(recipe, batch=4, lr=1e-3), online=online)
    before = {name: p.detach().clone() for name, p in usual.student.named_parameters()}
    torch.manual_seed(0)
    losses = [usual.update() for _ in range(2)]
    assert all(loss > 0 for loss in losses)
    moved = {name for name, p in usual.student.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(".lora_" in name for name in moved)
    assert all(torch.equal(a, b) for a, b in zip(usual.teacher.parameters(), backbone.unet.parameters(), strict=True))
