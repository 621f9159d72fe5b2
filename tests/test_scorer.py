"""The scorers: the loss, learning, and what is read back from disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from test_text import TEXTS
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from hypersd.emoji import artwork, scorer, text
from hypersd.evaluate import ladder
from hypersd.train import Recipe, Run, Step

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 30), "blue": (30, 30, 220), "yellow": (240, 220, 30)}


def towers(seed: int = 0) -> tuple[CLIPTextModelWithProjection, CLIPTokenizer]:
    torch.manual_seed(seed)
    tokenizer = text.tokenizer_for([*TEXTS, *COLOURS], 600)
    config = text.config(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
    config.projection_dim = scorer.SPACE
    tower = CLIPTextModelWithProjection(config)
    tower.text_model.requires_grad_(False)
    return tower, tokenizer


def squares() -> tuple[np.ndarray, list[artwork.Picture]]:
    """Coloured squares of several sizes on white, the largest held out."""
    pictures: list[np.ndarray] = []
    rows: list[artwork.Picture] = []
    for colour, rgb in COLOURS.items():
        for size in (30, 40, 50, 60, 70, 80):
            picture = np.full((128, 128, 3), 255, np.uint8)
            picture[64 - size // 2 : 64 + size // 2, 64 - size // 2 : 64 + size // 2] = rgb
            pictures.append(picture)
            split = "composition" if size == 80 else "concept" if size == 70 else "train"
            rows.append(
                artwork.Picture(
                    f"p/{colour}{size}",
                    colour,
                    "flat",
                    colour,
                    (f"{colour} square",),
                    "symbols",
                    split,
                    f"{len(rows):x}",
                )
            )
    return np.stack(pictures), rows


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, scorer.Scorer]:
    made = scorer.Scorer(scorer.image_tower(), *towers()).eval()
    for p in made.parameters():
        p.data = p.data.half().float()
    folder = tmp_path_factory.mktemp("scorer")
    scorer.export(made, folder)
    keep_trunk(made, folder)
    return folder, made


def keep_trunk(made: scorer.Scorer, folder: Path) -> None:
    """The text encoder and tokenizer that a scorer shares with the embedded model, where the tests look for them."""
    trunk = CLIPTextModel(made.text.config)
    trunk.load_state_dict(made.text.text_model.state_dict())
    trunk.to(torch.float16).save_pretrained(folder / "text_encoder")
    text.save_tokenizer(made.tokenizer, folder / "tokenizer")


# ------------------------------------------------------------------------------------------------------ the loss


def test_matching_loss_reaches_the_entropy_of_its_targets() -> None:
    concepts = torch.tensor([0, 0, 1, 2])
    ideal = torch.eye(3)[concepts]
    at_best = scorer.matching_loss(ideal, ideal, torch.tensor(20.0), concepts)  # the scale is cut at 100
    assert float(at_best) == pytest.approx(0.5 * np.log(2), abs=1e-4)
    assert scorer.matching_loss(ideal, ideal.roll(1, 0), torch.tensor(3.0), concepts) > at_best + 1


def test_augment_keeps_white_white_and_depends_on_its_generator() -> None:
    x = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    once, again, other = (scorer.augment(x, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert once.shape == x.shape
    assert once.abs().max() <= 1
    white = scorer.augment(torch.ones(8, 3, 64, 64), torch.Generator().manual_seed(1))
    assert white.mean(dim=(1, 2, 3)).min() > 0.5  # a little darker and noisier, no black borders
    assert white[:, :, :4].mean(dim=(1, 2, 3)).sub(white.mean(dim=(1, 2, 3))).abs().max() < 0.05


# ------------------------------------------------------------------------------------------------------ learning


def test_it_learns_colours(tmp_path: Path) -> None:
    pictures, rows = squares()
    recipe = Recipe(updates=50, batch=12, lr=2e-3, warmup=5, ema=0.9)
    objective = scorer.Matching(pictures, rows, None, towers(), recipe)
    run = Run(objective, recipe, tmp_path)
    for _ in range(recipe.updates):
        run.update()
    with run.averaged():
        names = list(COLOURS)
        texts = scorer.embed_texts(objective.scorer, names)
        shown = scorer.embed_pictures(objective.scorer, pictures[[i for i, r in enumerate(rows) if r.split != "train"]])
    assert (shown @ texts.T).argmax(1).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_halves_share_no_picture_and_hold_no_held_out_one() -> None:
    pictures, rows = squares()
    a, b = (scorer.Matching(pictures, rows, half, towers()) for half in (0, 1))
    assert not set(a.train) & set(b.train)
    assert {rows[i].split for i in [*a.train, *b.train]} == {"train"}
    assert len(a.train) + len(b.train) == 16
    assert a.describe() != b.describe()


def test_the_text_trunk_stays_as_it_was() -> None:
    pictures, rows = squares()
    objective = scorer.Matching(pictures, rows, None, towers(), Recipe(updates=1, batch=8, lr=1e-3))
    ((_, loss),) = objective.losses(Step(0, objective.recipe))
    loss.backward()
    assert all(p.grad is None for p in objective.scorer.text.text_model.parameters())
    for p in (
        objective.scorer.text.text_projection.weight,
        objective.scorer.image.classifier[1].weight,
        objective.scorer.scale,
    ):
        assert p.grad is not None
        assert p.grad.abs().sum() > 0


# ------------------------------------------------------------------------------------------- export and reading


def test_what_is_read_back_scores_alike(exported: tuple[Path, scorer.Scorer]) -> None:
    folder, made = exported
    loaded = scorer.load(folder, folder)
    pictures = squares()[0][:3]
    torch.testing.assert_close(scorer.embed_pictures(loaded, pictures), scorer.embed_pictures(made, pictures))
    torch.testing.assert_close(scorer.embed_texts(loaded, TEXTS), scorer.embed_texts(made, TEXTS))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_texts_are_padded_without_effect(exported: tuple[Path, scorer.Scorer]) -> None:
    made = exported[1]
    with torch.inference_mode():
        full = made.texts(text.tokens(made.tokenizer, TEXTS))
    torch.testing.assert_close(scorer.embed_texts(made, TEXTS, batch=3), full, atol=1e-5, rtol=1e-4)


def test_another_text_encoder_is_refused(exported: tuple[Path, scorer.Scorer], tmp_path: Path) -> None:
    keep_trunk(scorer.Scorer(scorer.image_tower(), *towers(1)), tmp_path)
    with pytest.raises(artwork.ArtworkError, match="was trained on another text encoder"):
        scorer.load(exported[0], tmp_path)


def test_any_size_of_picture_and_gradients_for_a_reward(exported: tuple[Path, scorer.Scorer]) -> None:
    made = scorer.load(exported[0], exported[0])
    x = torch.rand(2, 3, 96, 96, requires_grad=True)
    made.pictures(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_looks_are_the_moments_of_every_stage(exported: tuple[Path, scorer.Scorer]) -> None:
    _, made = exported
    pictures = squares()[0][:3]
    seen: list[torch.Tensor] = []
    stages = [made.image.resnet.embedder, *made.image.resnet.encoder.stages]
    hooks = [stage.register_forward_hook(lambda _m, _i, out: seen.append(out)) for stage in stages]
    found = scorer.looks(made, pictures)
    for hook in hooks:
        hook.remove()
    assert seen[0].shape[-1] == 32, "128 pixels, a quarter after the first stage: nothing was shrunk"
    written = torch.cat([torch.cat([y.flatten(2).mean(2), y.flatten(2).std(2, correction=0)], 1) for y in seen], 1)
    assert found.shape == (3, 1024) and torch.allclose(found, written, atol=1e-5)
    large = pictures.repeat(4, 1).repeat(4, 2)
    assert torch.allclose(scorer.looks(made, large), found, atol=1e-5), "larger pictures are brought to the same size"
    assert scorer.looks(made, pictures[:, ::8, ::8]).isfinite().all(), "stages of one pixel do not vary"


@pytest.mark.skipif(not (scorer.ASSETS / "emoji-scorer-b").exists(), reason="the scorers are not trained yet")
def test_looks_notice_blur_that_the_embedding_overlooks() -> None:
    judge, pictures = scorer.load(scorer.ASSETS / "emoji-scorer-b"), squares()[0]
    soft = ladder.blurred(torch.from_numpy(pictures)[:, None], 1.5)[:, 0].numpy()

    def moved(features: Callable[[scorer.Scorer, np.ndarray], torch.Tensor]) -> float:
        """How far blur moves a picture, in distances between two of them."""
        before, after = features(judge, pictures), features(judge, soft)
        return float((after - before).norm(dim=1).mean() / torch.pdist(before).mean())

    assert moved(scorer.looks) > 2 * moved(scorer.embed_pictures)


def test_missing_scorer_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(artwork.ArtworkError, match="python -m hypersd emoji scorer"):
        scorer.load(tmp_path)


def test_only_what_is_done_becomes_an_asset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, rows = squares()
    (tmp_path / "artwork").mkdir()
    np.save(tmp_path / "artwork" / "pictures.npy", pictures)
    np.save(tmp_path / "artwork" / "masks.npy", pictures[..., 0])
    lines = "".join(json.dumps(asdict(r)) + "\n" for r in rows)
    (tmp_path / "artwork" / "manifest.jsonl").write_text(lines, encoding="utf-8")
    tokenizer = text.tokenizer_for([*TEXTS, *COLOURS], 600)
    tower = text.Tower(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
    text.export(tower, tokenizer, tmp_path / "text" / "export")
    monkeypatch.setattr(scorer, "RECIPE", Recipe(updates=2, batch=4, lr=1e-3))
    assets = tmp_path / "assets"
    scorer.make(tmp_path, minutes=0, assets=assets)  # one update each
    assert not assets.exists()
    scorer.make(tmp_path, only="b", assets=assets)
    assert [f.name for f in assets.iterdir()] == ["emoji-scorer-b"]
    projection = scorer.load(assets / "emoji-scorer-b", tmp_path / "text" / "export").text.text_projection.weight
    assert (projection - tower.head.weight).abs().max() < 0.005  # it began as the head the tower was distilled with
    assert tower.head.weight.abs().max() > 0.05
