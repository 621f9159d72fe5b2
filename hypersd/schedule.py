"""The noise schedule: how much signal and noise a latent holds at each timestep, and which timesteps a drawing visits.

Glossary, the same symbols in the whole package:

    T                number of timesteps, 1000; t runs from T - 1 (all but noise) to 0 (all but clean)
    beta_t           share of variance replaced by noise between t - 1 and t
    alphas_cumprod   abar_t = prod_{i <= t} (1 - beta_i), named as in diffusers
    alpha, sigma     sqrt(abar_t) and sqrt(1 - abar_t): x_t = alpha x_0 + sigma eps (DDPM, arXiv:2006.11239, eq. 4)
    x_t              a noisy latent at t; x_s the same picture at the less noisy s < t
    x0, eps          the estimates of the clean latent and of the noise that the network's output stands for
    v                alpha eps - sigma x0, the velocity (arXiv:2202.00512, appendix D)
    s                where a step lands: the next timestep of the grid, after the last one FINAL
    n                network steps of a drawing
    N                solver points of a distillation: the timesteps between which the teacher's ODE is followed
    k                segments that the solver points are divided into (Hyper-SD, arXiv:2404.13686, section 3.1)
    g                guidance scale: eps_unc + g (eps_cond - eps_unc) (arXiv:2207.12598, eq. 6 with w = g - 1)
    eta              share of fresh noise in a step: 0 none, 1 all the sampler knows (gamma in TCD)

Networks answer with eps, v or x0; `Schedule.split` turns each into (x0, eps) in float32, here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hypersd.records import CLEAN, FINAL, InputError, whole_number

PREDICTIONS = ("epsilon", "v_prediction", "sample")
WINDOWED = ("ddim_eps", "diff_eps")  # of WindowSchedule
SPACINGS = ("trailing", "leading", "linspace", "original")
ORIGINAL = 50  # points of LCM's own grid


class Level(NamedTuple):
    """Signal and noise of x_t = alpha x_0 + sigma eps, float32, shaped [] or [batch, 1, 1, 1]."""

    alpha: Tensor
    sigma: Tensor


@dataclass(frozen=True, eq=False)
class Schedule:
    """The variance-preserving schedule of one base model.

    `alphas_cumprod` is [T], float32. `final_alpha_cumprod` is abar at FINAL: 1 when the scheduler's set_alpha_to_one
    is true, else alphas_cumprod[0], so that the last step stops where training's least noisy picture was.
    """

    predictions: ClassVar[tuple[str, ...]] = PREDICTIONS
    alphas_cumprod: Tensor
    final_alpha_cumprod: float
    prediction: str = "epsilon"
    spacing: str = "leading"
    steps_offset: int = 0
    _abar: Tensor = field(init=False, repr=False)  # [T + 1]: alphas_cumprod, then the value at FINAL

    def __post_init__(self) -> None:
        if self.prediction not in self.predictions:
            raise InputError(f"prediction_type must be one of {', '.join(self.predictions)}, got {self.prediction!r}")
        _check_spacing(self.spacing)
        # FINAL is -1, so the table's last entry is where an index of FINAL looks, in a batch of timesteps too.
        final = torch.tensor([self.final_alpha_cumprod])
        object.__setattr__(self, "_abar", torch.cat([self.alphas_cumprod.float(), final]))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Schedule:
        """Read a diffusers `scheduler_config.json` (DDIM, PNDM, Euler, ... of the Stable Diffusion family).

        Raises:
            InputError: the config asks for something that would change pictures and is not supported here.
        """
        ddim = config.get("_class_name") == "DDIMScheduler"
        for option, default in (("clip_sample", ddim), ("thresholding", False), ("rescale_betas_zero_snr", False)):
            if config.get(option, default):
                raise InputError(f"scheduler option {option} is not supported for latents; set it to false")
        alphas_cumprod = torch.cumprod(1.0 - _betas(config), dim=0)
        to_one = config.get("set_alpha_to_one", ddim)
        return cls(
            alphas_cumprod=alphas_cumprod,
            final_alpha_cumprod=1.0 if to_one else float(alphas_cumprod[0]),
            prediction=config.get("prediction_type", "epsilon"),
            spacing=config.get("timestep_spacing", "leading"),
            steps_offset=config.get("steps_offset", 0),
        )

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def timesteps(self, steps: int, spacing: str | None = None) -> list[int]:
        """The n timesteps a drawing visits, noisiest first (arXiv:2305.08891, table 2), equal to DDIMScheduler's.

        "trailing" starts at T - 1, where a latent really is noise; "leading" stops `steps_offset` short of 0 and
        starts too low; "linspace" holds both ends; "original" takes n of the 50 that LCM and TCD were trained on, as
        their schedulers in diffusers do. For some n (61, 103, 121, ...) a rounding error makes diffusers
        add a timestep of -1 to its trailing grid; here n stays n.
        """
        total = len(self)
        steps = whole_number(steps, "steps", 1, total)
        spacing = self.spacing if spacing is None else spacing
        _check_spacing(spacing)
        grid: np.ndarray
        if spacing == "linspace":
            grid = np.linspace(0, total - 1, steps).round()[::-1]
        elif spacing == "leading":
            grid = np.arange(steps)[::-1] * (total // steps) + self.steps_offset
            if grid[0] >= total:
                raise InputError(f"leading spacing holds no {steps} steps; choose fewer or trailing spacing")
        elif spacing == "original":
            points = np.arange(1, ORIGINAL + 1) * (total // ORIGINAL) - 1
            if steps > ORIGINAL:
                raise InputError(f"original spacing has {ORIGINAL} timesteps, got {steps}; choose fewer or trailing")
            grid = points[::-1][np.floor(np.linspace(0, ORIGINAL, steps, endpoint=False)).astype(int)]
        else:
            # numpy's floats and not exact fractions: halves must round as they do in diffusers
            grid = np.round(np.arange(total, 0, -total / steps))[:steps] - 1
        return [int(t) for t in grid]

    def jumps(self, steps: int, spacing: str | None = None) -> list[tuple[int, int]]:
        """(t, s) of every step: each lands where the next one starts, the last at FINAL.

        diffusers' DDIMScheduler lands at t - T // n instead. That is the same place when n divides T; otherwise it
        is up to one timestep off its own grid at each step, and the network is told a wrong noise level.
        """
        grid = self.timesteps(steps, spacing)
        return list(zip(grid, [*grid[1:], FINAL], strict=True))

    def level(self, t: int | Tensor) -> Level:
        """Signal and noise at `t`, an int (0-d result) or an integer tensor [batch] (result [batch, 1, 1, 1])."""
        if isinstance(t, Tensor):
            abar = self._abar.to(t.device)[t]
            abar = abar.reshape(-1, 1, 1, 1) if t.ndim else abar
        elif FINAL <= t < len(self):
            abar = self._abar[t]
        else:
            raise IndexError(f"timestep must be from {FINAL} to {len(self) - 1}, got {t}")
        return Level(abar**0.5, (1 - abar) ** 0.5)

    def diffuse(self, x0: Tensor, eps: Tensor, t: int | Tensor) -> Tensor:
        """x_t from a clean latent and noise, both [batch, c, h, w] (DDPM, eq. 4)."""
        alpha, sigma = self.level(t)
        return alpha * x0 + sigma * eps

    def target(self, x0: Tensor, eps: Tensor, t: int | Tensor) -> Tensor:
        """What a perfect network would answer for x_t = diffuse(x0, eps, t), in this schedule's prediction type."""
        if self.prediction == "epsilon":
            return eps
        if self.prediction == "sample":
            return x0
        alpha, sigma = self.level(t)
        return alpha * eps - sigma * x0

    def split(self, output: Tensor, x_t: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        """(x0, eps) in float32 from a network's output at x_t, all [batch, c, h, w].

        float32 because at t = T - 1 x0 is eps divided by alpha = 0.07: half precision loses its digits there.
        """
        alpha, sigma = self.level(t)
        output, x_t = output.float(), x_t.float()
        if self.prediction == "epsilon":
            return (x_t - sigma * output) / alpha, output
        if self.prediction == "sample":
            return output, (x_t - alpha * output) / sigma
        return alpha * x_t - sigma * output, alpha * output + sigma * x_t

    def clean(self, x0: Tensor, eps: Tensor, t: int) -> Tensor:
        """The clean latent that a network had in mind at t, from what `split` gave: what is shown while it draws."""
        return x0


@dataclass(frozen=True, eq=False)
class FlowSchedule(Schedule):
    """Rectified flow (arXiv:2209.03003, arXiv:2403.03206): x_t = (1 - sigma) x_0 + sigma eps, answered with eps - x_0.

    Timesteps are whole numbers here as everywhere: millionths of sigma. Their grid is that of diffusers' own scheduler
    for this `config`; where it is shifted by the size of the picture, `tokens` is that size, in patches. With `even`
    the unshifted grid ends at sigma = 1 / n, as FLUX's, else at the config's smallest sigma, as Stable Diffusion 3's.
    The step that follows the flow is `ddim_step` there too: both are lines between estimates of x_0 and eps.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    tokens: int = 0
    even: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any], tokens: int, even: bool) -> FlowSchedule:
        return cls(torch.empty(0), 1.0, "flow", "flow", config=config, tokens=tokens, even=even)

    def __post_init__(self) -> None:  # there is no table
        pass

    def __len__(self) -> int:
        return 1_000_000

    def timesteps(self, steps: int, spacing: str | None = None) -> list[int]:
        """The n timesteps a drawing visits, noisiest first; `spacing` is the model's own, whatever is asked for."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        steps = whole_number(steps, "steps", 1, 1000)
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(self.config))
        shifted = {"mu": self._shift()} if self.config.get("use_dynamic_shifting") else {}
        if self.even:
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), **shifted)
        else:
            scheduler.set_timesteps(steps, **shifted)
        return [round(sigma * len(self)) for sigma in scheduler.sigmas[:-1].tolist()]

    def _shift(self) -> float:
        """mu of arXiv:2403.03206, section 5.3.2, drawn as a line through two sizes of pictures."""
        small, large = self.config.get("base_image_seq_len", 256), self.config.get("max_image_seq_len", 4096)
        low = self.config.get("base_shift", 0.5)
        high = self.config.get("max_shift", 1.15 if self.even else 1.16)
        return float(low + (high - low) * (self.tokens - small) / (large - small))

    def level(self, t: int | Tensor) -> Level:
        if isinstance(t, Tensor):
            sigma = t.clamp_min(0).float() / len(self)
            sigma = sigma.reshape(-1, 1, 1, 1) if t.ndim else sigma
        else:
            sigma = torch.tensor(max(t, 0) / len(self))
        return Level(1 - sigma, sigma)

    def target(self, x0: Tensor, eps: Tensor, t: int | Tensor) -> Tensor:
        return eps - x0

    def split(self, output: Tensor, x_t: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.level(t)
        output, x_t = output.float(), x_t.float()
        return x_t - sigma * output, x_t + alpha * output


@dataclass(frozen=True, eq=False)
class WindowSchedule(Schedule):
    """PeRFlow, arXiv:2405.07510, section 3: the trajectory in equal windows, in each of which it is a straight line.

    Timesteps count from T down to 0 here, as the network was trained, so that a window's edge t has the level of the
    schedule's timestep t - 1. In a window from t_s down to t_e, with u = (t_s - t) / (t_s - t_e),

        x_t = (1 - u) x_{t_s} + u x_{t_e},

    and both edges hold the noise that the network answers with: in x_{t_s} and x_{t_e} alike for "ddim_eps", as DDIM
    says; for "diff_eps" it is only what the diffusion from t_e to t_s adds. Either gives the window's end from any x_t.
    """

    predictions: ClassVar[tuple[str, ...]] = WINDOWED
    windows: int = 4

    @classmethod
    def of(cls, schedule: Schedule, windows: int, prediction: str = "") -> WindowSchedule:
        """The same noise in `windows` windows. Raises InputError where the timesteps are not divided evenly."""
        total = len(schedule.alphas_cumprod)
        if not total or total % windows:
            raise InputError(f"{windows} windows need a noise schedule of timesteps that they divide, got {total}")
        return cls(schedule.alphas_cumprod, 1.0, prediction or WINDOWED[0], windows=windows)

    def timesteps(self, steps: int, spacing: str | None = None) -> list[int]:
        """The n timesteps a drawing visits: as many in each window, or one more in the first ones.

        Raises:
            InputError: there are fewer steps than windows.
        """
        steps = whole_number(steps, "steps", self.windows, len(self))
        size, grid = len(self) // self.windows, []
        for window in range(self.windows):
            inside = steps // self.windows + (window < steps % self.windows)
            top = len(self) - window * size
            grid += [(top * inside - place * size) // inside for place in range(inside)]
        return grid

    def window(self, t: int) -> tuple[int, int]:
        """(t_s, t_e) of the window that t lies in; an edge belongs to the window below it."""
        size = len(self) // self.windows
        start = -(-t // size) * size
        return start, start - size

    def level(self, t: int | Tensor) -> Level:
        """Of a window's edge."""
        return super().level(max(int(t) - 1, 0))

    def split(self, output: Tensor, x_t: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        """(x_{t_e}, eps) in float32: the end of the window takes the place of x0."""
        start, end = self.window(int(t))
        u, head, foot = (start - int(t)) / (start - end), self.level(start), self.level(end)
        if self.prediction == "diff_eps":
            kept = head.alpha / foot.alpha
            head, foot = Level(kept, (1 - kept**2) ** 0.5), Level(torch.tensor(1.0), torch.tensor(0.0))
        alpha, sigma = ((1 - u) * h + u * f for h, f in zip(head, foot, strict=True))
        output, x_t = output.float(), x_t.float()
        return foot.alpha * (x_t - sigma * output) / alpha + foot.sigma * output, output

    def clean(self, x0: Tensor, eps: Tensor, t: int) -> Tensor:
        """Without the noise that the window's end still holds; that of "diff_eps" is another, so this is near it."""
        foot = self.level(self.window(t)[1])
        return (x0 - foot.sigma * eps) / foot.alpha


@dataclass(frozen=True, eq=False)
class Segments:
    """Solver points and segment edges of trajectory segmented consistency distillation as one integer table.

    `timesteps` holds CLEAN, then the N solver points in rising order; a place in it is called an index here, so that
    index 0 is the clean end and indices 1..N are where a training latent may be. `lower[i]` is the index of the lower
    edge of the segment of i: the point at an edge belongs to the segment below it. With N a multiple of k the edges
    are the timesteps that a drawing in k trailing steps visits, so training and inference meet at the same points.
    (Hyper-SD, eq. 11, computed in timesteps, has targets above their start at each edge that T / k does not hit.)
    """

    timesteps: Tensor  # int64 [N + 1]
    lower: Tensor  # int64 [N + 1]; lower[0] is 0
    size: int  # points in a segment, N / k

    @classmethod
    def of(cls, k: int, n: int = 40, total: int = 1000) -> Segments:
        """k segments of n solver points over `total` timesteps: 24, 49, .. 999 for n = 40.

        Raises:
            InputError: n is no multiple of k, or does not divide `total`.
        """
        if n < 1 or total % n:
            most = max(d for d in _divisors(total) if d <= 40)
            raise InputError(f"solver points must divide the {total} timesteps, got {n}; type {most}")
        if k < 1 or n % k:
            known = ", ".join(map(str, _divisors(n)))
            raise InputError(f"{n} solver points make no {k} equal segments; choose k from {known}")
        index, size = torch.arange(n + 1), n // k
        timesteps = torch.cat([torch.tensor([CLEAN]), index[1:] * (total // n) - 1])
        return cls(timesteps, (index - 1).clamp_min(0) // size * size, size)

    def top(self, index: Tensor) -> Tensor:
        """The index of the upper edge of the segment of `index`, int64 [batch]."""
        return self.lower[index] + self.size

    def draw(self, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(start, previous, end) indices from two uniform variables in [0, 1), float64 [batch].

        The start is uniform over 1..N, the solver's previous point is one below it, and the end of the jump is
        uniform from the segment's lower edge up to that previous point, both included (Algorithm 1).
        """
        first = 1 + (start * (len(self.timesteps) - 1)).long()
        low, previous = self.lower[first], first - 1
        return first, previous, low + (end * (previous - low + 1)).long()


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _betas(config: Mapping[str, Any]) -> Tensor:
    """[T] float32, computed as diffusers computes them, so that no bit differs."""
    total = config.get("num_train_timesteps", 1000)
    start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    kind = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float32)
    if kind == "linear":
        return torch.linspace(start, end, total, dtype=torch.float32)
    if kind == "scaled_linear":  # latent diffusion: linear in sqrt(beta)
        return torch.linspace(start**0.5, end**0.5, total, dtype=torch.float32) ** 2
    if kind == "squaredcos_cap_v2":  # improved DDPM, arXiv:2102.09672, eq. 17, beta capped at 0.999
        ratios = [_squared_cosine((i + 1) / total) / _squared_cosine(i / total) for i in range(total)]
        return torch.tensor([min(1 - ratio, 0.999) for ratio in ratios], dtype=torch.float32)
    raise InputError(f"beta_schedule must be linear, scaled_linear or squaredcos_cap_v2, got {kind!r}")


def _squared_cosine(u: float) -> float:
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def _check_spacing(spacing: str) -> None:
    if spacing not in SPACINGS:
        raise InputError(f"timestep_spacing must be one of {', '.join(SPACINGS)}, got {spacing!r}")
