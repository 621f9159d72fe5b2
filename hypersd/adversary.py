"""The latent adversary: small heads that judge what the frozen base network sees in a latent.

SDXL-Lightning (arXiv:2402.13929, section 3.2), which Hyper-SD cites, trains a copy of the network's encoder as the
discriminator. Here, as in latent adversarial distillation and PCM (arXiv:2405.18407, section 3.4), the encoder is the
frozen base itself, looked into at every level, and only a head a level is trained: no second network is in memory, and
the pass stops after the middle block. Loss: hinge (arXiv:1705.02894, eq. 5-6), averaged over positions and levels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hypersd.network import call

WIDTH = 64


class Adversary(nn.Module):
    """A head for every down block and the middle block of a UNet2DConditionModel."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        widths = [*network.config.block_out_channels, network.config.block_out_channels[-1]]
        self.heads = nn.ModuleList(_head(width) for width in widths)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Judgements [batch, 1, h, w] of each level: above 1 is surely a target, below -1 surely the student's."""
        return [head(f.float()) for head, f in zip(self.heads, features, strict=True)]


def _head(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(width, WIDTH, 3, padding=1),
        nn.GroupNorm(min(32, WIDTH // 4), WIDTH),
        nn.SiLU(),
        nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
        nn.GroupNorm(min(32, WIDTH // 4), WIDTH),
        nn.SiLU(),
        nn.Conv2d(WIDTH, 1, 1),
    )


def features(frozen: Any, x_t: Tensor, t: Tensor, states: Tensor) -> list[Tensor]:
    """What the network sees: the output of each down block and of the middle block, [batch, width, h, w] each.

    Runs in the network's dtype, whatever that of the latents and states; stops after the middle block.
    """
    seen: list[Tensor] = []

    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    with _lower_half(frozen), ExitStack() as hooks:
        for block in (*frozen.down_blocks, frozen.mid_block):
            hooks.callback(block.register_forward_hook(note).remove)
        call(frozen, x_t.to(frozen.dtype), t, states.to(frozen.dtype))
    return seen


@contextmanager
def _lower_half(network: Any) -> Iterator[None]:
    """The network ends with its middle block, as a call that returns: FSDP gathers and frees weights around calls."""
    ends = {"up_blocks": nn.ModuleList(), "conv_norm_out": None, "conv_out": nn.Identity()}
    upper = {name: getattr(network, name) for name in ends}
    try:
        for name, end in ends.items():
            setattr(network, name, end)
        yield
    finally:
        for name, part in upper.items():
            setattr(network, name, part)


def fool(judgements: list[Tensor]) -> Tensor:
    """The generator's loss: to be judged a target."""
    return -torch.stack([j.mean() for j in judgements]).mean()


def tell(fake: list[Tensor], real: list[Tensor]) -> Tensor:
    """The adversary's hinge loss; 2 for one that cannot tell."""
    pairs = zip(fake, real, strict=True)
    return torch.stack([(1 + f).relu().mean() + (1 - r).relu().mean() for f, r in pairs]).mean()
