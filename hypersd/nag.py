"""Negative prompts without guidance: normalised attention guidance, Chen et al. 2025, arXiv:2505.21179.

A network that was distilled with its guidance baked in is asked once a step and has no second answer to be led away
from. It has two in each cross-attention: what the image finds in the prompt, and what it would find in the negative
prompt. The first is carried away from the second, not too far, and the rest of the network goes on with that.

`scale` is s = 1 + phi of the paper, as the guidance of this project: 1 changes nothing. A step stays one pass of the
network; only its cross-attention is computed twice. Differs from the paper: norms are taken in float32 whatever the
network computes in, since a sum over a thousand channels does not fit into float16.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import Attention

TAU, ALPHA = 2.5, 0.5  # as its makers draw with networks of this kind
CROSS = ".attn2.processor"  # the attention to the text in each block, as diffusers names it


def carried_away(positive: Tensor, negative: Tensor, scale: float, tau: float = TAU, alpha: float = ALPHA) -> Tensor:
    """The output of an attention, led away from that of another text. [..., tokens, channels] three times."""
    z, away = positive.float(), negative.float()
    extrapolated = z + (scale - 1) * (z - away)
    norm = extrapolated.abs().sum(-1, keepdim=True)
    limit = tau * z.abs().sum(-1, keepdim=True)
    normalised = extrapolated * (limit / norm.clamp_min(1e-12)).clamp_max(1)  # no longer than tau times z
    return z.lerp(normalised, alpha).to(positive.dtype)


class Away:
    """An attention processor of diffusers for one cross-attention: the text that it is called with, less another."""

    def __init__(self, negative: Tensor, scale: float) -> None:
        """`negative` are the states of the other text, [1, tokens, width]."""
        self.negative, self.scale = negative, scale

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """[n, pixels, channels] and the states of the text [n, tokens, width] -> [n, pixels, channels]"""
        assert attention_mask is None, "texts are padded here, never masked"
        query = _heads(attn, attn.to_q(hidden_states))
        negative = self.negative.expand(len(hidden_states), -1, -1)
        found, other = (
            F.scaled_dot_product_attention(query, _heads(attn, attn.to_k(text)), _heads(attn, attn.to_v(text)))
            for text in (encoder_hidden_states, negative)
        )
        guided = carried_away(_joined(found), _joined(other), self.scale)
        return attn.to_out[1](attn.to_out[0](guided))


def _heads(attn: Attention, x: Tensor) -> Tensor:
    """[n, tokens, heads * width] -> [n, heads, tokens, width]"""
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def _joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


@contextmanager
def away_from(network: UNet2DConditionModel, negative: Tensor, scale: float) -> Iterator[None]:
    """Within, the network keeps away from the text with these states [1, tokens, width]; then it is as it was."""
    before = network.attn_processors
    worn = {name: Away(negative, scale) if name.endswith(CROSS) else kept for name, kept in before.items()}
    network.set_attn_processor(worn)
    try:
        yield
    finally:
        network.set_attn_processor(before)
