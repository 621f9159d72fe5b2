"""As many merged copies as memory has room for; without room the network changes in place, and changes back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hypersd.adapters import AdapterError, AdapterFile, Lora, dressed
from hypersd.backbone import Backbone
from hypersd.generate import draw
from hypersd.methods import discover
from hypersd.records import Request
from hypersd.wardrobe import COPIES, Wardrobe, free_bytes

LAYER = 64 * 64 * 4  # bytes of the one layer that is changed


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def adapter(number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {"first.lora_A": torch.randn(2, 64, generator=generator),
            "first.lora_B": torch.randn(64, 2, generator=generator)}  # fmt: skip


class Machine:
    """Memory that a copy takes up and that its loss gives back."""

    def __init__(self, layers: float) -> None:
        self.bytes = int(layers * LAYER)
        self.wardrobe = Wardrobe(Net(), reserve=0, free=lambda _: self.bytes - self.wardrobe.copies * LAYER)
        self.loads: list[int] = []

    def draw(self, number: int | None) -> Tensor:
        def read() -> Lora:
            assert number is not None
            self.loads.append(number)
            return Lora(adapter(number), 0.5)

        x = torch.ones(1, 64)
        with torch.no_grad():
            output: Tensor = (self.wardrobe.bare() if number is None else self.wardrobe.wear(number, read))(x)
        return output


@pytest.fixture(scope="module")
def answers() -> Callable[[int | None], Tensor]:
    """What each adapter must draw, by a machine with room for everything."""
    torch.manual_seed(0)
    net, x = Net(), torch.ones(1, 64)
    with torch.no_grad():
        table = {n: dressed(net, Lora(adapter(n), 0.5))(x) for n in range(8)} | {None: net(x)}
    return lambda number: table[number]


@settings(max_examples=40, deadline=None)
@given(
    layers=st.sampled_from([0.0, 0.5, 1.0, 2.5, 100.0]),
    asked=st.lists(st.sampled_from([None, *range(8)]), min_size=1, max_size=20),
)
def test_every_question_gets_its_own_networks_answer(
    answers: Callable[[int | None], Tensor], layers: float, asked: list[int | None]
) -> None:
    torch.manual_seed(0)
    machine = Machine(layers)
    for number in asked:
        assert torch.equal(machine.draw(number), answers(number))
        assert machine.wardrobe.copies <= min(COPIES, int(layers))


def test_with_room_a_switch_reads_nothing() -> None:
    machine = Machine(3)
    for number in (1, 2, 1, 2, 1):
        machine.draw(number)
    assert machine.loads == [1, 2]


def test_the_copy_that_was_worn_longest_ago_goes() -> None:
    machine = Machine(2)
    for number in (1, 2, 1, 3, 1):
        machine.draw(number)
    assert machine.loads == [1, 2, 3]
    machine.draw(2)
    assert machine.loads == [1, 2, 3, 2]


def test_without_room_the_base_itself_is_changed_and_changed_back() -> None:
    machine = Machine(0)
    weight = machine.wardrobe.network.get_parameter("first.weight")
    before = weight.clone()
    machine.draw(1)
    assert not torch.equal(weight, before)
    machine.draw(1)
    assert machine.loads == [1]  # it is still worn
    machine.draw(None)
    assert torch.equal(weight, before)  # to the bit: it is copied back, not subtracted


def test_one_that_does_not_fit_leaves_everything_as_it_was() -> None:
    machine = Machine(0)
    machine.draw(1)
    worn = machine.draw(1)
    with pytest.raises(AdapterError, match="does not fit this base"):
        machine.wardrobe.wear("odd", lambda: Lora({"third.lora_A": torch.ones(2, 64)}))
    assert torch.equal(machine.draw(1), worn)


def test_free_memory_is_measured() -> None:
    assert 1e8 < free_bytes(torch.device("cpu")) < 1e14


def test_pictures_do_not_depend_on_the_room(tiny_folder: Path, tiny_adapters: Sequence[AdapterFile]) -> None:
    """Four methods in turn on a machine without room for a single copy, and on one with room for all."""
    roomy, tight = Backbone.load(tiny_folder), Backbone.load(tiny_folder)
    tight.wardrobe.free = lambda _: 0
    table = discover(tiny_adapters, roomy.network_sha256)
    for name in ("hyper", "base", "lcm", "tcd", "hyper", "base"):
        request = Request("a cat", seed=3, steps=4)
        assert draw(tight, request, table[name]).pixels == draw(roomy, request, table[name]).pixels
    assert (tight.wardrobe.copies, roomy.wardrobe.copies) == (0, 3)
