"""What one update of a distillation costs, found on paper: multiplications and memory, without weights or a GPU.

The network is built without memory (torch's meta device) and called once with one latent. Each linear layer,
convolution and attention is noted with the shape it meets there; what it costs is a formula of that shape. A product
of an [n, m] and an [m, k] matrix counts as 2 n m k FLOPs; norms, activations and sums as none.

A frozen layer has no gradient of its weights. Its backward pass is the gradient of its input, one more product as
large as the forward one, and not even that where nothing below it learns: in front of the first LoRA, and where the
text is read. Which layers these are is what autograd says of the noted inputs. A LoRA of rank r adds 2 r (m + k) FLOPs
a position, twice that backwards. Small networks run on W + s B A instead (roles.py): they pay for the gradient of all
of W.

How often the network is called is not written down here: the methods' own losses are run with numbers for latents and
a `Training` that counts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hypersd import adversary
from hypersd.methods import Method, Stage
from hypersd.methods.base import Places
from hypersd.records import InputError
from hypersd.roles import LAYERS, SMALL
from hypersd.schedule import Level
from hypersd.single import laid_out
from hypersd.train import Recipe, Step

_CROSS = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
CONFIGS: dict[str, dict[str, Any]] = {  # as published with the weights, where they differ from diffusers' defaults
    "sd15": {
        "sample_size": 64,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", _CROSS[0], _CROSS[0]),
        "up_block_types": (_CROSS[1], _CROSS[1], "UpBlock2D"),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
TOKENS = 77  # of CLIP's text encoders
COPIES = 5  # of what learns, all in float32: weights, gradient, AdamW's two moments, average
PERIOD = range(60)  # updates that are averaged over, a multiple of whatever few a method counts by


# --------------------------------------------------------------------------------------------------- the network


@dataclass(frozen=True)
class Layer:
    """One product of a pass, per latent: `flops` forward, with an [inputs, outputs] weight at so many `positions`.

    `reached` and `keys_reached` (of attention, else False) say whether a gradient goes on to what it was given.
    Attention has no weight: `inputs` and `outputs` are 0.
    """

    name: str
    flops: float
    reached: bool
    keys_reached: bool = False
    inputs: int = 0
    outputs: int = 0
    positions: float = 0.0

    @property
    def adapted(self) -> bool:
        """Whether it is one of those that roles put a LoRA on."""
        return any(self.name == end or self.name.endswith(f".{end}") for end in LAYERS)

    @property
    def backward(self) -> float:
        """FLOPs of the gradients of what it was given; attention has two products for its query, two for the rest."""
        return self.flops * (self.reached + self.keys_reached)


@dataclass(frozen=True)
class Pass:
    """The layers of one call, and the bytes a latent that autograd keeps for its backward pass.

    `checkpointed` are those bytes with activation checkpointing: every block's input, one block's inside.
    """

    layers: tuple[Layer, ...]
    kept: int
    checkpointed: int

    @property
    def forward(self) -> float:
        return sum(layer.flops for layer in self.layers)

    @property
    def backward(self) -> float:
        return sum(layer.backward for layer in self.layers)


class Network:
    """A UNet without weights: what its calls cost."""

    def __init__(self, config: dict[str, Any], tokens: int = TOKENS, dtype: torch.dtype = torch.float32) -> None:
        from diffusers import UNet2DConditionModel

        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(config)
            self.judge = adversary.Adversary(unet)
        self.unet: Any = nn.Module.to(unet, dtype)  # diffusers' own `to` warns of layers that it does not have
        self.unet.register_forward_pre_hook(_with_size, with_kwargs=True)
        self.tokens = tokens
        weights = {name.removesuffix(".weight"): p for name, p in self.unet.named_parameters()}
        self._adapted = [p for name, p in weights.items() if Layer(name, 0, False).adapted]

    @cached_property
    def learning(self) -> Pass:
        """A call in which all adapted layers learn."""
        x = torch.empty(1, *self.latent_shape, device="meta", dtype=self.unet.dtype)
        return _noted(
            self.unet, partial(self.unet, x, x.new_empty(1), encoder_hidden_states=self._states), self._adapted
        )

    @cached_property
    def judged(self) -> Pass:
        """The adversary's look at a latent through the bare base, with a gradient to the latent."""
        x = torch.empty(1, *self.latent_shape, device="meta", requires_grad=True)
        return _noted(self.unet, lambda: self._seen(x), [])

    @cached_property
    def heads(self) -> Pass:
        """The adversary's heads, which learn, after that look."""
        with torch.no_grad():
            features = self._seen(torch.empty(1, *self.latent_shape, device="meta"))
        return _noted(self.judge, lambda: self.judge(features), self.judge.parameters())

    def _seen(self, x: Tensor) -> list[Tensor]:
        return adversary.features(self.unet, x, x.new_empty(1), self._states)

    @property
    def _states(self) -> Tensor:
        return torch.empty(1, self.tokens, self.unet.config.cross_attention_dim, device="meta", dtype=self.unet.dtype)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.unet.parameters())

    @property
    def bytes(self) -> int:
        return self.parameters * self.unet.dtype.itemsize

    @property
    def judging(self) -> int:
        """Parameters of the adversary's heads."""
        return sum(p.numel() for p in self.judge.parameters())

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width

    def lora(self, rank: int) -> int:
        """Parameters of one role."""
        return sum(rank * (p[0].numel() + len(p)) for p in self._adapted)


