"""How good the embedded model is: every figure the README gives of it, into assets/emoji-measures.json.

    python -m hypersd emoji measure

Pictures are drawn from the committed weights at 25 steps and judged by scorer "b", which nothing is ever trained on.
R-precision@1: among 100 labels, one of them right, how often the right one is nearest; the same question is put to the
real pictures of the same rows, so the scorer's own mistakes cancel out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hypersd.backbone import Backbone
from hypersd.emoji import artwork, autoencoder, scorer, teacher, words
from hypersd.emoji.assemble import draw
from hypersd.quality import r_precision

COMMAND = "python -m hypersd emoji measure"
ASSETS = artwork.MANIFEST.parent
ROWS = 200  # pictures a split at most
SEEDS = 2  # drawings of every word of the synonym table


def make(runs: Path, *, minutes: float | None = None, assets: Path = ASSETS) -> None:
    """Measure the weights in `assets` and write emoji-measures.json beside them."""
    backbone, judge = Backbone.load(assets / "emoji-sd"), scorer.load(assets / "emoji-scorer-b")
    pictures, _, rows = artwork.load(runs / "artwork")
    labels = sorted({r.label for r in rows})
    pool = scorer.embed_texts(judge, labels)
    figures: dict[str, float] = {"autoencoder_psnr_db": autoencoder_psnr(backbone, pictures, rows)}
    for split in ("train", "composition", "concept"):
        chosen = evenly([i for i, r in enumerate(rows) if r.split == split], ROWS)
        own = pool[[labels.index(rows[i].label) for i in chosen]]
        drawn = draw(backbone, [artwork.captions(rows[i])[0] for i in chosen], split)
        for name, shown in (("generated", drawn), ("real", np.asarray(pictures[chosen]))):
            value = r_precision(scorer.embed_pictures(judge, shown), own, pool=pool)
            figures[f"r_precision_{split}_{name}"] = float(value.mean())
    figures["synonyms_right"] = synonyms(backbone, judge, pool, labels, runs / "synonyms.png")
    figures["synonyms_real"] = synonyms_of_real(judge, pool, labels, pictures, rows)
    megabytes = sum(f.stat().st_size for f in assets.rglob("*.safetensors")) / 1e6
    figures["weights_mb"] = megabytes
    content = {"command": COMMAND, "base_sha256": backbone.sha256, "rows": ROWS, "steps": teacher.STEPS,
               "guidance": teacher.GUIDANCE, "figures": {k: round(v, 3) for k, v in figures.items()}}  # fmt: skip
    (assets / "emoji-measures.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    tqdm.write(table(content))


SPLITS = {
    "train": "things and styles it was trained on",
    "composition": "known things in a known style, the pair never seen",
    "concept": "things it never saw",
}


def table(content: dict[str, Any]) -> str:
    """The figures as the README shows them, Markdown."""
    figures: dict[str, float] = content["figures"]
    lines = ["| figure | generated | real pictures |", "|---|---|---|"]
    for split, title in SPLITS.items():
        drawn, real = (f"{100 * figures[f'r_precision_{split}_{kind}']:.1f} %" for kind in ("generated", "real"))
        lines.append(f"| R-precision@1 among 100 labels, {title} | {drawn} | {real} |")
    drawn, real = (f"{100 * figures[f'synonyms_{kind}']:.1f} %" for kind in ("right", "real"))
    lines.append(f"| other words for things, the right thing nearest among all labels | {drawn} | {real} |")
    lines.append(f"| autoencoder, PSNR on held-out pictures | {figures['autoencoder_psnr_db']:.1f} dB | |")
    lines.append(f"| all weights | {figures['weights_mb']:.0f} MB | |")
    return "\n".join(lines)


@torch.inference_mode()
def autoencoder_psnr(backbone: Backbone, pictures: np.ndarray, rows: Sequence[artwork.Picture]) -> float:
    """Mean PSNR in dB over every held-out picture, whole, 128 px."""
    held_out = [i for i, r in enumerate(rows) if r.split in ("concept", "composition")]
    x = autoencoder.to_float(pictures[held_out])
    y = torch.cat([autoencoder.reconstruct(backbone.vae, part) for part in x.split(16)])
    return autoencoder.psnr_db(x, y)


def synonyms(backbone: Backbone, judge: scorer.Scorer, pool: Tensor, labels: Sequence[str], sheet: Path) -> float:
    """Share of drawings of other words for things whose nearest label of all labels is one that is right."""
    asked = list(words.MEANT)
    right = []
    for seed in range(1, SEEDS + 1):
        drawn = draw(backbone, asked, f"synonyms {seed}", seed)
        nearest = (scorer.embed_pictures(judge, drawn) @ pool.T).argmax(1).tolist()
        right += [_right(words.MEANT[a], labels[n]) for a, n in zip(asked, nearest, strict=True)]
    autoencoder.save_grid(autoencoder.to_float(drawn), sheet, 8)
    sheet.with_suffix(".txt").write_text(
        "".join(f"{a}: {labels[n]}\n" for a, n in zip(asked, nearest, strict=True)), encoding="utf-8"
    )
    return float(np.mean(right))


def synonyms_of_real(
    judge: scorer.Scorer, pool: Tensor, labels: Sequence[str], pictures: np.ndarray, rows: Sequence[artwork.Picture]
) -> float:
    """The same question to artwork of the right labels, 8 pictures a word: what a perfect drawing could reach."""
    right = []
    for meant in words.MEANT.values():
        chosen = evenly([i for i, r in enumerate(rows) if _right(meant, r.label)], 8)
        nearest = (scorer.embed_pictures(judge, np.asarray(pictures[chosen])) @ pool.T).argmax(1).tolist()
        right.append(np.mean([_right(meant, labels[n]) for n in nearest]))
    return float(np.mean(right))


def _right(meant: str, label: str) -> bool:
    return bool(re.search(meant, label, re.IGNORECASE))


def evenly(rows: Sequence[int], count: int) -> list[int]:
    """At most `count` of the rows, evenly spread."""
    return [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int))]
