"""LoRA files: safetensors with diffusers' or kohya's names, and in their metadata an `Adapter` that says what they are.

An adapter in memory is {"mid_block.attentions.0.proj_in.lora_A": [rank, in, ...], "....lora_B": [out, rank, ...], ...},
the names of `roles.Role`. Alpha always equals the rank, so the scale is 1 for readers that look for an alpha and for
those that don't. Only headers are read until the tensors are wanted, so a list of files costs nothing.

Some few-step models are published as whole networks. They are kept and worn like adapters, {"conv_in.weight": tensor,
...} with a rank of 0, and take the place of every weight instead of adding to some.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hypersd import folders
from hypersd.records import Adapter, InputError, real_number, whole_number
from hypersd.single import laid_out

if TYPE_CHECKING:
    from torch import Tensor, nn

KEY = "hypersd"  # of the metadata entry that holds the Adapter as JSON
PREFIX, FLOW_PREFIX = "unet.", "transformer."  # diffusers says which part of a pipeline a LoRA is for
KOHYA = "lora_unet_"
FIRST = "conv_in.weight"  # is in every UNet and in no LoRA


class AdapterError(InputError):
    """A LoRA file cannot be used. The message names the file, what is wrong with it and what to do."""


class AdapterFile(NamedTuple):
    """A LoRA file that has been looked at: where it lies, its sha256, and what it says of itself."""

    path: Path
    sha256: str
    card: Adapter


# ---------------------------------------------------------------------------------------------------- reading


def inspect(path: Path) -> AdapterFile:
    """What a file is, from its header and its hash.

    Raises:
        AdapterError: it is no safetensors file, is cut short, or does not say what it is.
    """
    header = _header(path)
    if KEY not in header.metadata:
        raise AdapterError(
            f"{path.name} does not say how it was made (metadata entry {KEY!r}); only adapters that "
            "`python -m hypersd distill` wrote can be shown by themselves"
        )
    card = _card(header.metadata[KEY], path.name)
    with path.open("rb") as file:
        return AdapterFile(path, hashlib.file_digest(file, "sha256").hexdigest(), card)


def _card(text: str, name: str) -> Adapter:
    """The Adapter that a file's metadata hold, each field of its type and in its range."""
    try:
        told = json.loads(text)
        known = {f.name: f for f in fields(Adapter)}
        if unknown := sorted(told.keys() - known.keys()):
            raise InputError(f"the field {unknown[0]!r} is unknown; it may be of a later version")
        if lost := [n for n, f in known.items() if n not in told and f.default is MISSING]:
            raise InputError(f"the field {lost[0]!r} is missing")
        for field in fields(Adapter):
            if field.type == "str" and not isinstance(told[field.name], str):
                raise InputError(f"{field.name} must be text, got {told[field.name]!r:.40}")
        if not told["name"] or not isinstance(told["recipe"], dict):
            raise InputError("name or recipe is empty")
        for number, low, high in (("segments", 1, 1000), ("rank", 0, 100_000), ("updates", 0, 10**12)):
            told[number] = whole_number(told[number], number, low, high)
        for number in ("start", "end"):
            told[number] = whole_number(told.get(number, getattr(Adapter, number)), number, 0, 10**6)
        for amount, least, most in (("guidance", 0.0, 30.0), ("eta", 0.0, 1.0), ("scale", -100.0, 100.0)):
            told[amount] = real_number(told.get(amount, getattr(Adapter, amount, None)), amount, least, most)
        return Adapter(**told)
    except (AttributeError, ValueError) as problem:  # InputError is a ValueError
        why = problem if isinstance(problem, InputError) else "they are no JSON object"
        raise AdapterError(f"{name}: its metadata cannot be used: {why}") from problem


