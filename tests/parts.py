"""The training parts of the embedded model on a dozen synthetic pictures, as a program that tests can kill.

python tests/parts.py PART FOLDER [--every-update]
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from test_scorer import towers
from test_text import TEXTS, bag_of_words
from transformers import CLIPTokenizer

from hypersd.emoji import artwork, autoencoder, decoder, scorer, teacher, text
from hypersd.train import Objective, Recipe, Run

UPDATES = 3


def synthetic(runs: Path, count: int = 12) -> None:
    """Discs and squares of many colours, with captions, in the layout of the real artwork and its caches."""
    folder = runs / "artwork"
    if (runs / "latents.pt").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:128, :128]
    rows, pictures = [], []
    for i in range(count):
        inside = (x - 64) ** 2 + (y - 64) ** 2 < 1600 if i % 2 else (abs(x - 64) < 40) & (abs(y - 64) < 40)
        pictures.append(np.where(inside[..., None], rng.integers(0, 200, 3), 255).astype(np.uint8))
        label = f"thing {i}"
        split = ("train", "train", "composition", "concept")[i % 4]
        sha = hashlib.sha256(pictures[-1].tobytes()).hexdigest()
        rows.append(artwork.Picture(f"p/{i}", f"thing-{i}", "noto", label, ("round",), "objects", split, sha))
    np.save(folder / "pictures.npy", np.stack(pictures))
    np.save(folder / "masks.npy", np.stack(pictures)[..., 0])
    (folder / "manifest.jsonl").write_text("".join(json.dumps(asdict(r)) + "\n" for r in rows))
    texts = sorted({"", *teacher.SHEET_PROMPTS, *(c for r in rows for c in artwork.captions(r))})
    (runs / "texts.json").write_text(json.dumps(texts))
    np.save(runs / "states.npy", rng.standard_normal((len(texts), 32, 256)).astype(np.float16))
    torch.save(torch.from_numpy(rng.standard_normal((count, 8, 16, 16)).astype(np.float32)), runs / "latents.pt")
    torch.manual_seed(0)
    autoencoder.network().save_pretrained(runs / "autoencoder" / "export")


def tokenizer() -> CLIPTokenizer:
    return text.tokenizer_for(TEXTS, 600)


def short(recipe: Recipe) -> Recipe:
    return replace(recipe, updates=UPDATES, batch=4, warmup=1, cooldown=1)


PARTS: dict[str, Callable[[Path], tuple[Objective, Recipe]]] = {
    "autoencoder": lambda runs: (
        autoencoder.Reconstruction(runs / "artwork", short(autoencoder.RECIPE)),
        short(autoencoder.RECIPE),
    ),
    "decoder": lambda runs: (
        decoder.Decoding(runs / "artwork", runs / "autoencoder" / "export", short(decoder.RECIPE)),
        short(decoder.RECIPE),
    ),
    "text": lambda runs: (
        text.Distillation(text.Corpus(TEXTS, TEXTS[:2], TEXTS[1:4]), tokenizer(), bag_of_words, short(text.RECIPE)),
        short(text.RECIPE),
    ),
    "scorer": lambda runs: (
        scorer.Matching(*artwork.load(runs / "artwork")[::2], None, towers(), short(scorer.RECIPE)),
        short(scorer.RECIPE),
    ),
    "teacher": lambda runs: (teacher.Denoising(runs, short(teacher.RECIPE)), short(teacher.RECIPE)),
}


class Unseen:
    """An objective without its sample sheet, which costs more than a short run."""

    def __init__(self, objective: Objective) -> None:
        self.modules, self.losses, self.describe = objective.modules, objective.losses, objective.describe

    def sheet(self, folder: Path, step: int) -> dict[str, float]:
        return {}


if __name__ == "__main__":
    part, runs, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    objective, recipe = PARTS[part](runs)
    Run(Unseen(objective), recipe, folder).advance(save_every=0.0)
