"""Every published LoRA is drawn as its model card says: ours against the stock pipeline, called by hand as there."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    TCDScheduler,
    UNet2DConditionModel,
)
from test_releases import published, taken
from torch import Tensor

from hypersd import adapters, releases
from hypersd.backbone import Backbone
from hypersd.cost import CONFIGS
from hypersd.folders import read_json
from hypersd.generate import denoise
from hypersd.methods import METHODS, discover
from hypersd.records import InputError, Request
from hypersd.releases import RELEASES, Release

PROMPT, SEED = "a happy cat with a red heart", 7
KINDS = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}

# What the model cards have people write, by method: the scheduler, and what the pipeline is called with.
Card = tuple[Callable[[Any], Any], dict[str, Any]]
CARDS: dict[str, Card] = {
    "hyper": (lambda c: TCDScheduler.from_config(c), {"guidance_scale": 0, "eta": 1.0}),
    "tscd": (lambda c: DDIMScheduler.from_config(c, timestep_spacing="trailing"), {"guidance_scale": 0}),
    "tscd-cfg": (lambda c: DDIMScheduler.from_config(c, timestep_spacing="trailing"), {"guidance_scale": 6.0}),
    "lcm": (lambda c: LCMScheduler.from_config(c), {"guidance_scale": 1.0}),
    "tcd": (lambda c: TCDScheduler.from_config(c), {"guidance_scale": 0, "eta": 0.3}),
    "pcm": (lambda c: DDIMScheduler.from_config(c, timestep_spacing="trailing"), {"guidance_scale": 0}),
    "pcm-cfg": (lambda c: DDIMScheduler.from_config(c, timestep_spacing="trailing"), {"guidance_scale": 7.5}),
    "lightning": (lambda c: EulerDiscreteScheduler.from_config(c, timestep_spacing="trailing"), {"guidance_scale": 0}),
    "flash": (lambda c: LCMScheduler.from_config(c), {"guidance_scale": 0}),
    "dmd2": (lambda c: LCMScheduler.from_config(c), {"guidance_scale": 0, "timesteps": [999, 749, 499, 249]}),
}
# The true models' scheduler_config.json say these; a tiny model's says them too, whatever class wrote it.
FAMILY = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Backbone]:
    folder = tmp_path_factory.mktemp("recipes")
    tiny.build(folder / "sd15", prediction="epsilon")
    tiny.build_xl(folder / "sdxl")
    return {name: Backbone.load(folder / name) for name in KINDS}


@pytest.fixture(scope="module")
def theirs(models: dict[str, Backbone], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LoRA file for each base, in kohya's names with an alpha, as most of the releases are."""
    return {name: published(models[name], tmp_path_factory.mktemp(name), kohya=True, alpha=2.0) for name in models}


@pytest.fixture(scope="module")
def pipes(models: dict[str, Backbone], theirs: dict[str, Path]) -> dict[str, Any]:
    """The stock pipelines, which have read and merged these files themselves."""
    made = {name: kind.from_pretrained(models[name].folder, local_files_only=True) for name, kind in KINDS.items()}
    for name, pipe in made.items():
        pipe.set_progress_bar_config(disable=True)
        pipe.load_lora_weights(theirs[name].parent, weight_name=theirs[name].name)
        pipe.fuse_lora(lora_scale=1.0)
    return made


class NextPoint(DDIMScheduler):
    """diffusers' own, but that a step ends where the next one begins, where theirs ends a timestep beside it."""

    def step(self, model_output: Any, timestep: Any, *arguments: Any, **named: Any) -> Any:
        end = max((t for t in self.timesteps.tolist() if t < timestep), default=-1)
        self.num_inference_steps = Fraction(self.config.num_train_timesteps, int(timestep) - end)
        return super().step(model_output, timestep, *arguments, **named)


def stock(pipe: Any, config: Any, release: Release, steps: int, scheduler: Any = None) -> Tensor:
    """The latents that the model card's own lines end with; `config` is that of the model's scheduler."""
    made, call = CARDS[release.method]
    pipe.scheduler = (scheduler or made)({**config, **FAMILY})
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    latents = pipe(
        PROMPT, num_inference_steps=steps, generator=torch.Generator().manual_seed(SEED), output_type="latent",
        height=side, width=side, **call,
    ).images  # fmt: skip
    assert isinstance(latents, Tensor)
    return latents


def counts(release: Release) -> list[int]:
    """The release's own number of steps, and what the app suggests that it was made for too."""
    if "timesteps" in CARDS[release.method][1]:
        return [release.segments]
    steps = METHODS[release.method].steps
    suggested = [n for n in steps.suggested if n % release.segments == 0]
    return sorted({max(release.segments, steps.low), *suggested})


