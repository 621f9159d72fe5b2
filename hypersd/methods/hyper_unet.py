"""Hyper-SD's network for one step, Ren et al. 2024, arXiv:2404.13686, section 3.3. Releases only, for SDXL.

All weights are trained, where `hyper` is a LoRA, and the one step begins at timestep 800: with less noise, the
network's answer is divided by a larger alpha. Drawn with LCM's last step, as its makers say.
"""

from __future__ import annotations

from hypersd.methods.base import Method, StepRange
from hypersd.methods.lcm import step

METHOD = Method(
    name="hyper-unet",
    title="Hyper-SD, one step",
    paper="arXiv:2404.13686",
    summary="A whole network made for one step, which begins with less noise.",
    sampler="LCM",
    step=step,
    steps=StepRange(1, 1, suggested=(1,)),
    guidance=1.0,
    eta=1.0,
    otherwise="for more steps choose hyper",
)
