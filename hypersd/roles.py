"""One frozen base, several roles: named LoRAs (arXiv:2106.09685) on one network, worn one at a time or together.

Teacher, student, EMA target and fake score are the same network: nothing is ever copied, and a switch costs nothing.
PEFT injects the layers; which of them are worn is decided here, because PEFT's own switch flips `requires_grad`, and a
parameter whose flag is off when the gradient arrives gets none, without a word.

    roles = Roles(unet)
    roles.add("student", rank=64)
    roles.add("ema", rank=64, trainable=False)
    with roles.wear("student"):
        prediction = unet(...)  # the graph keeps the student's tensors, whatever is worn when backward is called
    with roles.wear(), torch.no_grad():
        teacher = unet(...)

Differs from PEFT: adapters are float32 whatever the base's dtype (AdamW on bfloat16 weights loses small steps), and
passes without gradient run on the effective weight W + s B A, made layer by layer and thrown away, which for
convolutions costs a fraction of two more convolutions; small networks do so with gradient as well. A base in bfloat16
loses the part of s B A that is below its rounding: keep small bases in float32, and let autocast round the sum.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input
from torch.utils.checkpoint import checkpoint

from hypersd.records import InputError

LAYERS = (  # every linear and convolution of a Stable Diffusion UNet but the first, the last and the time embedding
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
HALVES = ("lora_A", "lora_B")


SMALL = 100_000_000  # parameters; below it launching kernels costs more than what they compute


@dataclass
class _Worn:
    """What is worn now; one object shared by all layers, so that a switch is one assignment.

    `merged`: passes with gradient run on the effective weight as well. That keeps W + s B A until backward, which is
    cheap for small networks and out of the question for large ones.
    """

    merged: bool
    names: tuple[str, ...] = ()
    strength: float = 1.0


class _Layer:
    """What the two kinds of layer have in common: the base layer and its low-rank additions, by role."""

    worn: _Worn
    base_layer: Any  # nn.Linear or nn.Conv2d
    lora_A: Any  # nn.ModuleDict of the same kind, by role
    lora_B: Any
    scaling: dict[str, float]

    def forward(self, x: Tensor) -> Tensor:
        names = [name for name in self.worn.names if name in self.lora_A]
        if not names:
            return self.base_layer(x)
        halves = [layers[name].weight for name in names for layers in (self.lora_A, self.lora_B)]
        scales = [self.scaling[name] * self.worn.strength for name in names]
        if torch.is_grad_enabled() and not self.worn.merged:
            return self.base_layer(x) + self._low_rank(x, halves, scales)
        weight = self._effective(halves, scales)
        if not torch.is_grad_enabled():
            return self._base(x, weight)
        if torch.is_autocast_enabled(x.device.type):  # backward, which is outside of it, shall compute in the same
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        y: Tensor = _Merged.apply(self, scales, x, weight, *halves)
        return y

    def _low_rank(self, x: Tensor, halves: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
        """The sum of s B A x; `halves` are A and B in turn."""
        pairs = zip(halves[::2], halves[1::2], scales, strict=True)
        parts = [s * self._up(self._down(x, a.to(x.dtype)), b.to(x.dtype)) for a, b, s in pairs]
        return sum(parts[1:], parts[0])

    @torch.no_grad()
    def _effective(self, halves: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
        """W plus the sum of s B A."""
        weight: Tensor = self.base_layer.weight
        for a, b, s in zip(halves[::2], halves[1::2], scales, strict=True):
            weight = weight + (s * b.flatten(1) @ a.flatten(1)).view_as(weight).to(weight.dtype)
        return weight

    @abstractmethod
    def _base(self, x: Tensor, weight: Tensor) -> Tensor:
        """The base layer with another weight."""

    @abstractmethod
    def _back(self, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The gradient of `_base` with respect to x, given that with respect to its output."""

    @abstractmethod
    def _down(self, x: Tensor, a: Tensor) -> Tensor:
        """A x"""

    @abstractmethod
    def _up(self, x: Tensor, b: Tensor) -> Tensor:
        """B x"""


