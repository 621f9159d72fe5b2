"""Take the committed model apart again, so that training can go on where there are no runs: a new machine, a new idea.

    python -m hypersd emoji restore

The optimizer's memory is not among the assets: the denoiser goes on from its averaged weights with a new warm-up.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from hypersd.emoji import artwork, text
from hypersd.records import InputError

ASSETS = artwork.MANIFEST.parent


def make(runs: Path, *, minutes: float | None = None, assets: Path = ASSETS, teach: text.Teach | None = None) -> None:
    """Fill `autoencoder/export`, `text/export` and `teacher/start` under `runs` from `assets/emoji-sd`.

    `teach` embeds texts for the head that the scorers start from; the sentence encoder, if not given.

    Raises:
        InputError: one of them is already there; what was trained here is never overwritten.
    """
    model = assets / "emoji-sd"
    places = {
        "vae": runs / "autoencoder" / "export",
        "tokenizer": runs / "text" / "export" / "tokenizer",
        "text_encoder": runs / "text" / "export" / "text_encoder",
        "unet": runs / "teacher" / "start",
    }
    for place in places.values():
        if place.exists():
            raise InputError(f"{place} is already there and would be lost; move it away, or give another --runs")
    for part, place in places.items():
        shutil.copytree(model / part, place)
    labels = sorted({t for row in artwork.read_manifest() for t in (row.label, *row.tags)})
    text.fit_head(runs / "text" / "export", labels, teach or text.SentenceEncoder(runs / "text"))
