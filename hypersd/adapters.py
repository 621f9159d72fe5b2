"""LoRA files: safetensors with diffusers' or kohya's names, and in their metadata an `Adapter` that says what they are.

An adapter in memory is {"mid_block.attentions.0.proj_in.lora_A": [rank, in, ...], "....lora_B": [out, rank, ...], ...},
the names of `roles.Role`. Alpha always equals the rank, so the scale is 1 for readers that look for an alpha and for
those that don't. Only headers are read until the tensors are wanted, so a list of files costs nothing.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from hypersd import folders
from hypersd.records import KINDS, Adapter, InputError, real_number, whole_number
from hypersd.single import laid_out

if TYPE_CHECKING:
    from torch import Tensor, nn

KEY = "hypersd"  # of the metadata entry that holds the Adapter as JSON
PREFIX, FLOW_PREFIX = "unet.", "transformer."  # diffusers says which part of a pipeline a LoRA is for
KOHYA = "lora_unet_"
# Where the layers of a UNet lie; a transformer has none of these.
UNET = ("conv_in", "conv_out", "time_embedding", "add_embedding", "down_blocks", "mid_block", "up_blocks")


class AdapterError(InputError):
    """A LoRA file cannot be used. The message names the file, what is wrong with it and what to do."""


class AdapterFile(NamedTuple):
    """A LoRA file that has been looked at: where it lies, its sha256, and what it says of itself.

    A whole network is gigabytes, so its sha256 is that of the published file that it was kept from.
    """

    path: Path
    sha256: str
    card: Adapter


# ---------------------------------------------------------------------------------------------------- reading


def inspect(path: Path) -> AdapterFile:
    """What a file is, from its header and its hash.

    Raises:
        AdapterError: it is no safetensors file, is cut short, or does not say what it is.
    """
    found = header(path)
    if KEY not in found.metadata:
        raise AdapterError(
            f"{path.name} does not say how it was made (metadata entry {KEY!r}); only adapters that "
            "`python -m hypersd distill` wrote can be shown by themselves"
        )
    card = _card(found.metadata[KEY], path.name)
    if card.kind != "lora":
        if len(told := str(card.recipe.get("sha256", ""))) != 64:
            raise AdapterError(f"{path.name} does not say what it was kept from; fetch it again")
        return AdapterFile(path, told, card)
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
            if field.type == "str" and not isinstance(told.get(field.name, field.default), str):
                raise InputError(f"{field.name} must be text, got {told[field.name]!r:.40}")
        if not told["name"] or not isinstance(told["recipe"], dict):
            raise InputError("name or recipe is empty")
        if (kind := told.get("kind", Adapter.kind)) not in KINDS:
            raise InputError(f"kind must be one of {', '.join(KINDS)}, got {kind[:40]!r}")
        least_rank = 1 if kind == "lora" else 0
        for number, low, high in (("segments", 1, 1000), ("rank", least_rank, 100_000), ("updates", 0, 10**12)):
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

    Raises:
        AdapterError: not safetensors, truncated, not a LoRA of a UNet alone, or not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    told = header(path).metadata
    if KEY in told and _card(told[KEY], path.name).kind != "lora":
        raise AdapterError(f"{path.name} is a whole network and not a LoRA; choose a LoRA")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as problem:
        raise AdapterError(f"{path.name} cannot be read ({type(problem).__name__}); copy it again") from problem
    if any(key.startswith(KOHYA) for key in tensors):
        tensors = _scaled(tensors)
    if any(re.search("(double|single)_blocks", key) for key in tensors):
        tensors = _flux_renamed(tensors, path)
    adapter = (
        _from_kohya(tensors, path) if any(k.startswith(KOHYA) for k in tensors) else _from_diffusers(tensors, path)
    )
    _check(adapter, path)
    return adapter


def _check(adapter: dict[str, Tensor], path: Path) -> None:
    """Every layer has its two halves, of one rank and finite."""
    if not adapter:
        raise AdapterError(f"{path.name} is not a LoRA of a UNet: it holds no layers")
    for name, tensor in adapter.items():
        layer = name.rsplit(".", 1)[0]
        a, b = adapter.get(f"{layer}.lora_A"), adapter.get(f"{layer}.lora_B")
        if a is None or b is None or not a.dim() == b.dim() >= 2 or len(a) != b.shape[1]:
            raise AdapterError(f"{path.name}: the two halves of {layer} do not fit together; train or copy it again")
        if not tensor.isfinite().all():
            raise AdapterError(f"{path.name}: {name} holds numbers that are not finite; train or copy it again")


def header(path: Path) -> folders.Header:
    """What a safetensors file begins with, once its size is what that says. Raises AdapterError where it is not."""
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


def _flux_renamed(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """FLUX's own names, in which queries, keys and values are one layer, as diffusers' names and layers."""
    from diffusers import FluxPipeline

    try:
        found: dict[str, Tensor] = FluxPipeline.lora_state_dict(tensors)
    except Exception as problem:  # diffusers raises anything from KeyError to its own
        raise AdapterError(f"{path.name} is no LoRA of FLUX that can be read ({type(problem).__name__})") from problem
    own = (FLOW_PREFIX, "text_encoder.")  # it leaves layers outside of the blocks without
    return {key if key.startswith(own) else f"{FLOW_PREFIX}{key}": tensor for key, tensor in found.items()}


def _scaled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """kohya's tensors in float32, alpha / rank multiplied in and left out; without an alpha the scale is 1."""
    scaled = {key: tensor.float() for key, tensor in tensors.items() if not key.endswith(".alpha")}
    for key, alpha in tensors.items():
        stem = key.removesuffix(".alpha")
        up, down = (scaled.get(f"{stem}.lora_{half}.weight") for half in ("up", "down"))
        if key != stem and up is not None and down is not None and down.dim():
            up *= float(alpha) / len(down)
    return scaled


