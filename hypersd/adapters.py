"""LoRA files: safetensors with diffusers' or kohya's names, and in their metadata an `Adapter` that says what they are.

An adapter in memory is {"mid_block.attentions.0.proj_in.lora_A": [rank, in, ...], "....lora_B": [out, rank, ...], ...},
the names of `roles.Role`. Alpha always equals the rank, so the scale is 1 for readers that look for an alpha and for
those that don't. Only headers are read until the tensors are wanted, so a list of files costs nothing.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hypersd.records import Adapter, InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

KEY = "hypersd"  # of the metadata entry that holds the Adapter as JSON
PREFIX = "unet."  # diffusers says which part of a pipeline a LoRA is for
KOHYA = "lora_unet_"
HEADER_MAX = 100_000_000  # bytes; the format's own limit


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
        AdapterError: it is no safetensors file, is cut short, or says nothing of itself.
    """
    header = _header(path)
    end = 8 + header.length + max((e["data_offsets"][1] for e in header.tensors.values()), default=0)
    if path.stat().st_size != end:
        raise AdapterError(f"{path.name} is truncated or damaged ({path.stat().st_size:,} bytes instead of {end:,})")
    try:
        card = Adapter(**json.loads(header.metadata[KEY]))
    except (KeyError, TypeError, ValueError) as problem:
        raise AdapterError(
            f"{path.name} does not say how it was made (metadata entry {KEY!r}); only adapters that "
            "`python -m hypersd distill` wrote can be shown by themselves"
        ) from problem
    with path.open("rb") as file:
        return AdapterFile(path, hashlib.file_digest(file, "sha256").hexdigest(), card)


def load(path: Path) -> dict[str, Tensor]:
    """The adapter in a file, in float32, whichever of the two ways of naming it uses; alpha is multiplied in.

    Raises:
        AdapterError: not safetensors, truncated, not a LoRA, or not finite.
    """
    from safetensors.torch import load_file

    _header(path)
    try:
        tensors = load_file(path)
    except Exception as problem:  # the library raises its own error type, which is no subclass of anything useful
        raise AdapterError(f"{path.name} cannot be read ({type(problem).__name__}); copy it again") from problem
    adapter = (
        _from_kohya(tensors, path) if any(k.startswith(KOHYA) for k in tensors) else _from_diffusers(tensors, path)
    )
    for name, tensor in adapter.items():
        if not tensor.isfinite().all():
            raise AdapterError(f"{path.name}: {name} holds numbers that are not finite; train or copy it again")
    return adapter


class _Header(NamedTuple):
    length: int
    tensors: dict[str, Any]
    metadata: dict[str, str]


def _header(path: Path) -> _Header:
    try:
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if start[:2] in (b"PK", b"\x80\x02") or length > HEADER_MAX:
                raise AdapterError(f"{path.name} is not a safetensors file (pickles are never read); convert it first")
            tensors: dict[str, Any] = json.loads(file.read(length))
    except OSError as problem:
        raise AdapterError(f"{path.name} cannot be read ({type(problem).__name__}); check the path") from problem
    except ValueError as problem:
        raise AdapterError(f"{path.name} is truncated or damaged (no readable header); copy it again") from problem
    return _Header(length, tensors, tensors.pop("__metadata__", {}))


