"""Stable Diffusion XL: two text encoders, a pooled state and sizes, against diffusers' own pipeline."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

from hypersd import bench, network
from hypersd.backbone import Backbone, StableDiffusionXL
from hypersd.cost import CONFIGS
from hypersd.data import open_source, prepare
from hypersd.distill import Distillation, Settings
from hypersd.folders import ModelError, network_sha256
from hypersd.generate import denoise, draw
from hypersd.methods import METHODS, discover, find
from hypersd.pictures import to_image
from hypersd.plan import MadeUp, counted
from hypersd.records import Request
from hypersd.roles import Roles
from hypersd.train import Recipe, Run

BASE = METHODS["base"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_xl(tmp_path_factory.mktemp("xl") / "tiny-xl")


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return Backbone.load(folder)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> StableDiffusionXLPipeline:
    stock = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True, add_watermarker=False)
    stock.set_progress_bar_config(disable=True)
    changed = {
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "set_alpha_to_one": False,
    }
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config, **changed)
    return stock


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(("guidance", "negative"), [(1.0, ""), (4.0, ""), (4.0, "a red dog")])
def test_equals_the_stock_pipeline(
    backbone: Backbone, pipeline: StableDiffusionXLPipeline, steps: int, guidance: float, negative: str
) -> None:
    """An empty negative prompt is what a person gets who gives none: zeros, where the model was made so."""
    request = Request("a happy cat", 5, steps, guidance, negative_prompt=negative)
    drawn = pipeline(
        request.prompt, negative_prompt=negative or None, num_inference_steps=steps, guidance_scale=guidance,
        generator=torch.Generator().manual_seed(5), output_type="latent", height=64, width=64,
    ).images  # fmt: skip
    with torch.inference_mode():
        ours = denoise(backbone, request, BASE).x
    torch.testing.assert_close(ours, drawn, rtol=1e-5, atol=1e-5)
    assert ours.std() > 0.1


def test_pixels_equal_the_stock_pipelines(backbone: Backbone, pipeline: StableDiffusionXLPipeline) -> None:
    stock = pipeline("a happy cat", num_inference_steps=2, guidance_scale=4.0, height=64, width=64,
                     generator=torch.Generator().manual_seed(3)).images[0]  # fmt: skip
    ours = np.asarray(to_image(draw(backbone, Request("a happy cat", 3, 2, 4.0), BASE))).astype(int)
    assert ours.shape == (64, 64, 3)
    assert np.abs(ours - np.asarray(stock).astype(int)).max() <= 1 and ours.std() > 1


@pytest.mark.filterwarnings("ignore:.*config attributes:UserWarning")
def test_the_bench_compares_with_the_pipeline_of_the_family(backbone: Backbone) -> None:
    theirs = np.asarray(bench._stock(backbone)(7, 2, 4.0)).astype(int)
    ours = draw(backbone, Request(f"{bench.PROMPT} 7", bench.SEED, 2, 4.0), BASE)
    assert np.abs(np.asarray(to_image(ours)).astype(int) - theirs).max() <= 1


def test_states_hold_all_that_the_network_is_told(backbone: Backbone, pipeline: StableDiffusionXLPipeline) -> None:
    told = network.conditions(backbone.unet, backbone.embed(["a happy cat", ""]))
    with torch.no_grad():
        sequence, empty, pooled, empty_pooled = pipeline.encode_prompt("a happy cat", device="cpu")
    assert torch.equal(told["encoder_hidden_states"], torch.cat([sequence, empty]))
    assert torch.equal(told["added_cond_kwargs"]["text_embeds"], torch.cat([pooled, empty_pooled]))
    assert told["added_cond_kwargs"]["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]] * 2
    assert not empty.any() and sequence.any()


def test_an_empty_prompt_is_read_where_the_model_was_made_so(folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "model")
    index = json.loads((copied / "model_index.json").read_text())
    (copied / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": False}))
    assert Backbone.load(copied).embed([""])[0, :-1].any()


def test_the_decoder_stays_in_full_precision(folder: Path) -> None:
    """SDXL's overflows in half precision, which its configuration says."""
    half = Backbone.load(folder, dtype=torch.float16)
    assert (half.unet.dtype, half.vae.dtype, half.dtype) == (torch.float16, torch.float32, torch.float16)
    with torch.no_grad():
        assert half.picture(half.noise(1)[0]).isfinite().all()


