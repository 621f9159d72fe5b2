"""The autoencoder's second half of training: the decoder alone, while the denoiser already learns.

    python -m hypersd emoji decoder

The encoder is frozen, so cached latents stay valid; only how they are turned into pixels gets better. It sees latents
as the denoiser makes them: posterior means, slightly noisy. To the autoencoder's loss comes each crop's root mean
square error, of which PSNR is the logarithm: L1 alone aims at medians, and leaves PSNR lying at soft edges.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from hypersd.emoji import artwork
from hypersd.emoji.autoencoder import Reconstruction, network, picture_loss
from hypersd.train import Recipe, Run, Step, mixed

NOISE = 0.05  # of the latents' unit deviation
ROOT_SQUARE, FLOOR = 1.0, 1e-4  # the floor (40 dB) keeps empty crops from taking over
RECIPE = Recipe(
    updates=5000, batch=16, lr=1e-3, warmup=200, cooldown=2500, weight_decay=0.01, ema=0.998, precision="bf16"
)


class Decoding(Reconstruction):
    """The objective: reconstruct crops from frozen, slightly noisy latents."""

    def __init__(self, folder: Path, start: Path, recipe: Recipe = RECIPE) -> None:
        super().__init__(folder, recipe)
        self.vae = AutoencoderKL.from_pretrained(start, torch_dtype=torch.float32).train()
        self.vae.encoder.requires_grad_(False)
        self.vae.quant_conv.requires_grad_(False)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "decoder_only": True, "noise": NOISE, "root_square": ROOT_SQUARE}

    def losses(self, step: Step) -> Iterator[tuple[str, Tensor]]:
        x = self.crops(step)
        with mixed("cpu", self.recipe.precision == "bf16"):
            with torch.no_grad():
                z = self.vae.encode(x).latent_dist.mode().float()
            z = z + NOISE * torch.randn(z.shape, generator=step.generator("latent"))
            decoded = self.vae.decode(z).sample.float()
        rms = ((decoded - x).square().flatten(1).mean(1) + FLOOR).sqrt().mean()
        yield "autoencoder", picture_loss(decoded, x) + ROOT_SQUARE * rms


def make(runs: Path, *, minutes: float | None = None) -> None:
    """Train, or go on training, what `emoji autoencoder` exported; ends with the folder `decoder/export`.

    Raises:
        ArtworkError: there is no trained autoencoder yet.
    """
    start = runs / "autoencoder" / "export"
    if not start.exists():
        raise artwork.ArtworkError(f"no weights in {start}; make them with: python -m hypersd emoji autoencoder")
    run = Run(Decoding(runs / "artwork", start), RECIPE, runs / "decoder")
    run.advance(minutes=minutes)
    copy = network()
    copy.load_state_dict(run.average["autoencoder"])
    copy.to(torch.float16).save_pretrained(runs / "decoder" / "export")
