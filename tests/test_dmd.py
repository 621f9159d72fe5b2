"""Distribution matching where it has a formula: real and fake pictures are Gaussian, so their denoisers are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_world import SCHEDULE, D, M
from torch import Tensor, nn

from hypersd.methods import dmd
from hypersd.methods.base import Places
from hypersd.train import Recipe, Step

RECIPE = Recipe(updates=400, batch=256, lr=1.0)


class Scores:
    """What `matching` asks of a training: two perfect denoisers, of the data and of what the student draws."""

    def __init__(self, mean: Tensor, deviation: Tensor) -> None:
        self.mean, self.deviation = mean, deviation

    def guided(self, x_t: Tensor, t: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        return denoised(x_t, t, torch.tensor(M), torch.tensor(D))

    def estimate(self, role: str, x_t: Tensor, t: Tensor, states: Tensor, *, learn: bool) -> tuple[Tensor, Tensor]:
        assert (role, learn) == ("fake", False)
        return denoised(x_t, t, self.mean.detach(), self.deviation.detach())

    def anywhere(self, x0: Tensor, step: Step, stream: str) -> tuple[Tensor, Tensor, Tensor]:
        t = (20 + 960 * step.uniform("t")).long()
        noise = step.randn("noise", x0.shape[1:])
        return SCHEDULE.diffuse(x0, noise, t), t, noise


def denoised(x_t: Tensor, t: Tensor, mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
    level = SCHEDULE.level(t)
    spread2 = level.alpha**2 * deviation**2 + level.sigma**2
    x0 = mean + level.alpha * deviation**2 / spread2 * (x_t - level.alpha * mean)
    return x0, (x_t - level.alpha * x0) / level.sigma


def places(x0: Tensor) -> Places:
    end = torch.zeros(len(x0), dtype=torch.long)
    return Places(torch.zeros_like(x0), end + 999, end, end, end + 999, torch.zeros(len(x0), 1, 1))


def loss(scores: Any, x0: Tensor, step: Step) -> Tensor:
    return dmd.matching(scores, x0, places(x0), step)


def test_the_gradient_is_the_difference_of_the_scores() -> None:
    """With equal deviations the denoisers differ by (m_fake - m_real) sigma^2 / spread^2, wherever x_t is."""
    step, off = Step(0, RECIPE), 0.5
    x0 = (M + off + D * step.randn("x", (1, 1, 1))).requires_grad_()
    scores = Scores(torch.tensor(M + off), torch.tensor(D))
    (gradient,) = torch.autograd.grad(loss(scores, x0, step), x0)
    x_t, t, _ = scores.anywhere(x0.detach(), step, "")
    level = SCHEDULE.level(t)
    apart = off * level.sigma**2 / (level.alpha**2 * D**2 + level.sigma**2)
    real, _ = scores.guided(x_t, t, torch.empty(0))
    torch.testing.assert_close(gradient * len(x0), apart / (x0.detach() - real).abs(), rtol=1e-3, atol=1e-5)


def test_nothing_moves_where_both_distributions_are_equal() -> None:
    step = Step(0, RECIPE)
    x0 = (M + D * step.randn("x", (1, 1, 1))).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(Scores(torch.tensor(M), torch.tensor(D)), x0, step), x0)
    assert float(gradient.abs().max()) < 1e-6


@pytest.mark.parametrize(("mean", "deviation"), [(2.0, 0.4), (0.7, 1.2), (-1.0, 0.1)])
def test_a_student_comes_to_draw_the_datas_distribution(mean: float, deviation: float) -> None:
    mean_, deviation_ = nn.Parameter(torch.tensor(mean)), nn.Parameter(torch.tensor(deviation))
    optimizer = torch.optim.Adam([mean_, deviation_], lr=0.03, betas=(0.0, 0.9))
    rates = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, RECIPE.updates)
    for index in range(RECIPE.updates):
        step = Step(index, RECIPE)
        x0 = mean_ + deviation_ * step.randn("x", (1, 1, 1))
        optimizer.zero_grad()
        loss(Scores(mean_, deviation_), x0, step).backward()
        optimizer.step()
        rates.step()
    assert float(mean_.detach()) == pytest.approx(M, abs=0.05)
    assert float(deviation_.detach()) == pytest.approx(D, abs=0.05)
