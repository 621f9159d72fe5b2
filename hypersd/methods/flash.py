"""Flash Diffusion: Chadebec et al. 2024, arXiv:2406.02347, distribution matching and an adversary beside distillation.

Releases only; not for commerce. Drawn with LCM's step on LCM's grid, as its makers say.
"""

from __future__ import annotations

from hypersd.methods.base import Method, StepRange
from hypersd.methods.lcm import step

METHOD = Method(
    name="flash",
    title="Flash Diffusion",
    paper="arXiv:2406.02347",
    summary="Distillation, an adversary and distribution matching at once, for 2 to 4 steps.",
    sampler="LCM",
    step=step,
    steps=StepRange(2, 4, suggested=(2, 4)),
    guidance=1.0,
    eta=1.0,
    spacing="original",
    otherwise="for other numbers of steps choose hyper",
    licence="CC BY-NC 4.0",
)
