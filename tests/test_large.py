"""One real update at Stable Diffusion 1.5's true architecture: slow, and 8 GB of memory."""

from __future__ import annotations

import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hypersd.distill import Distillation, preset
from hypersd.methods import METHODS
from hypersd.plan import MadeUp, counted
from hypersd.schedule import Schedule
from hypersd.train import Recipe, Run


def sd15() -> Any:
    """The network with random weights in bfloat16; text states are random too, as nothing encodes them here."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).to(torch.bfloat16)
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    return SimpleNamespace(
        name="sd15",
        unet=unet,
        schedule=Schedule.from_config(config),
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        latent_shape=(4, 64, 64),
        network_sha256="random",
        embed=lambda texts: torch.randn(len(texts), 77, 768, generator=torch.Generator().manual_seed(0)).bfloat16(),
    )


@pytest.mark.slow
def test_an_update_of_the_last_stage_at_full_size(tmp_path: Path) -> None:
    backbone = sd15()
    assert sum(p.numel() for p in backbone.unet.parameters()) == 859_520_964
    method = METHODS["tscd"]
    stage = method.stages[1]  # both distances
    objective = Distillation(backbone, MadeUp.of(backbone, 1), method, stage, preset("sd15").settings)
    run = Run(objective, Recipe(updates=1, batch=1, lr=1e-5), tmp_path)
    with counted(backbone.unet) as calls:
        entry = run.update()
    assert entry["student/norm"] > 0 and entry["adversary/norm"] > 0
    assert (calls["with gradient"], calls["without gradient"]) == (2, 3)  # the adversary looks at fake and real
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    assert peak_gb < 12
    print(f"peak memory {peak_gb:.1f} GB")  # noqa: T201 - the figure is what this test is run for