DRAWN = [(r, n) for r in RELEASES if r.backbone in KINDS and r.kind == "lora" for n in counts(r)]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' Euler with numpy 2
@pytest.mark.parametrize(("release", "steps"), DRAWN, ids=[f"{r.backbone}-{r.name}-in-{n}" for r, n in DRAWN])
def test_a_release_is_drawn_as_its_card_says(
    models: dict[str, Backbone], theirs: dict[str, Path], pipes: dict[str, Any], tmp_path: Path, release: Release,
    steps: int,
) -> None:  # fmt: skip
    backbone, pipe = models[release.backbone], pipes[release.backbone]
    unpinned = Release(**{**vars(release), "sha256": ""})  # the file is made up
    kept = releases.fetch(unpinned, backbone.network_sha256, tmp_path, taken(theirs[release.backbone]))
    method = discover([kept], backbone.network_sha256)[release.method]
    with torch.inference_mode():
        ours = denoise(backbone, Request(PROMPT, SEED, steps), method)
    assert release.scale == 1.0  # as the pipelines have merged it
    assert ours.nfe == steps * (2 if release.guidance > 1 else 1)
    config = read_json(backbone.folder, release.backbone, "scheduler/scheduler_config.json")
    expected = stock(pipe, config, release, steps)
    if 1000 % steps:  # diffusers lands beside its own grid, see `jumps`
        assert (ours.x - expected).abs().max() < 0.2 * expected.std()
        expected = stock(pipe, config, release, steps, partial(NextPoint.from_config, timestep_spacing="trailing"))
    assert (ours.x - expected).abs().max() < 1e-3 * expected.std()  # the adapter is kept in half precision


def test_every_published_lora_has_a_card() -> None:
    assert {release.method for release in RELEASES if release.kind == "lora"} == CARDS.keys()


def test_hashes_are_whole_and_not_shared() -> None:
    pinned = [release.sha256 for release in RELEASES if release.sha256]
    assert len(set(pinned)) == len(pinned) > 20
    assert all(len(h) == 64 and set(h) <= set("0123456789abcdef") for h in pinned)


# ------------------------------------------------------------------------------------------------ Stability's names

KNOWN = {
    "input_blocks_0_0": "conv_in",
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_0_emb_layers_1": "down_blocks.1.resnets.0.time_emb_proj",
    "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks_4_1_proj_in": "down_blocks.1.attentions.0.proj_in",
    "input_blocks_8_1_transformer_blocks_9_norm1": "down_blocks.2.attentions.1.transformer_blocks.9.norm1",
    "middle_block_0_out_layers_3": "mid_block.resnets.0.conv2",
    "middle_block_1_transformer_blocks_0_attn2_to_out_0": "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "middle_block_2_in_layers_2": "mid_block.resnets.1.conv1",
    "output_blocks_0_1_proj_out": "up_blocks.0.attentions.0.proj_out",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_8_0_skip_connection": "up_blocks.2.resnets.2.conv_shortcut",
    "time_embed_0": "time_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
    "out_2": "conv_out",
}  # fmt: skip


def test_stabilitys_names_mean_layers_of_the_true_network() -> None:
    with torch.device("meta"):
        layers = dict(UNet2DConditionModel(**CONFIGS["sdxl"]).named_modules())
    for name, expected in KNOWN.items():
        assert adapters._dotted(name) == expected
        assert expected in layers
    blocks = [f"input_blocks_{i}_0" for i in (1, 2, 4, 5, 7, 8)] + [f"output_blocks_{i}_0" for i in range(9)]
    blocks += ["middle_block_0", "middle_block_2"]
    residual = {adapters._dotted(f"{block}_in_layers_2") for block in blocks}
    assert residual == {name for name in layers if name.endswith(".conv1")}


def test_a_file_in_stabilitys_names_is_the_same_adapter(models: dict[str, Backbone], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    a, b = torch.randn(2, 8), torch.randn(16, 2)
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    save_file({f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b}, tmp_path / "x.safetensors")
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    found = adapters.load(tmp_path / "x.safetensors")
    assert found.keys() == {f"{layer}.lora_A", f"{layer}.lora_B"}
    assert torch.equal(found[f"{layer}.lora_B"], b)  # without an alpha the scale is 1


def test_the_older_names_of_diffusers_are_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    layer = "mid_block.attentions.0.proj_in"
    halves = {f"unet.{layer}.lora.down.weight": torch.ones(2, 8), f"unet.{layer}.lora.up.weight": torch.ones(16, 2)}
    save_file(halves, tmp_path / "x.safetensors")
    assert adapters.load(tmp_path / "x.safetensors").keys() == {f"{layer}.lora_A", f"{layer}.lora_B"}


# --------------------------------------------------------------------------------------------------- is it the file


def test_another_file_than_the_published_one_is_refused(
    models: dict[str, Backbone], theirs: dict[str, Path], tmp_path: Path
) -> None:
    release = next(r for r in RELEASES if r.backbone == "sd15" and r.method == "lcm")
    with pytest.raises(adapters.AdapterError, match=r"is not what latent-consistency/lcm-lora-sdv1-5 published"):
        releases.fetch(release, "b", tmp_path / "lora", taken(theirs["sd15"]))
    assert not (tmp_path / "lora").exists()


def test_what_is_not_for_commerce_waits_for_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    from hypersd.__main__ import main

    assert main(["fetch", "sdxl", "dmd2", "--out", "nowhere"]) == 2
    assert "CC BY-NC 4.0, not for commerce; if that suits you, say --accept-licence" in capsys.readouterr().err
    assert all(r.commercial for r in releases.chosen("sdxl", ["hyper", "lcm", "lightning"]))
    with pytest.raises(InputError):
        releases.chosen("sd15", ["lightning"])
