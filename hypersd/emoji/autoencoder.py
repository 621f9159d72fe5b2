"""The embedded model's autoencoder: 128 px pictures <-> 16 x 16 x 8 latents (diffusers' AutoencoderKL).

    python -m hypersd emoji autoencoder

Trained on random 64 px crops, which cost a quarter of a picture. The loss is L1 + 0.5 x gradient L1 + a small KL, and a
scale-equivariance term (EQ-VAE, arXiv 2502.09509): decoding latents at half size should give the picture at half size,
which makes the latents smooth and quicker to learn for the denoiser.

After training the latents are brought to zero mean and unit variance per channel by folding the statistics into
`quant_conv` and `post_quant_conv` (1 x 1 convolutions, so this is exact): `scaling_factor` is 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from hypersd.emoji import artwork
from hypersd.train import Recipe, Run, Step, mixed

CROP = 64  # pixels
RECIPE = Recipe(
    updates=4000, batch=16, lr=1e-3, warmup=200, cooldown=1300, weight_decay=0.01, ema=0.998, clip=1.0, precision="bf16"
)
GRADIENT, KL, EQUIVARIANCE = 0.5, 3e-4, 0.25


def network() -> AutoencoderKL:
    """2.6 M parameters: encode 0.44, decode 1.36 GMAC a picture."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=artwork.SIDE,
        scaling_factor=1.0,
    )


class Reconstruction:
    """The objective: reconstruct crops of the training pictures."""

    def __init__(self, folder: Path, recipe: Recipe = RECIPE) -> None:
        pictures, _, rows = artwork.load(folder)
        self.pictures, self.recipe = pictures, recipe
        self.train = np.flatnonzero([r.split == "train" for r in rows])
        self.held_out = np.flatnonzero([r.split in ("concept", "composition") for r in rows])
        torch.manual_seed(recipe.seed)
        self.vae = network().train()

    def modules(self) -> dict[str, nn.Module]:
        return {"autoencoder": self.vae}

    def describe(self) -> dict[str, Any]:
        return {"crop": CROP, "gradient": GRADIENT, "kl": KL, "equivariance": EQUIVARIANCE, "pictures": len(self.train)}

    def losses(self, step: Step) -> Iterator[tuple[str, Tensor]]:
        x = self.crops(step)  # [batch, 3, 64, 64] in -1..1
        with mixed("cpu", self.recipe.precision == "bf16"):
            posterior = self.vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=step.generator("posterior"))
            z = posterior.mean + posterior.std * noise
            decoded = self.vae.decode(z).sample.float()
            half = slice(0, len(x) // 2)
            small = self.vae.decode(F.avg_pool2d(z[half], 2)).sample.float()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        yield (
            "autoencoder",
            (picture_loss(decoded, x) + KL * divergence + EQUIVARIANCE * picture_loss(small, F.avg_pool2d(x[half], 2))),
        )

    def crops(self, step: Step) -> Tensor:
        """Random 64 px crops, half of them mirrored. float [batch, 3, 64, 64] in -1..1"""
        generator = step.generator("crop")
        rows = self.train[step.rows(len(self.train)).numpy()]
        corners = torch.randint(0, artwork.SIDE - CROP + 1, (len(rows), 2), generator=generator).tolist()
        mirrored = torch.rand(len(rows), generator=generator) < 0.5
        cut = [self.pictures[r, y : y + CROP, x : x + CROP] for r, (y, x) in zip(rows, corners, strict=True)]
        x = to_float(np.stack(cut))
        return torch.where(mirrored[:, None, None, None], x.flip(-1), x)

    @torch.inference_mode()
    def sheet(self, folder: Path, step: int) -> dict[str, float]:
        """Held-out pictures above their reconstructions; PSNR in dB over 64 whole held-out pictures."""
        rows = self.held_out[np.linspace(0, len(self.held_out) - 1, 64).astype(int)]
        x = to_float(self.pictures[rows])
        y = torch.cat([reconstruct(self.vae, part) for part in x.split(16)])
        save_grid(
            torch.cat([t for i in range(0, 32, 8) for t in (x[i : i + 8], y[i : i + 8])]), folder / "sheet.png", 8
        )
        return {"psnr_db": psnr_db(x, y)}


def picture_loss(y: Tensor, x: Tensor) -> Tensor:
    """L1 plus L1 of horizontal and vertical differences, which keeps outlines sharp."""
    e = y - x
    return e.abs().mean() + GRADIENT * (e.diff(dim=-1).abs().mean() + e.diff(dim=-2).abs().mean())


def reconstruct(vae: AutoencoderKL, x: Tensor) -> Tensor:
    return vae.decode(vae.encode(x).latent_dist.mode()).sample


def psnr_db(x: Tensor, y: Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB; x and y float [n, 3, h, w] in -1..1."""
    mse = ((x - y.clamp(-1, 1)) / 2).square().flatten(1).mean(1)
    return float((-10 * torch.log10(mse.clamp_min(1e-12))).mean())


def to_float(pictures: np.ndarray) -> Tensor:
    """uint8 [n, h, w, 3] -> float [n, 3, h, w] in -1..1"""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def save_grid(x: Tensor, path: Path, columns: int) -> None:
    """float [n, 3, h, w] in -1..1 as one PNG."""
    n, _, h, w = x.shape
    rows = math.ceil(n / columns)
    canvas = torch.full((rows * h, columns * w, 3), 255, dtype=torch.uint8)
    for i, picture in enumerate(((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)):
        top, left = i // columns * h, i % columns * w
        canvas[top : top + h, left : left + w] = picture
    Image.fromarray(canvas.numpy()).save(path)


@torch.inference_mode()
def encode_all(vae: AutoencoderKL, pictures: np.ndarray, batch: int = 64) -> Tensor:
    """Posterior means of all pictures. float32 [n, 8, 16, 16]"""
    parts = [
        vae.encode(to_float(pictures[i : i + batch])).latent_dist.mode()
        for i in tqdm(range(0, len(pictures), batch), desc="encode", unit="batch")
    ]
    return torch.cat(parts)


@torch.no_grad()
def normalise(vae: AutoencoderKL, latents: Tensor) -> None:
    """Fold the per-channel mean and deviation of `latents` [n, c, h, w] into the network, in place and exactly.

    quant_conv gives (mean, logvar): mean -> (mean - m) / s, logvar -> logvar - 2 log s; post_quant_conv undoes it.
    """
    channels = latents.shape[1]
    m, s = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:channels] /= s[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - m) / s
    quant.bias[channels:] -= 2 * s.log()
    post.bias += post.weight[:, :, 0, 0] @ m
    post.weight *= s[None, :, None, None]


def make(runs: Path, *, minutes: float | None = None) -> None:
    """Train, or go on training; ends with the folder `autoencoder/export` holding averaged, normalised weights."""
    objective = Reconstruction(runs / "artwork")
    run = Run(objective, RECIPE, runs / "autoencoder")
    run.advance(minutes=minutes)
    copy = network()
    copy.load_state_dict(run.average["autoencoder"])
    normalise(copy.eval(), encode_all(copy, objective.pictures[objective.train]))
    copy.to(torch.float16).save_pretrained(runs / "autoencoder" / "export")
