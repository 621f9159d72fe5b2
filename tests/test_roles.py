"""Roles on one network: what is worn, what learns, what it costs, against PEFT's own layers."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hypersd.backbone import Backbone
from hypersd.records import InputError
from hypersd.roles import LAYERS, Roles

X = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(1))
T = torch.tensor([499, 999])
STATES = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def network(tiny_backbone: Backbone) -> nn.Module:
    """A tiny UNet of one's own."""
    return copy.deepcopy(tiny_backbone.unet)


def call(network: Any, x: Tensor = X) -> Tensor:
    dtype = network.conv_in.weight.dtype
    output: Tensor = network(x.to(dtype), T, encoder_hidden_states=STATES.to(dtype), return_dict=False)[0]
    return output


def bare(network: nn.Module) -> Tensor:
    with torch.no_grad():
        return call(network)


def randomise(roles: Roles, *names: str, size: float = 0.1) -> None:
    """Something to see: adapters begin with B = 0."""
    with torch.no_grad():
        for number, name in enumerate(names):
            generator = torch.Generator().manual_seed(number)
            for weight in roles[name].parameters():
                weight.copy_(size * torch.randn(weight.shape, generator=generator))


def dressed(network: nn.Module, *names: str, size: float = 0.1, rank: int = 2) -> Roles:
    roles = Roles(network, merged=False)
    for name in names:
        roles.add(name, rank=rank)
    randomise(roles, *names, size=size)
    return roles


# ------------------------------------------------------------------------------------------------ what is worn


@pytest.mark.parametrize("grad", [False, True])
def test_nothing_worn_is_the_base_bit_for_bit(network: nn.Module, grad: bool) -> None:
    before = bare(network)
    roles = dressed(network, "student", "ema")
    with torch.set_grad_enabled(grad):
        assert torch.equal(call(network), before)
        with roles.wear():
            assert torch.equal(call(network), before)


@pytest.mark.parametrize("grad", [False, True])
def test_a_fresh_role_changes_nothing(network: nn.Module, grad: bool) -> None:
    before = bare(network)
    roles = Roles(network, merged=False)
    student = roles.add("student", rank=4)
    assert all((p.abs().max() > 0) == ("lora_A" in name) for name, p in student.named_parameters())
    with torch.set_grad_enabled(grad), roles.wear("student"):
        assert torch.equal(call(network), before)


@pytest.mark.parametrize("worn", [("a",), ("b",), ("a", "b"), ("b", "a"), ("a", "b", "c")])
def test_without_gradient_the_effective_weights_say_the_same(network: nn.Module, worn: Sequence[str]) -> None:
    before = bare(network)
    roles = dressed(network, "a", "b", "c")
    with roles.wear(*worn):
        low_rank = call(network).detach()
        torch.testing.assert_close(bare(network), low_rank, rtol=1e-5, atol=1e-5)
        with torch.inference_mode():
            torch.testing.assert_close(call(network), low_rank, rtol=1e-5, atol=1e-5)
    assert (low_rank - before).abs().max() > 1e-2


