"""Whole networks: published denoisers that stand in for the base's own, or are added to it, weight by weight.

Such a file lies beside the adapters and says in its card of which kind it is: a "network" or a "difference". It has
diffusers' names and half precision; some makers publish single precision, whose last digits are lost. A denoiser is
gigabytes, so nothing here holds more than one tensor of it at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypersd.adapters import AdapterError, AdapterFile, header, inspect, metadata, staged
from hypersd.records import Adapter

if TYPE_CHECKING:
    from torch import Tensor, nn

ENDS = ("conv_in.weight", "conv_out.weight")  # the first and the last layer of every UNet, as diffusers names them


class Whole:
    """A file's tensors in place of all weights of a network; with `difference` they are added to the weights."""

    def __init__(self, path: Path, difference: bool = False) -> None:
        self.path, self.difference = path, difference

    def fit(self, network: nn.Module) -> dict[str, nn.Parameter]:
        """All weights, by name.

        Raises:
            AdapterError: the file and the network differ in a name or a shape.
        """
        weights = dict(network.named_parameters())
        check(self.path, {name: weight.shape for name, weight in weights.items()})
        return weights

    def weights(self, bare: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        with _opened(self.path) as file:
            for name, weight in bare.items():
                tensor: Tensor = file.get_tensor(name)
                yield name, weight.float() + tensor.to(weight.device).float() if self.difference else tensor


def check(path: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """A file holds a network's weights, of these shapes by name, all of them and nothing else.

    Raises:
        AdapterError: it does not.
    """
    there = {name: list(entry["shape"]) for name, entry in header(path).tensors.items()}
    needed = {name: list(shape) for name, shape in shapes.items()}
    if odd := [name for name in sorted(there.keys() | needed.keys()) if there.get(name) != needed.get(name)]:
        found = f"{there.get(odd[0], 'nothing')} instead of {needed.get(odd[0], 'nothing')}"
        raise AdapterError(
            f"{path.name} does not fit this base: {odd[0]} is {found}, one of {len(odd)} that differ; "
            "choose the base that it was made for"
        )


def keep(source: Path, path: Path, card: Adapter) -> AdapterFile:
    """Leave a published denoiser at `path`, in half precision and with a card.

    Raises:
        AdapterError: it is no safetensors file, no UNet in diffusers' names, damaged or not finite, or the disk is
            full; nothing was written.
    """
    import torch

    told = header(source).tensors
    if lost := [name for name in ENDS if name not in told]:
        found = min(told, default="nothing")
        raise AdapterError(f"{source.name} is not a UNet in diffusers' names: it lacks {lost[0]} and holds {found}")
    with staged(path) as staging, staging.open("wb") as out:
        out.write(_header({name: entry["shape"] for name, entry in told.items()}, card))
        with _opened(source) as file:
            for name in told:
                half = file.get_tensor(name).to(torch.float16).contiguous()
                if not half.isfinite().all():
                    raise AdapterError(
                        f"{source.name}: {name} is not finite in half precision; {path.name} was not written"
                    )
                out.write(half.numpy().tobytes())
        out.flush()
        return inspect(staging)._replace(path=path)


def _header(shapes: Mapping[str, list[int]], card: Adapter) -> bytes:
    """What a safetensors file of half precision tensors, in this order, begins with."""
    header: dict[str, Any] = {"__metadata__": metadata(card)}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants tensors to begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file's tensors, read one by one. Raises AdapterError where it cannot be."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (FileNotFoundError, SafetensorError) as problem:
        raise AdapterError(f"{path.name} cannot be read ({type(problem).__name__}); fetch it again") from problem
