"""Distribution matching distillation in one step: Yin et al. 2023, arXiv:2311.18828, as in Hyper-SD's section 3.3.

The student draws a picture from noise in one step. Two networks look at it through noise: the real one, which is the
guided base, and a fake one that learns what the student's pictures look like. Where they disagree, the student follows
the real one: that difference is the gradient of the divergence between the two distributions (eq. 7).

Chosen here, partly as in DMD2 (arXiv:2405.14867): the fake network learns in every update, the student in each fifth;
both are LoRA roles of the base. The paired samples of the regression are drawn from the teacher as they are needed, in
8 guided DDIM steps, instead of stored ones of 50; their distance is measured in latents, not by LPIPS.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hypersd.methods.base import Method, Places, Stage, StepRange, Training
from hypersd.methods.tcd import step

if TYPE_CHECKING:
    from torch import Tensor

    from hypersd import train

EVERY = 5  # updates of the fake network for one of the student
PAIRED, PAIRED_STEPS = 0.25, 8  # weight of the regression (section 3.3), steps of the teacher's samples


def losses(training: Training, step: train.Step) -> Iterator[tuple[str, Tensor]]:
    """Algorithm 1."""
    at = training.beginnings(step)
    turn = step.index % EVERY == 0
    x0, _ = training.estimate("student", at.x_t, at.t, at.states, learn=turn)
    if turn:
        regression = (x0 - training.teacher_sample(at, PAIRED_STEPS)).square().mean()
        yield "student", matching(training, x0, at, step) + PAIRED * regression
    yield "fake", denoising(training, x0.detach(), at, step)


def matching(training: Training, x0: Tensor, at: Places, step: train.Step) -> Tensor:
    """A loss whose gradient at x0 is that of the divergence, eq. 7 and 8, written with the scores' estimates of x0."""
    x_t, t, _ = training.anywhere(x0.detach(), step, "matching")
    real, _ = training.guided(x_t, t, at.states)
    fake, _ = training.estimate("fake", x_t, t, at.states, learn=False)
    distance = (x0.detach() - real).abs().mean((1, 2, 3), keepdim=True)  # so that all noise levels weigh alike
    towards = x0.detach() - (fake - real) / distance.clamp_min(1e-6)
    return 0.5 * (x0 - towards).square().mean()


def denoising(training: Training, x0: Tensor, at: Places, step: train.Step) -> Tensor:
    """The fake network's own loss, eq. 6: to find the noise in the student's noisy pictures."""
    x_t, t, noise = training.anywhere(x0, step, "denoising")
    _, eps = training.estimate("fake", x_t, t, at.states, learn=True)
    return (eps - noise).square().mean()


METHOD = Method(
    name="dmd",
    title="DMD",
    paper="arXiv:2311.18828",
    summary="Distribution matching: one step, led by the difference of two denoisers.",
    sampler="TCD",
    step=step,
    steps=StepRange(1, 1, suggested=(1,)),
    guidance=1.0,
    eta=0.0,
    otherwise="for more steps choose hyper",
    losses=losses,
    stages=(Stage(),),
    learners=("student", "fake"),
    pictures=False,
)