@pytest.mark.parametrize("rank", [1, 3])
def test_equals_pefts_own_forward(network: nn.Module, rank: int) -> None:
    theirs = copy.deepcopy(network)
    roles = dressed(network, "student", rank=rank)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LAYERS)), theirs, "student")
    given = {f"{name}.weight": tensor for name, tensor in roles["student"].adapter().items()}
    assert given.keys() == get_peft_model_state_dict(theirs, adapter_name="student").keys()
    set_peft_model_state_dict(theirs, given, adapter_name="student")
    expected = call(theirs).detach()
    with roles.wear("student"):
        torch.testing.assert_close(call(network).detach(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(bare(network), expected, rtol=1e-5, atol=1e-5)


def test_all_layers_but_the_first_the_last_and_the_time_embedding_take_part(network: nn.Module) -> None:
    able = {name for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    role = Roles(network).add("student", rank=2)
    left = {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}
    assert {name.rsplit(".", 1)[0] for name in role.adapter()} == able - left


def test_several_worn_at_once_add_up(network: Any) -> None:
    """On one linear layer, by hand."""
    roles = dressed(network, "a", "b")
    layer = network.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(3))
    expected = layer.base_layer(x)
    for role in (roles["a"], roles["b"]):
        a, b = (role.adapter()[f"mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_{half}"] for half in "AB")
        expected = expected + x @ a.T @ b.T
    with roles.wear("a", "b"):
        torch.testing.assert_close(layer(x), expected)


def test_layers_may_differ_from_role_to_role(network: nn.Module) -> None:
    before = bare(network)
    roles = Roles(network, merged=False)
    roles.add("few", rank=2, layers=["to_q"])
    roles.add("more", rank=3, layers=["to_q", "conv1"])
    randomise(roles, "few", "more")
    assert len(roles["few"].adapter()) < len(roles["more"].adapter())
    outputs = []
    for worn in ([], ["few"], ["more"], ["few", "more"]):
        with roles.wear(*worn):
            outputs.append(bare(network))
    assert torch.equal(outputs[0], before)
    assert all(not torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])


@pytest.mark.parametrize("grad", [True, False])
def test_at_a_strength_all_that_is_worn_counts_so_many_times(network: Any, grad: bool) -> None:
    """As if B had been multiplied, and only for so long."""
    roles = dressed(network, "a", "b")
    with torch.set_grad_enabled(grad), roles.wear("a", "b"):
        plain = call(network)
        with roles.at(1.5):
            stronger = call(network)
        assert torch.equal(call(network), plain)
    with torch.no_grad():
        for name in ("a", "b"):
            for half, weight in roles[name].named_parameters():
                weight.mul_(1.5 if half.endswith("lora_B") else 1.0)
        with roles.wear("a", "b"):
            torch.testing.assert_close(stronger.detach(), call(network), rtol=1e-4, atol=1e-5)
    assert float((stronger - plain).detach().abs().max()) > 1e-2


def test_nesting_and_exceptions_restore(network: nn.Module) -> None:
    roles = dressed(network, "a", "b")
    plain = bare(network)
    with roles.wear("a"):
        in_a = bare(network)
        with roles.wear("b"):
            assert not torch.equal(bare(network), in_a)
            with roles.wear():
                assert torch.equal(bare(network), plain)
        assert torch.equal(bare(network), in_a)
        with pytest.raises(KeyError), roles.wear("b"):
            raise KeyError
        assert torch.equal(bare(network), in_a)
        with pytest.raises(InputError, match=r"there is no role 'c'; the roles are a, b"), roles.wear("b", "c"):
            pass
        assert torch.equal(bare(network), in_a)
    assert torch.equal(bare(network), plain)


# ------------------------------------------------------------------------------------------------- what learns


def gradients(roles: Roles, worn_then: Sequence[str], checkpointing: bool) -> dict[str, dict[str, Tensor]]:
    """Of every role, with the student worn when forward was called and `worn_then` when backward is."""
    if checkpointing:
        roles.checkpointing()
    with roles.wear("student"):
        loss = call(roles.network).square().mean()
    with roles.wear(*worn_then):
        loss.backward()
    return {
        name: {n: p.grad for n, p in roles[name].named_parameters() if p.grad is not None}
        for name in ("student", "fake", "ema")
    }


@pytest.fixture
def three(network: nn.Module) -> Roles:
    roles = Roles(network, merged=False)
    roles.add("student", rank=2)
    roles.add("fake", rank=2)
    roles.add("ema", rank=2, trainable=False)
    randomise(roles, "student", "fake", "ema")
    return roles


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("worn_then", [("student",), (), ("fake",), ("ema",), ("fake", "ema")])
def test_grownare_the_students_whatever_is_worn_at_backward(
    three: Roles, worn_then: Sequence[str], checkpointing: bool
) -> None:
    expected = gradients(copy.deepcopy(three), ("student",), False)["student"]
    found = gradients(three, worn_then, checkpointing)
    assert found["fake"] == found["ema"] == {}
    assert found["student"].keys() == {name for name, _ in three["student"].named_parameters()}
    for name, gradient in found["student"].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-6)
    assert not [name for name, p in three.network.named_parameters() if p.grad is not None and "lora" not in name]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("learning", [{"a"}, {"b"}, {"a", "b"}, set()])
def test_effective_weights_give_the_low_rank_gradients(
    tiny_backbone: Backbone, learning: set[str], checkpointing: bool
) -> None:
    """Into the halves that learn, one way and the other, and into the latent; with two LoRAs worn, of which some do."""
    found = []
    for merged in (False, True):
        roles = Roles(copy.deepcopy(tiny_backbone.unet), merged=merged)
        for name in ("a", "b"):
            roles.add(name, rank=2, trainable=name in learning)
        randomise(roles, "a", "b")
        if checkpointing:
            roles.checkpointing()
        x = X.clone().requires_grad_()
        with roles.wear("a", "b"):
            output = call(roles.network, x)
        output.square().mean().backward()
        halves = {f"{name} {key}": p.grad for name in "ab" for key, p in roles[name].named_parameters()}
        assert {key for key, gradient in halves.items() if gradient is not None} == {
            key for key in halves if key[0] in learning
        }
        found.append({"x": x.grad, "output": output.detach()} | {k: g for k, g in halves.items() if g is not None})
    low_rank, effective = found
    for key, tensor in low_rank.items():
        torch.testing.assert_close(effective[key], tensor, rtol=1e-4, atol=1e-6)


