"""SDXL-Lightning's whole networks: Lin et al. 2024, arXiv:2402.13929. Releases only.

What `lightning` draws with a LoRA in 2, 4 or 8 steps, and one step beside: there, eps divided by alpha = 0.07 would
magnify the network's errors, so it was made to answer with the clean latent (section 3.6). That network is a trial, its
makers say; each is for its own number of steps.
"""

from __future__ import annotations

from hypersd.methods.base import Method, StepRange
from hypersd.methods.lightning import step

METHOD = Method(
    name="lightning-unet",
    title="SDXL-Lightning, whole networks",
    paper="arXiv:2402.13929",
    summary="Progressive distillation with an adversary, a whole network for each of 1, 2, 4 and 8 steps.",
    sampler="Euler",
    step=step,
    steps=StepRange(1, 8, suggested=(1, 2, 4, 8)),
    guidance=1.0,
    eta=0.0,
    sigma_start=True,
    exact=True,
)
