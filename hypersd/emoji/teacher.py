"""The embedded model's denoiser: a 17 M UNet2DConditionModel on 16 x 16 x 8 latents, v-prediction.

    python -m hypersd emoji teacher

Latents and text states are computed once and cached, so an update is nothing but the network. Every picture comes once
an epoch with one of its captions; one in ten comes with the empty caption, for classifier-free guidance.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from hypersd.emoji import artwork, autoencoder
from hypersd.generate import grid, trajectory
from hypersd.methods import METHODS
from hypersd.schedule import Schedule
from hypersd.train import Recipe, Run, Step, mixed

RECIPE = Recipe(
    updates=2400,
    batch=128,
    lr=1e-3,
    warmup=100,
    cooldown=1600,
    weight_decay=0.01,
    ema=0.9995,
    clip=1.0,
    precision="bf16",
    optimizer="muon",
)
EMPTY = 0.10  # share of pictures that come without a caption
STYLED = 0.5  # share of captions that name their style
NOISE = (0.0, 1.0)  # mean and spread of the logit of the noise's share in training, see `noise_levels`
GUIDANCE, STEPS = 4.0, 25  # of the sample sheet

SHEET_PROMPTS = tuple(
    (  # noqa: SIM905 - a table of prompts reads better than a list of strings
        "grinning face, sad face, angry face, cat face, dog face, red heart, blue heart, rocket, "
        "pizza, red apple, banana, strawberry, hamburger, birthday cake, ice cream, hot beverage, "
        "automobile, bus, bicycle, sailboat, airplane, house, castle, snowman, "
        "cactus, sunflower, rose, mushroom, evergreen tree, rainbow, crescent moon, sun with face, "
        "penguin, owl, frog, fish, octopus, butterfly, lady beetle, snail, "
        "elephant, panda, lion, pig face, guitar, violin, drum, trumpet, "
        "soccer ball, basketball, trophy, gem stone, crown, top hat, high heeled shoe, glasses, "
        "ghost, robot, alien, skull, key, light bulb, alarm clock, wrapped gift"
    ).split(", ")
)


def network() -> UNet2DConditionModel:
    """16.8 M parameters, 0.53 GMAC a forward pass; cross-attention at 8 x 8 and 4 x 4."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        layers_per_block=1,
        block_out_channels=(64, 128, 256),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=256,
        attention_head_dim=4,
    )


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
    )


# -------------------------------------------------------------------------------------------------- the data


