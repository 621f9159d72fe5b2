"""Muon: the matrices it makes, the size of its updates, and AdamW for all that is no matrix."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from hypersd.muon import ADAMW_RMS, Muon, orthogonal


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = {"conv_in": nn.Conv2d(3, 8, 3), "middle": nn.Conv2d(8, 16, 3), "wide": nn.Linear(16, 64)}
    return nn.ModuleDict(layers)


def give_gradients(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("shape", [(4, 8, 64), (4, 64, 8), (1, 1, 9), (2, 16, 72)])
def test_singular_values_come_near_one_and_directions_stay(shape: tuple[int, ...]) -> None:
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    found = orthogonal(g).float()
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6 and values.max() < 1.3
    inside = u.mT @ found @ v.mT  # diagonal, if the directions are those of g
    off = inside - torch.diag_embed(torch.diagonal(inside, dim1=1, dim2=2))
    assert off.abs().max() < 0.05  # bfloat16


def test_a_gradient_of_zero_or_of_any_size_is_no_trouble() -> None:
    assert torch.equal(orthogonal(torch.zeros(2, 4, 8)), torch.zeros(2, 4, 8).bfloat16())
    g = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(orthogonal(1e4 * g), orthogonal(g), rtol=0.1, atol=0.05)
    assert orthogonal(1e-6 * g).isfinite().all()


def test_an_update_is_as_large_as_adamws_whatever_the_shape() -> None:
    for shape in ((64, 64), (16, 256), (256, 16)):
        module = nn.Linear(shape[1], shape[0], bias=False)
        before = module.weight.detach().clone()
        give_gradients(module, 0)
        Muon(module, lr=1e-2, weight_decay=0.0).step()
        rms = float((module.weight.detach() - before).square().mean().sqrt())
        assert rms == pytest.approx(1e-2 * ADAMW_RMS, rel=0.25)


def test_all_but_the_inner_matrices_go_by_adamw() -> None:
    ours, theirs = network(), network()
    muon, adamw = (
        Muon(ours, lr=1e-2, weight_decay=0.1),
        torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.1),
    )
    for seed in range(3):
        for module, optimizer in ((ours, muon), (theirs, adamw)):
            give_gradients(module, seed)
            optimizer.step()
    expected = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        same = torch.allclose(p, expected[name], rtol=1e-5, atol=1e-7)
        assert same == (name not in ("middle.weight", "wide.weight")), name


def test_weight_decay_is_decoupled_and_what_has_no_gradient_rests() -> None:
    module: Any = network()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    module["middle"].weight.grad = torch.zeros_like(module["middle"].weight)
    Muon(module, lr=0.1, weight_decay=0.5).step()
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if name == "middle.weight" else 1.0))


def test_the_state_travels() -> None:
    straight = network()
    optimizer = Muon(straight, lr=1e-2, weight_decay=0.01)
    for seed in range(2):
        give_gradients(straight, seed)
        optimizer.step()
    resumed = copy.deepcopy(straight)
    other = Muon(resumed, lr=1e-2, weight_decay=0.01)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for module, each in ((straight, optimizer), (resumed, other)):
        give_gradients(module, 9)
        each.step()
    assert all(map(torch.equal, straight.parameters(), resumed.parameters()))


def test_frozen_parameters_are_not_its_business() -> None:
    module: Any = network()
    module["wide"].requires_grad_(False)
    held = {id(p) for group in Muon(module, 1e-2, 0.0).param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters() if p.requires_grad}