def _from_kohya(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Their names join a layer's path by underscores; the dots are found again in the module names of a real network.

    Stable Diffusion 3's own names are read too, in which queries, keys and values are one layer. Where its last
    modulations have shift and scale, diffusers has scale and shift.
    """
    adapter: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        stem, _, end = key.partition(".")
        half = {"lora_down.weight": "lora_A", "lora_up.weight": "lora_B"}.get(end)
        if not stem.startswith(KOHYA) or not half:  # text encoders; LoHa, DoRA and others
            raise AdapterError(f"{path.name} is not a LoRA of a UNet alone: it holds {key}")
        layers = _layers(stem.removeprefix(KOHYA))
        shared = half == "lora_A" or len(layers) == 1
        parts = [tensor] * len(layers) if shared else tensor.tensor_split(len(layers))
        adapter |= {f"{layer}.{half}": part for layer, part in zip(layers, parts, strict=True)}
    for name, up in adapter.items():
        layer, half = name.rsplit(".", 1)
        down = adapter.get(f"{layer}.lora_A", up)
        swaps = half == "lora_B" and layer.endswith(_SCALE_FIRST) and up.dim() == down.dim() == 2
        if swaps and len(up) == 2 * down.shape[1]:
            adapter[name] = up.roll(len(up) // 2, 0)
    return adapter


# Layers of Stable Diffusion 3, Stability's names and diffusers': of a block, for the picture and for the text.
_JOINT = {
    "attn_qkv": ("attn.to_q attn.to_k attn.to_v", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"),
    "attn_proj": ("attn.to_out.0", "attn.to_add_out"),
    "mlp_fc1": ("ff.net.0.proj", "ff_context.net.0.proj"), "mlp_fc2": ("ff.net.2", "ff_context.net.2"),
    "adaLN_modulation_1": ("norm1.linear", "norm1_context.linear"),
}  # fmt: skip
_OUTSIDE_JOINT = {
    "x_embedder_proj": "pos_embed.proj", "context_embedder": "context_embedder", "final_layer_linear": "proj_out",
    "t_embedder_mlp_0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder_mlp_2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder_mlp_0": "time_text_embed.text_embedder.linear_1",
    "y_embedder_mlp_2": "time_text_embed.text_embedder.linear_2",
    "final_layer_adaLN_modulation_1": "norm_out.linear",
}  # fmt: skip
_SCALE_FIRST = ("norm_out.linear", "norm1_context.linear")  # the latter in the last block, where it has these two only


def _layers(name: str) -> list[str]:
    """diffusers' layers for one of kohya's names."""
    if name in _OUTSIDE_JOINT:
        return [_OUTSIDE_JOINT[name]]
    found = re.fullmatch(r"joint_blocks_(\d+)_(x|context)_block_(.+)", name)
    if found and found[3] in _JOINT:
        return [f"transformer_blocks.{found[1]}.{end}" for end in _JOINT[found[3]][found[2] == "context"].split()]
    return [_dotted(name)]


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
        AdapterError: a tensor is not finite, or the disk is full or read-only, or it is a transformer's and `kohya` is
            asked for. An older file of that name stays.
    """
    import torch
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    prefix = PREFIX if any(name.startswith(UNET) for name in adapter) else FLOW_PREFIX
    if kohya and prefix == FLOW_PREFIX:
        raise AdapterError(f"{path.name} was not written: kohya's names are for UNets; save it in diffusers'")
    for name, tensor in adapter.items():
        half = tensor.detach().to(torch.float16).contiguous().cpu()
        if not half.isfinite().all():
            raise AdapterError(f"{name} is not finite in half precision; {path.name} was not written")
        tensors |= _kohya_named(name, half) if kohya else {f"{prefix}{name}.weight": half}
    with staged(path) as staging:
        save_file(tensors, staging, metadata=metadata(card))
        return inspect(staging)._replace(path=path)  # what cannot be read again replaces nothing


def metadata(card: Adapter) -> dict[str, str]:
    """A card as a safetensors file holds it."""
    return {KEY: json.dumps(asdict(card), sort_keys=True)}


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Where to write what shall be at `path`, which it replaces at the end, whole or not at all.

    Raises:
        AdapterError: the disk is full or read-only. An older file of that name stays.
    """
    from safetensors import SafetensorError

    staging = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield staging
        staging.chmod(0o644)  # safetensors leaves it readable to nobody else
        with staging.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(staging, path)
    except (OSError, SafetensorError) as problem:  # a full disk is the latter
        raise AdapterError(f"{path} was not written ({problem}); make room, or choose another folder") from problem
    finally:
        with contextlib.suppress(OSError):
            staging.unlink(missing_ok=True)


def _kohya_named(name: str, tensor: Tensor) -> dict[str, Tensor]:
    layer, half = name.rsplit(".", 1)
    stem = KOHYA + layer.replace(".", "_")
    if half == "lora_B":
        return {f"{stem}.lora_up.weight": tensor}
    return {f"{stem}.lora_down.weight": tensor, f"{stem}.alpha": tensor.new_tensor(float(len(tensor)))}


# ---------------------------------------------------------------------------------------------------- wearing


class Outfit(Protocol):
    """What a network can wear: other values for some of its weights."""

    def fit(self, network: nn.Module) -> dict[str, nn.Parameter]:
        """The weights that it changes, by name. Raises AdapterError where it was made for another base."""
        ...

    def weights(self, bare: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(name, new value) of each, one after the other, from the values that `fit` found."""
        ...


class Lora(NamedTuple):
    """W + scale B A in place of W, for the layers that the tensors name."""

    tensors: dict[str, Tensor]
    scale: float = 1.0

    def fit(self, network: nn.Module) -> dict[str, nn.Parameter]:
        return fit(network, self.tensors)

    def weights(self, bare: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, weight in bare.items():
            yield name, merged(weight, self.tensors, name.removesuffix(".weight"), self.scale)


def changed(shapes: Mapping[str, Sequence[int]], adapter: dict[str, Tensor]) -> list[str]:
    """Which of a network's weights, of these shapes by name, an adapter changes.

    Raises:
        AdapterError: a layer is not there or has another shape: the adapter is for another base.
    """
    layers = sorted({name.rsplit(".", 1)[0] for name in adapter})
    for name in layers:
        a, b, shape = adapter.get(f"{name}.lora_A"), adapter.get(f"{name}.lora_B"), shapes.get(f"{name}.weight", ())
        if a is None or b is None or (*b.shape[:1], *a.shape[1:]) != tuple(shape) or a.shape[:1] != b.shape[1:2]:
            raise AdapterError(f"the adapter does not fit this base: its layer {name} is missing or of another shape")
    return [f"{name}.weight" for name in layers]


def fit(network: nn.Module, adapter: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    """The weights of a network that an adapter changes, by name. Raises AdapterError as `changed` does."""
    weights = dict(network.named_parameters())
    return {name: weights[name] for name in changed({name: w.shape for name, w in weights.items()}, adapter)}


def merged(weight: Tensor, adapter: dict[str, Tensor], layer: str, scale: float = 1.0) -> Tensor:
    """W + scale B A of a layer, float32, where the weight is."""
    a, b = (adapter[f"{layer}.{half}"].to(weight.device).flatten(1) for half in ("lora_A", "lora_B"))
    return weight.float() + scale * (b @ a).view_as(weight)


def dressed(network: nn.Module, outfit: Outfit) -> nn.Module:
    """A network that wears something; every weight that it leaves alone is shared with `network`.

    Raises:
        AdapterError: it was made for another base, or its file cannot be read.
    """
    touched = outfit.fit(network)
    kept = [weight for name, weight in network.named_parameters() if name not in touched]
    worn = copy.deepcopy(network, {id(weight): weight for weight in kept})
    for name, weight in outfit.weights(touched):
        worn.get_parameter(name).data.copy_(weight)
    return worn


def beside(backbone: str) -> tuple[Path, Path]:
    """(model's folder, folder of its adapters) of a model that came with the package, or of a local one.

    The adapters of one from the hub lie in runs/lora, below the model's name.
    """
    assets = Path(__file__).parent.parent / "assets"
    here, local = assets / f"{backbone}-sd", Path(laid_out(backbone))
    if here.is_dir():
        return here, assets / f"{backbone}-lora"
    return local, local / "lora" if local.is_dir() else folders.LORAS / local.name


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


def asked_for(folder: Path, name: str) -> AdapterFile:
    """The LoRA file at a path that ends in .safetensors, else the one of that name in `folder`.

    Raises:
        InputError: there is none of that name.
        AdapterError: what is at the path cannot be used.
    """
    return inspect(Path(name)) if name.endswith(".safetensors") else named(found(folder), name)


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