class CachedData:
    """Latents of every picture, text states of every caption, and which captions belong to which picture."""

    def __init__(self, run: Path) -> None:
        _, _, self.rows = artwork.load(run / "artwork")
        self.train = np.flatnonzero([r.split == "train" for r in self.rows])
        self.latents = torch.load(run / "latents.pt", weights_only=True)  # [n, 8, 16, 16]
        self.texts: list[str] = json.loads((run / "texts.json").read_text(encoding="utf-8"))
        self.states = np.load(run / "states.npy", mmap_mode="r")  # [texts, 32, 256] float16
        place = {text: i for i, text in enumerate(self.texts)}
        self.captions = [[place[c] for c in artwork.captions(r)] for r in self.rows]
        self.empty = place[""]

    def digest(self) -> str:
        key = hashlib.sha256(self.latents.numpy().tobytes())
        key.update(np.ascontiguousarray(self.states[:: max(1, len(self.states) // 64)]).tobytes())
        return key.hexdigest()[:16]


def cache(run: Path) -> None:
    """Encode every caption and every picture once; what an unchanged encoder has encoded before is kept."""
    if _stale(run / "states.npy", run / "text" / "export"):
        _, _, rows = artwork.load(run / "artwork")
        texts = sorted({"", *SHEET_PROMPTS, *(c for r in rows for c in artwork.captions(r))})
        (run / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
        np.save(run / "states.npy", encode_texts(run / "text" / "export", texts))
        _stamp(run / "states.npy", run / "text" / "export")
    if _stale(run / "latents.pt", run / "autoencoder" / "export"):
        pictures, _, _ = artwork.load(run / "artwork")
        vae = AutoencoderKL.from_pretrained(run / "autoencoder" / "export", torch_dtype=torch.float32)
        torch.save(autoencoder.encode_all(vae, pictures), run / "latents.pt")
        _stamp(run / "latents.pt", run / "autoencoder" / "export")


def _stale(path: Path, weights: Path) -> bool:
    """Whether `path` is missing or was made by other weights than those in the folder `weights`."""
    mark, digest = path.with_suffix(".made-by"), _weights_digest(weights)
    return not (path.exists() and mark.exists() and mark.read_text() == digest)


def _stamp(path: Path, weights: Path) -> None:
    path.with_suffix(".made-by").write_text(_weights_digest(weights))


@torch.inference_mode()
def encode_texts(folder: Path, texts: Sequence[str], batch: int = 256) -> np.ndarray:
    """States as StableDiffusionPipeline makes them: padded to the full length, no mask. float16 [n, 32, 256]"""
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True, dtype=torch.float32).eval()
    parts = []
    for i in tqdm(range(0, len(texts), batch), desc="captions", unit="batch"):
        tokens = tokenizer(list(texts[i : i + batch]), padding="max_length", truncation=True, return_tensors="pt")
        parts.append(encoder(tokens.input_ids)[0].to(torch.float16).numpy())
    return np.concatenate(parts)


def _weights_digest(folder: Path) -> str:
    files = sorted(folder.rglob("*.safetensors"))
    if not files:
        raise artwork.ArtworkError(
            f"no weights in {folder}; make them with: python -m hypersd emoji {folder.parent.name}"
        )
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


# --------------------------------------------------------------------------------------------- the objective


def noise_levels(schedule: Schedule) -> Tensor:
    """How likely training takes a timestep up to t, float64 [1000]: logit-normal in the noise's share.

    The share is sigma / (alpha + sigma), as in arXiv:2403.03206, section 3.1. Uniform timesteps spend half of the loss
    above t = 700, where a picture is a guess from its caption and the network learns the pictures by heart; this
    spreads the loss about evenly.
    """
    alpha, sigma = schedule.alphas_cumprod.double().sqrt(), (1 - schedule.alphas_cumprod.double()).sqrt()
    share = sigma / (alpha + sigma)
    below = torch.distributions.Normal(*NOISE).cdf(torch.logit(share))
    return (below / below[-1]).contiguous()


class Denoising:
    """The objective: predict v from noisy latents and a caption (arXiv:2202.00512)."""

    def __init__(self, run: Path, recipe: Recipe = RECIPE) -> None:
        self.run, self.recipe, self.data = run, recipe, CachedData(run)
        self.schedule = Schedule.from_config(scheduler().config)
        self.noise_levels = noise_levels(self.schedule)
        torch.manual_seed(recipe.seed)
        self.unet = network().train()
        self.start = run / "teacher" / "start"  # what `emoji restore` left there, if it did
        if self.start.exists():
            begun = UNet2DConditionModel.from_pretrained(self.start, torch_dtype=torch.float32)
            self.unet.load_state_dict(begun.state_dict())
        self.unet.set_attn_processor(AttnProcessor())  # quicker here than the fused kernel, whose backward is slow

    def modules(self) -> dict[str, nn.Module]:
        return {"unet": self.unet}

    def describe(self) -> dict[str, Any]:
        start = {"start": _weights_digest(self.start)[:16]} if self.start.exists() else {}
        return {"empty": EMPTY, "styled": STYLED, "noise": NOISE, "data": self._digest, **start}

    @cached_property
    def _digest(self) -> str:
        return self.data.digest()

    def losses(self, step: Step) -> Iterator[tuple[str, Tensor]]:
        generator = step.generator("denoise")
        rows = self.data.train[step.rows(len(self.data.train)).numpy()]
        x0 = self.data.latents[rows]  # [batch, 8, 16, 16]
        noise = torch.randn(x0.shape, generator=generator)
        # One timestep from each of `batch` equally likely slices: the same distribution, less variance between updates.
        u = (torch.arange(len(rows)) + torch.rand(len(rows), generator=generator, dtype=torch.float64)) / len(rows)
        t = torch.searchsorted(self.noise_levels, u[torch.randperm(len(rows), generator=generator)]).clamp(0, 999)
        states = self.states(rows, generator)
        with mixed("cpu", self.recipe.precision == "bf16"):
            output = self.unet(self.schedule.diffuse(x0, noise, t), t, states, return_dict=False)[0]
        yield "unet", (output.float() - self.schedule.target(x0, noise, t)).square().mean()

    def states(self, rows: np.ndarray, generator: torch.Generator) -> Tensor:
        """One caption a picture, drawn at random. float32 [batch, 32, 256]"""
        chance = torch.rand(len(rows), 3, generator=generator).tolist()
        chosen = []
        for row, (drop, style, other) in zip(rows, chance, strict=True):
            captions = self.data.captions[row]
            plain = captions[1:]
            chosen.append(
                self.data.empty if drop < EMPTY else captions[0] if style < STYLED else plain[int(other * len(plain))]
            )
        return torch.from_numpy(self.data.states[chosen].astype(np.float32))

    @torch.inference_mode()
    def sheet(self, folder: Path, step: int) -> dict[str, float]:
        """The fixed prompts with fixed noise at 25 steps; and the loss on held-out compositions, fixed noise."""
        texts = [self.data.texts.index(p) for p in SHEET_PROMPTS]
        states = torch.from_numpy(self.data.states[texts].astype(np.float32))
        empty = torch.from_numpy(self.data.states[[self.data.empty]].astype(np.float32))
        latents = sample(self.unet, self.schedule, states, empty, torch.Generator().manual_seed(1))
        vae = AutoencoderKL.from_pretrained(self.run / "autoencoder" / "export", torch_dtype=torch.float32)
        pictures = torch.cat([vae.decode(z).sample for z in latents.split(16)])
        autoencoder.save_grid(pictures, folder / "sheet.png", 8)
        return {"held_out_loss": self.held_out_loss()}

    def held_out_loss(self) -> float:
        rows = np.flatnonzero([r.split == "composition" for r in self.data.rows])
        generator = torch.Generator().manual_seed(2)
        x0 = self.data.latents[rows]
        noise, t = torch.randn(x0.shape, generator=generator), torch.randint(0, 1000, (len(rows),), generator=generator)
        states = torch.from_numpy(self.data.states[[self.data.captions[r][0] for r in rows]].astype(np.float32))
        output = self.unet(self.schedule.diffuse(x0, noise, t), t, states, return_dict=False)[0]
        return float((output - self.schedule.target(x0, noise, t)).square().mean())


def sample(
    unet: nn.Module,
    schedule: Schedule,
    states: Tensor,
    empty: Tensor,
    generator: torch.Generator,
    steps: int = STEPS,
    g: float = GUIDANCE,
    batch: int = 16,
) -> Tensor:
    """DDIM on many prompts at once, for sheets and measures. states [n, 32, 256] -> latents [n, 8, 16, 16]"""
    done, base = [], METHODS["base"]
    for part in states.split(batch):
        x_t = torch.randn(len(part), 8, 16, 16, generator=generator)
        both = torch.cat([empty.expand_as(part), part])

        def estimate(x_t: Tensor, t: int, both: Tensor = both) -> tuple[Tensor, Tensor]:
            unconditional, conditional = unet(torch.cat([x_t, x_t]), t, both, return_dict=False)[0].float().chunk(2)
            return schedule.split(unconditional + g * (conditional - unconditional), x_t, t)

        *_, last = trajectory(schedule, base, grid(schedule, base, steps), x_t, estimate)
        done.append(last.x)
    return torch.cat(done)


def make(runs: Path, *, minutes: float | None = None) -> None:
    """Train, or go on training; ends with the folder `teacher/export` holding the averaged weights."""
    cache(runs)
    run = Run(Denoising(runs), RECIPE, runs / "teacher")
    run.advance(minutes=minutes)
    with run.averaged():
        network_ = run.networks["unet"]
        assert isinstance(network_, UNet2DConditionModel)
        export_network(network_, runs / "teacher" / "export")


def export_network(unet: UNet2DConditionModel, folder: Path) -> None:
    copy = network()
    copy.load_state_dict(unet.state_dict())
    copy.to(torch.float16).save_pretrained(folder)
