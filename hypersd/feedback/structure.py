"""Structure: a frozen network that finds the objects in a picture, and how wrong it is about a drawn one.

    python -m hypersd segmenter

A real picture and its mask are known; the student draws that picture again from noise. Where the segmenter cannot find
the object any more, its shape was lost (Hyper-SD, arXiv:2404.13686, eq. 14; UniFL, arXiv:2404.05595). The embedded
model has masks without error, since its artwork comes with transparency, and a small segmenter of its own. Other models
take an instance segmentation model of transformers, with the masks and classes of COCO's objects (the paper: SOLO,
which is not among them).
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from hypersd.adapters import beside
from hypersd.checkpoint import sha256
from hypersd.emoji import artwork
from hypersd.emoji.autoencoder import to_float
from hypersd.folders import read_tensors
from hypersd.hub import fetched
from hypersd.records import InputError
from hypersd.scores import WHOLE
from hypersd.train import Recipe, Run, Step

SIDE = 64  # pixels
RECIPE = Recipe(updates=600, batch=32, lr=3e-3, warmup=20, cooldown=300, ema=0.98)
WEIGHTS = "segmenter.safetensors"
OWN, PUBLISHED = "assets/emoji-segmenter", "facebook/mask2former-swin-tiny-coco-instance"


class Structure(Protocol):
    """How badly objects are found in pictures; 0 is not at all badly. Differentiable in the pictures.

    What is known of the real pictures is what the data says of their rows when it is asked for it by the name `asks`.
    """

    asks: str

    def __call__(self, pixels: Tensor, truth: Any) -> Tensor:
        """float [n, 3, h, w] in -1..1 -> [n]; it works where the pictures are."""
        ...


class Segmenter(nn.Module):
    """A small U-Net (arXiv:1505.04597): pictures [n, 3, 64, 64] -> logits of the object [n, 64, 64]."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width)
        self.down = nn.ModuleList(_twice(a, b) for a, b in zip((3, *widths), widths, strict=False))
        self.up = nn.ModuleList(_twice(a + b, b) for a, b in zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.out = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for block in self.down:
            x = block(F.avg_pool2d(x, 2) if kept else x)
            kept.append(x)
        kept.pop()
        for block in self.up:
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0, mode="nearest"), kept.pop()], 1))
        logits: Tensor = self.out(x).squeeze(1)
        return logits


def _twice(a: int, b: int) -> nn.Sequential:
    layers = (nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(4, b), nn.SiLU(), nn.Conv2d(b, b, 3, padding=1), nn.SiLU())
    return nn.Sequential(*layers)


def shrink(x: Tensor) -> Tensor:
    """[n, c, h, w] -> [n, c, 64, 64], averaging over areas."""
    return x if x.shape[-2:] == (SIDE, SIDE) else F.interpolate(x, (SIDE, SIDE), mode="area")