def load(path: Path) -> dict[str, Tensor]:
    """The adapter in a file, in float32, whichever of the two ways of naming it uses; alpha is multiplied in.

    A whole network comes in the precision that it is kept in: in float32 it may be larger than memory.

    Raises:
        AdapterError: not safetensors, truncated, neither a LoRA of a UNet alone nor a UNet, or not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _header(path)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as problem:
        raise AdapterError(f"{path.name} cannot be read ({type(problem).__name__}); copy it again") from problem
    if FIRST in tensors or f"{PREFIX}{FIRST}" in tensors:
        network = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
        _check_finite(network, path)
        return network
    if any(re.search("(double|single)_blocks", key) for key in tensors):
        tensors = _flux_renamed(path)
    adapter = (
        _from_kohya(tensors, path) if any(k.startswith(KOHYA) for k in tensors) else _from_diffusers(tensors, path)
    )
    _check(adapter, path)
    return adapter


def _check(adapter: dict[str, Tensor], path: Path) -> None:
    """Every layer has its two halves, of one rank and finite."""
    if not adapter:
        raise AdapterError(f"{path.name} is not a LoRA of a UNet: it holds no layers")
    for layer in {name.rsplit(".", 1)[0] for name in adapter}:
        a, b = adapter.get(f"{layer}.lora_A"), adapter.get(f"{layer}.lora_B")
        if a is None or b is None or not a.dim() == b.dim() >= 2 or len(a) != b.shape[1]:
            raise AdapterError(f"{path.name}: the two halves of {layer} do not fit together; train or copy it again")
    _check_finite(adapter, path)


def _check_finite(adapter: dict[str, Tensor], path: Path) -> None:
    for name, tensor in adapter.items():
        if not tensor.isfinite().all():
            raise AdapterError(f"{path.name}: {name} holds numbers that are not finite; train or copy it again")


def _header(path: Path) -> folders.Header:
    """What a safetensors file begins with, once its size is what that says."""
    try:
        found, size = folders.header(path), path.stat().st_size
    except OSError as problem:
        raise AdapterError(f"{path.name} cannot be read ({type(problem).__name__}); check the path") from problem
    except folders.NoSafetensors as problem:
        raise AdapterError(
            f"{path.name} is not a safetensors file (pickles are never read); convert it first"
        ) from problem
    except ValueError as problem:
        raise AdapterError(f"{path.name} is truncated or damaged (no readable header); copy it again") from problem
    if size != found.size:
        raise AdapterError(
            f"{path.name} is truncated or damaged ({size:,} bytes instead of {found.size:,}); copy it again"
        )
    return found


def _from_diffusers(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """peft's names for the halves of a layer, or those that diffusers had before: lora.down and lora.up."""
    halves = {"lora_A": "lora_A", "lora_B": "lora_B", "lora.down": "lora_A", "lora.up": "lora_B"}
    adapter = {}
    for key, tensor in tensors.items():
        found = re.fullmatch(
            f"(?:{re.escape(PREFIX)}|{re.escape(FLOW_PREFIX)})" + r"(.+)\.(lora_A|lora_B|lora\.down|lora\.up)\.weight",
            key,
        )
        if not found:
            raise AdapterError(f"{path.name} is not a LoRA of a UNet: it holds {key}")
        adapter[f"{found[1]}.{halves[found[2]]}"] = tensor.float()
    return adapter


def _flux_renamed(path: Path) -> dict[str, Tensor]:
    """FLUX's own names, in which queries, keys and values are one layer, as diffusers' names and layers."""
    from diffusers import FluxPipeline

    try:
        tensors: dict[str, Tensor] = FluxPipeline.lora_state_dict(str(path), local_files_only=True)
    except Exception as problem:  # diffusers raises anything from KeyError to its own
        raise AdapterError(f"{path.name} is no LoRA of FLUX that can be read ({type(problem).__name__})") from problem
    return tensors


