"""One network and the adapters it wears: merged copies while memory has room for them, otherwise merged in place.

A network that wears an adapter computes W + s B A for each layer that the adapter changes. A copy of those layers
beside the base costs their bytes and makes a switch free; everything else is shared. Where there is no room for a
further copy, the one that was worn longest ago goes; where there is none even for one, the base itself is changed, and
changed back from its untouched layers, which wait in the machine's main memory. What is there is measured, not guessed:
the same code serves a laptop with the small model and a GPU that SDXL barely fits on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from hypersd.adapters import fit, fused, merged

COPIES = 6  # at most, however much memory there is
GIGABYTE = 1 << 30


def free_bytes(device: torch.device) -> int:
    """What could be allocated on a device now: on a GPU what nobody holds and what torch holds without using it."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    available: int = psutil.virtual_memory().available
    return available


class Wardrobe:
    """A frozen network, and what it looks like with adapters.

    Args:
        network: the base; its layers change only while an adapter is worn in place.
        reserve: bytes to leave free for drawing.
        free: bytes that could be allocated now.
    """

    def __init__(self, network: nn.Module, reserve: int, free: Callable[[torch.device], int] = free_bytes) -> None:
        self.network, self.reserve, self.free = network, reserve, free
        self._copies: OrderedDict[Hashable, nn.Module] = OrderedDict()
        self._in_place: Hashable = None
        self._untouched: dict[str, Tensor] = {}  # of the layers that are changed in place, in main memory

    @property
    def copies(self) -> int:
        """How many merged copies there are beside the base."""
        return len(self._copies)

    def wear(self, key: Hashable, adapter: Callable[[], tuple[dict[str, Tensor], float]]) -> nn.Module:
        """The network with the adapter `key`; `adapter` gives its tensors and scale where they are needed.

        Raises:
            AdapterError: it does not fit the network, which is as it was.
        """
        if key in self._copies:
            self._copies.move_to_end(key)
            return self._copies[key]
        if self._in_place is not None and key == self._in_place:
            return self.network
        tensors, scale = adapter()
        touched = fit(self.network, tensors)
        self.bare()
        need = sum(weight.numel() * weight.element_size() for weight in touched.values())
        while self._copies and not self._room(need):
            self._copies.popitem(last=False)
        if not self._room(need):
            return self._change(key, touched, tensors, scale)
        self._copies[key] = fused(self.network, tensors, scale)
        return self._copies[key]

    def spare(self) -> None:
        """Memory turned out to be short: drop the copies, and leave twice as much free from now on."""
        self._copies.clear()
        self.reserve = max(2 * self.reserve, GIGABYTE)

    def bare(self) -> Any:
        """The network without an adapter."""
        for name, weight in self._untouched.items():
            self.network.get_parameter(name).data.copy_(weight)
        self._untouched, self._in_place = {}, None
        return self.network

    def _room(self, need: int) -> bool:
        device = next(self.network.parameters()).device
        return len(self._copies) < COPIES and self.free(device) >= need + self.reserve

    def _change(
        self, key: Hashable, touched: dict[str, nn.Parameter], tensors: dict[str, Tensor], scale: float
    ) -> nn.Module:
        self._untouched = {name: weight.detach().to("cpu", copy=True) for name, weight in touched.items()}
        for name, weight in touched.items():
            weight.data.copy_(merged(weight, tensors, name, scale))
        self._in_place = key
        return self.network
