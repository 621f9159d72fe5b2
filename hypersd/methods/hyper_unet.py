"""Hyper-SD's one-step network: Ren et al. 2024, arXiv:2404.13686, section 3.3 and Table 4. A release only.

A whole network instead of a LoRA, for one step that starts from less noise: it is told t = 800, where its estimates are
more to be trusted than at the last timestep, though what it is given is noise alone.
"""

from __future__ import annotations

from hypersd.methods.base import Method, StepRange
from hypersd.methods.lcm import step

METHOD = Method(
    name="hyper-unet",
    title="Hyper-SD (one-step network)",
    paper="arXiv:2404.13686",
    summary="A whole network for one step, not a LoRA; the step starts at t = 800.",
    sampler="LCM",
    step=step,
    steps=StepRange(1, 1, suggested=(1,)),
    guidance=1.0,
    eta=1.0,
    otherwise="for other numbers of steps choose hyper",
)
