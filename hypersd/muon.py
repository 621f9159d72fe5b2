"""Muon: momentum whose update of each matrix is replaced by the nearest semi-orthogonal matrix.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon), with the update's size matched to AdamW's as in
arXiv:2502.16982, so that one learning rate serves both. Convolution kernels [out, in, h, w] count as matrices
[out, in h w]. Vectors, and the layers that touch latents or pixels, go by AdamW (arXiv:1711.05101), in the same step.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

MOMENTUM, ITERATIONS = 0.95, 5
A, B, C = 3.4445, -4.7750, 2.0315  # of the quintic whose iteration drives every singular value towards 1
ADAMW_RMS = 0.2  # root mean square of a typical AdamW update, in learning rates
OUTER = ("conv_in.", "conv_out.")


class Muon(torch.optim.Optimizer):
    """Updates the trainable parameters of `network`; `lr` and `weight_decay` (decoupled) mean what they do in AdamW."""

    def __init__(self, network: nn.Module, lr: float, weight_decay: float) -> None:
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, p in network.named_parameters():
            if p.requires_grad:
                (matrices if p.ndim > 1 and not name.startswith(OUTER) else rest).append(p)
        groups = [{"params": matrices, "orthogonal": True}, {"params": rest, "orthogonal": False}]
        super().__init__([g for g in groups if g["params"]], {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            (self._orthogonal if group["orthogonal"] else self._adamw)(group)

    def _orthogonal(self, group: dict[str, Any]) -> None:
        alike: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
        for p in group["params"]:
            if p.grad is not None:
                if p not in self.state:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum"].lerp_(p.grad, 1 - MOMENTUM)
                ahead = torch.lerp(p.grad, momentum, MOMENTUM).flatten(1)  # Nesterov's look ahead
                alike[(ahead.shape[0], ahead.shape[1])].append((p, ahead))
        for (rows, columns), members in alike.items():  # one batched product for all matrices of a shape
            size = group["lr"] * ADAMW_RMS * max(rows, columns) ** 0.5
            for (p, _), update in zip(members, orthogonal(torch.stack([u for _, u in members])), strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.view_as(p).to(p.dtype), alpha=-size)

    def _adamw(self, group: dict[str, Any]) -> None:
        moved = [p for p in group["params"] if p.grad is not None]
        for p in moved:
            if p not in self.state:
                self.state[p] |= {n: torch.zeros_like(p) for n in ("exp_avg", "exp_avg_sq")} | {"step": torch.zeros(())}
        kept = {name: [self.state[p][name] for p in moved] for name in ("exp_avg", "exp_avg_sq", "step")}
        adamw(
            moved, [p.grad for p in moved], kept["exp_avg"], kept["exp_avg_sq"], [], kept["step"],
            fused=True, amsgrad=False, beta1=0.9, beta2=0.999,
            lr=group["lr"], weight_decay=group["weight_decay"], eps=1e-8, maximize=False,
        )  # fmt: skip


def has_bfloat16(device: str) -> bool:
    """Whether a device has units for bfloat16. A processor without computes it in software, fifty times slower than
    float32 (seen on AVX2)."""
    if device != "cpu":
        return True
    known = (getattr(torch.cpu, f"_is_{unit}_supported", None) for unit in ("avx512_bf16", "amx_tile"))
    return any(ask() for ask in known if ask is not None)


def orthogonal(g: Tensor) -> Tensor:
    """The semi-orthogonal matrices nearest to g [n, rows, columns]; singular values within 0.7 .. 1.2."""
    x = g.bfloat16() if has_bfloat16(g.device.type) else g
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = A * x + (B * gram + C * gram @ gram) @ x
    return x.mT if tall else x
