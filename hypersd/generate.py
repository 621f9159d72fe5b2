"""Request -> Panel, by the only sampling loop, `trajectory`: trainers follow the same one on their own batches."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from hypersd import __version__
from hypersd.backbone import Backbone, no_room
from hypersd.folders import ModelError
from hypersd.methods import Method
from hypersd.records import FINAL, Panel, Request
from hypersd.schedule import Schedule, WindowSchedule

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class StepInfo:
    """A step that has just been taken: `index` of `total` counted from 0, and the clean latent it estimated.

    `x0` is [1, c, h, w] float32; `pixels()` decodes it, uint8 [1, height, width, 3], only if called.
    """

    index: int
    total: int
    timestep: int
    x0: Tensor = field(repr=False)
    decode: Callable[[Tensor], Tensor] = field(repr=False)

    def pixels(self) -> Tensor:
        return self.decode(self.x0)


OnStep = Callable[[StepInfo], None] | None


class Latents(NamedTuple):
    """Where a drawing ended: clean latents [1, c, h, w], hash of the noise it began with, network passes it took."""

    x: Tensor
    noise_sha256: str
    nfe: int


class Taken(NamedTuple):
    """A step of a trajectory that was taken from timestep t: what the network saw there, and the latent it led to."""

    t: int
    x0: Tensor
    eps: Tensor
    x: Tensor


def _none() -> Tensor:
    raise AssertionError("a method with eta 0 takes no fresh noise")


def grid(schedule: Schedule, method: Method, steps: int, start: int | None = None) -> list[tuple[int, int]]:
    """(t, s) of every step that a drawing by the method takes; one alone begins at `start`, if given."""
    jumps = schedule.jumps(steps, method.spacing)
    if start is not None and len(jumps) == 1:  # Hyper-SD, section 3.3: less noise is trusted more (t = 800)
        return [(min(start, len(schedule) - 1), FINAL)]
    return jumps


def trajectory(
    schedule: Schedule,
    method: Method,
    jumps: Sequence[tuple[int, int]],
    x_t: Tensor,
    estimate: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    noise: Callable[[], Tensor] = _none,
) -> Iterator[Taken]:
    """From x_t [batch, c, h, w] along the jumps, step by step; `estimate` finds (x0, eps) in a latent at a timestep."""
    for t, s in jumps:
        x0, eps = estimate(x_t, t)
        x_t = method.step(schedule, x_t, x0, eps, t, s, method.eta, noise)
        yield Taken(t, x0, eps, x_t)


def draw(backbone: Backbone, request: Request, method: Method, *, on_step: OnStep = None) -> Panel:
    """One picture. The same request gives the same pixels every time on the same machine.

    `on_step` is called after every step; whatever it raises ends the drawing and reaches the caller. Where the GPU's
    memory does not suffice, the drawing is begun again with less of it, and stays so for the next ones.

    Raises:
        InputError: the method was not made for so many steps, or the GPU has too little memory even so.
        ModelError: the weights are damaged.
    """
    method.check(request)
    adapter = method.adapter(request.steps)
    base_sha256 = backbone.sha256  # hashed once per model, outside the time that is reported
    started = time.perf_counter()
    latents, pixels = _within_memory(backbone, partial(_painted, backbone, request, method, _told_once(on_step)))
    seconds = time.perf_counter() - started
    return Panel(
        pixels=pixels.numpy().tobytes(),
        width=pixels.shape[1],
        height=pixels.shape[0],
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        seed=request.seed,
        noise_sha256=latents.noise_sha256,
        backbone=backbone.name,
        base_sha256=base_sha256,
        method=method.name,
        adapter_sha256=adapter.sha256 if adapter else None,
        sampler=method.sampler,
        steps=request.steps,
        nfe=latents.nfe,
        guidance=_guidance(request, method),
        eta=_eta(request, method),
        dtype=_arithmetic(backbone, method, _nag(request, method)),
        seconds=seconds,
        version=__version__,
        nag=_nag(request, method),
    )


def _painted(backbone: Backbone, request: Request, method: Method, on_step: OnStep) -> tuple[Latents, Tensor]:
    """Latents, and pixels [height, width, 3]."""
    with torch.inference_mode():
        latents = denoise(backbone, request, method, on_step=on_step)
        if not latents.x.isfinite().all():
            raise ModelError(
                f"{backbone.name}: the network answered with numbers that are not finite; "
                "its weights are damaged, copy the model's folder again from where it came"
            )
        return latents, backbone.decode(latents.x)[0]


def _within_memory(backbone: Backbone, work: Callable[[], T]) -> T:
    """What `work` returns, at the second try if the first found too little memory on the GPU."""
    with suppress(torch.cuda.OutOfMemoryError):  # outside of which nothing holds the first try's tensors any more
        return work()
    log.warning("%s: the GPU's memory is full; going on with less of it", backbone.name)
    backbone.spare_memory()
    try:
        return work()
    except torch.cuda.OutOfMemoryError as problem:
        raise no_room(backbone.name) from problem


def _decoded(backbone: Backbone, latents: Tensor) -> Tensor:
    return _within_memory(backbone, partial(backbone.decode, latents))


def _told_once(on_step: OnStep) -> OnStep:
    """A step is told once, even if the drawing is begun again."""
    told = 0

    def tell(step: StepInfo) -> None:
        nonlocal told
        if step.index >= told:
            told += 1
            if on_step is not None:
                on_step(step)

    return tell


def denoise(
    backbone: Backbone,
    request: Request,
    method: Method,
    *,
    start: int | None = None,
    on_step: OnStep = None,
) -> Latents:
    """From the request's noise to clean latents. Differentiable; `draw` wraps it in inference mode.

    Guidance above 1 evaluates [unconditional, conditional] as one batch of two, which counts as two passes; a network
    that is told the scale, as FLUX's, is called once. One step begins at the timestep `start`, where it is not given at
    the one that the adapter was trained for. Under `nag` the network is asked once a step.
    """
    schedule, g = _schedule(backbone, request, method), _guidance(request, method)
    method = replace(method, eta=_eta(request, method))
    adapter = method.adapter(request.steps)
    guided = g > 1 and not backbone.tells_guidance
    states = backbone.guided(
        backbone.embed([request.negative_prompt, request.prompt] if guided else [request.prompt]), g
    )
    states = backbone.sized(states, method.smaller)
    x_t, noise_sha256 = backbone.noise(request.seed, method.smaller)
    fresh_noise = _noise_after(x_t, request.seed)
    jumps = grid(schedule, method, request.steps, adapter.card.start if start is None and adapter else start)
    if method.sigma_start:
        x_t = x_t * schedule.level(jumps[0][0]).sigma.to(x_t)

    def estimate(x_t: Tensor, t: int) -> tuple[Tensor, Tensor]:
        network_input = torch.cat([x_t, x_t]) if guided else x_t
        with _away(backbone, request, method):
            output = backbone.predict(network_input, t, states, adapter)
        if guided:  # arXiv:2207.12598, eq. 6
            unconditional, conditional = output.chunk(2)
            output = unconditional + g * (conditional - unconditional)
        return schedule.split(output, x_t, t)

    for index, taken in enumerate(trajectory(schedule, method, jumps, x_t, estimate, fresh_noise)):
        x_t = taken.x
        if on_step is not None:
            clean = schedule.clean(taken.x0, taken.eps, taken.t)
            on_step(StepInfo(index, len(jumps), taken.t, clean, partial(_decoded, backbone)))
    return Latents(x_t, noise_sha256, len(jumps) * (2 if guided else 1))


def _noise_after(x_t: Tensor, seed: int) -> Callable[[], Tensor]:
    """Further noise from the seed's own stream, after the initial latent, as a diffusers pipeline draws it."""
    generator = torch.Generator().manual_seed(seed)
    torch.randn(x_t.shape, generator=generator)
    return lambda: torch.randn(x_t.shape, generator=generator).to(x_t.device)


