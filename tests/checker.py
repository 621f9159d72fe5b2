"""Safety checkers of the published architecture, tiny and random, whose verdict is known."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig


def network(concepts: float = 2.0, care: float = 2.0) -> StableDiffusionSafetyChecker:
    """Thresholds of the cosine: above 1 nothing is flagged, below -1 everything."""
    part = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": 30, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "projection_dim": 8}
    config = CLIPConfig(
        vision_config={**part, "image_size": 28, "patch_size": 14, "projection_dim": 8},
        text_config={**part, **text}, projection_dim=8,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = StableDiffusionSafetyChecker(config)
        for embeds in (found.concept_embeds, found.special_care_embeds):
            embeds.data.normal_()
        torch.nn.init.normal_(found.visual_projection.weight)
    found.concept_embeds_weights.data.fill_(concepts)
    found.special_care_embeds_weights.data.fill_(care)
    return found


def folder(place: Path, concepts: float = 2.0) -> Path:
    network(concepts).save_pretrained(place)
    return place