class _Linear(_Layer, lora.Linear):
    def _base(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.base_layer.bias)

    def _back(self, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return gradient @ weight

    def _down(self, x: Tensor, a: Tensor) -> Tensor:
        return F.linear(x, a)

    def _up(self, x: Tensor, b: Tensor) -> Tensor:
        return F.linear(x, b)


class _Conv2d(_Layer, lora.Conv2d):
    def _base(self, x: Tensor, weight: Tensor) -> Tensor:
        base = self.base_layer
        return F.conv2d(x, weight, base.bias, base.stride, base.padding, base.dilation)

    def _back(self, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        base = self.base_layer
        return conv2d_input(x.shape, weight, gradient, base.stride, base.padding, base.dilation)

    def _down(self, x: Tensor, a: Tensor) -> Tensor:
        return F.conv2d(x, a, None, self.base_layer.stride, self.base_layer.padding, self.base_layer.dilation)

    def _up(self, x: Tensor, b: Tensor) -> Tensor:
        return F.conv2d(x, b)


class _Merged(torch.autograd.Function):
    """A layer on its effective weight W + s B A, which is as dear as the layer alone.

    Backward never makes the gradient of that weight, which would cost one more such pass: A and B get theirs from the
    low-rank path, computed again for it.
    """

    @staticmethod
    def forward(ctx: Any, layer: _Layer, scales: list[float], x: Tensor, weight: Tensor, *halves: Tensor) -> Tensor:
        ctx.layer, ctx.scales = layer, scales
        ctx.save_for_backward(x, weight if ctx.needs_input_grad[2] else None, *halves)
        return layer._base(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, weight, *halves = ctx.saved_tensors
        _, _, into_x, _, *learn = ctx.needs_input_grad
        found: Iterator[Tensor] = iter(())
        if any(learn):
            with torch.enable_grad():
                halves = [half.detach().requires_grad_(wanted) for half, wanted in zip(halves, learn, strict=True)]
                low_rank = ctx.layer._low_rank(x.detach(), halves, ctx.scales)
            found = iter(torch.autograd.grad(low_rank, [half for half in halves if half.requires_grad], gradient))
        into_halves = [next(found) if wanted else None for wanted in learn]
        return None, None, ctx.layer._back(gradient, x, weight) if into_x else None, None, *into_halves


class Role(nn.Module):
    """The parameters of one role as a module of their own, which an optimizer and a checkpoint take as any other.

    Names are those of the layers, with colons for dots: "mid_block:attentions:0:proj_in:lora_A".
    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name.replace(".", ":"), parameter)

    def adapter(self) -> dict[str, Tensor]:
        """{"mid_block.attentions.0.proj_in.lora_A": [rank, in, ...], ...}, sharing memory with the role."""
        return {name.replace(":", "."): tensor.detach() for name, tensor in self.state_dict().items()}

    @torch.no_grad()
    def load_adapter(self, adapter: dict[str, Tensor]) -> None:
        """Copy what `adapter()` of an equal role gave: all of it, or nothing.

        Raises:
            InputError: a layer is missing, unknown, or of another shape (another base, or another rank).
        """
        own = self.adapter()
        if odd := sorted(own.keys() ^ adapter.keys()):
            what = "lacks" if odd[0] in own else "has the unknown"
            raise InputError(f"this adapter {what} layer {odd[0]}; it was made for another base or other layers")
        for name, tensor in own.items():
            if tensor.shape != adapter[name].shape:
                raise InputError(
                    f"this adapter's {name} is {tuple(adapter[name].shape)}, the role's is {tuple(tensor.shape)}; "
                    "it was made for another base or with another rank"
                )
        for name, tensor in own.items():
            tensor.copy_(adapter[name])


class Roles:
    """The roles of one network, which is frozen for good. Outside any `wear` it is the bare base.

    `merged` says whether passes with gradient run on the effective weight too; if not given, small networks do.

    Raises:
        InputError: the network carries LoRA layers already, of other Roles or of PEFT's own.
    """

    def __init__(self, network: Any, *, merged: bool | None = None) -> None:
        size = sum(p.numel() for p in network.parameters())
        self._worn = _Worn(size < SMALL if merged is None else merged)
        self._refuse_others(network)
        self.network = network.requires_grad_(False)
        self._roles: dict[str, Role] = {}
        self._trainable: dict[str, bool] = {}

    def __getitem__(self, name: str) -> Role:
        return self._roles[name]

    def add(self, name: str, *, rank: int, layers: Sequence[str] = LAYERS, trainable: bool = True) -> Role:
        """A new role that changes nothing yet: A is random (torch's global generator), B is zero, the scale is 1.

        Raises:
            InputError: the name is taken, no layer of the network is among `layers`, or others put roles on it too.
        """
        if name in self._roles:
            raise InputError(f"there is a role {name!r} already; choose another name")
        self._refuse_others(self.network)
        if not any(key == end or key.endswith(f".{end}") for key, _ in self.network.named_modules() for end in layers):
            raise InputError(f"the network has none of the layers {', '.join(layers)}")
        # alpha = rank: a scale of 1, which readers that miss the alpha assume anyway
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(layers))
        config._register_custom_module({nn.Linear: _Linear, nn.Conv2d: _Conv2d})
        with warnings.catch_warnings():  # PEFT warns of several adapters on one network, which is what roles are
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            inject_adapter_in_model(config, self.network, name)
        parameters = {}
        for path, layer in self.network.named_modules():
            if isinstance(layer, _Layer) and name in layer.lora_A:
                layer.worn = self._worn
                for half in HALVES:
                    weight = getattr(layer, half)[name].weight
                    weight.data = weight.data.float()
                    parameters[f"{path}.{half}"] = weight
        self._roles[name] = Role(parameters)
        self._trainable[name] = trainable
        for other, role in self._roles.items():  # PEFT has just switched off all but the newest
            role.requires_grad_(self._trainable[other])
        return self._roles[name]

    def _refuse_others(self, network: nn.Module) -> None:
        """Which roles are worn is known to one object a layer: with two, one of them would switch nothing."""
        for path, layer in network.named_modules():
            if isinstance(layer, lora.LoraLayer) and getattr(layer, "worn", None) is not self._worn:
                raise InputError(
                    f"the network carries LoRA layers of somebody else, such as {path}; "
                    "add all roles through one Roles, on a network that was loaded anew"
                )

    @contextmanager
    def at(self, strength: float) -> Iterator[None]:
        """All that is worn counts so many times, for as long as this is open."""
        before, self._worn.strength = self._worn.strength, strength
        try:
            yield
        finally:
            self._worn.strength = before

    @contextmanager
    def wear(self, *names: str) -> Iterator[None]:
        """The network with these roles on, none for the bare base; the old ones are back afterwards."""
        if unknown := [name for name in names if name not in self._roles]:
            raise InputError(f"there is no role {unknown[0]!r}; the roles are {', '.join(self._roles) or 'none yet'}")
        before, self._worn.names = self._worn.names, names
        try:
            yield
        finally:
            self._worn.names = before

    def checkpointing(self) -> None:
        """Trade time for memory (arXiv:1604.06174); what is computed again is computed in the roles of then."""
        self.network.enable_gradient_checkpointing(partial(_checkpoint, self))

    def shard(self) -> None:
        """Leave each process its share of the base (FSDP, arXiv:2304.11277); a block is whole while it computes.

        For when all roles are there; they stay whole in each process, as the base is up to now. From now on a call of
        the network is one that all processes make together. The first has to be a whole one, since it finds out which
        blocks there are: an adversary's look, which ends in the middle, would miss some.
        """
        from diffusers.models.attention import BasicTransformerBlock
        from diffusers.models.resnet import ResnetBlock2D
        from torch.distributed.fsdp import fully_shard

        whole = {parameter for role in self._roles.values() for parameter in role.parameters()}
        blocks = [block for block in self.network.modules() if isinstance(block, BasicTransformerBlock | ResnetBlock2D)]
        for block in (*blocks, self.network):  # what is in no block is a group of its own, freed as theirs are
            fully_shard(block, ignored_params=whole, reshard_after_forward=True)

    @torch.no_grad()
    def copy(self, source: str, target: str) -> None:
        """Make `target` equal to `source`."""
        self[target].load_adapter(self[source].adapter())


def _checkpoint(roles: Roles, function: Any, *arguments: Any) -> Any:
    names, strength = roles._worn.names, roles._worn.strength

    def as_then(*arguments: Any) -> Any:  # entered anew by each backward; `context_fn` would do for one only
        with roles.wear(*names), roles.at(strength):
            return function(*arguments)

    return checkpoint(as_then, *arguments, use_reentrant=False)