@pytest.mark.parametrize("name", ["tscd", "hyper", "tscd-cfg"])
def test_it_can_be_distilled(folder: Path, tmp_path: Path, name: str) -> None:
    method = find(name)
    backbone = Backbone.load(folder)
    assert isinstance(backbone, StableDiffusionXL)
    settings = Settings(2, (4.0, 4.0), prompts=("a cat",))
    objective = Distillation(backbone, MadeUp.of(backbone, 2), method, method.stages[-1], settings)
    run = Run(objective, Recipe(updates=2, batch=2, lr=1e-3), tmp_path)
    before = {n: p.clone() for n, p in objective.modules()["student"].named_parameters()}
    with counted(objective.network) as calls:
        run.update()
        run.update()
    assert calls["with gradient"] >= 2
    learned = dict(objective.modules()["student"].named_parameters())
    assert any(not torch.equal(learned[n], before[n]) for n in before)


def test_pictures_with_captions_become_an_update(folder: Path, tmp_path: Path) -> None:
    """The pooled state and the sizes lie in the cache with the sequence, and nothing of them is lost."""
    backbone, captions = Backbone.load(folder), ["a happy cat", "a red heart", "a dog"]
    (tmp_path / "pictures").mkdir()
    for i, caption in enumerate(captions):
        pixels = np.random.default_rng(i).integers(0, 256, (80, 72, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"pictures/{i}.png")
        (tmp_path / f"pictures/{i}.txt").write_text(caption)
    data = prepare(open_source(tmp_path / "pictures"), backbone, tmp_path / "cache")
    batch = data.take(torch.arange(3))
    assert batch.captions == captions and batch.latents is not None and batch.latents.shape == (3, 4, 8, 8)
    for states, texts in ((batch.states, captions), (data.empty, [""])):
        told, expected = (network.conditions(backbone.unet, s) for s in (states, backbone.embed(texts)))
        pooled, sizes = told["added_cond_kwargs"].values()
        assert sizes.tolist() == [[64, 64, 0, 0, 64, 64]] * len(texts)
        torch.testing.assert_close(pooled, expected["added_cond_kwargs"]["text_embeds"], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(
            told["encoder_hidden_states"], expected["encoder_hidden_states"], rtol=1e-3, atol=1e-4
        )
    method = find("tscd-cfg")  # which learns from the empty caption too
    objective = Distillation(backbone, data, method, method.stages[-1], Settings(2, (4.0, 4.0), prompts=("a cat",)))
    before = {n: p.clone() for n, p in objective.modules()["student"].named_parameters()}
    Run(objective, Recipe(updates=1, batch=3, lr=1e-3), tmp_path / "run").update()
    learned = dict(objective.modules()["student"].named_parameters())
    assert all(p.isfinite().all() for p in learned.values())
    assert any(not torch.equal(learned[n], before[n]) for n in before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sizes_are_exact_in_half_precision(dtype: torch.dtype) -> None:
    """In the network's, then in the cache's."""
    for side in (*range(8, 1024, 8), *range(1024, 2049, 64)):
        row = network.packed(
            torch.zeros(1, 1, 8, dtype=dtype), torch.zeros(1, 2, dtype=dtype), (side, side, 0, 0, side, side)
        )
        assert row.half().float()[0, -1, 2:].tolist() == [side, side, 0, 0, side, side]


def test_adapters_of_every_method_draw(folder: Path, backbone: Backbone, tmp_path: Path) -> None:
    plain = {n: draw(backbone, Request("a cat", 1, n, guidance=1.0), BASE).pixels for n in (1, 2, 4, 8)}
    table = discover(tiny.adapters(folder, tmp_path), network_sha256(folder))
    assert table.keys() == METHODS.keys()
    for method in table.values():
        if method.adapted:
            steps = method.steps.suggested[0]
            assert draw(backbone, Request("a cat", 1, steps), method).pixels != plain[steps]


def test_the_second_encoder_is_looked_for(folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "model")
    weights = copied / "text_encoder_2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ModelError, match=r"text_encoder_2/model\.safetensors is truncated"):
        Backbone.load(copied)
    weights.unlink()
    with pytest.raises(ModelError, match=r"text_encoder_2/model\.safetensors is missing"):
        Backbone.load(copied)
    shutil.rmtree(copied / "tokenizer_2")
    with pytest.raises(ModelError, match="tokenizer_2"):
        Backbone.load(copied)


def test_weights_may_lie_in_shards(folder: Path, backbone: Backbone, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "model")
    unet = copied / "unet"
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    backbone.unet.save_pretrained(unet, max_shard_size="30KB")
    shards = sorted(unet.glob("diffusion_pytorch_model-*.safetensors"))
    assert len(shards) > 2
    sharded = Backbone.load(copied)
    assert sharded.network_sha256 == network_sha256(copied) not in ("", backbone.network_sha256)
    assert draw(sharded, Request("a cat", 1, 1), BASE).pixels == draw(backbone, Request("a cat", 1, 1), BASE).pixels
    shards[1].unlink()
    with pytest.raises(ModelError, match=r"unet/diffusion_pytorch_model-00002-of-.* is missing"):
        Backbone.load(copied)


def test_half_precision_files_are_enough(folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "model")
    for file in list(copied.rglob("*.safetensors")):
        halved = {name: tensor.half() for name, tensor in load_file(file).items()}
        save_file(halved, file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")), {"format": "pt"})
        file.unlink()
    assert Backbone.load(copied).network_sha256 == network_sha256(copied) != network_sha256(folder)


def test_sdxl_at_its_true_size_is_told_as_much() -> None:
    """On meta tensors: 2.57 billion parameters, states of 78 rows, no picture."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**CONFIGS["sdxl"])
        assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684
        assert network.pooled_width(unet) == 1280
        sequence, pooled = torch.zeros(2, 77, 2048), torch.zeros(2, 1280)
        states = network.packed(sequence, pooled, (1024, 1024, 0, 0, 1024, 1024))
        assert states.shape == (2, 78, 2048)
        with torch.no_grad():
            output = network.call(unet, torch.zeros(2, 4, 128, 128), torch.tensor(999), states)
        assert output.shape == (2, 4, 128, 128)
        roles = Roles(unet)
        student = roles.add("student", rank=64)
    assert sum(p.numel() for p in student.parameters()) > 100_000_000


# ----------------------------------------------------------------------------------------- with little memory


def test_a_quick_decoder_draws_what_the_stock_pipeline_draws_with_it(
    folder: Path, pipeline: StableDiffusionXLPipeline, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    AutoencoderTiny(
        latent_channels=4, encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4,
    ).save_pretrained(tmp_path / "quick")  # fmt: skip
    backbone = Backbone.load(folder, decoder=str(tmp_path / "quick"))
    stock = copy.copy(pipeline)
    stock.register_modules(vae=AutoencoderTiny.from_pretrained(tmp_path / "quick"))
    theirs = stock("a cat", num_inference_steps=2, guidance_scale=1.0, height=64, width=64,
                   generator=torch.Generator().manual_seed(3)).images[0]  # fmt: skip
    ours = np.asarray(to_image(draw(backbone, Request("a cat", 3, 2, 1.0), BASE))).astype(int)
    assert np.abs(ours - np.asarray(theirs).astype(int)).max() <= 1 and ours.std() > 1
    assert backbone.encode(torch.zeros(1, 64, 64, 3, dtype=torch.uint8))[0].shape == (1, 4, 8, 8)  # by the large one


@pytest.mark.parametrize(
    ("decoder", "sentence"),
    [
        ("quick", "no quick decoder is known for tiny-xl"),
        ("/nowhere", "must be 'quick' or the folder of one, got '/nowhere'"),
    ],
)
def test_a_decoder_that_is_not_there_is_told(folder: Path, decoder: str, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        Backbone.load(folder, decoder=decoder)


class Resting:
    """A part that says it lies on another device, and writes down where it is sent. There is no GPU here."""

    device = torch.device("meta")

    def __init__(self, part: Any, name: str, moves: list[str]) -> None:
        self.part, self.name, self.moves = part, name, moves

    def to(self, place: Any) -> None:
        self.moves.append(f"{self.name} to {place}")

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self.part(*given, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.part, name)


def test_what_rests_elsewhere_comes_and_goes(folder: Path, backbone: Backbone) -> None:
    resting, moves = Backbone.load(folder, offload=True), list[str]()
    assert isinstance(resting, StableDiffusionXL)
    resting.text_encoder = Resting(resting.text_encoder, "text", moves)
    resting.text_encoder_2 = Resting(resting.text_encoder_2, "text 2", moves)
    resting.decoder = Resting(resting.vae, "decoder", moves)
    panel = draw(resting, Request("a cat", 3, 2, 1.0), BASE)
    assert panel.pixels == draw(backbone, Request("a cat", 3, 2, 1.0), BASE).pixels
    assert moves == [f"{part} to {place}" for part in ("text", "text 2", "decoder") for place in ("cpu", "meta")]


def test_a_negative_prompt_without_guidance(backbone: Backbone) -> None:
    """Only the sequence takes part in cross-attention: the pooled state and the sizes stay those of the prompt."""
    plain, near, away = (
        draw(backbone, Request("a cat", 3, 2, 1.0, negative_prompt=negative, nag=nag), BASE).pixels
        for negative, nag in (("", None), ("a cat", 4.0), ("a red dog", 4.0))
    )
    assert near == plain != away
