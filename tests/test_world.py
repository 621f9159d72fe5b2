"""Distillation in a world whose answers are known: data that are Gaussian, so that denoiser and flow have a formula.

For x_0 ~ N(m, d^2) the best denoiser is E[x_0 | x_t] = m + alpha d^2 / spread_t^2 (x_t - alpha m), where spread_t is
the deviation of x_t, and along the probability flow (x_t - alpha m) / spread_t stays what it is. The losses are the
real ones; only the network and the teacher's solver are replaced.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hypersd.methods import METHODS, Stage
from hypersd.methods.base import Places
from hypersd.records import CLEAN, FINAL
from hypersd.schedule import Level, Schedule, Segments
from hypersd.solvers import ddim_step, euler_step
from hypersd.train import Recipe, Run, Step

M, D = 0.7, 0.4
LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULE = Schedule.from_config({**LATENT, "set_alpha_to_one": False})
EACH_K = pytest.mark.parametrize("k", [8, 4, 2, 1])


def spread(level: Level) -> Tensor:
    return (level.alpha**2 * D**2 + level.sigma**2) ** 0.5


def denoised(x_t: Tensor, t: Level) -> tuple[Tensor, Tensor]:
    """(x0, eps) of the perfect network."""
    x0 = M + t.alpha * D**2 / spread(t) ** 2 * (x_t - t.alpha * M)
    return x0, (x_t - t.alpha * x0) / t.sigma


def flow(x_t: Tensor, t: Level, s: Level) -> Tensor:
    """Where the probability flow through x_t arrives."""
    return s.alpha * M + spread(s) / spread(t) * (x_t - t.alpha * M)


class World:
    """A `methods.base.Training`, and the objective of one method on it.

    `student` is a function (x_t, t, s) -> x0, s where the jump shall end: with it a consistent student exists, since
    a straight jump has to know how far the curved flow goes. With `told` False s is always 0, as for the real network,
    which sees x_t and t only.
    """

    def __init__(self, method: str, k: int, student: nn.Module, *, points: int = 40, solver: str = "exact") -> None:
        self.method, self.stage, self.solver = METHODS[method], Stage(segments=k), solver
        self.segments = Segments.of(k, points)
        self.student = student

    def places(self, step: Step) -> Places:
        start, previous, end = self.segments.draw(step.uniform("start"), step.uniform("end"))
        t, t_prev, t_end, t_top = (self.segments.timesteps[i] for i in (start, previous, end, self.segments.top(start)))
        if self.method.name == "lcm":
            t_end = torch.zeros_like(t)
        x_t = self.level(t).alpha * M + spread(self.level(t)) * step.randn("x", (1, 1, 1))
        self.at = Places(x_t, t, t_prev, t_end, t_top, torch.zeros(len(t), 1, 1))
        return self.at

    def teacher_step(self, at: Places) -> Tensor:
        t, s = self.level(at.t), self.level(at.t_prev)
        return flow(at.x_t, t, s) if self.solver == "exact" else ddim_step(*denoised(at.x_t, t), t, s)

    def estimate(self, role: str, x_t: Tensor, t: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(role == "student"):
            x0 = self.modules_of(role)(x_t, self.level(t), self.level(self.at.t_end))
        return x0, (x_t - self.level(t).alpha * x0) / self.level(t).sigma

    def modules_of(self, role: str) -> nn.Module:
        return self.student if role == "student" else self.ema

    def level(self, t: Tensor) -> Level:
        return Level(*(part.double() for part in SCHEDULE.level(t)))

    def losses(self, step: Step) -> Iterator[tuple[str, Tensor]]:
        assert self.method.losses is not None
        return self.method.losses(self, step)  # type: ignore[arg-type]

    @property
    def ema(self) -> nn.Module:
        return self.average if hasattr(self, "average") else self.student

    # what Run asks for

    def modules(self) -> dict[str, nn.Module]:
        return {"student": self.student}

    def averages(self) -> dict[str, nn.Module]:
        self.average = copy.deepcopy(self.student)
        return {"student": self.average}

    def describe(self) -> dict[str, Any]:
        return {"world": self.stage.segments}

    def sheet(self, folder: Path, step: int) -> dict[str, float]:
        return {}


class Exact(nn.Module):
    """The x0 whose straight jump from t to s, x_s = alpha_s x0 + sigma_s eps, lands on the flow."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.clean = method == "lcm"  # whose answer is the place itself, no jump to it

    def forward(self, x_t: Tensor, t: Level, s: Level) -> Tensor:
        if self.clean:
            return flow(x_t, t, s)
        slope = s.alpha - s.sigma * t.alpha / t.sigma
        jump = (flow(x_t, t, s) - s.sigma / t.sigma * x_t) / torch.where(slope == 0, 1.0, slope)
        return torch.where(slope == 0, denoised(x_t, t)[0], jump)