def test_effective_weights_learn_under_autocast(tiny_backbone: Backbone) -> None:
    """Arithmetic is in bfloat16, forwards and backwards; what learns stays in float32, and so do its gradients."""
    gradients = []
    for merged, autocast in ((True, False), (True, True), (False, True)):
        roles = Roles(copy.deepcopy(tiny_backbone.unet), merged=merged)
        roles.add("student", rank=2)
        randomise(roles, "student")
        with roles.wear("student"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = call(roles.network).float().square().mean()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in roles["student"].parameters() if p.grad is not None]))
    exact, effective, low_rank = gradients
    assert exact.dtype == effective.dtype == torch.float32 and exact.shape == effective.shape
    assert 0 < (effective - exact).norm() < 2 * (low_rank - exact).norm() < 0.2 * exact.norm()


def test_checkpointing_computes_again(three: Roles) -> None:
    """Or the test above would say nothing of it."""
    calls: list[int] = []
    blocks: Any = three.network.down_blocks
    blocks[0].resnets[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    gradients(three, (), checkpointing=True)
    assert len(calls) == 2


def test_a_checkpointed_graph_can_be_gone_through_twice(three: Roles) -> None:
    """As an adaptive adversarial weight does: one gradient for each of two losses, then backward."""
    three.checkpointing()
    with three.wear("student"):
        loss = call(three.network).square().mean()
    weights = list(three["student"].parameters())
    first = torch.autograd.grad(loss, weights, retain_graph=True)
    with three.wear("fake"):
        second = torch.autograd.grad(loss, weights)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_two_graphs_may_wait_for_their_backward(three: Roles) -> None:
    with three.wear("student"):
        student = call(three.network).square().mean()
    with three.wear("fake"):
        fake = call(three.network).square().mean()
    fake.backward()
    assert all(p.grad is None for p in three["student"].parameters())
    student.backward()
    both = [*three["student"].parameters(), *three["fake"].parameters()]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in both)


def test_an_earlier_role_gets_its_gradient_after_another_was_added(three: Roles) -> None:
    with three.wear("student"):
        loss = call(three.network).square().mean()
    three.add("late", rank=1)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in three["student"].parameters())


def test_what_may_learn_never_changes(three: Roles) -> None:
    def flags() -> dict[str, bool]:
        return {name: p.requires_grad for name, p in three.network.named_parameters()}

    before = flags()
    assert {name for name, yes in before.items() if yes} == {
        name for name in before if ".student." in name or ".fake." in name
    }
    for worn in ([], ["fake"], ["ema"], ["student", "ema"]):
        with three.wear(*worn):
            assert flags() == before
    three.add("late", rank=1, trainable=False)
    now = flags()
    assert {name: now[name] for name in before} == before
    assert not any(yes for name, yes in now.items() if ".late." in name)


def test_a_step_moves_its_own_role_only(three: Roles) -> None:
    before = {name: p.detach().clone() for name, p in three.network.named_parameters()}
    optimizer = torch.optim.AdamW(three["student"].parameters(), lr=1e-2, weight_decay=0.1)
    gradients(three, ("fake",), checkpointing=False)
    optimizer.step()
    moved = {name for name, p in three.network.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".student." in name}


# ------------------------------------------------------------------------------------------------- half precision


@pytest.fixture
def half(network: nn.Module) -> nn.Module:
    return network.to(torch.bfloat16)


def test_adapters_on_a_half_precision_base_are_float32(half: nn.Module) -> None:
    roles = dressed(half, "student")
    roles.add("late", rank=1)
    assert {p.dtype for name in ("student", "late") for p in roles[name].parameters()} == {torch.float32}
    assert {p.dtype for name, p in half.named_parameters() if "lora" not in name} == {torch.bfloat16}
    with roles.wear("student"):
        loss = call(half).float().square().mean()
    loss.backward()
    grown = [p.grad for p in roles["student"].parameters()]
    assert all(g is not None and g.dtype == torch.float32 and g.abs().max() > 0 for g in grown)
    with roles.wear("student"):
        assert bare(half).dtype == torch.bfloat16
        assert bare(half).isfinite().all()


# --------------------------------------------------------------------------------------------------- what it costs


def test_the_base_is_in_memory_once(network: nn.Module) -> None:
    before = {p.data_ptr(): p.nbytes for p in network.parameters()}
    roles = dressed(network, "student", "ema", "fake")
    after = {p.data_ptr(): p.nbytes for p in network.parameters()}
    assert before.items() <= after.items()
    adapters = sum(p.nbytes for name in ("student", "ema", "fake") for p in roles[name].parameters())
    assert sum(after.values()) == sum(before.values()) + adapters
    assert adapters == 3 * sum(t.nbytes for t in roles["student"].adapter().values())


