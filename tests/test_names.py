"""Every layer of the true networks is found in a LoRA file, whichever way its makers name it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import test_single
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

from hypersd import adapters
from hypersd.cost import CONFIGS
from hypersd.single import DENOISER

Lora = dict[str, Tensor]  # a file's tensors
ALPHA = 2.0

# The published transformers' configurations, where they differ from diffusers' defaults.
FLOWS: dict[str, Callable[[], nn.Module]] = {
    "sd3": lambda: SD3Transformer2DModel(
        num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192
    ),
    "flux": lambda: FluxTransformer2DModel(guidance_embeds=True),
}


@cache
def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """{"down_blocks.0. ... .to_q": [out, in], ...}: the weights of all linear and convolutional layers."""
    with torch.device("meta"):
        network: nn.Module = UNet2DConditionModel(**CONFIGS[name]) if name in CONFIGS else FLOWS[name]()
    layers = [(n, layer) for n, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    return {n: tuple(layer.weight.shape) for n, layer in layers}


def halves(shape: tuple[int, ...], number: int) -> tuple[Tensor, Tensor]:
    """Rank 1; half precision holds the number."""
    a = torch.full((1, *shape[1:]), float(number), dtype=torch.float16)
    return a, torch.ones(shape[0], 1, *(1 for _ in shape[2:]), dtype=torch.float16)


def kohya(names: dict[str, tuple[int, ...]], alpha: float | None = ALPHA) -> Lora:
    made: Lora = {}
    for number, (name, shape) in enumerate(names.items()):
        stem = f"lora_unet_{name.replace('.', '_')}"
        made[f"{stem}.lora_down.weight"], made[f"{stem}.lora_up.weight"] = halves(shape, number)
        if alpha is not None:
            made[f"{stem}.alpha"] = torch.tensor(alpha)
    return made


def dotted(names: dict[str, tuple[int, ...]], prefix: str, ends: tuple[str, str]) -> Lora:
    return {
        f"{prefix}{name}.{end}.weight": half
        for number, (name, shape) in enumerate(names.items())
        for end, half in zip(ends, halves(shape, number), strict=True)
    }


def fits(layers: dict[str, tuple[int, ...]], found: Lora) -> None:
    """It has all of the layers, in their true shapes, and no others."""
    weights = {f"{name}.weight": shape for name, shape in layers.items()}
    assert set(adapters.changed(weights, found)) == weights.keys()


def stabilitys(names: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The same layers as Stability's code calls them, which `test_single` holds to diffusers' own translation."""
    there: Any = {f"{name}.weight": shape for name, shape in names.items()}
    found: Any = test_single.unet(there, 2)
    return {name.removeprefix(DENOISER).removesuffix(".weight"): shape for name, shape in found.items()}


WAYS: dict[str, Callable[[dict[str, tuple[int, ...]]], Lora]] = {
    "kohya": kohya,
    "kohya-without-alpha": lambda names: kohya(names, None),
    "stability": lambda names: kohya(stabilitys(names)),
    "peft": lambda names: dotted(names, "unet.", ("lora_A", "lora_B")),
    "diffusers": lambda names: dotted(names, "unet.", ("lora.down", "lora.up")),
}


# Trainers give SDXL's layers either name, but the blocks of Stable Diffusion 1.5 diffusers' alone.
@pytest.mark.parametrize(
    ("name", "way"), [*(("sd15", w) for w in WAYS if w != "stability"), *(("sdxl", w) for w in WAYS)]
)
def test_every_layer_of_the_true_unets_is_found(name: str, way: str, tmp_path: Path) -> None:
    layers = shapes(name)
    save_file(WAYS[way](layers), tmp_path / "theirs.safetensors")
    found = adapters.load(tmp_path / "theirs.safetensors")
    fits(layers, found)
    scale = ALPHA if way in ("kohya", "stability") else 1.0  # of rank 1
    for number, layer in enumerate(layers):
        assert float(found[f"{layer}.lora_A"].flatten()[0]) == number, layer
        assert float(found[f"{layer}.lora_B"].flatten()[0]) == scale, layer


# ------------------------------------------------------------------------------- transformers with layers that are one

QKV = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")


