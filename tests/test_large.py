"""Stable Diffusion 1.5's true architecture with random weights: one update, one comparison. Slow, and large.

One by one they say what each takes: `python -m pytest -n 0 -m slow -s tests/test_large.py -k update`, or `-k methods`.
"""

from __future__ import annotations

import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

from hypersd.backbone import Backbone
from hypersd.cost import CONFIGS
from hypersd.distill import Distillation, preset
from hypersd.generate import draw
from hypersd.methods import METHODS, discover
from hypersd.muon import has_bfloat16
from hypersd.plan import MadeUp, counted
from hypersd.records import Request
from hypersd.schedule import Schedule
from hypersd.train import Recipe, Run


def sd15() -> Any:
    """The network with random weights, in bfloat16 where there are units for it; text states are random too."""
    from diffusers import UNet2DConditionModel

    dtype = torch.bfloat16 if has_bfloat16("cpu") else torch.float32
    unet = UNet2DConditionModel(**CONFIGS["sd15"]).to(dtype)
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    return SimpleNamespace(
        name="sd15",
        unet=unet,
        schedule=Schedule.from_config(config),
        device=torch.device("cpu"),
        dtype=dtype,
        latent_shape=(4, 64, 64),
        network_sha256="random",
        embed=lambda texts: torch.randn(len(texts), 77, 768, generator=torch.Generator().manual_seed(0)).to(dtype),
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
    assert told("an update of one latent") < 16


def told(what: str) -> float:
    """The peak of this process's memory in GB, said aloud: the figure is what these tests are run for."""
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{what}: peak memory {peak_gb:.1f} GB")  # noqa: T201
    return peak_gb


@pytest.mark.slow
def test_four_methods_at_full_size(tmp_path: Path) -> None:
    """One comparison, each method in one step: the files in half precision, the arithmetic in float32, 512 pixels."""
    folder = full(tmp_path / "sd15")
    backbone = Backbone.load(folder)
    assert backbone.picture_px == 512
    files = tiny.adapters(folder, tmp_path / "lora", rank=4, only=("lcm", "tcd", "hyper"))
    table = discover(files, backbone.network_sha256)
    assert list(table) == ["base", "lcm", "tcd", "hyper"]
    seen = {}
    for method in table.values():
        panel = draw(backbone, Request("a happy cat", seed=1, steps=1), method)
        seen[method.name] = panel.pixels
        print(f"{method.name}: {panel.seconds:.0f} s, {panel.nfe} NFE")  # noqa: T201
    assert len(set(seen.values())) == 4
    assert told("four methods") < 20


def full(folder: Path) -> Path:
    """Stable Diffusion 1.5's network, text encoder and autoencoder with random weights, as its makers lay it out."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        max_position_embeddings=77, projection_dim=768,
    )  # fmt: skip
    vae = AutoencoderKL(
        sample_size=512, block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, timestep_spacing="trailing",
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=vae.half(), text_encoder=CLIPTextModel(text).half(), tokenizer=tiny.tokenizer(),
        unet=UNet2DConditionModel(**CONFIGS["sd15"]).half(),
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder
