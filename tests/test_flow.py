"""Stable Diffusion 3 and FLUX: drawn as diffusers' own pipelines draw them, with Hyper-SD's LoRAs for them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from safetensors.torch import save_file
from test_releases import taken
from torch import Tensor, nn

from hypersd import adapters, bench, releases
from hypersd.backbone import Backbone, Flux, StableDiffusion3
from hypersd.distill import loader
from hypersd.folders import ModelError
from hypersd.generate import denoise, draw
from hypersd.methods import METHODS, discover
from hypersd.pictures import to_image
from hypersd.records import InputError, Request
from hypersd.releases import RELEASES, Release
from hypersd.schedule import FlowSchedule

BASE = METHODS["base"]
PROMPT, SEED = "a happy cat with a red heart", 7
LAYERS = {"sd3": "transformer_blocks.0.attn.to_v", "flux": "single_transformer_blocks.0.attn.to_v"}
WIDTH = {"sd3": 16, "flux": 32}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Backbone]:
    folder = tmp_path_factory.mktemp("flow")
    made = {"sd3": tiny.build_sd3(folder / "sd3"), "shifted": tiny.build_sd3(folder / "shifted", shift=True),
            "flux": tiny.build_flux(folder / "flux")}  # fmt: skip
    return {name: Backbone.load(path) for name, path in made.items()}


def stock(
    backbone: Backbone, steps: int, g: float, negative: str = "", lora: Path | None = None
) -> tuple[Tensor, np.ndarray]:
    """Final latents [1, c, h, w] and pixels of the stock pipeline."""
    flux = isinstance(backbone, Flux)
    pipe = (FluxPipeline if flux else StableDiffusion3Pipeline).from_pretrained(backbone.folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    if lora:
        pipe.load_lora_weights(lora.parent, weight_name=lora.name)
        pipe.fuse_lora(lora_scale=0.125)
    kept: list[Tensor] = []

    def keep(_pipe: object, _index: int, _t: object, given: dict[str, Tensor]) -> dict[str, Tensor]:
        kept[:] = [given["latents"]]
        return {}

    call = {} if flux else {"negative_prompt": negative}
    drawn = pipe(
        PROMPT, num_inference_steps=steps, guidance_scale=g, generator=torch.Generator().manual_seed(SEED),
        height=64, width=64, callback_on_step_end=keep, **call,
    ).images[0]  # fmt: skip
    latents = FluxPipeline._unpack_latents(kept[0], 64, 64, 8) if flux else kept[0]
    return latents, np.asarray(drawn).astype(int)


@pytest.mark.parametrize("name", ["sd3", "shifted", "flux"])
@pytest.mark.parametrize(("steps", "g", "negative"), [(1, 3.5, ""), (4, 3.5, ""), (6, 1.0, ""), (4, 5.0, "a red dog")])
def test_equals_the_stock_pipeline(models: dict[str, Backbone], name: str, steps: int, g: float, negative: str) -> None:
    backbone = models[name]
    theirs, pixels = stock(backbone, steps, g, negative)
    request = Request(PROMPT, SEED, steps, g, negative_prompt=negative)
    with torch.inference_mode():
        ours = denoise(backbone, request, BASE)
    torch.testing.assert_close(ours.x, theirs, rtol=1e-4, atol=1e-4)
    assert ours.nfe == steps * (2 if g > 1 and name != "flux" else 1)
    drawn = np.asarray(to_image(draw(backbone, request, BASE))).astype(int)
    assert np.abs(drawn - pixels).max() <= 1 and drawn.std() > 1


@pytest.mark.parametrize(
    "release", [r for r in RELEASES if r.backbone in LAYERS], ids=lambda r: f"{r.backbone}-{r.name}"
)
def test_hyper_sds_loras_are_drawn_as_their_card_says(
    models: dict[str, Backbone], tmp_path: Path, release: Release
) -> None:
    """The card's lines: load, fuse at 0.125, call with the steps of the name and the guidance of the table."""
    name = release.backbone
    torch.manual_seed(1)
    layer, width = LAYERS[name], WIDTH[name]
    halves = {f"transformer.{layer}.lora_A.weight": 4 * torch.randn(4, width),
              f"transformer.{layer}.lora_B.weight": torch.randn(width, 4)}  # fmt: skip
    save_file(halves, tmp_path / "theirs.safetensors")
    backbone = models[name]
    unpinned = Release(**{**vars(release), "sha256": ""})
    kept = releases.fetch(unpinned, backbone.network_sha256, tmp_path / "lora", taken(tmp_path / "theirs.safetensors"))
    method = discover([kept], backbone.network_sha256)["tscd-cfg"]
    assert release.segments in method.steps
    with torch.inference_mode():
        ours = denoise(backbone, Request(PROMPT, SEED, release.segments), method)
        plain = denoise(backbone, Request(PROMPT, SEED, release.segments, release.guidance), BASE)
    theirs, _ = stock(backbone, release.segments, release.guidance, lora=tmp_path / "theirs.safetensors")
    torch.testing.assert_close(ours.x, theirs, rtol=2e-3, atol=2e-3)
    assert (ours.x - plain.x).abs().max() > 0.02  # the adapter does something


