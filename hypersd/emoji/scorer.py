"""Two CLIP-like scorers, "a" and "b": does this picture show what this text says?

    python -m hypersd emoji scorer

Each is a small ResNet on 64 px pictures and a copy of the text encoder, both with a linear projection into one space
(CLIP, arXiv:2103.00020). A picture is told from the captions of its batch, all drawings of one concept counting as
right (arXiv:2004.11362), and from the labels of all concepts. The two scorers saw different pictures and started from
different seeds, so one may become a reward while the other only ever measures.

Generated pictures are softer than vector art: training pictures are blurred and made noisy at random, so that the
scorers judge what is drawn rather than how sharp it is.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    ResNetConfig,
    ResNetForImageClassification,
)

from hypersd.emoji import artwork, text
from hypersd.emoji.autoencoder import to_float
from hypersd.folders import read_tensors
from hypersd.quality import r_precision
from hypersd.train import Recipe, Run, Step, mixed

SIDE, SPACE = 64, text.TEACHER_WIDTH  # pixels, width of the common space
ASSETS = artwork.MANIFEST.parent
RECIPE = Recipe(
    updates=1600, batch=64, lr=1.5e-3, warmup=50, cooldown=800, weight_decay=0.05, ema=0.995, clip=1.0, precision="bf16"
)
STYLED = 0.3  # share of captions that name their style


# ------------------------------------------------------------------------------------------------ the network


class Scorer(nn.Module):
    """An image tower and a text tower, each loadable on its own with stock transformers classes."""

    def __init__(
        self, image: ResNetForImageClassification, text_: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer
    ) -> None:
        super().__init__()
        self.image, self.text, self.tokenizer = image, text_, tokenizer
        self.scale = nn.Parameter(torch.tensor(2.5))  # log of the inverse temperature

    def pictures(self, x: Tensor) -> Tensor:
        """float [n, 3, h, w] in -1..1 -> unit vectors [n, 384]; differentiable, so it can serve as a reward."""
        return F.normalize(self.features(x), dim=1)

    def features(self, x: Tensor) -> Tensor:
        """The same before they are made unit vectors, whose length says something too. [n, 384]"""
        return self.image(pixel_values=shrink(x)).logits.float()

    def looks(self, x: Tensor) -> Tensor:
        """How pictures are drawn, more than what they show: mean and deviation over the picture of every channel after
        every stage of the image tower. float [n, 3, h, w] in -1..1 -> [n, 1024].

        The embedding was taught to overlook blur and noise; the stages on the way to it see them, and pictures are
        shrunk no further than to the artwork's own 128 pixels.
        """
        full = artwork.SIDE
        x = F.interpolate(x, (full, full), mode="area") if x.shape[-1] > full else x
        stages = self.image.resnet(pixel_values=x, output_hidden_states=True).hidden_states
        return torch.cat([part for y in stages for part in (y.mean((2, 3)), y.std((2, 3), correction=0))], 1).float()

    def texts(self, ids: Tensor) -> Tensor:
        """Ids [n, length] -> unit vectors [n, 384]."""
        return F.normalize(self.text(input_ids=ids).text_embeds.float(), dim=1)


def image_tower() -> ResNetForImageClassification:
    """2.8 M parameters, 46 MMAC a picture; its classifier is the projection."""
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=32,
            hidden_sizes=[32, 64, 128, 256],
            depths=[2, 2, 2, 2],
            layer_type="basic",
            num_labels=SPACE,
        )
    )


def text_tower(folder: Path) -> tuple[CLIPTextModelWithProjection, CLIPTokenizer]:
    """The embedded model's text encoder, frozen, with a projection that begins as the head it was distilled with."""
    tower, tokenizer = text.load(folder)
    return projecting(tower.text_encoder, tower.head.weight.detach()), tokenizer