def _from_diffusers(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    ends = (".lora_A.weight", ".lora_B.weight")
    if odd := [k for k in tensors if not (k.startswith(PREFIX) and k.endswith(ends))]:
        raise AdapterError(f"{path.name} is not a LoRA of a UNet: it holds {odd[0]}")
    return {k.removeprefix(PREFIX).removesuffix(".weight"): t.float() for k, t in tensors.items()}


def _from_kohya(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Their names join a layer's path by underscores; the dots are found again in the module names of a real UNet."""
    adapter = {}
    for key in [k for k in tensors if k.endswith(".lora_down.weight")]:
        stem = key.removesuffix(".lora_down.weight")
        down, up = tensors[key].float(), tensors[f"{stem}.lora_up.weight"].float()
        scale = float(tensors.get(f"{stem}.alpha", down.new_tensor(len(down)))) / len(down)
        name = _dotted(stem.removeprefix(KOHYA))
        adapter |= {f"{name}.lora_A": down, f"{name}.lora_B": up * scale}
    if not adapter:
        raise AdapterError(f"{path.name} is not a LoRA of a UNet: no layer ends with lora_down")
    return adapter


_WORDS = (  # of a UNet's module names that hold underscores themselves
    *("down_blocks", "up_blocks", "mid_block", "transformer_blocks", "time_emb_proj", "conv_shortcut"),
    *("to_q", "to_k", "to_v", "to_out", "proj_in", "proj_out"),
)


def _dotted(name: str) -> str:
    """down_blocks_1_attentions_0_proj_in -> down_blocks.1.attentions.0.proj_in"""
    for word in _WORDS:
        name = name.replace(word, word.replace("_", "-"))
    return name.replace("_", ".").replace("-", "_")


# ---------------------------------------------------------------------------------------------------- writing


def save(path: Path, adapter: dict[str, Tensor], card: Adapter, *, kohya: bool = False) -> AdapterFile:
    """Write fp16 safetensors for diffusers' `load_lora_weights`, or for ComfyUI and A1111; whole or not at all.

    Raises:
        AdapterError: a tensor is not finite.
        OSError: the disk is full or read-only; an older file of that name stays as it is.
    """
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for name, tensor in adapter.items():
        half = tensor.detach().to(torch.float16).contiguous().cpu()
        if not half.isfinite().all():
            raise AdapterError(f"{name} is not finite in half precision; {path.name} was not written")
        tensors |= _kohya_named(name, half) if kohya else {f"{PREFIX}{name}.weight": half}
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.tmp")
    try:
        save_file(tensors, staging, metadata={"format": "pt", KEY: json.dumps(asdict(card), sort_keys=True)})
        staging.chmod(0o644)  # safetensors leaves it readable to nobody else
        with staging.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)
    return inspect(path)


def _kohya_named(name: str, tensor: Tensor) -> dict[str, Tensor]:
    layer, half = name.rsplit(".", 1)
    stem = KOHYA + layer.replace(".", "_")
    if half == "lora_B":
        return {f"{stem}.lora_up.weight": tensor}
    return {f"{stem}.lora_down.weight": tensor, f"{stem}.alpha": tensor.new_tensor(float(len(tensor)))}


# ---------------------------------------------------------------------------------------------------- wearing


def fused(network: nn.Module, adapter: dict[str, Tensor], scale: float = 1.0) -> nn.Module:
    """A network with W + scale B A in place of W; everything that the adapter leaves alone is shared with `network`.

    Raises:
        AdapterError: a layer is not there or has another shape: the adapter is for another base.
    """
    layers = dict(network.named_modules())
    touched = {name.rsplit(".", 1)[0] for name in adapter}
    for name in sorted(touched):
        a, b = adapter.get(f"{name}.lora_A"), adapter.get(f"{name}.lora_B")
        weight = getattr(layers.get(name), "weight", None)
        if a is None or b is None or weight is None or (len(b), *a.shape[1:]) != tuple(weight.shape):
            raise AdapterError(f"the adapter does not fit this base: its layer {name} is missing or of another shape")
    kept = [p for name, layer in layers.items() for key, p in layer.named_parameters(name, recurse=False)
            if name not in touched or not key.endswith(".weight")]  # fmt: skip
    worn = copy.deepcopy(network, {id(p): p for p in kept})
    for name in touched:
        weight = worn.get_submodule(name).weight.data
        delta = adapter[f"{name}.lora_B"].flatten(1) @ adapter[f"{name}.lora_A"].flatten(1)
        weight.copy_(weight.float() + scale * delta.view_as(weight).to(weight.device))
    return worn


def beside(backbone: str) -> tuple[Path, Path]:
    """(model's folder, folder of its adapters) of a model that came with the package, or of a local one."""
    assets = Path(__file__).parent.parent / "assets"
    here = assets / f"{backbone}-sd"
    return (here, assets / f"{backbone}-lora") if here.is_dir() else (Path(backbone), Path(backbone) / "lora")


def network_sha256(folder: Path) -> str:
    """The hash of a model's denoiser, from its manifest where it has one; "" if there is no denoiser."""
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    if not weights.is_file():
        return ""
    manifest = folder / "manifest.json"
    if manifest.is_file():
        return json.loads(manifest.read_text(encoding="utf-8"))["files"][weights.relative_to(folder).as_posix()]
    with weights.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