@pytest.mark.parametrize("name", LAYERS)
def test_diffusers_reads_every_layer_that_is_saved(models: dict[str, Backbone], tmp_path: Path, name: str) -> None:
    """Those outside of the blocks as well."""
    backbone, release = models[name], next(r for r in RELEASES if r.backbone == name)
    torch.manual_seed(1)
    adapter: dict[str, Tensor] = {}
    for layer, module in backbone.unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            out, *into = module.weight.shape
            adapter[f"{layer}.lora_A"] = torch.randn(2, *into)
            adapter[f"{layer}.lora_B"] = torch.randn(out, 2, *(1 for _ in into[1:]))
    card = release.card(backbone.network_sha256, 2)
    with pytest.raises(adapters.AdapterError, match="kohya's names are for UNets"):
        adapters.save(tmp_path / "every.safetensors", adapter, card, kohya=True)
    file = adapters.save(tmp_path / "every.safetensors", adapter, card)
    method = discover([file], backbone.network_sha256)["tscd-cfg"]
    with torch.inference_mode():
        ours = denoise(backbone, Request(PROMPT, SEED, release.segments), method)
    theirs, _ = stock(backbone, release.segments, release.guidance, lora=file.path)
    torch.testing.assert_close(ours.x, theirs, rtol=2e-3, atol=2e-3)


def test_fluxs_own_names_and_fused_layers_are_read(tmp_path: Path) -> None:
    """As kohya's trainer writes them: one layer for queries, keys and values, and an alpha."""
    width, rank, stem = 32, 4, "lora_unet_double_blocks_0_img_attn_qkv"
    torch.manual_seed(0)
    down, up = torch.randn(rank, width), torch.randn(3 * width, rank)
    theirs = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(2.0)}
    save_file(theirs, tmp_path / "x.safetensors")
    found = adapters.load(tmp_path / "x.safetensors")
    layers = [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    assert found.keys() == {f"{layer}.{half}" for layer in layers for half in ("lora_A", "lora_B")}
    deltas = torch.cat([found[f"{layer}.lora_B"] @ found[f"{layer}.lora_A"] for layer in layers])
    torch.testing.assert_close(deltas, up @ down * 2.0 / rank)


def test_names_that_only_look_like_fluxs_are_told(tmp_path: Path) -> None:
    save_file({"lora_unet_double_blocks_0_odd.lora_down.weight": torch.ones(2, 4)}, tmp_path / "x.safetensors")
    with pytest.raises(adapters.AdapterError, match=r"x\.safetensors"):
        adapters.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize("even", [True, False])
def test_the_flow_is_a_straight_line(even: bool) -> None:
    schedule = FlowSchedule.of({"shift": 3.0}, tokens=16, even=even)
    x0, eps = torch.randn(2, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    for t in (1, 250_000, 1_000_000):
        x_t = schedule.diffuse(x0, eps, t)
        torch.testing.assert_close(schedule.split(schedule.target(x0, eps, t), x_t, t), (x0, eps), atol=1e-6, rtol=1e-5)
        batched = schedule.split(schedule.target(x0, eps, t), x_t, torch.tensor([t]))
        torch.testing.assert_close(batched[0], x0, atol=1e-6, rtol=1e-5)
    assert torch.equal(schedule.diffuse(x0, eps, -1), x0)
    grid = schedule.timesteps(5)
    assert grid == sorted(grid, reverse=True) and grid[0] == 1_000_000 and len(grid) == 5


def test_what_is_not_read_is_told(models: dict[str, Backbone]) -> None:
    assert models["sd3"].truncated("cat " * 100) == ""
    assert models["sd3"].truncated("cat " * 255 + "dog") == "dog"
    assert models["flux"].truncated("cat " * 500) == ""


def test_they_are_for_drawing_only(models: dict[str, Backbone]) -> None:
    with pytest.raises(InputError, match="sd3 can be drawn with, not trained"):
        loader(str(models["sd3"].folder))()
    with pytest.raises(InputError, match="the openvino engine does not draw with sd3"):
        Backbone.load(models["sd3"].folder, engine="openvino")


def test_the_long_encoder_is_looked_for(models: dict[str, Backbone], tmp_path: Path) -> None:
    copy = shutil.copytree(models["flux"].folder, tmp_path / "model")
    (copy / "text_encoder_2" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"text_encoder_2/model\.safetensors is missing"):
        Backbone.load(copy)


@pytest.mark.parametrize(("name", "half"), [("sd3", torch.float16), ("flux", torch.bfloat16)])
def test_a_gpu_draws_a_local_folder_in_the_half_precision_of_its_family(
    models: dict[str, Backbone], name: str, half: torch.dtype
) -> None:
    """Whatever the folder is called: float16 overflows in FLUX. torch's "meta" is a device without a machine."""
    assert Backbone.load(models[name].folder, device="meta", dtype=None).dtype == half
    assert Backbone.load(models[name].folder, device="cpu:0", dtype=None).dtype == torch.float32


def test_each_family_has_its_class(models: dict[str, Backbone]) -> None:
    assert type(models["sd3"]) is StableDiffusion3 and type(models["flux"]) is Flux


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_the_bench_compares_with_the_pipeline_of_the_family(models: dict[str, Backbone], name: str) -> None:
    theirs = np.asarray(bench._stock(models[name])(7, 2, 3.5)).astype(int)
    ours = draw(models[name], Request(f"{bench.PROMPT} 7", bench.SEED, 2, 3.5), BASE)
    assert np.abs(np.asarray(to_image(ours)).astype(int) - theirs).max() <= 1