def wrongness(logits: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy and one minus the Dice coefficient, for each picture: [n, h, w] twice -> [n]"""
    entropy = F.binary_cross_entropy_with_logits(logits, masks, reduction="none").mean((1, 2))
    found = logits.sigmoid()
    dice = (2 * (found * masks).sum((1, 2)) + 1) / (found.sum((1, 2)) + masks.sum((1, 2)) + 1)
    return entropy + 1 - dice


class Segmenting:
    """The objective: find the object of pieces of artwork, some of them as blurred and noisy as drawn pictures are."""

    def __init__(self, pictures: np.ndarray, masks: np.ndarray, rows: Sequence[artwork.Picture], seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.segmenter = Segmenter().train()
        small = [shrink(to_float(pictures[i : i + 128])) for i in range(0, len(pictures), 128)]
        self.pictures = torch.cat(small)
        flat = [torch.from_numpy(np.array(masks[i : i + 128])).float() / 255 for i in range(0, len(masks), 128)]
        self.masks = torch.cat([shrink(m[:, None])[:, 0] for m in flat])
        self.rows = {s: np.flatnonzero([r.split == s for r in rows]) for s in ("train", "composition")}
        self.digest = str(hash_of(rows))

    def modules(self) -> dict[str, nn.Module]:
        return {"segmenter": self.segmenter}

    def describe(self) -> dict[str, Any]:
        return {"artwork": self.digest}

    def losses(self, step: Step) -> Iterator[tuple[str, Tensor]]:
        rows = self.rows["train"][step.rows(len(self.rows["train"])).numpy()]
        x, masks = self.pictures[rows], self.masks[rows]
        blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        x = torch.lerp(x, blurred, step.uniform("blur").float().view(-1, 1, 1, 1))
        x = x + 0.15 * step.uniform("loud").float().view(-1, 1, 1, 1) * step.randn("noise", x.shape[1:])
        mirror = (step.uniform("mirror") < 0.5).view(-1, 1, 1)
        x, masks = torch.where(mirror[..., None], x.flip(3), x), torch.where(mirror, masks.flip(2), masks)
        yield "segmenter", wrongness(self.segmenter(x), masks).mean()

    @torch.inference_mode()
    def sheet(self, folder: Path, step: int) -> dict[str, float]:
        """Intersection over union on held-out pictures."""
        rows = self.rows["composition"]
        overlaps = []
        for first in range(0, len(rows), 128):
            part = rows[first : first + 128]
            found, true = self.segmenter(self.pictures[part]) > 0, self.masks[part] > 0.5
            overlaps.append((found & true).sum((1, 2)) / (found | true).sum((1, 2)).clamp_min(1))
        return {"iou": float(torch.cat(overlaps).mean())}


def hash_of(rows: Sequence[artwork.Picture]) -> str:
    return hashlib.sha256("".join(row.sha256 for row in rows).encode()).hexdigest()[:16]


def train(
    artwork_folder: Path, folder: Path, out: Path, recipe: Recipe = RECIPE, minutes: float | None = None
) -> float:
    """Train the embedded model's segmenter and write it to `out`; its overlap with held-out masks, 0 to 1.

    Raises:
        ArtworkError: there is no artwork.
        InputError: `minutes` were not enough; the same call goes on.
    """
    objective = Segmenting(*artwork.load(artwork_folder), recipe.seed)
    run = Run(objective, recipe, folder)
    if not run.advance(minutes=minutes):
        raise InputError(f"{run.step} of {recipe.updates} updates done; run the same command again to go on")
    out.mkdir(parents=True, exist_ok=True)
    with run.averaged():
        half = {name: tensor.to(torch.float16) for name, tensor in objective.segmenter.state_dict().items()}
    about = {"artwork": objective.digest, "iou": f"{run.measures['iou']:.4f}"}
    save_file(half, out / WEIGHTS, metadata={"hypersd": json.dumps(about)})
    (out / WEIGHTS).chmod(0o644)
    return run.measures["iou"]


class Outline:
    """The embedded model's `Structure`: its own segmenter, frozen. Masks are float [n, h, w] in 0..1."""

    asks = "masks"

    def __init__(self, folder: Path) -> None:
        """Raises InputError: there is no segmenter in `folder`, or it cannot be read."""
        if not (folder / WEIGHTS).is_file():
            raise InputError(f"there is no segmenter in {folder}; train it with: python -m hypersd segmenter")
        weights = read_tensors(folder / WEIGHTS)
        self.model = Segmenter()
        self.model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
        self.model.requires_grad_(False).eval()
        self.sha256 = sha256(folder / WEIGHTS)

    def __call__(self, pixels: Tensor, truth: Tensor) -> Tensor:
        found = self.model.to(pixels.device)(shrink(pixels.float()))
        return wrongness(found, shrink(truth[:, None].to(pixels.device))[:, 0])


class Instances:
    """A universal segmentation model of transformers (Mask2Former, MaskFormer) as `Structure`: its own training loss.

    What is known of a picture are its objects, bool [objects, h, w], and their classes, int64 [objects]. One without
    objects has nothing to lose.
    """

    asks = "instances"
    MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet

    def __init__(self, model: Any, side: int = 384) -> None:
        """Raises InputError: the model has no loss over masks and their classes."""
        takes = inspect.signature(model.forward).parameters
        if not {"mask_labels", "class_labels"} <= takes.keys() or "task_inputs" in takes:
            kind = type(model).__name__
            raise InputError(f"{kind} is not taught masks and classes alone; choose a Mask2Former or a MaskFormer")
        self.model, self.side = model.requires_grad_(False).eval(), side

    def __call__(self, pixels: Tensor, truth: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        self.model.to(pixels.device)
        size = (self.side, self.side)
        x = F.interpolate(pixels.float() / 2 + 0.5, size, mode="bilinear", antialias=True, align_corners=False)
        x = (x - x.new_tensor(self.MEAN).view(3, 1, 1)) / x.new_tensor(self.SPREAD).view(3, 1, 1)
        return torch.stack([self._loss(one, *known) for one, known in zip(x, truth, strict=True)])

    def _loss(self, x: Tensor, masks: Tensor, classes: Tensor) -> Tensor:
        if not len(classes):
            return x.new_zeros(())
        if (last := int(classes.max())) >= self.model.config.num_labels:
            raise InputError(
                f"the segmenter knows {self.model.config.num_labels} classes and the data has one numbered {last}; "
                f"choose one that learned from the same data, such as {PUBLISHED}"
            )
        labels = F.interpolate(masks[None].to(x), x.shape[-2:], mode="nearest")
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            torch.manual_seed(int(masks.sum()))  # the pixels it compares, the same ones in a run that was resumed
            found = self.model(pixel_values=x[None], mask_labels=[*labels], class_labels=[classes.to(x.device)])
        loss: Tensor = found.loss.reshape(())
        return loss


def load(place: str, backbone: str) -> Structure:
    """The segmenter in a folder, ours or one of transformers, or of the hub by its name.

    Raises:
        InputError: there is none, or it cannot be read or used; it is ours, which only knows the embedded model's kind.
    """
    folder = Path(place)
    if place == OWN or (folder / WEIGHTS).is_file() or (folder.is_dir() and not (folder / "config.json").is_file()):
        if beside(backbone)[0].resolve() != beside("emoji")[0].resolve():
            raise InputError(
                f"{place} knows single icons on white, not what {backbone} draws; choose a model of transformers that "
                f"learned from COCO: --segmenter {PUBLISHED}"
            )
        return Outline(folder)
    if importlib.util.find_spec("scipy") is None:
        raise InputError("models of transformers tell objects apart with scipy; install it: pip install scipy")
    from transformers import AutoModelForUniversalSegmentation

    advice = f"choose a Mask2Former or MaskFormer of transformers, in a folder or on the hub, such as {PUBLISHED}"
    source = folder if folder.is_dir() else fetched(place, WHOLE, advice)
    try:
        model = AutoModelForUniversalSegmentation.from_pretrained(source, local_files_only=True)
    except Exception as error:  # transformers and safetensors raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        raise InputError(f"the segmenter {place} cannot be loaded ({reason}); {advice}") from error
    side = getattr(model.config, "image_size", 384)
    return Instances(model, side if isinstance(side, int) else 384)