def projecting(encoder: CLIPTextModel, projection: Tensor) -> CLIPTextModelWithProjection:
    """The encoder, frozen, with this projection [384, 256] of its end token's state."""
    config = copy.deepcopy(encoder.config)
    config.projection_dim = SPACE
    with_projection = CLIPTextModelWithProjection(config)
    with_projection.text_projection.load_state_dict({"weight": projection})
    with_projection.text_model.load_state_dict(encoder.state_dict())
    with_projection.text_model.requires_grad_(False)
    return with_projection


def shrink(x: Tensor) -> Tensor:
    """float [n, 3, h, w] -> [n, 3, 64, 64], averaging over areas."""
    return x if x.shape[-2:] == (SIDE, SIDE) else F.interpolate(x, (SIDE, SIDE), mode="area")


# --------------------------------------------------------------------------------------------- the objective


class Matching:
    """The objective: tell which caption of the batch belongs to which picture, both ways."""

    def __init__(
        self,
        pictures: np.ndarray,
        rows: Sequence[artwork.Picture],
        half: int | None,
        tower: tuple[CLIPTextModelWithProjection, CLIPTokenizer],
        recipe: Recipe = RECIPE,
    ) -> None:
        self.rows, self.recipe, self.half = rows, recipe, half
        self.small = np.concatenate(
            [_bytes(shrink(to_float(pictures[i : i + 64]))) for i in range(0, len(pictures), 64)]
        )
        self.train = np.flatnonzero([r.split == "train" and half in (None, int(r.sha256, 16) % 2) for r in rows])
        torch.manual_seed(recipe.seed)
        self.scorer = Scorer(image_tower(), *tower).train()
        self.captions = [artwork.captions(r) for r in rows]
        self.texts = sorted({c for captions in self.captions for c in captions})
        self.place = {t: i for i, t in enumerate(self.texts)}
        self.states = text_states(self.scorer, self.texts)  # the trunk is frozen: only its projection is trained
        # Labels of held-out concepts are not among them: they must not be pushed away.
        concepts = {rows[i].concept: rows[i].label for i in reversed(self.train.tolist())}
        self.labels = torch.tensor([self.place[label] for label in concepts.values()])
        number = {concept: i for i, concept in enumerate(concepts)}
        self.concept = torch.tensor([number.get(r.concept, -1) for r in rows])

    def modules(self) -> dict[str, nn.Module]:
        return {"scorer": self.scorer}

    def describe(self) -> dict[str, Any]:
        key = hashlib.sha256("".join(self.rows[i].sha256 for i in self.train.tolist()).encode())
        for tensor in self.scorer.text.text_model.state_dict().values():
            key.update(tensor.numpy().tobytes())
        return {"half": self.half, "pictures": len(self.train), "styled": STYLED, "data": key.hexdigest()[:16]}

    def losses(self, step: Step) -> Iterator[tuple[str, Tensor]]:
        generator = step.generator("matching")
        rows = self.train[step.rows(len(self.train)).numpy()]
        x = augment(to_float(self.small[rows]), generator)
        captions = [self._caption(r, generator) for r in rows]
        with mixed("cpu", self.recipe.precision == "bf16"):
            ours = self.scorer.pictures(x)
            theirs = self.project(self.states[captions])
            labels = self.project(self.states[self.labels])
        concept = self.concept[rows]
        named = F.cross_entropy(inverse_temperature(self.scorer.scale) * ours @ labels.T, concept)
        yield "scorer", named + matching_loss(ours, theirs, self.scorer.scale, concept)

    def project(self, states: Tensor) -> Tensor:
        return F.normalize(self.scorer.text.text_projection(states).float(), dim=1)

    def _caption(self, row: int, generator: torch.Generator) -> int:
        styled, other = torch.rand(2, generator=generator).tolist()
        captions = self.captions[row]
        return self.place[captions[0] if styled < STYLED else captions[1:][int(other * (len(captions) - 1))]]

    @torch.inference_mode()
    def sheet(self, folder: Path, step: int) -> dict[str, float]:
        """R-precision of real pictures by their labels, among 100 labels, on both held-out splits."""
        labels = sorted({r.label for r in self.rows})
        pool = self.project(self.states[[self.place[label] for label in labels]])
        measures = {}
        for split in ("composition", "concept"):
            rows = [i for i, r in enumerate(self.rows) if r.split == split]
            pictures = embed_pictures(self.scorer, self.small[rows])
            own = pool[[labels.index(self.rows[i].label) for i in rows]]
            found = r_precision(pictures, own, min(100, len(labels)), pool=pool)
            measures[f"r_precision_{split}"] = float(found.mean())
        return {**measures, "scale": float(self.scorer.scale.detach().exp())}