def _from_kohya(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Their names join a layer's path by underscores; the dots are found again in the module names of a real UNet.

    Without an alpha the scale is 1.
    """
    adapter, alphas = {}, {k: t for k, t in tensors.items() if k.endswith(".alpha")}
    for key, tensor in tensors.items():
        stem, _, end = key.partition(".")
        half = {"lora_down.weight": "lora_A", "lora_up.weight": "lora_B"}.get(end)
        if not stem.startswith(KOHYA) or (half is None and end != "alpha"):  # text encoders; LoHa, DoRA and others
            raise AdapterError(f"{path.name} is not a LoRA of a UNet alone: it holds {key}")
        if half:
            adapter[f"{_dotted(stem.removeprefix(KOHYA))}.{half}"] = tensor.float()
    for key, alpha in alphas.items():
        name = _dotted(key.removesuffix(".alpha").removeprefix(KOHYA))
        if f"{name}.lora_A" in adapter and f"{name}.lora_B" in adapter:
            adapter[f"{name}.lora_B"] *= float(alpha) / len(adapter[f"{name}.lora_A"])
    return adapter


_WORDS = (  # of a UNet's module names that hold underscores themselves
    *("down_blocks", "up_blocks", "mid_block", "transformer_blocks", "time_emb_proj", "conv_shortcut"),
    *("to_q", "to_k", "to_v", "to_out", "proj_in", "proj_out"),
    *("conv_in", "conv_out", "time_embedding", "add_embedding", "linear_1", "linear_2"),
)
_LAYERS = 2  # residual blocks a level, in every network of the family that Stability's names are used for
_OUTSIDE = {  # of the blocks: Stability's names and diffusers'
    "input_blocks_0_0": "conv_in", "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1", "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1", "label_emb_0_2": "add_embedding_linear_2",
}  # fmt: skip
_RESIDUAL = {
    "in_layers_2": "conv1", "out_layers_3": "conv2", "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}  # fmt: skip


def _dotted(name: str) -> str:
    """down_blocks_1_attentions_0_proj_in, or input_blocks_4_1_proj_in -> down_blocks.1.attentions.0.proj_in"""
    name = _diffusers_named(name)
    for word in _WORDS:
        name = name.replace(word, word.replace("_", "-"))
    return name.replace("_", ".").replace("-", "_")


def _diffusers_named(name: str) -> str:
    """Stability's name of a layer, as their own code and kohya's count the blocks, as diffusers counts them."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    if found := re.fullmatch(r"middle_block_([012])_(.+)", name):
        number, rest = int(found[1]), found[2]
        part = "attentions_0" if number == 1 else f"resnets_{number // 2}"
        return f"mid_block_{part}_{_RESIDUAL.get(rest, rest)}"
    if not (found := re.fullmatch(r"(input|output)_blocks_(\d+)_(\d)_(.+)", name)):
        return name
    down, place, attends, rest = found[1] == "input", int(found[2]), int(found[3]), found[4]
    level, layer = divmod(place - 1, _LAYERS + 1) if down else divmod(place, _LAYERS + 1)
    block = f"{'down' if down else 'up'}_blocks_{level}"
    if down and layer == _LAYERS:
        return f"{block}_downsamplers_0_{rest.replace('op', 'conv', 1)}"
    if attends and rest.startswith("conv"):
        return f"{block}_upsamplers_0_{rest}"
    return f"{block}_attentions_{layer}_{rest}" if attends else f"{block}_resnets_{layer}_{_RESIDUAL.get(rest, rest)}"


# ---------------------------------------------------------------------------------------------------- writing


def save(path: Path, adapter: dict[str, Tensor], card: Adapter, *, kohya: bool = False) -> AdapterFile:
    """Write fp16 safetensors for diffusers' `load_lora_weights`, or for ComfyUI and A1111; whole or not at all.

    Raises:
        AdapterError: a tensor is not finite, or the disk is full or read-only. An older file of that name stays.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    whole = FIRST in adapter
    for name, tensor in adapter.items():
        half = tensor.detach().to(torch.float16).contiguous().cpu()
        if not half.isfinite().all():
            raise AdapterError(f"{name} is not finite in half precision; {path.name} was not written")
        prefix = FLOW_PREFIX if re.match(r"(single_)?transformer_blocks\.", name) else PREFIX
        key = f"{prefix}{name}" if whole else f"{prefix}{name}.weight"
        tensors |= _kohya_named(name, half) if kohya and not whole else {key: half}
    staging = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, staging, metadata={KEY: json.dumps(asdict(card), sort_keys=True)})
        staging.chmod(0o644)  # safetensors leaves it readable to nobody else
        with staging.open("rb") as file:
            os.fsync(file.fileno())
        written = inspect(staging)._replace(path=path)  # what cannot be read again replaces nothing
        os.replace(staging, path)
    except (OSError, SafetensorError) as problem:  # a full disk is the latter
        raise AdapterError(f"{path} was not written ({problem}); make room, or choose another folder") from problem
    finally:
        with contextlib.suppress(OSError):
            staging.unlink(missing_ok=True)
    return written


def _kohya_named(name: str, tensor: Tensor) -> dict[str, Tensor]:
    layer, half = name.rsplit(".", 1)
    stem = KOHYA + layer.replace(".", "_")
    if half == "lora_B":
        return {f"{stem}.lora_up.weight": tensor}
    return {f"{stem}.lora_down.weight": tensor, f"{stem}.alpha": tensor.new_tensor(float(len(tensor)))}


# ---------------------------------------------------------------------------------------------------- wearing


def fit(network: nn.Module, adapter: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    """The weights that an adapter changes, by name.

    Raises:
        AdapterError: a layer is not there or has another shape: the adapter is for another base.
    """
    weights = dict(network.named_parameters())
    if FIRST in adapter:
        odd = sorted(
            name for name in weights.keys() | adapter.keys()
            if name not in weights or name not in adapter or weights[name].shape != adapter[name].shape
        )  # fmt: skip
        if odd:
            raise AdapterError(f"the network does not fit this base: {odd[0]} is missing or of another shape in one")
        return weights
    touched = {}
    for name in sorted({name.rsplit(".", 1)[0] for name in adapter}):
        a, b = adapter.get(f"{name}.lora_A"), adapter.get(f"{name}.lora_B")
        weight = weights.get(f"{name}.weight")
        shape = None if weight is None else weight.shape
        if a is None or b is None or (*b.shape[:1], *a.shape[1:]) != shape or a.shape[:1] != b.shape[1:2]:
            raise AdapterError(f"the adapter does not fit this base: its layer {name} is missing or of another shape")
        touched[f"{name}.weight"] = weights[f"{name}.weight"]
    return touched


def merged(weight: Tensor, adapter: dict[str, Tensor], name: str, scale: float = 1.0) -> Tensor:
    """W + scale B A of the weight of that name, or what a whole network has in its place; float32, where W is."""
    if name in adapter:
        return adapter[name].to(weight.device).float()
    layer = name.removesuffix(".weight")
    a, b = (adapter[f"{layer}.{half}"].to(weight.device).flatten(1) for half in ("lora_A", "lora_B"))
    return weight.float() + scale * (b @ a).view_as(weight)


def fused(network: nn.Module, adapter: dict[str, Tensor], scale: float = 1.0) -> nn.Module:
    """A network with W + scale B A in place of W; everything that the adapter leaves alone is shared with `network`.

    Raises:
        AdapterError: the adapter is for another base.
    """
    touched = fit(network, adapter)
    kept = [weight for name, weight in network.named_parameters() if name not in touched]
    worn = copy.deepcopy(network, {id(weight): weight for weight in kept})
    for name in touched:
        weight = worn.get_parameter(name).data
        weight.copy_(merged(weight, adapter, name, scale))
    return worn


def beside(backbone: str) -> tuple[Path, Path]:
    """(model's folder, folder of its adapters) of a model that came with the package, or of a local one.

    The adapters of one from the hub lie in runs/lora, below the model's name.
    """
    assets = Path(__file__).parent.parent / "assets"
    here, local = assets / f"{backbone}-sd", Path(laid_out(backbone))
    if here.is_dir():
        return here, assets / f"{backbone}-lora"
    return local, local / "lora" if local.is_dir() else Path("runs/lora") / local.name


def named(files: Sequence[AdapterFile], name: str) -> AdapterFile:
    """The LoRA file of that name, without its ending.

    Raises:
        InputError: there is none; says which there are.
    """
    for file in files:
        if file.path.stem == name:
            return file
    known = ", ".join(file.path.stem for file in files) or "none; train one with: python -m hypersd distill tscd"
    raise InputError(f"there is no LoRA {name[:60]!r}; choose from {known}")


def found(folder: Path) -> tuple[AdapterFile, ...]:
    """The adapters in a folder, by file name; a file that cannot be used is told of in the log and left out."""
    import logging

    files = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            files.append(inspect(path))
        except AdapterError as problem:
            logging.getLogger(__name__).warning("%s", problem)
    return tuple(files)
