"""DMD2: Yin et al. 2024, arXiv:2405.14867, distribution matching in four steps. Releases only; not for commerce.

Drawn with LCM's step at the four timesteps it was trained at, which are those of a trailing grid. `dmd` and `hyper`
train with its losses.
"""

from __future__ import annotations

from hypersd.methods.base import Method, StepRange
from hypersd.methods.lcm import step

METHOD = Method(
    name="dmd2",
    title="DMD2",
    paper="arXiv:2405.14867",
    summary="Distribution matching and an adversary, for 4 steps.",
    sampler="LCM",
    step=step,
    steps=StepRange(4, 4, suggested=(4,)),
    guidance=1.0,
    eta=1.0,
    otherwise="for other numbers of steps choose hyper",
    licence="CC BY-NC 4.0",
)