def flux_names() -> dict[str, tuple[str, ...]]:
    """FLUX's own names of layers and diffusers', as its makers' code has them."""
    names: dict[str, tuple[str, ...]] = {
        "img_in": ("x_embedder",), "txt_in": ("context_embedder",), "final_layer_linear": ("proj_out",),
        "final_layer_adaLN_modulation_1": ("norm_out.linear",),
    }  # fmt: skip
    for theirs, part in (("time_in", "timestep"), ("vector_in", "text"), ("guidance_in", "guidance")):
        names[f"{theirs}_in_layer"] = (f"time_text_embed.{part}_embedder.linear_1",)
        names[f"{theirs}_out_layer"] = (f"time_text_embed.{part}_embedder.linear_2",)
    for i in range(19):
        for side, ff, norm, out, qkv in (
            ("img", "ff", "norm1", "to_out.0", QKV[0]),
            ("txt", "ff_context", "norm1_context", "to_add_out", QKV[1]),
        ):
            stem, block = f"double_blocks_{i}_{side}", f"transformer_blocks.{i}"
            names[f"{stem}_attn_qkv"] = tuple(f"{block}.attn.{part}" for part in qkv)
            names[f"{stem}_attn_proj"] = (f"{block}.attn.{out}",)
            names[f"{stem}_mlp_0"], names[f"{stem}_mlp_2"] = (f"{block}.{ff}.net.0.proj",), (f"{block}.{ff}.net.2",)
            names[f"{stem}_mod_lin"] = (f"{block}.{norm}.linear",)
    for i in range(38):
        stem, block = f"single_blocks_{i}", f"single_transformer_blocks.{i}"
        names[f"{stem}_linear1"] = (*(f"{block}.attn.{part}" for part in QKV[0]), f"{block}.proj_mlp")
        names[f"{stem}_linear2"], names[f"{stem}_modulation_lin"] = (f"{block}.proj_out",), (f"{block}.norm.linear",)
    return names


def sd3_names() -> dict[str, tuple[str, ...]]:
    """Stable Diffusion 3's; the text's side of the last block ends with its attention."""
    names: dict[str, tuple[str, ...]] = {
        "x_embedder_proj": ("pos_embed.proj",), "context_embedder": ("context_embedder",),
        "final_layer_linear": ("proj_out",), "final_layer_adaLN_modulation_1": ("norm_out.linear",),
    }  # fmt: skip
    for theirs, part in (("t_embedder", "timestep"), ("y_embedder", "text")):
        for number in (1, 2):
            layer = f"time_text_embed.{part}_embedder.linear_{number}"
            names[f"{theirs}_mlp_{2 * number - 2}"] = (layer,)
    for i in range(24):
        for side, ff, norm, out, qkv in (
            ("x", "ff", "norm1", "to_out.0", QKV[0]),
            ("context", "ff_context", "norm1_context", "to_add_out", QKV[1]),
        ):
            stem, block = f"joint_blocks_{i}_{side}_block", f"transformer_blocks.{i}"
            names[f"{stem}_attn_qkv"] = tuple(f"{block}.attn.{part}" for part in qkv)
            names[f"{stem}_adaLN_modulation_1"] = (f"{block}.{norm}.linear",)
            if (i, side) != (23, "context"):
                names[f"{stem}_attn_proj"] = (f"{block}.attn.{out}",)
                names[f"{stem}_mlp_fc1"] = (f"{block}.{ff}.net.0.proj",)
                names[f"{stem}_mlp_fc2"] = (f"{block}.{ff}.net.2",)
    return names


SWAPPED = {  # layers whose shift and scale diffusers has the other way round
    "sd3": {"norm_out.linear", "transformer_blocks.23.norm1_context.linear"},
    "flux": {"norm_out.linear"},
}
FLOW_NAMES = {"sd3": sd3_names, "flux": flux_names}


@pytest.mark.parametrize("alpha", [ALPHA, None])
@pytest.mark.parametrize("name", FLOWS)
def test_every_layer_of_the_true_transformers_is_found(name: str, alpha: float | None, tmp_path: Path) -> None:
    """In kohya's files of them, where one layer stands for queries, keys and values, in FLUX for what follows too."""
    layers, names = shapes(name), FLOW_NAMES[name]()
    assert {layer for several in names.values() for layer in several} == layers.keys()
    fused = {n: (sum(layers[s][0] for s in several), *layers[several[0]][1:]) for n, several in names.items()}
    theirs = kohya(fused, alpha)
    for key, up in theirs.items():  # each row is told apart from its neighbours
        if key.endswith("lora_up.weight"):
            theirs[key] = (torch.arange(len(up)) % 2039).half().view(up.shape)
    save_file(theirs, tmp_path / "theirs.safetensors")
    found = adapters.load(tmp_path / "theirs.safetensors")
    fits(layers, found)
    for number, (own, several) in enumerate(names.items()):
        rows = theirs[f"lora_unet_{own}.lora_up.weight"].float()
        for layer, part in zip(several, rows.split([layers[s][0] for s in several]), strict=True):
            part = part.roll(len(part) // 2, 0) if layer in SWAPPED[name] else part
            a, b = found[f"{layer}.lora_A"].flatten()[:1], found[f"{layer}.lora_B"]
            assert torch.equal(a * b, number * part * (alpha or 1.0)), layer
