"""Phased consistency models that keep guidance and negative prompts, arXiv:2405.18407, section 3.3: releases only.

Differs from `pcm` by the teacher, which was not guided; at two network calls a step.
"""

from __future__ import annotations

from hypersd.methods.base import Method, StepRange
from hypersd.methods.teacher import step

METHOD = Method(
    name="pcm-cfg",
    title="PCM (keeps guidance)",
    paper="arXiv:2405.18407",
    summary="Phased consistency with guidance and negative prompts left to the one who draws.",
    sampler="DDIM",
    step=step,
    steps=StepRange(4, 16, suggested=(4, 8, 16)),
    guidance=7.5,
    eta=0.0,
    otherwise="for fewer steps choose pcm",
)