def matching_loss(pictures: Tensor, texts: Tensor, scale: Tensor, concepts: Tensor) -> Tensor:
    """Symmetric cross-entropy whose targets are shared evenly by all pairs of one concept.

    pictures, texts: unit vectors [n, d]; scale: log of the inverse temperature, at most 100 is used (CLIP 2.4);
    concepts: int64 [n].
    """
    logits = inverse_temperature(scale) * pictures @ texts.T
    right = (concepts[:, None] == concepts[None]).float()
    right = right / right.sum(1, keepdim=True)  # symmetric: the same for columns
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


def inverse_temperature(scale: Tensor) -> Tensor:
    return scale.exp().clamp(max=100)  # the cut of CLIP, 2.4


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror, shift, scale, colours, blur, noise; white stays outside. float [n, 3, h, w] in -1..1, the same shape."""
    n = len(x)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    scale, mirror = uniform(0.9, 1.25), torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    zero = torch.zeros(n)
    matrix = torch.stack(
        [
            torch.stack([scale * mirror, zero, uniform(-0.12, 0.12)], 1),
            torch.stack([zero, scale, uniform(-0.12, 0.12)], 1),
        ],
        1,
    )
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    x = F.grid_sample(x - 1, grid, align_corners=False) + 1  # outside is zero, which is white here
    blurred = F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    x = torch.lerp(x, blurred, uniform(0, 1, 1, 1, 1) * (uniform(0, 1, 1, 1, 1) < 0.5))
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * uniform(0.8, 1.2, 1, 1, 1)
    x = x * uniform(0.85, 1.0, 1, 1, 1) + uniform(-0.1, 0.1, 1, 1, 1)
    noise = torch.randn(x.shape, generator=generator) * uniform(0, 0.1, 1, 1, 1)
    return (x + noise).clamp(-1, 1)


# -------------------------------------------------------------------------------------------------- measuring


@torch.inference_mode()
def embed_pictures(scorer: Scorer, pictures: np.ndarray, batch: int = 128) -> Tensor:
    """uint8 [n, h, w, 3] -> unit vectors, float32 [n, 384]."""
    return torch.cat([scorer.pictures(to_float(pictures[i : i + batch])) for i in range(0, len(pictures), batch)])


@torch.inference_mode()
def looks(scorer: Scorer, pictures: np.ndarray, batch: int = 64) -> Tensor:
    """`Scorer.looks` of uint8 [n, h, w, 3], float32 [n, 1024]."""
    return torch.cat([scorer.looks(to_float(pictures[i : i + batch])) for i in range(0, len(pictures), batch)])


@torch.inference_mode()
def embed_texts(scorer: Scorer, texts: Sequence[str], batch: int = 256) -> Tensor:
    """Texts -> unit vectors, float32 [n, 384]."""
    projected = scorer.text.text_projection(text_states(scorer, texts, batch))
    return F.normalize(projected.float(), dim=1)


@torch.inference_mode()
def text_states(scorer: Scorer, texts: Sequence[str], batch: int = 256) -> Tensor:
    """End-token states before the projection, float32 [n, 256]; padding does not change them (causal mask)."""
    out = torch.empty(len(texts), scorer.text.config.hidden_size)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # alike lengths together: little padding
    for first in range(0, len(order), batch):
        part = order[first : first + batch]
        ids = scorer.tokenizer(
            [texts[i] for i in part], padding=True, truncation=True, max_length=text.TOKENS, return_tensors="pt"
        ).input_ids
        out[part] = scorer.text.text_model(input_ids=ids).pooler_output
    return out.clone()


def _bytes(x: Tensor) -> np.ndarray:
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


# ------------------------------------------------------------------------------------------ export and reading


def export(scorer: Scorer, folder: Path) -> None:
    """image/ (ResNetForImageClassification) and projection.safetensors, weights in fp16.

    The text trunk is the embedded model's own text encoder, which is not written a second time but named by its hash.
    """
    image = image_tower()
    image.load_state_dict(scorer.image.state_dict())
    image.to(torch.float16).save_pretrained(folder / "image")
    projection = scorer.text.text_projection.weight.detach().to(torch.float16).contiguous()
    save_file({"weight": projection}, folder / "projection.safetensors")
    about = {"scale": float(scorer.scale.detach()), "text_encoder": trunk_sha256(scorer.text.text_model)}
    (folder / "scorer.json").write_text(json.dumps(about), encoding="utf-8")
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors leaves them readable to nobody else


def load(folder: Path, model: Path = ASSETS / "emoji-sd") -> Scorer:
    """What `export` wrote, with the text encoder of the embedded model; in fp32, frozen, in eval mode.

    Raises:
        ArtworkError: it is not there, or was trained on another text encoder.
        ModelError: a file of it cannot be read.
    """
    if not (folder / "scorer.json").exists():
        raise artwork.ArtworkError(f"no scorer in {folder}; make it with: python -m hypersd emoji scorer")
    about = json.loads((folder / "scorer.json").read_text(encoding="utf-8"))
    image = ResNetForImageClassification(ResNetConfig.from_pretrained(folder / "image", local_files_only=True))
    image.load_state_dict(read_tensors(folder / "image/model.safetensors"))
    encoder = CLIPTextModel.from_pretrained(model / "text_encoder", local_files_only=True, dtype=torch.float32)
    scorer = Scorer(
        image,
        projecting(encoder, read_tensors(folder / "projection.safetensors")["weight"].float()),
        CLIPTokenizer.from_pretrained(model / "tokenizer", local_files_only=True),
    )
    if trunk_sha256(scorer.text.text_model) != about["text_encoder"]:
        raise artwork.ArtworkError(f"{folder.name} was trained on another text encoder; python -m hypersd emoji scorer")
    scorer.scale.data.fill_(about["scale"])
    return scorer.requires_grad_(False).eval()


def trunk_sha256(trunk: nn.Module) -> str:
    """One hash over the tensors of a text encoder as they are stored, in fp16."""
    key = hashlib.sha256()
    for name, tensor in sorted(trunk.state_dict().items()):
        key.update(name.encode())
        key.update((tensor.to(torch.float16) + 0.0).numpy().tobytes())  # averaging turns -0 into 0
    return key.hexdigest()


@dataclass(frozen=True)
class Kind:
    name: str
    half: int  # trained on pictures whose sha256 is even (0) or odd (1)
    seed: int


KINDS = (Kind("a", 0, 1), Kind("b", 1, 2))


def make(runs: Path, *, minutes: float | None = None, only: str | None = None, assets: Path = ASSETS) -> None:
    """Train both, or `only` one, or go on; each that is done becomes `emoji-scorer-a` or `-b` in `assets`.

    `minutes` are those of each. A judge that is not done yet is not exported: its figures would be taken for real.
    """
    pictures, _, rows = artwork.load(runs / "artwork")
    for kind in KINDS:
        if only not in (None, kind.name):
            continue
        recipe = replace(RECIPE, seed=kind.seed)
        objective = Matching(pictures, rows, kind.half, text_tower(runs / "text" / "export"), recipe)
        run = Run(objective, recipe, runs / f"scorer-{kind.name}")
        if not run.advance(minutes=minutes):
            tqdm.write(f"scorer {kind.name}: {run.step} of {recipe.updates} updates done; run this again to go on")
            continue
        with run.averaged():
            export(objective.scorer, assets / f"emoji-scorer-{kind.name}")