class Small(nn.Module):
    """The denoiser with its gain corrected by a small network of the two angles; the teacher itself at first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 1)
        ).double()
        for parameter in self.layers[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x_t: Tensor, t: Level, s: Level) -> Tensor:
        angles = torch.cat([torch.atan2(level.sigma, level.alpha).flatten(1) for level in (t, s)], 1)
        gain = t.alpha * D**2 / spread(t) ** 2 + self.layers(angles).view_as(t.alpha)
        return M + gain * (x_t - t.alpha * M)


def loss(world: World, batch: int = 512) -> float:
    ((_, value),) = world.losses(Step(0, Recipe(updates=1, batch=batch, lr=1.0)))
    return float(value.detach())


@EACH_K
@pytest.mark.parametrize("method", ["tcd", "tscd", "lcm"])
def test_the_loss_at_the_true_flow_map_is_zero(method: str, k: int) -> None:
    """With the exact flow in the solver's place, since one DDIM step of 40 leaves the flow a little: see below."""
    assert loss(World(method, k, Small())) > 1e-7  # the teacher alone is not consistent
    # LCM's identity at t = 0 comes by c_skip = 1; its c_out at t = 24 is 1 - 2e-6, hence not quite zero
    assert loss(World(method, k, Exact(method))) < (1e-9 if method == "lcm" else 1e-24)


@EACH_K
def test_what_remains_with_ddim_as_solver_is_its_error(k: int) -> None:
    """One step of size 1/N errs by 1/N^2, so the squared error falls sixteenfold when N doubles."""
    losses = [loss(World("tscd", k, Exact("tscd"), points=n, solver="ddim"), batch=2048) for n in (40, 200, 1000)]
    assert losses[0] < 1e-3 * D**2
    orders = [math.log(coarse / fine, 5) for coarse, fine in pairwise(losses)]
    assert all(2.5 < order < 4.5 for order in orders), orders


@EACH_K
def test_a_small_network_reaches_the_flow_map(k: int, tmp_path: Path) -> None:
    """What is learned at a segment's edge spreads upwards point by point: it takes a while, most of all for k = 1."""
    recipe = Recipe(updates=2000, batch=64, lr=5e-3, warmup=10, cooldown=1000, weight_decay=0.0, ema=0.9)
    world = World("tscd", k, Small())
    run = Run(world, recipe, tmp_path)
    before, size = off_the_flow(world)
    while run.step < recipe.updates:
        run.update()
    after, _ = off_the_flow(world)
    assert after < 0.1 * before and after < 0.005 * size, (before, after, size)


@torch.no_grad()
def off_the_flow(world: World) -> tuple[float, float]:
    """How far the average's jumps end from the flow, and the spread of where they should: root mean squares."""
    at = world.places(Step(0, Recipe(updates=1, batch=2048, lr=1.0)))
    t, s = world.level(at.t), world.level(at.t_end)
    ends, there = ddim_step(*world.estimate("ema", at.x_t, at.t, at.states), t, s), flow(at.x_t, t, s)
    return float((ends - there).square().mean().sqrt()), float(there.std())


def test_both_solvers_are_of_first_order() -> None:
    """On the grid of the real schedule, each halving of the steps halves the distance to the exact flow."""
    table = [Level(*(part.double() for part in SCHEDULE.level(torch.tensor([t])))) for t in [*range(1000), FINAL]]
    first = torch.full((1, 1, 1, 1), 1.3, dtype=torch.float64)

    def error(solver: str, steps: int) -> float:
        x_t = first
        grid = [*SCHEDULE.timesteps(steps, "trailing"), CLEAN]
        for t, s in pairwise(table[i] for i in grid):
            x0, eps = denoised(x_t, t)
            if solver == "ddim":
                x_t = ddim_step(x0, eps, t, s)
            else:
                x_t = s.alpha * euler_step(x_t / t.alpha, x0, t.sigma / t.alpha, s.sigma / s.alpha)
        return float((x_t - flow(first, table[grid[0]], table[CLEAN])).abs())

    for solver in ("ddim", "euler"):
        errors = [error(solver, n) for n in (25, 50, 100, 200)]
        orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
        assert orders == pytest.approx([1, 1, 1], abs=0.15)
