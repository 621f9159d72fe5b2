"""The committed weights: stock diffusers reads them and draws what we draw; the figures were measured on them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from hypersd import pictures
from hypersd.backbone import Backbone
from hypersd.emoji import artwork, scorer
from hypersd.feedback import known, reward, structure
from hypersd.generate import draw
from hypersd.methods import METHODS
from hypersd.records import Panel, Request

ASSETS = Path(__file__).parents[1] / "assets"


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone.load("emoji")


@pytest.mark.parametrize(("steps", "guidance"), [(4, 1.0), (25, 4.0)])
def test_stock_diffusers_draws_the_same_picture(backbone: Backbone, steps: int, guidance: float) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(ASSETS / "emoji-sd", dtype=torch.float32)
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        "a happy cat, fluent style",
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(7),
    ).images[0]
    panel = draw(backbone, Request("a happy cat, fluent style", 7, steps, guidance), METHODS["base"])
    difference = np.abs(np.asarray(theirs, np.int16) - np.asarray(pictures.to_image(panel), np.int16))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_latents_have_unit_variance_so_that_the_schedule_fits(backbone: Backbone) -> None:
    """Known pictures drawn by the model itself: its latents must live where training put them."""
    panel = draw(backbone, Request("red heart", 1), METHODS["base"])
    x = torch.from_numpy(np.frombuffer(panel.pixels, np.uint8).reshape(1, 128, 128, 3).copy()).permute(0, 3, 1, 2)
    with torch.inference_mode():
        latents = backbone.vae.encode(x.float() / 127.5 - 1).latent_dist.mode()
    assert 0.3 < float(latents.std()) < 2 and backbone.vae.config.scaling_factor == 1.0


@pytest.mark.parametrize(("prompt", "strongest"), [("red heart", 0), ("blue heart", 2)])
def test_hearts_have_their_colour_on_white(backbone: Backbone, prompt: str, strongest: int) -> None:
    panel = draw(backbone, Request(prompt, 1), METHODS["base"])
    picture = np.frombuffer(panel.pixels, np.uint8).reshape(128, 128, 3)
    corners = (picture[:6, :6], picture[:6, -6:], picture[-6:, :6], picture[-6:, -6:])
    assert min(corner.mean() for corner in corners) > 235
    middle = picture[48:80, 40:88].reshape(-1, 3).mean(0)
    assert middle.argmax() == strongest and middle.max() - middle.min() > 60


@pytest.mark.skipif(not (ASSETS / "emoji-measures.json").exists(), reason="these weights are not measured yet")
def test_the_figures_were_measured_on_these_weights(backbone: Backbone) -> None:
    measures = json.loads((ASSETS / "emoji-measures.json").read_text())
    assert measures["base_sha256"] == backbone.sha256


@pytest.mark.skipif(not (ASSETS / "emoji-scorer-b").exists(), reason="the scorers are not trained yet")
def test_the_scorers_tell_labels_apart(backbone: Backbone) -> None:
    """Both know a red heart from other things, and they are not the same network."""
    labels = ["red heart", "rocket", "pizza", "cat face", "evergreen tree", "automobile"]
    panel = draw(backbone, Request("red heart", 3), METHODS["base"])
    picture = np.frombuffer(panel.pixels, np.uint8).reshape(1, 128, 128, 3)
    scores = []
    for name in ("a", "b"):
        judge = scorer.load(ASSETS / f"emoji-scorer-{name}")
        score = scorer.embed_pictures(judge, picture) @ scorer.embed_texts(judge, labels).T
        assert labels[int(score.argmax())] == "red heart"
        scores.append(score)
    assert not torch.allclose(scores[0], scores[1])


def test_every_pack_is_credited() -> None:
    credits = (ASSETS / "CREDITS.md").read_text()
    for pack in artwork.PACKS:
        assert pack.credit.split(" by ")[0] in credits and pack.licence in credits


@pytest.mark.skipif(not (ASSETS / "emoji-reward").exists(), reason="the reward is not trained yet")
def test_the_reward_prefers_drawings_to_spoiled_ones(backbone: Backbone) -> None:
    judge = reward.load(ASSETS / "emoji-reward")
    prompts = ["red heart", "cat face", "pizza", "snowman", "rocket", "owl"]
    drawn = torch.stack([pixels(draw(backbone, Request(p, 3, 8), METHODS["base"])) for p in prompts])
    good, bad = (x.permute(0, 3, 1, 2) / 127.5 - 1 for x in (drawn, known.worse(drawn)))
    assert int((judge(good, prompts) > judge(bad, prompts)).sum()) >= 5
    assert isinstance(judge, reward.Trained) and judge.card.accuracy >= 0.9, "of pairs of prompts that it never saw"


@pytest.mark.skipif(not (ASSETS / "emoji-segmenter").exists(), reason="the segmenter is not trained yet")
def test_the_segmenter_finds_the_heart(backbone: Backbone) -> None:
    find = structure.Outline(ASSETS / "emoji-segmenter")
    x = pixels(draw(backbone, Request("red heart", 1), METHODS["base"])).permute(2, 0, 1)[None] / 127.5 - 1
    coloured = (x.amax(1) - x.amin(1) > 0.5).float()
    assert float(find(x, coloured)) < 0.3 < float(find(x, 1 - coloured))


def pixels(panel: Panel) -> torch.Tensor:
    return torch.frombuffer(bytearray(panel.pixels), dtype=torch.uint8).view(panel.height, panel.width, 3)