def _arithmetic(backbone: Backbone, method: Method, nag: float | None) -> str:
    """Such as "float32"; what else changes the pixels is behind it: an engine's name, a small decoder, tiles."""
    dtype = str(backbone.dtype).removeprefix("torch.")
    compiled = backbone.engine != "torch" and method.smaller == 1  # engines draw one size
    engine = f", {backbone.engine}{' decoder' if nag else ''}" if compiled else ""
    return dtype + engine + ", quick decoder" * bool(backbone.quick) + ", tiles" * backbone.spares_memory


def _schedule(backbone: Backbone, request: Request, method: Method) -> Schedule:
    """The base's, or what its network is once it wears an adapter that answers with something else."""
    adapter = method.adapter(request.steps)
    prediction = adapter.card.prediction if adapter else ""
    if method.windows:
        return WindowSchedule.of(backbone.schedule, method.windows, prediction)
    return replace(backbone.schedule, prediction=prediction) if prediction else backbone.schedule


def _guidance(request: Request, method: Method) -> float:
    return method.guidance if request.guidance is None else request.guidance


def _away(backbone: Backbone, request: Request, method: Method) -> AbstractContextManager[None]:
    """In which the network keeps away from the negative prompt, where `_nag` says so."""
    scale = _nag(request, method)
    if scale is None:
        return nullcontext()
    return backbone.away_from(backbone.embed([request.negative_prompt]), scale, method.adapter(request.steps))


def _nag(request: Request, method: Method) -> float | None:
    """The scale that leads away from the negative prompt; None where guidance does that, or nothing."""
    return None if request.nag in (None, 1.0) or _guidance(request, method) > 1 else request.nag


def _eta(request: Request, method: Method) -> float:
    return method.eta if request.eta is None else request.eta
