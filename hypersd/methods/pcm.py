"""Phased consistency models: Wang et al. 2024, arXiv:2405.18407. Their releases are drawn; `tscd` trains the like.

The trajectory is cut into as many phases as there are steps, each with a consistency model of its own, so that a
drawing of exactly so many steps is deterministic. Drawn with DDIM, as their makers say.
"""

from __future__ import annotations

from hypersd.methods.base import Method, StepRange
from hypersd.methods.teacher import step

METHOD = Method(
    name="pcm",
    title="PCM",
    paper="arXiv:2405.18407",
    summary="Phased consistency: a consistency model for each of 2, 4, 8 or 16 phases.",
    sampler="DDIM",
    step=step,
    steps=StepRange(2, 16, suggested=(2, 4, 8, 16)),
    guidance=1.0,
    eta=0.0,
    otherwise="for one step choose hyper",
)
