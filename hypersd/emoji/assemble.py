"""Put the trained parts together: `assets/emoji-sd`, a folder that stock diffusers loads, in fp16 safetensors.

python -m hypersd emoji assemble
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from hypersd.backbone import Backbone
from hypersd.emoji import artwork, autoencoder, teacher
from hypersd.folders import write_manifest

ASSETS = artwork.MANIFEST.parent


def make(runs: Path, *, minutes: float | None = None, assets: Path = ASSETS) -> None:
    """Replace `assets/emoji-sd` with the exported parts under `runs`, whole or not at all.

    Raises:
        ArtworkError: a part has not been trained; the message names its command.
    """
    parts = {part: runs / part / "export" for part in ("autoencoder", "text", "teacher")}
    if (runs / "decoder" / "export").exists():
        parts["autoencoder"] = runs / "decoder" / "export"  # the same encoder, a better decoder
    if not parts["teacher"].exists():
        parts["teacher"] = runs / "teacher" / "start"  # as `restore` took it out, not trained further
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
    # transformers writes tokenizer.json alone; programs that read vocab.json and merges.txt get them too
    shutil.copytree(parts["text"] / "tokenizer", staging / "tokenizer", dirs_exist_ok=True)
    for file in staging.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors leaves them readable to nobody else
    write_manifest(staging)
    if final.exists():
        os.replace(final, old)
    os.replace(staging, final)
    shutil.rmtree(old, ignore_errors=True)
    sheet = draw(Backbone.load(final), teacher.SHEET_PROMPTS, "sheet")
    autoencoder.save_grid(autoencoder.to_float(sheet), assets / "emoji-sheet.png", 8)


@torch.inference_mode()
def draw(backbone: Backbone, prompts: Sequence[str], title: str, seed: int = 1, batch: int = 16) -> np.ndarray:
    """One picture a prompt, 25 steps, all from one stream of noise. uint8 [n, 128, 128, 3]"""
    generator, empty, done = torch.Generator().manual_seed(seed), backbone.embed([""]), []
    for i in tqdm(range(0, len(prompts), batch), desc=title, unit="batch"):
        states = backbone.embed(prompts[i : i + batch])
        latents = teacher.sample(backbone.unet, backbone.schedule, states, empty, generator)
        done.append(backbone.decode(latents).numpy())
    return np.concatenate(done)
