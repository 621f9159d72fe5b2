"""A call of the denoiser, the same for every family: a noisy latent, a timestep, and states with all it is told.

Stable Diffusion's UNet is told a sequence of token states. SDXL's (arXiv:2307.01952, section 2.2) is told a pooled
state of the whole prompt and six sizes as well: the picture's original height and width, where its crop begins, the
height and width wanted. They travel as one more row of the sequence, so that caches, batches and roles hold one tensor
whatever the family.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SIZES = 6


def call(network: Any, x_t: Tensor, t: int | Tensor, states: Tensor) -> Tensor:
    """The raw output of a UNet2DConditionModel at x_t [n, c, h, w], in the network's own dtype."""
    output: Tensor = network(x_t, t, **conditions(network, states), return_dict=False)[0]
    return output


def conditions(network: Any, states: Tensor) -> dict[str, Any]:
    """`states` under the names that the network's forward pass has for them."""
    pooled = pooled_width(network)
    if not pooled:
        return {"encoder_hidden_states": states}
    last = states[:, -1]
    told = {"text_embeds": last[:, :pooled], "time_ids": last[:, pooled : pooled + SIZES]}
    return {"encoder_hidden_states": states[:, :-1], "added_cond_kwargs": told}


def pooled_width(network: Any) -> int:
    """Width of the pooled state that a network is told beside the sequence; 0 if it is told none."""
    if network.config.addition_embed_type != "text_time":
        return 0
    whole: int = network.config.projection_class_embeddings_input_dim
    return whole - SIZES * int(network.config.addition_time_embed_dim)


def packed(sequence: Tensor, pooled: Tensor, sizes: tuple[int, ...] = ()) -> Tensor:
    """[n, tokens, width], [n, p] and sizes in pixels, six or none -> states [n, tokens + 1, width]; p + 6 <= width."""
    last = sequence.new_zeros(len(sequence), 1, sequence.shape[2])
    last[:, 0, : pooled.shape[1]] = pooled
    last[:, 0, pooled.shape[1] : pooled.shape[1] + len(sizes)] = sequence.new_tensor(sizes)
    return torch.cat([sequence, last], dim=1)
