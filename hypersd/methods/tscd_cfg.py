"""TSCD that keeps guidance and negative prompts, for 8 steps and more: the CFG-preserved LoRAs of Hyper-SD's release.

The other students have one scale of guidance baked in: they are carried to where a guided teacher goes. Here the
teacher's step is not guided and a tenth of the captions are empty, so that the student is a quicker teacher in both
its moods, and the difference of the two is guidance still (as PCM, arXiv:2405.18407, with `--not_apply_cfg_solver`).
It costs two network calls a step, as the base model does.

Silent in the paper, which only releases the weights: everything but the steps.
"""

from __future__ import annotations

from hypersd.methods.base import Method, Stage, StepRange
from hypersd.methods.tcd import losses, step

METHOD = Method(
    name="tscd-cfg",
    title="Hyper-SD (keeps guidance)",
    paper="arXiv:2404.13686",
    summary="TSCD in 8 segments with guidance and negative prompts left to the one who draws.",
    sampler="TCD",
    step=step,
    steps=StepRange(8, 24, suggested=(8, 16, 24)),
    guidance=4.0,
    eta=0.0,
    otherwise="for fewer steps choose tscd or hyper",
    losses=losses,
    stages=(Stage(segments=8),),
    keeps_guidance=True,
)
