"""Published few-step LoRAs as adapters of ours: fetched once, read under either way of naming, kept with a card.

    python -m hypersd fetch sd15            what there is, how big, under which licence
    python -m hypersd fetch sd15 hyper lcm  fetch these, and the base model where it is not there

What a release is drawn with (steps, sampler, guidance, eta) is written down here once; the file that `fetch` leaves
behind carries it in its metadata, like a LoRA that was trained here, and stands in the app as its method's row.

Differs from the releases: LCM's own grid of 50 timesteps is a few timesteps off the trailing grid that all methods
share here, so that all panels of a comparison visit the same noise levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hypersd.adapters import AdapterFile, load, save
from hypersd.records import Adapter, InputError


@dataclass(frozen=True)
class Release:
    """One published LoRA: whose method, made for how many segments, drawn with what, under which licence."""

    method: str
    backbone: str
    repository: str
    file: str
    segments: int
    licence: str
    megabytes: int
    guidance: float = 1.0
    eta: float = 0.0
    scale: float = 1.0

    @property
    def name(self) -> str:
        """Of the file here: "tscd-4.safetensors" where a method has several."""
        several = [r for r in RELEASES if (r.method, r.backbone) == (self.method, self.backbone)]
        return f"{self.method}-{self.segments}" if len(several) > 1 else self.method

    def card(self, base_sha256: str, rank: int) -> Adapter:
        return Adapter(
            name=self.method,
            method=self.method,
            backbone=self.backbone,
            base_sha256=base_sha256,
            segments=self.segments,
            rank=rank,
            guidance=self.guidance,
            eta=self.eta,
            updates=0,
            data="",
            commit="",
            recipe={"release": f"{self.repository}/{self.file}", "licence": self.licence},
            scale=self.scale,
        )


HYPER, RAIL = "ByteDance/Hyper-SD", "ByteDance RAIL (2024-04-11), uses restricted"
RELEASES = (
    Release("hyper", "sd15", HYPER, "Hyper-SD15-1step-lora.safetensors", 1, RAIL, 269, eta=1.0),
    *(Release("tscd", "sd15", HYPER, f"Hyper-SD15-{k}step{'s' * (k > 1)}-lora.safetensors", k, RAIL, 269)
      for k in (8, 4, 2)),
    Release("tscd-cfg", "sd15", HYPER, "Hyper-SD15-8steps-CFG-lora.safetensors", 8, RAIL, 269, guidance=6.0),
    Release("lcm", "sd15", "latent-consistency/lcm-lora-sdv1-5", "pytorch_lora_weights.safetensors", 1,
            "CreativeML OpenRAIL++-M", 135),
    Release("tcd", "sd15", "h1t/TCD-SD15-LoRA", "pytorch_lora_weights.safetensors", 1, "MIT", 135, eta=0.3),
)  # fmt: skip


def of(backbone: str, releases: Sequence[Release] = RELEASES) -> list[Release]:
    """What is published for a backbone.

    Raises:
        InputError: nothing is; says for which there is.
    """
    found = [release for release in releases if release.backbone == backbone]
    if not found:
        known = ", ".join(sorted({release.backbone for release in releases}))
        raise InputError(f"nothing is published for {backbone[:40]}; choose from {known}")
    return found


def chosen(backbone: str, names: Sequence[str]) -> list[Release]:
    """The releases of these methods, in the table's order. Raises InputError for one that there is none of."""
    there = of(backbone)
    known = dict.fromkeys(release.method for release in there)
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"no {unknown[0][:40]} is published for {backbone}; choose from {', '.join(known)}")
    return [release for release in there if release.method in names]


def hub(repository: str, file: str) -> Path:
    """A file of the Hugging Face hub, from its cache where it is there; with the hub's own progress bar.

    Raises:
        InputError: it cannot be had.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, file))
    except Exception as error:  # the hub's client raises its own, httpx's and the system's errors
        raise InputError(
            f"{repository}/{file} could not be fetched from the Hugging Face hub ({type(error).__name__}); "
            "check the network, or put a copy somewhere and name it with --file"
        ) from error


def fetch(release: Release, base_sha256: str, out: Path, get: Callable[[str, str], Path] = hub) -> AdapterFile:
    """Keep a release in `out` as an adapter of ours, made for the base whose network has this hash.

    Raises:
        InputError: it cannot be had.
        AdapterError: it is no LoRA of a UNet, or damaged; nothing was written.
    """
    adapter = load(get(release.repository, release.file))
    rank = max(len(tensor) for name, tensor in adapter.items() if name.endswith("lora_A"))
    return save(out / f"{release.name}.safetensors", adapter, release.card(base_sha256, rank))


def describe(release: Release, at_hand: bool) -> str:
    """One line for people."""
    where = "at hand" if at_hand else f"{release.megabytes} MB"
    return (
        f"{release.method:<10} {release.name:<12} {where:<8}  {release.licence:<46} {release.repository}/{release.file}"
    )