def read(name_or_folder: str, dtype: torch.dtype = torch.float32) -> Network:
    """The network of a backbone of CONFIGS, the embedded one, a model's folder or file, by its configuration alone.

    Raises:
        InputError: there is no such configuration, or it is of another kind of network.
    """
    if name_or_folder in CONFIGS:
        return Network(CONFIGS[name_or_folder], TOKENS, dtype)
    embedded = Path(__file__).parent.parent / "assets/emoji-sd"
    folder = embedded if name_or_folder == "emoji" else Path(laid_out(name_or_folder))
    try:
        config, text = (
            json.loads((folder / part / "config.json").read_text(encoding="utf-8")) for part in ("unet", "text_encoder")
        )
        return Network(config, text["max_position_embeddings"], dtype)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"backbone must be one of emoji, {', '.join(CONFIGS)} or a folder with unet/config.json and "
            f"text_encoder/config.json that can be read, got {name_or_folder[:80]!r} ({type(error).__name__})"
        ) from None


def _with_size(unet: Any, arguments: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """SDXL's network is told the picture's size and the text as a whole besides."""
    if unet.config.addition_embed_type == "text_time":
        sizes = 6
        width = unet.config.projection_class_embeddings_input_dim - sizes * unet.config.addition_time_embed_dim
        x = arguments[0]
        named["added_cond_kwargs"] = {"text_embeds": x.new_empty(len(x), width), "time_ids": x.new_empty(len(x), sizes)}
    return arguments, named


def _noted(module: nn.Module, call: Callable[[], Any], learning: Iterable[nn.Parameter]) -> Pass:
    """Call, and note every product and every tensor that is kept for the backward pass."""
    learns = {id(p) for p in learning}
    for parameter in module.parameters():
        parameter.requires_grad_(id(parameter) in learns)
    names = {id(p): name.removesuffix(".weight") for name, p in module.named_parameters()}
    products, kept = _Products(names), _Kept(module)
    with products, kept.noting():
        call()
    return Pass(tuple(products.layers), *kept.bytes())


class _Products(TorchFunctionMode):
    """Notes linear layers, convolutions and attentions on their way into torch."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names
        self.layers: list[Layer] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attention(*args[:3], **(kwargs or {}))
        output = func(*args, **(kwargs or {}))
        if func in (F.linear, F.conv2d):
            x, weight = args[:2]
            outputs, inputs = len(weight), weight[0].numel()
            positions = output.numel() / outputs
            flops = 2.0 * positions * inputs * outputs
            name = self.names[id(weight)]
            self.layers.append(Layer(name, flops, x.requires_grad, False, inputs, outputs, positions))
        return output

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        flops = 2.0 * query[..., 0].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        self.layers.append(Layer("attention", flops, query.requires_grad, key.requires_grad))
        attended: Tensor = _Attention.apply(query, key, value)
        return attended


class _Attention(torch.autograd.Function):
    """The shape of attention, and what a fused kernel keeps of it: no matrix of all pairs."""

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attended = query.new_empty(*query.shape[:-1], value.shape[-1])
        logarithms = query.new_empty(query.shape[:-1], dtype=torch.float32)
        context.save_for_backward(query, key, value, attended, logarithms)
        return attended


class _Kept:
    """Notes what autograd keeps, each memory once, parameters not; and in which block, as checkpointing cuts them."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.own = {p.untyped_storage()._cdata for p in module.parameters()}
        self.storages: dict[int, tuple[Any, int]] = {}  # held, so that no other gets the same number
        self.inputs: dict[int, Any] = {}
        self.block = self.blocks = 0

    @contextmanager
    def noting(self) -> Iterator[None]:
        network: Any = self.module
        cut = hasattr(network, "enable_gradient_checkpointing")
        if cut:
            network.enable_gradient_checkpointing(self._in_block)
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
                yield
        finally:
            if cut:
                network.disable_gradient_checkpointing()

    def _in_block(self, function: Any, *arguments: Any) -> Any:
        for tensor in arguments:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.inputs[storage._cdata] = storage
        self.blocks += 1
        self.block = self.blocks
        try:
            return function(*arguments)
        finally:
            self.block = 0

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.own:
            self.storages.setdefault(storage._cdata, (storage, self.block))
        return tensor

    def bytes(self) -> tuple[int, int]:
        """(all, with checkpointing)"""
        inside: Counter[int] = Counter()
        for storage, block in self.storages.values():
            inside[block] += storage.nbytes()
        outside = inside.pop(0, 0)
        counted = {number for number, (_, block) in self.storages.items() if not block}
        entering = sum(storage.nbytes() for number, storage in self.inputs.items() if number not in counted)
        return outside + inside.total(), outside + entering + max(inside.values(), default=0)


# ---------------------------------------------------------------------------------------------- calls of an update


@dataclass
class Counting:
    """The `methods.base.Training` that counts. Latents are one number each.

    `calls` are network calls by kind; `alive` are those that a loss keeps a graph of, loss by loss.
    """

    stage: Stage
    guided_twice: bool
    calls: Counter[str] = field(default_factory=Counter)
    alive: list[Counter[str]] = field(default_factory=lambda: [Counter()])

    def _at(self) -> Places:
        number = torch.ones(1, 1, 1, 1)
        t = torch.ones(1, dtype=torch.long)
        return Places(number, t, t, t, t, number)

    def places(self, step: Step) -> Places:
        return self._at()

    beginnings = visits = places

    def teacher_step(self, at: Places) -> Tensor:
        return self.guided(at.x_t, at.t, at.states)[0]

    def guided(self, x_t: Tensor, t: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        self.calls["teacher, guided" if self.guided_twice else "teacher"] += 1
        return x_t, x_t

    def teacher_sample(self, at: Places, steps: int) -> Tensor:
        for _ in range(steps):
            self.guided(at.x_t, at.t, at.states)
        return at.x_t

    def estimate(
        self, role: str, x_t: Tensor, t: Tensor, states: Tensor, *, learn: bool | None = None
    ) -> tuple[Tensor, Tensor]:
        learns = role == "student" if learn is None else learn
        self.calls[f"{role}, learning" if learns else role] += 1
        if learns:
            self.alive[-1]["learning"] += 1
        return x_t, x_t

    def anywhere(self, x0: Tensor, step: Step, stream: str) -> tuple[Tensor, Tensor, Tensor]:
        return x0, torch.ones(1, dtype=torch.long), x0

    def level(self, t: Tensor) -> Level:
        return Level(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1))

    def fool(self, fake: Tensor, at: Places, step: Step) -> Tensor:
        self.calls["adversary, fooled"] += 1
        self.alive[-1]["judged"] += 1
        return fake.mean()

    def tell(self, real: Tensor, at: Places, step: Step) -> Tensor:
        self.calls["adversary, telling"] += 1
        return real.mean()


@dataclass(frozen=True)
class Work:
    """One kind of network call in an update: launches a micro-batch, latents for each of the batch.

    `forward` and `backward` are FLOPs of a launch for each latent of the batch; `once` what a launch costs however many
    there are: the making of W + s B A, and its gradient.
    """

    label: str
    launches: float
    latents: float
    forward: float
    backward: float
    once: float

    def flops(self, batch: int, accumulate: int = 1) -> float:
        """Of an update."""
        return self.launches * (batch * (self.forward + self.backward) + accumulate * self.once)


@dataclass(frozen=True)
class Update:
    """An average update of one stage: its calls, and what they keep for the backward pass.

    `kept` are bytes a latent, without activation checkpointing and with it, which costs `again` FLOPs a latent. `fixed`
    are bytes in any case.
    """

    work: tuple[Work, ...]
    kept: tuple[int, int]
    fixed: int
    again: float

    def flops(self, batch: int, accumulate: int = 1, *, checkpointing: bool = False) -> float:
        """Of the whole batch, in so many micro-batches."""
        return sum(work.flops(batch, accumulate) for work in self.work) + batch * self.again * checkpointing


def update(
    network: Network,
    method: Method,
    stage: Stage,
    rank: int,
    *,
    guided: bool = True,
    merged: bool | None = None,
    indices: range = PERIOD,
) -> Update:
    """What an update of a method's stage costs on a network, on average over those of the `indices`.

    `guided`: the teacher is called twice a latent. `merged` as in `roles.Roles`.
    """
    assert method.losses is not None, "find() gives methods that are trained"
    counts = Counting(stage, guided and not method.keeps_guidance)
    for index in indices:
        step = Step(index, Recipe(updates=1, batch=1, lr=1.0))
        for _ in method.losses(counts, step):
            counts.alive.append(Counter())
    merged = network.parameters < SMALL if merged is None else merged
    prices = _prices(network, rank, merged)
    work = []
    for label, calls in counts.calls.items():
        kind = label.split(", ")[-1]
        price = prices[kind] if kind in prices else prices["role"]
        launches = calls / len(indices)
        work.append(Work(label, launches, launches * (2 if kind == "guided" else 1), *price))
    learning = sum(w.launches for w in work if w.label.endswith("learning"))
    low_rank, weights = _lora_bytes(network, rank)
    most = [max(c[kind] for c in counts.alive) for kind in ("learning", "judged")]
    kept = tuple(
        most[0] * (getattr(network.learning, how) + (0 if merged else low_rank))
        + most[1] * (getattr(network.judged, how) + getattr(network.heads, how))
        for how in ("kept", "checkpointed")
    )
    return Update(tuple(work), (kept[0], kept[1]), most[0] * weights * merged, learning * network.learning.forward)


def _prices(network: Network, rank: int, merged: bool) -> dict[str, tuple[float, float, float]]:
    """FLOPs by kind of call: (forward a latent, backward a latent, a launch)."""
    bare, judged, heads = network.learning.forward, network.judged, network.heads.forward
    adapted = [layer for layer in network.learning.layers if layer.adapted]
    made = sum(2.0 * rank * layer.inputs * layer.outputs for layer in adapted)  # s B A
    down, up = (sum(2.0 * rank * p.positions * n for p, n in zip(adapted, sizes, strict=True))
                for sizes in ([p.inputs for p in adapted], [p.outputs for p in adapted]))  # fmt: skip
    reached = sum(2.0 * rank * p.positions * p.inputs for p in adapted if p.reached)
    through = network.learning.backward
    whole = (bare, through + 2 * down + 3 * up, made)  # the low-rank path again, and backward through it
    low_rank = (bare + down + up, through + down + reached + 2 * up, 0.0)
    return {
        "teacher": (bare, 0.0, 0.0),
        "guided": (2 * bare, 0.0, 0.0),
        "role": (bare, 0.0, made),
        "learning": whole if merged else low_rank,
        "fooled": (judged.forward + heads, judged.backward + heads, 0.0),
        "telling": (judged.forward + 2 * heads, 2 * (heads + network.heads.backward), 0.0),
    }


def _lora_bytes(network: Network, rank: int) -> tuple[int, int]:
    """What LoRAs add to what is kept: (a latent, A x of every layer; in any case, W + s B A where x has a gradient)."""
    adapted = [layer for layer in network.learning.layers if layer.adapted]
    width = network.unet.dtype.itemsize
    low_rank = sum(rank * layer.positions * width for layer in adapted)
    return int(low_rank), sum(layer.inputs * layer.outputs * width for layer in adapted if layer.reached)