class Operations(TorchDispatchMode):
    """How often torch was asked for anything."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def python_calls(roles: Roles) -> int:
    """How many functions a switch there and back calls."""
    calls: list[str] = []
    sys.setprofile(lambda _frame, event, _argument: calls.append(event))
    try:
        with roles.wear("a"):
            pass
    finally:
        sys.setprofile(None)
    return sum(event.endswith("call") for event in calls)


def test_a_switch_costs_the_same_whatever_the_network(network: nn.Module) -> None:
    large = dressed(network, "a")
    small = Roles(nn.Sequential(nn.Linear(2, 2)))
    small.add("a", rank=1, layers=["0"])
    assert len(large["a"].adapter()) > 20 * len(small["a"].adapter())
    assert python_calls(large) == python_calls(small) < 30
    with Operations() as operations, large.wear("a"), large.wear():
        pass
    assert operations.count == 0
    with Operations() as operations:
        bare(network)
    assert operations.count > 100  # it does see them


# ---------------------------------------------------------------------------------------------------- a role itself


def test_copy_makes_equal_and_stays_apart(three: Roles) -> None:
    three.copy("student", "ema")
    assert all(torch.equal(three["ema"].adapter()[n], t) for n, t in three["student"].adapter().items())
    randomise(three, "student", size=0.3)
    assert not any(torch.equal(three["ema"].adapter()[n], t) for n, t in three["student"].adapter().items())


def test_an_adapter_shares_memory_with_its_role(three: Roles) -> None:
    adapter = three["student"].adapter()
    randomise(three, "student", size=0.3)
    assert all(torch.equal(adapter[n], t) for n, t in three["student"].adapter().items())
    assert not any(t.requires_grad for t in adapter.values())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("rank", r"is \(3, .*the role's is \(2, .*another rank"),
        ("lacks", r"this adapter lacks layer .*proj_in\.lora_A"),
        ("unknown", r"this adapter has the unknown layer mid_block\.extra\.lora_A"),
    ],
)
def test_another_adapter_is_refused_whole(three: Roles, change: str, sentence: str) -> None:
    before = {n: t.clone() for n, t in three["student"].adapter().items()}
    given = {n: torch.ones_like(t) for n, t in before.items()}
    name = sorted(n for n in before if n.endswith("proj_in.lora_A"))[-1]
    if change == "rank":
        given[name] = torch.ones(3, *before[name].shape[1:])
    elif change == "lacks":
        del given[name]
    else:
        given["mid_block.extra.lora_A"] = torch.ones(2, 2)
    with pytest.raises(InputError, match=sentence):
        three["student"].load_adapter(given)
    assert all(torch.equal(before[n], t) for n, t in three["student"].adapter().items())


def test_a_role_is_a_module_that_a_checkpoint_takes(three: Roles) -> None:
    saved = {n: t.clone() for n, t in three["student"].state_dict().items()}
    randomise(three, "student", size=0.3)
    three["student"].load_state_dict(saved)
    with three.wear("student"):
        again = bare(three.network)
    randomise(three, "student")
    with three.wear("student"):
        assert torch.equal(bare(three.network), again)


def test_names_are_told_apart(three: Roles) -> None:
    with pytest.raises(InputError, match=r"there is a role 'ema' already"):
        three.add("ema", rank=2)
    with pytest.raises(InputError, match=r"the network has none of the layers to_z"):
        three.add("new", rank=2, layers=["to_z"])


def test_two_masters_of_one_network_are_refused(three: Roles) -> None:
    before = {name: p.requires_grad for name, p in three.network.named_parameters()}
    with pytest.raises(InputError, match=r"carries LoRA layers of somebody else, such as .*; add all roles through"):
        Roles(three.network)
    assert {name: p.requires_grad for name, p in three.network.named_parameters()} == before


def test_a_second_master_is_refused_however_late(network: nn.Module) -> None:
    first, second = Roles(network), Roles(network)
    first.add("student", rank=2)
    with pytest.raises(InputError, match=r"carries LoRA layers of somebody else"):
        second.add("student", rank=2)


def test_layers_of_pefts_own_are_refused(network: nn.Module) -> None:
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), network, "theirs")
    with pytest.raises(InputError, match=r"carries LoRA layers of somebody else, such as .*to_q"):
        Roles(network)


def test_equal_seeds_make_equal_roles(tiny_folder: Path) -> None:
    made = []
    for _ in range(2):
        torch.manual_seed(5)
        made.append(Roles(Backbone.load(tiny_folder).unet).add("student", rank=2).adapter())
    assert all(torch.equal(made[0][n], made[1][n]) for n in made[0])
