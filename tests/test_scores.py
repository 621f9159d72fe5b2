"""Published scores: the right formula on tiny random weights, checkpoints under their own names, clear absence."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig, BlipVisionModel, CLIPConfig, CLIPModel
from transformers.models.blip.modeling_blip_text import BlipTextModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hypersd import scores
from hypersd.emoji.prompts import Prompt
from hypersd.evaluate import chosen
from hypersd.evaluate.measures import METRICS, Evidence, measured
from hypersd.feedback import reward
from hypersd.feedback.likeness import Eye
from hypersd.records import InputError

SIDE = 32
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "happy", "cat", "dog"]
PROMPTS = ["a happy cat", "a dog"]


def clip() -> CLIPModel:
    torch.manual_seed(0)
    words = tiny.tokenizer()
    text = {"vocab_size": len(words), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 12, "eos_token_id": words.eos_token_id,
            "bos_token_id": words.bos_token_id, "pad_token_id": words.pad_token_id}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": SIDE, "patch_size": 8}  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()


def saved_clip(folder: Path) -> CLIPModel:
    model = clip()
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return model


def head(width: int) -> dict[str, Tensor]:
    """Under the names of the published heads: linear layers at 0, 2, 4, 6 and 7."""
    torch.manual_seed(1)
    sizes = zip((0, 2, 4, 6, 7), (width, 1024, 128, 64, 16), (1024, 128, 64, 16, 1), strict=True)
    return {f"layers.{n}.{k}": v for n, a, b in sizes for k, v in nn.Linear(a, b).state_dict().items()}


def blip() -> tuple[BlipVisionModel, BlipTextModel]:
    torch.manual_seed(2)
    vision = BlipVisionConfig(hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1,
                              image_size=SIDE, patch_size=16, layer_norm_eps=1e-6)  # fmt: skip
    text = BlipTextConfig(vocab_size=len(WORDS), hidden_size=16, encoder_hidden_size=16, intermediate_size=64,
                          num_hidden_layers=2, num_attention_heads=1, max_position_embeddings=40, is_decoder=True,
                          bos_token_id=2, sep_token_id=3)  # fmt: skip
    seer, reader = BlipVisionModel(vision).eval(), BlipTextModel(text, add_pooling_layer=False).eval()
    for weight in (*seer.parameters(), *reader.parameters()):
        weight.data += 0.05 * torch.randn(weight.shape)  # positions and the like begin as zero
    return seer, reader


def as_published(vision: BlipVisionModel, text: BlipTextModel) -> dict[str, Tensor]:
    """The names of ImageReward's own checkpoint, written from its authors' classes (timm's ViT, BLIP's BERT)."""
    found = {f"mlp.{k}": v for k, v in head(16).items()}
    found |= {f"blip.text_encoder.{k}": v for k, v in text.state_dict().items()}
    there = {"class_embedding": "cls_token", "position_embedding": "pos_embed"}
    for key, value in vision.state_dict().items():
        part, _, rest = key.partition(".")
        if part == "embeddings":
            name = there.get(rest) or "patch_embed.proj." + rest.rpartition(".")[2]
        elif part == "post_layernorm":
            name = f"norm.{rest}"
        else:
            _, n, rest = rest.split(".", 2)
            rest = rest.replace("layer_norm", "norm").replace("self_attn.projection", "attn.proj")
            name = f"blocks.{n}.{rest.replace('self_attn', 'attn')}"
        found[f"blip.visual_encoder.{name}"] = value
    return found


def as_open_clip(model: CLIPModel) -> dict[str, Tensor]:
    """The names of open_clip's CLIP, written from its own modules: attention in one piece, projections transposed."""
    state = model.state_dict()
    found = {"logit_scale": state["logit_scale"], "visual.proj": state["visual_projection.weight"].T,
             "text_projection": state["text_projection.weight"].T}  # fmt: skip
    for tower, ours in (("visual.", "vision_model."), ("", "text_model.")):
        for layer in range(2):
            here, there = f"{ours}encoder.layers.{layer}.", f"{tower}transformer.resblocks.{layer}."
            for kind in ("weight", "bias"):
                found[f"{there}attn.in_proj_{kind}"] = torch.cat(
                    [state[f"{here}self_attn.{x}_proj.{kind}"] for x in "qkv"]
                )
                for a, b in (("self_attn.out_proj", "attn.out_proj"), ("mlp.fc1", "mlp.c_fc"),
                             ("mlp.fc2", "mlp.c_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2")):  # fmt: skip
                    found[f"{there}{b}.{kind}"] = state[f"{here}{a}.{kind}"]
    eye, reader = "vision_model.embeddings.", "text_model.embeddings."
    for a, b in ((f"{eye}class_embedding", "visual.class_embedding"),
                 (f"{eye}patch_embedding.weight", "visual.conv1.weight"),
                 (f"{eye}position_embedding.weight", "visual.positional_embedding"),
                 (f"{reader}token_embedding.weight", "token_embedding.weight"),
                 (f"{reader}position_embedding.weight", "positional_embedding")):  # fmt: skip
        found[b] = state[a]
    for kind in ("weight", "bias"):
        found[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        found[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
        found[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
    return found


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all five, tiny and random, laid out as HYPERSD_SCORES wants it."""
    folder = tmp_path_factory.mktemp("scores")
    for place in ("clip/clip-vit-base-patch32", "pick/PickScore_v1", "aesthetic/clip-vit-large-patch14",
                  "hps/CLIP-ViT-H-14-laion2B-s32B-b79K"):  # fmt: skip
        saved_clip(folder / place)
    torch.save(head(16), folder / "aesthetic/aesthetic-model.pth")
    torch.save({"state_dict": as_open_clip(clip())}, folder / "hps/HPS_v2.1_compressed.pt")
    (folder / "image_reward").mkdir()
    torch.save(as_published(*blip()), folder / "image_reward/ImageReward.pt")
    bert = folder / "image_reward/bert-base-uncased"
    bert.mkdir()
    (bert / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer.from_pretrained(bert).save_pretrained(bert)
    return folder


@pytest.fixture
def load(weights: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HYPERSD_SCORES", str(weights))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    scores.load.cache_clear()
    yield scores.load
    scores.load.cache_clear()


def pictures(count: int = 2, side: int = SIDE) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(3)) * 2 - 1


def test_pictures_are_prepared_as_clips_own_processor_does() -> None:
    coarse = torch.rand(1, 3, 9, 12, generator=torch.Generator().manual_seed(4))
    pixels = (F.interpolate(coarse, (90, 120), mode="bicubic").clamp(0, 1) * 255).round().to(torch.uint8)[0]
    own = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    theirs = own(Image.fromarray(pixels.permute(1, 2, 0).numpy()), return_tensors="pt")["pixel_values"]
    ours = scores.prepared(pixels[None] / 127.5 - 1, 64)
    assert ours.shape == (1, 3, 64, 64)
    assert float((ours - theirs).abs().max()) < 0.05 and float((ours - theirs).abs().mean()) < 0.01


@pytest.mark.parametrize(("name", "scale"), [("clip", 100.0), ("pick", 1.0), ("hps", 1.0)])
def test_cosines_are_clips_own(load: Any, name: str, scale: float) -> None:
    x, words = pictures(), tiny.tokenizer()
    with torch.no_grad():
        out = clip()(pixel_values=scores.prepared(x, SIDE), **words(PROMPTS, padding=True, return_tensors="pt"))
    wanted = scale * F.cosine_similarity(out.image_embeds, out.text_embeds)
    torch.testing.assert_close(load(name)(x, PROMPTS), wanted, rtol=1e-4, atol=1e-5)


def test_beauty_is_a_line_on_the_unit_vector(load: Any) -> None:
    """The head has no bend anywhere, so it is one matrix."""
    x = pictures()
    with torch.no_grad():
        vector = F.normalize(clip().get_image_features(pixel_values=scores.prepared(x, SIDE)).pooler_output, dim=1)
    for n in (0, 2, 4, 6, 7):
        vector = vector @ head(16)[f"layers.{n}.weight"].T + head(16)[f"layers.{n}.bias"]
    torch.testing.assert_close(load("aesthetic")(x, PROMPTS), vector[:, 0], rtol=1e-4, atol=1e-5)


def test_image_reward_reads_its_authors_checkpoint(load: Any, weights: Path) -> None:
    x, (vision, text) = pictures(), blip()
    words = BertTokenizer.from_pretrained(weights / "image_reward/bert-base-uncased")
    read = words(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    with torch.no_grad():
        seen = vision(pixel_values=scores.prepared(x, SIDE)).last_hidden_state
        state = text(input_ids=read.input_ids, attention_mask=read.attention_mask, encoder_hidden_states=seen,
                     encoder_attention_mask=torch.ones(seen.shape[:2])).last_hidden_state[:, 0]  # fmt: skip
    for n in (0, 2, 4, 6, 7):
        state = state @ head(16)[f"layers.{n}.weight"].T + head(16)[f"layers.{n}.bias"]
    wanted = (state[:, 0] - 0.16717363) / 1.03333940
    torch.testing.assert_close(load("image_reward")(x, PROMPTS), wanted, rtol=1e-4, atol=1e-5)
    assert float((wanted[0] - wanted[1]).abs()) > 1e-6, "pictures and prompts matter"


@pytest.mark.parametrize("name", scores.PUBLISHED)
def test_pictures_get_a_gradient_and_weights_do_not(load: Any, name: str) -> None:
    x = pictures(side=48).requires_grad_()
    scorer = load(name)
    scorer(x, PROMPTS).sum().backward()
    assert x.grad is not None and float(x.grad.abs().sum()) > 0
    assert not any(p.requires_grad for p in scorer.parameters())


@pytest.mark.parametrize("name", ["clip", "pick", "hps"])
def test_a_clip_tells_how_pictures_are_drawn(load: Any, name: str) -> None:
    """Of each layer the mean and deviation over patches; blur changes it, and a gradient goes through."""
    x, eye = pictures().requires_grad_(), load(name)
    assert [isinstance(each, Eye) for each in (eye, load("aesthetic"))] == [True, False]
    told = eye.looks(x)
    layers = eye.clip.vision_model(
        pixel_values=scores.prepared(x, eye.clip.config.vision_config.image_size), output_hidden_states=True
    ).hidden_states
    width = layers[0].shape[-1]
    assert told.shape == (2, 2 * len(layers) * width)
    torch.testing.assert_close(told[:, :width], layers[0][:, 1:].mean(1))
    torch.testing.assert_close(told[:, -width:], layers[-1][:, 1:].std(1, correction=0))
    blurred = torch.nn.functional.avg_pool2d(x, 5, 1, 2)
    assert float((eye.looks(blurred) - told).detach().abs().max()) > 1e-2
    (slope,) = torch.autograd.grad(told.sum(), x)
    assert bool(slope.abs().amax((1, 2, 3)).gt(0).all())


@pytest.mark.parametrize("name", scores.PUBLISHED)
def test_a_score_comes_to_where_the_pictures_are(load: Any, name: str) -> None:
    with suppress(RuntimeError):  # transformers looks at the values of a mask, and here there are none
        assert load(name)(pictures().to("meta"), PROMPTS).device.type == "meta"
    assert {weight.device.type for weight in load(name).parameters()} == {"meta"}


@pytest.mark.parametrize("name", scores.PUBLISHED)
def test_a_picture_scores_the_same_alone(load: Any, name: str) -> None:
    x = pictures()
    together, alone = load(name)(x, PROMPTS), torch.cat([load(name)(x[i : i + 1], PROMPTS[i : i + 1]) for i in (0, 1)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", scores.PUBLISHED)
def test_each_is_a_metric_and_a_reward(load: Any, name: str) -> None:
    pixels = torch.randint(0, 256, (2, 2, SIDE, SIDE, 3), generator=torch.Generator().manual_seed(5)).to(torch.uint8)
    none = "not there"
    evidence = Evidence([Prompt("given", p, p) for p in PROMPTS], pixels, *[none] * 8)
    values = measured(METRICS[name], evidence)
    assert isinstance(values, Tensor) and values.shape == (2,)
    x = pixels[:, 0].permute(0, 3, 1, 2) / 127.5 - 1
    y = pixels[:, 1].permute(0, 3, 1, 2) / 127.5 - 1
    judge = reward.load(Path(name))
    wanted = (judge(x, PROMPTS) + judge(y, PROMPTS)) / 2
    torch.testing.assert_close(values.float(), wanted, rtol=1e-4, atol=1e-5)
    assert judge.name == name and np.isfinite(judge.threshold)


def test_they_are_measured_when_asked_for_only() -> None:
    """The embedded model's report must not go and fetch gigabytes."""
    assert not [m for m in chosen(None) if m.published] and len(chosen(None, published=True)) == len(METRICS)
    assert [m.name for m in chosen("clip,pick")] == ["clip", "pick"]
    assert METRICS["image_reward"].optimised and METRICS["aesthetic"].optimised, "rewards of the paper are marked"


def test_absent_weights_are_named_and_stop_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERSD_SCORES", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the variable is read at import
    scores.load.cache_clear()
    with pytest.raises(InputError, match=r"yuvalkirstain/PickScore_v1 could not be fetched .* HYPERSD_SCORES"):
        scores.load("pick")
    evidence = Evidence([], torch.zeros(0, 1, 8, 8, 3).byte(), *[""] * 8)
    assert "PickScore_v1" in str(measured(METRICS["pick"], evidence))
    with pytest.raises(InputError, match="choose from clip, aesthetic"):
        scores.load("fid")


@pytest.mark.parametrize("what", ["text", "pickle", "short", "other"])
def test_a_checkpoint_of_no_use_is_named(
    weights: Path, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pickle that would run code is refused unread."""
    file = tmp_path / "aesthetic/aesthetic-model.pth"
    file.parent.mkdir()
    (tmp_path / "aesthetic/clip-vit-large-patch14").symlink_to(weights / "aesthetic/clip-vit-large-patch14")
    if what == "text":
        file.write_text("not a checkpoint")
    elif what == "pickle":
        torch.save({"layers.0.weight": print}, file)
    elif what == "short":
        file.write_bytes((weights / "aesthetic/aesthetic-model.pth").read_bytes()[:2000])
    else:
        torch.save(head(8), file)
    monkeypatch.setenv("HYPERSD_SCORES", str(tmp_path))
    scores.load.cache_clear()
    with pytest.raises(InputError, match=r"cannot be read|the head needs 0.weight of \(1024, 16\)"):
        scores.load("aesthetic")
