"""One network and the adapters it wears: copies that wear them while memory has room, otherwise the network itself.

A network that wears a LoRA computes W + s B A for each layer that the LoRA changes; of a whole network it wears all
weights. A copy of what is changed costs its bytes beside the base and makes a switch free; everything else is shared.
Where there is no room for a further copy, the one that was worn longest ago goes; where there is none even for one, the
base itself is changed, and changed back from its untouched layers, which wait in the machine's main memory, or, where
all were changed, on disk. What is there is measured, not guessed: the same code serves a laptop with the small model
and a GPU that SDXL barely fits on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hypersd.adapters import Outfit, dressed

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
        stored: reads the base's own weights again, (name, value) one after the other; without it those of a network
            that is changed as a whole wait in main memory.
    """

    def __init__(
        self,
        network: nn.Module,
        reserve: int,
        free: Callable[[torch.device], int] = free_bytes,
        stored: Callable[[], Iterable[tuple[str, Tensor]]] | None = None,
    ) -> None:
        self.network, self.reserve, self.free, self.stored = network, reserve, free, stored
        self._copies: OrderedDict[Hashable, nn.Module] = OrderedDict()
        self._in_place: Hashable = None
        self._untouched: Callable[[], Iterable[tuple[str, Tensor]]] | None = None  # where the base is changed in place

    @property
    def copies(self) -> int:
        """How many merged copies there are beside the base."""
        return len(self._copies)

    def wear(self, key: Hashable, read: Callable[[], Outfit]) -> nn.Module:
        """The network with the outfit `key`; `read` gives it where it is needed.

        Raises:
            AdapterError: it does not fit the network, which is as it was, or cannot be read.
        """
        if key in self._copies:
            self._copies.move_to_end(key)
            return self._copies[key]
        if self._in_place is not None and key == self._in_place:
            return self.network
        outfit = read()
        touched = outfit.fit(self.network)
        self.bare()
        need = sum(weight.numel() * weight.element_size() for weight in touched.values())
        while self._copies and not self._room(need):
            self._copies.popitem(last=False)
        if not self._room(need):
            return self._change(key, outfit, touched)
        self._copies[key] = dressed(self.network, outfit)
        return self._copies[key]

    def forget(self) -> None:
        """Drop the copies; what is asked for again is merged again."""
        self._copies.clear()

    def spare(self) -> None:
        """Memory turned out to be short: drop the copies, and leave twice as much free from now on."""
        self.forget()
        self.reserve = max(2 * self.reserve, GIGABYTE)

    def bare(self) -> Any:
        """The network without an adapter."""
        self._in_place = None
        if self._untouched:
            for name, weight in self._untouched():
                self.network.get_parameter(name).data.copy_(weight)
            self._untouched = None  # and not before: what fails halfway is tried again
        return self.network

    def _room(self, need: int) -> bool:
        device = next(self.network.parameters()).device
        return len(self._copies) < COPIES and self.free(device) >= need + self.reserve

    def _change(self, key: Hashable, outfit: Outfit, touched: dict[str, nn.Parameter]) -> nn.Module:
        if self.stored and len(touched) == sum(1 for _ in self.network.parameters()):
            self._untouched = self.stored
        else:
            kept = {name: weight.detach().to("cpu", copy=True) for name, weight in touched.items()}
            self._untouched = kept.items
        for name, weight in outfit.weights(touched):
            touched[name].data.copy_(weight)
        self._in_place = key
        return self.network
