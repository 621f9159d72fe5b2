"""Put the trained parts together: `assets/emoji-sd`, a folder that stock diffusers loads, in fp16 safetensors.

python -m hypersd emoji assemble
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from hypersd.backbone import write_manifest
from hypersd.emoji import artwork, teacher

ASSETS = artwork.MANIFEST.parent


def make(runs: Path, *, minutes: float | None = None, assets: Path = ASSETS) -> None:
    """Replace `assets/emoji-sd` with the exported parts under `runs`, whole or not at all.

    Raises:
        ArtworkError: a part has not been trained; the message names its command.
    """
    parts = {part: runs / part / "export" for part in ("autoencoder", "text", "teacher")}
    if (runs / "decoder" / "export").exists():
        parts["autoencoder"] = runs / "decoder" / "export"  # the same encoder, a better decoder
    for part, folder in parts.items():
        if not any(folder.rglob("*.safetensors")):
            raise artwork.ArtworkError(f"no weights in {folder}; make them with: python -m hypersd emoji {part}")
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(parts["autoencoder"], torch_dtype=torch.float16),
        text_encoder=CLIPTextModel.from_pretrained(parts["text"] / "text_encoder", dtype=torch.float16),
        tokenizer=CLIPTokenizer.from_pretrained(parts["text"] / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(parts["teacher"], torch_dtype=torch.float16),
        scheduler=teacher.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    staging, final, old = assets / ".emoji-sd.new", assets / "emoji-sd", assets / ".emoji-sd.old"
    for folder in (staging, old):
        shutil.rmtree(folder, ignore_errors=True)
    pipeline.save_pretrained(staging)
    write_manifest(staging)
    if final.exists():
        os.replace(final, old)
    os.replace(staging, final)
    shutil.rmtree(old, ignore_errors=True)
