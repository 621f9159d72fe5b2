"""The text encoder's second half of training: words outside the captions, by what the denoiser makes of them.

    python -m hypersd emoji synonyms

The sentence encoder put "doggo" near "dog", but the denoiser has only ever seen the states of captions, and draws what
it likes from states beside them. Here the denoiser is frozen and the text encoder learns to be understood: a text shall
make it draw what the label draws that the sentence encoder says is nearest (a teacher's answer to another wording, as
in distillation, arXiv:1503.02531). Captions, and all other texts, keep the states they have, so that what was trained
on them, the denoiser and its LoRAs, stays right.

What the measure asks for (words.MEANT) is in none of the texts, neither alone nor within a phrase.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextModel

from hypersd.emoji import artwork, teacher, text, words
from hypersd.schedule import Schedule
from hypersd.train import Recipe, Run, Step

NEAR = 0.55  # cosine to its nearest label from which a text counts as another wording of it
WORDS = 4  # longer texts say more than a label can
LENGTH = 16  # tokens at which states are compared: beyond them is nothing but padding
DRAWN = 8  # texts an update whose drawings are compared; states are of all
EARLIEST = 200  # timestep from which drawings are compared: below it the caption hardly matters
STYLED = 0.4  # share of texts that name a style, as their captions do
KEPT = 10.0  # weight of captions staying where they are: at 2, what is on the sheet was drawn worse
RECIPE = Recipe(updates=400, batch=48, lr=2e-4, warmup=30, cooldown=300, weight_decay=0.0, ema=0.98)


class Wording(NamedTuple):
    """A text, and the label that it is another wording of."""

    text: str
    label: str


def wordings(texts: Sequence[str], labels: Sequence[str], teach: text.Teach, shown: frozenset[str]) -> list[Wording]:
    """Those texts that mean one of the labels, by the sentence encoder; each label has to be among those `shown`.

    What names a colour, or two things, says more than any label and is left out.
    """
    held_out = re.compile(r"\b(" + "|".join(map(re.escape, words.MEANT)) + r")s?\b")
    more = re.compile(r"\b(" + "|".join((*words.COLOURS, "and", "with", "on", "two")) + r")\b|,")
    fit = [t for t in texts if len(t.split()) <= WORDS and not held_out.search(t.lower()) and not more.search(t)]
    near = torch.from_numpy(teach(fit)) @ torch.from_numpy(teach(labels)).T
    closeness, place = near.max(1)
    found = zip(fit, closeness.tolist(), place.tolist(), strict=True)
    return [Wording(t, labels[i]) for t, close, i in found if close >= NEAR and labels[i] in shown and t != labels[i]]


class Understanding:
    """The objective: texts are drawn as the label that they mean, and nothing else changes."""

    def __init__(self, run: Path, texts: Sequence[str], pairs: Sequence[Wording], recipe: Recipe = RECIPE) -> None:
        self.recipe, self.pairs, self.data = recipe, pairs, teacher.CachedData(run)
        self.schedule = Schedule.from_config(teacher.scheduler().config)
        meant = {p.text for p in pairs}
        self.others = [t for t in texts if t not in meant]
        self.rows: dict[str, list[int]] = {}
        for row in self.data.train:
            self.rows.setdefault(self.data.rows[row].label, []).append(int(row))
        folder = run / "text" / "export"
        tower, self.tokenizer = text.load(folder)
        self.encoder = tower.text_encoder.train()
        self.before = copy.deepcopy(self.encoder).requires_grad_(False).eval()
        self.unet = UNet2DConditionModel.from_pretrained(denoiser(run), torch_dtype=torch.float32).requires_grad_(False)
        self.unet.set_attn_processor(AttnProcessor())  # quicker here than the fused kernel, whose backward is slow
        self._weights = [teacher.weights_digest(f)[:16] for f in (folder, denoiser(run))]
        self.spread = self._states(self.before, self.data.texts[:256]).var()

    def modules(self) -> dict[str, nn.Module]:
        return {"text_encoder": self.encoder}

    def describe(self) -> dict[str, Any]:
        pairs = hashlib.sha256("\n".join(f"{p.text}\t{p.label}" for p in self.pairs).encode()).hexdigest()[:16]
        return {
            "pairs": pairs,
            "wordings": len(self.pairs),
            "weights": self._weights,
            "settings": [NEAR, LENGTH, DRAWN, EARLIEST, STYLED, KEPT],
        }

    def losses(self, step: Step) -> Iterator[tuple[str, Tensor]]:
        chosen = [self.pairs[i] for i in step.rows(len(self.pairs))]
        styled = step.uniform("styled") < STYLED
        pictures = [self._picture(p.label, u) for p, u in zip(chosen, step.uniform("picture").tolist(), strict=True)]
        suffixes = [f", {self.data.rows[r].style} style" * bool(s) for r, s in zip(pictures, styled, strict=True)]
        asked = [p.text + suffix for p, suffix in zip(chosen, suffixes, strict=True)]
        meant = [p.label + suffix for p, suffix in zip(chosen, suffixes, strict=True)]
        kept = [*_some(self.data.texts, step.uniform("captions")), *_some(self.others, step.uniform("others"))]
        loss = self._padding(asked, meant) + self._drawing(asked[:DRAWN], meant[:DRAWN], pictures[:DRAWN], step)
        yield "text_encoder", loss + KEPT * self._change(kept)

    def _picture(self, label: str, u: float) -> int:
        rows = self.rows[label]
        return rows[int(u * len(rows))]

    def _padding(self, asked: Sequence[str], meant: Sequence[str]) -> Tensor:
        """How far the states after both texts' ends, which are most of what the denoiser reads, are apart."""
        ids, goal = (text.tokens(self.tokenizer, t)[:, :LENGTH] for t in (asked, meant))
        over = ((ids == self.tokenizer.eos_token_id) & (goal == self.tokenizer.eos_token_id)).float()
        with torch.no_grad():
            target = self.before(goal).last_hidden_state
        apart = (self.encoder(ids).last_hidden_state - target).square().mean(2)
        return (apart * over).sum() / over.sum().clamp_min(1) / self.spread

    def _change(self, kept: Sequence[str]) -> Tensor:
        ids = text.tokens(self.tokenizer, kept)[:, :LENGTH]
        with torch.no_grad():
            target = self.before(ids).last_hidden_state
        return (self.encoder(ids).last_hidden_state - target).square().mean() / self.spread

    def _drawing(self, asked: Sequence[str], meant: Sequence[str], pictures: Sequence[int], step: Step) -> Tensor:
        """How differently the denoiser answers to both, beside how differently it answers to no caption at all."""
        places = slice(0, len(asked))
        x0, noise = self.data.latents[list(pictures)], step.randn("noise", self.data.latents.shape[1:])[places]
        t = (EARLIEST + (1000 - EARLIEST) * step.uniform("t")[places]).long()
        x_t = self.schedule.diffuse(x0, noise, t)
        with torch.no_grad():
            goal, none = (self.unet(x_t, t, self._states(self.before, s)).sample for s in (meant, [""] * len(meant)))
        answer = self.unet(x_t, t, self._states(self.encoder, asked)).sample
        return (answer - goal).square().mean() / (none - goal).square().mean().clamp_min(1e-6)

    def _states(self, encoder: CLIPTextModel, texts: Sequence[str]) -> Tensor:
        return encoder(text.tokens(self.tokenizer, texts)).last_hidden_state

    @torch.inference_mode()
    def sheet(self, folder: Path, step: int) -> dict[str, float]:
        """How far texts are from the labels that they mean, and captions from where they were: shares of the spread."""
        pairs = self.pairs[:: max(1, len(self.pairs) // 64)]
        captions = self.data.texts[:: max(1, len(self.data.texts) // 64)]
        apart = self._padding([p.text for p in pairs], [p.label for p in pairs])
        return {"apart": float(apart), "changed": float(self._change(captions))}


def _some(texts: Sequence[str], u: Tensor) -> list[str]:
    return [texts[int(x * len(texts))] for x in u.tolist()]


def denoiser(run: Path) -> Path:
    """The trained one, or the one that `restore` took out of the assets."""
    trained = run / "teacher" / "export"
    return trained if trained.exists() else run / "teacher" / "start"


def make(runs: Path, *, minutes: float | None = None) -> None:
    """Train, or go on training, what `emoji text` exported; ends with the folder `synonyms/export`.

    Raises:
        ArtworkError: there is no trained text encoder or denoiser yet.
    """
    for part, folder in (("text", runs / "text" / "export"), ("teacher", denoiser(runs))):
        if not any(folder.rglob("*.safetensors")):
            raise artwork.ArtworkError(f"no weights in {folder}; make them with: python -m hypersd emoji {part}")
    teacher.cache(runs)
    texts, teach = text.read_corpus(), text.SentenceEncoder(runs / "text")
    rows = list(artwork.read_manifest())
    captions = {c for r in rows for c in (r.label, *r.tags, *artwork.captions(r))}
    others = [t for t in texts.train if t not in captions]
    pairs = wordings(others, texts.labels, teach, frozenset(r.label for r in rows if r.split == "train"))
    tqdm.write(f"synonyms: {len(pairs)} other wordings of {len({p.label for p in pairs})} labels")
    objective = Understanding(runs, others, pairs)
    run = Run(objective, RECIPE, runs / "synonyms")
    run.advance(minutes=minutes)
    tower, tokenizer = text.load(runs / "text" / "export")
    with run.averaged():
        tower.text_encoder.load_state_dict(objective.encoder.state_dict())
    text.export(tower, tokenizer, runs / "synonyms" / "export")
    text.fit_head(runs / "synonyms" / "export", texts.labels, teach)
