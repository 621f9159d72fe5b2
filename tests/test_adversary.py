"""The judge of latents: what it looks at, what that costs, who learns from it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from hypersd import adversary
from hypersd.backbone import Backbone

X = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(1))
T = torch.tensor([499, 999])
STATES = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(2))


def hooks(network: nn.Module) -> int:
    return sum(len(layer._forward_hooks) for layer in network.modules())


def test_shapes_of_the_tiny_network(tiny_backbone: Backbone) -> None:
    seen = adversary.features(tiny_backbone.unet, X, T, STATES)
    assert [tuple(f.shape) for f in seen] == [(2, 8, 2, 2), (2, 16, 2, 2), (2, 16, 2, 2)]
    judged = adversary.Adversary(tiny_backbone.unet)(seen)
    assert [tuple(j.shape) for j in judged] == [(2, 1, 2, 2)] * 3
    assert {j.dtype for j in judged} == {torch.float32}


def test_shapes_of_sd15() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768).requires_grad_(False)
        seen = adversary.features(unet, torch.empty(2, 4, 16, 16), torch.empty(2), torch.empty(2, 77, 768))
        judged = adversary.Adversary(unet)(seen)
    assert [tuple(f.shape[1:]) for f in seen] == [(320, 8, 8), (640, 4, 4), (1280, 2, 2), (1280, 2, 2), (1280, 2, 2)]
    assert [tuple(j.shape) for j in judged] == [(2, 1, 8, 8), (2, 1, 4, 4)] + 3 * [(2, 1, 2, 2)]


def test_features_are_what_the_blocks_put_out(tiny_backbone: Backbone) -> None:
    unet, outputs = tiny_backbone.unet, []
    handles = [
        b.register_forward_hook(lambda _m, _i, o: outputs.append(o)) for b in (*unet.down_blocks, unet.mid_block)
    ]
    try:
        unet(X, T, encoder_hidden_states=STATES)
    finally:
        for handle in handles:
            handle.remove()
    expected = [o[0] if isinstance(o, tuple) else o for o in outputs]
    for found, wanted in zip(adversary.features(unet, X, T, STATES), expected, strict=True):
        assert torch.equal(found, wanted)


def test_the_pass_stops_after_the_middle(tiny_backbone: Backbone) -> None:
    unet, calls = tiny_backbone.unet, Counter[str]()
    watched = [(n, m) for n, m in unet.named_modules() if n]
    handles = [m.register_forward_pre_hook(lambda *_, n=n: calls.update([n])) for n, m in watched]
    try:
        adversary.features(unet, X, T, STATES)
    finally:
        for handle in handles:
            handle.remove()
    assert {n for n, _ in watched if n.startswith(("up_blocks", "conv_norm_out", "conv_out"))}
    assert not [n for n in calls if n.startswith(("up_blocks", "conv_norm_out", "conv_out"))]
    assert calls["conv_in"] == calls["mid_block"] == calls["down_blocks.0"] == 1


def test_the_network_is_as_it_was(tiny_backbone: Backbone) -> None:
    unet = tiny_backbone.unet
    before = unet(X, T, encoder_hidden_states=STATES, return_dict=False)[0]
    adversary.features(unet, X, T, STATES)
    assert hooks(unet) == 0
    assert torch.equal(unet(X, T, encoder_hidden_states=STATES, return_dict=False)[0], before)


@pytest.mark.parametrize("place", ["conv_in", "down_blocks.1", "mid_block"])
def test_an_exception_on_the_way_leaves_no_hook(tiny_backbone: Backbone, place: str) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    unet = tiny_backbone.unet
    handle = unet.get_submodule(place).register_forward_pre_hook(fail)
    try:
        with pytest.raises(ZeroDivisionError):
            adversary.features(unet, X, T, STATES)
    finally:
        handle.remove()
    assert hooks(unet) == 0


def test_a_half_precision_network_takes_latents_as_they_are() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(32, 32), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=16,
        ).to(torch.bfloat16)  # fmt: skip
        seen = adversary.features(unet, torch.empty(1, 4, 4, 4), torch.empty(1), torch.empty(1, 3, 16))
        assert {f.dtype for f in seen} == {torch.bfloat16}
        assert {j.dtype for j in adversary.Adversary(unet)(seen)} == {torch.float32}


def levels(*values: list[float]) -> list[Tensor]:
    """A judgement a level, of different sizes."""
    return [torch.tensor(v).view(1, 1, 1, -1) for v in values]


def test_hinge_values_by_hand() -> None:
    nothing = levels([0.0, 0.0], [0.0])
    assert float(adversary.tell(nothing, nothing)) == 2.0  # cannot tell
    sure = adversary.tell(levels([-1.0, -3.0], [-2.0]), levels([1.0, 5.0], [2.0]))
    assert float(sure) == 0.0
    # level 1: fake (1.5 + 0) / 2, real (0.75 + 0) / 2; level 2: fake 3, real 4; levels weigh the same
    loss = adversary.tell(levels([0.5, -2.0], [2.0]), levels([0.25, 1.5], [-3.0]))
    assert float(loss) == pytest.approx(((0.75 + 0.375) + (3 + 4)) / 2)
    assert float(adversary.fool(levels([0.5, -2.0], [2.0]))) == pytest.approx(-(-0.75 + 2) / 2)


def test_one_level_too_few_is_an_error(tiny_backbone: Backbone) -> None:
    with pytest.raises(ValueError, match="zip"):
        adversary.Adversary(tiny_backbone.unet)([torch.zeros(1, 8, 2, 2)])
    with pytest.raises(ValueError, match="zip"):
        adversary.tell(levels([0.0]), levels([0.0], [0.0]))


def test_the_generator_learns_from_it_and_the_base_does_not(tiny_backbone: Backbone) -> None:
    unet, judge = tiny_backbone.unet, adversary.Adversary(tiny_backbone.unet)
    fake = X.clone().requires_grad_()
    loss = adversary.fool(judge(adversary.features(unet, fake, T, STATES)))
    (gradient,) = torch.autograd.grad(loss, fake, retain_graph=True)
    assert gradient.flatten(1).abs().amax(1).min() > 0  # every latent of the batch
    loss.backward()
    assert all(p.grad is None for p in unet.parameters())
    with torch.no_grad():  # downhill is towards "a target"
        step = fake - 1e-2 * gradient / gradient.norm()
        assert adversary.fool(judge(adversary.features(unet, step, T, STATES))) < loss


def test_heads_learn_to_tell(tiny_backbone: Backbone) -> None:
    unet = tiny_backbone.unet
    torch.manual_seed(0)
    judge = adversary.Adversary(unet)
    with torch.no_grad():
        fake, real = (adversary.features(unet, x, T, STATES) for x in (X, X + 1))
    optimizer = torch.optim.AdamW(judge.parameters(), lr=1e-2)
    for _ in range(15):
        loss = adversary.tell(judge(fake), judge(real))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in judge.parameters())
        optimizer.step()
    assert loss.item() < 1.0
