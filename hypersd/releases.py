"""Published few-step models as adapters of ours: fetched once, checked, read under any way of naming, kept with a card.

    python -m hypersd fetch sdxl            what there is, how big, under which licence
    python -m hypersd fetch sdxl hyper lcm  fetch these, and the base model where it is not there
    python -m hypersd fetch mine.safetensors lcm    for a model of one's own, of the same kind

What a release is drawn with (steps, grid, guidance, eta) is written down here once, as its model card says; the file
that `fetch` leaves behind carries it in its metadata, like a LoRA that was trained here, and stands in the app as its
method's row. Nothing is believed by its name: a file must have the sha256 that stands here, or where none does the one
that the hub itself told before the download. What is not for commerce is fetched only by one who says so.

Most are LoRAs; some are whole networks, or differences to the base's (`whole`). Left out is what is published as a
pickle only, which may run a program when it is read: DMD2's networks.

Differs from the model cards: with numbers of steps that do not divide the timesteps, 12 and 16 among them, a step ends
where the next one begins, and not a timestep beside it as in diffusers' DDIMScheduler.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hypersd import whole
from hypersd.adapters import AdapterError, AdapterFile, changed, load, save
from hypersd.folders import BASES, read_json
from hypersd.hub import again, digest, fetched, told
from hypersd.records import Adapter, InputError


@dataclass(frozen=True)
class Release:
    """One published model: whose method, made for how many segments, drawn with what, under which licence.

    `sha256` is that of the file, "" where its makers' could not be looked up; `spacing` names the grid of timesteps;
    `kind` is one of KINDS, `prediction` what it answers with, and `start` where one step begins.
    """

    method: str
    backbone: str
    repository: str
    file: str
    segments: int
    licence: str
    megabytes: int
    sha256: str = ""
    guidance: float = 1.0
    eta: float = 0.0
    scale: float = 1.0
    spacing: str = "trailing"
    commercial: bool = True
    kind: str = "lora"
    prediction: str = ""
    start: int = 999

    @property
    def name(self) -> str:
        """Of the file here: "tscd-4.safetensors" where a method has several."""
        several = [r for r in RELEASES if (r.method, r.backbone) == (self.method, self.backbone)]
        return f"{self.method}-{self.segments}" if len(several) > 1 else self.method

    def card(self, base_sha256: str, rank: int, sha256: str = "") -> Adapter:
        told = {"licence": self.licence, "spacing": self.spacing, "sha256": sha256}
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
            recipe={"release": f"{self.repository}/{self.file}", **told},
            scale=self.scale,
            kind=self.kind,
            prediction=self.prediction,
            start=self.start,
        )


HYPER, RAIL = "ByteDance/Hyper-SD", "ByteDance RAIL (2024-04-11), uses restricted"
OPENRAIL, UNTOLD = "CreativeML OpenRAIL++-M", "not stated (code Apache-2.0)"
NON_COMMERCIAL = "CC BY-NC 4.0, not for commerce"
FLUX = "FLUX.1 [dev] Non-Commercial License"
STABILITY = "Stability AI NC community, not for commerce"
LORA, PCM = "pytorch_lora_weights.safetensors", "wangfuyun/PCM_Weights"


def _hyper(backbone: str, kind: str, megabytes: int, hashes: dict[str, str]) -> list[Release]:
    """The releases of Hyper-SD's authors for one base; `hashes` go by number of steps."""

    def one(steps: str, method: str, segments: int, guidance: float = 1.0) -> Release:
        file = f"Hyper-{kind}-{steps}-lora.safetensors"
        return Release(method, backbone, HYPER, file, segments, RAIL, megabytes, hashes[steps], guidance)

    return [
        replace(one("1step", "hyper", 1), eta=1.0, spacing="original"),
        *(one(f"{k}steps", "tscd", k) for k in (8, 4, 2)),
        *(one(f"{k}steps-CFG", "tscd-cfg", k, 6.0) for k in (8, 12)),
    ]


def _pcm(backbone: str, megabytes: int, hashes: dict[str, str]) -> list[Release]:
    def one(method: str, kind: str, steps: int, guidance: float) -> Release:
        file = f"{backbone}/pcm_{backbone}_{kind}cfg_{steps}step_converted.safetensors"
        sha256 = hashes.get(f"{kind} {steps}", "")
        return Release(method, backbone, PCM, file, steps, UNTOLD, megabytes, sha256, guidance)

    plain = [one("pcm", "small", k, 1.0) for k in (2, 4, 8, 16)]
    return plain + [one("pcm-cfg", "normal", k, 7.5) for k in (4, 8, 16)]


RELEASES = (
    *_hyper("sd15", "SD15", 269, {
        "1step": "a04fd9a535c1e56d38f7590ee72a13fd5ca0409853b4fff021e5a9482cf1ca3b",
        "2steps": "2f26dcc1d883feb07557a552315baae2ca2a04ac08556b08a355a244547e8c3a",
        "4steps": "c5dd058616461ed5053e2b14eec4dbe3fa0eea3b13688642f6d6c80ea2ba5958",
        "8steps": "91fc3186236e956d64dbb4357f2e120c69b968b78af7d2db9884a5ca74d3cd13",
        "8steps-CFG": "f6123d5b950d5250ab6c33600e27f4dcf71b3099ebf888685e01e9e8117ce482",
        "12steps-CFG": "64b98437383537cd968fda6f87a05c33160ece9c79ff4757949a1e212ff78361",
    }),
    Release("lcm", "sd15", "latent-consistency/lcm-lora-sdv1-5", LORA, 1, OPENRAIL, 135,
            "8f90d840e075ff588a58e22c6586e2ae9a6f7922996ee6649a7f01072333afe4", spacing="original"),
    Release("tcd", "sd15", "h1t/TCD-SD15-LoRA", LORA, 1, "MIT", 135,
            "eaecb24a1cda4411eab67275b1d991071216ac93693e8fa0c9226c9df0386232", eta=0.3, spacing="original"),
    *_pcm("sd15", 135, {
        "small 2": "4c5f27a727d12146de4b1d987cee3343bca89b085d12b03c45297af05ce88ef4",
        "small 8": "41a7f0b966d18f643d16c4401f0b5ef6b9ef7362c20e17128322f17874709107",
        "small 16": "c7ac2fa3df3a5b7080ebe63f259ab13630014f104c93c3c706d77b05cc48506b",
        "normal 4": "fa6acb94f11dba3bf4120af5a12e3c88cd2b9572d43ec1a6fb04eede9f32829e",
        "normal 8": "bff3d4499718b61455b0757b5f8d98fe23e73a768b538c82ecf91c693b69dbcd",
        "normal 16": "8f605ffde3616592deb37ed8c6bacb83fe98963c1fd0883c2a4f93787098aa45",
    }),
    Release("flash", "sd15", "jasperai/flash-sd", LORA, 2, NON_COMMERCIAL, 135,
            "99353444c1a0f40719a1b3037049dbd24800317979a73c312025c05af3574a5f", eta=1.0, spacing="original",
            commercial=False),
    *_hyper("sdxl", "SDXL", 787, {
        "1step": "c912df184c5116792d2c604d26c6bc2aa916685f4a793755255cda1c43a3c78a",
        "2steps": "69b25c0187ced301c3603c599c0bc509ac99b8ac34db89a2aecc3d5f77a35187",
        "4steps": "12f81a27d00a751a40d68fd15597091896c5a90f3bd632fb6c475607cbdad76e",
        "8steps": "ca689190e8c46038550384b5675488526cfe5a40d35f82b27acb75c100f417c1",
        "8steps-CFG": "55b51334c85061afff5eff7c550b61963c8b8607a5868bbe4f26db49374719b1",
        "12steps-CFG": "0b97f447b5878323a28fbe7c51ba7acebd21f4d77552ba77b04b11c8911825b6",
    }),
    Release("lcm", "sdxl", "latent-consistency/lcm-lora-sdxl", LORA, 1, OPENRAIL, 394,
            "a764e6859b6e04047cd761c08ff0cee96413a8e004c9f07707530cd776b19141", spacing="original"),
    Release("tcd", "sdxl", "h1t/TCD-SDXL-LoRA", LORA, 1, "MIT", 394,
            "2c777bc60abf41d3eb0fe405d23d73c280a020eea5adf97a82a141592c33feba", eta=0.3, spacing="original"),
    *_pcm("sdxl", 394, {}),
    *(Release("lightning", "sdxl", "ByteDance/SDXL-Lightning", f"sdxl_lightning_{k}step_lora.safetensors", k, OPENRAIL,
              394, sha256)
      for k, sha256 in ((2, "04fafc778385b24144498a8247498ae4fb7a69f702ea0566bdce2845a31fcc43"),
                        (4, "bf56cf2657efb15e465d81402ed481d1e11c4677e4bcce1bc11fe71ad8506b79"),
                        (8, "5aa30d94cdf7950a8b53a693682650ee061eddb128c5435a8f88defea73b2ac6"))),
    Release("flash", "sdxl", "jasperai/flash-sdxl", LORA, 2, NON_COMMERCIAL, 372,
            "afe2ca6e27c4c6087f50ef42772c45d7b0efbc471b76e422492403f9cae724d7", eta=1.0, spacing="original",
            commercial=False),
    Release("dmd2", "sdxl", "tianweiy/DMD2", "dmd2_sdxl_4step_lora_fp16.safetensors", 4, NON_COMMERCIAL, 394,
            "b3d9173815a4b595991c3a7a0e0e63ad821080f314a0b2a3cc31ecd7fcf2cbb8", eta=1.0, commercial=False),
    Release("perflow", "sd15", "hansyan/perflow-sd15-delta-weights", "diffusion_pytorch_model.v0-1.safetensors", 1,
            NON_COMMERCIAL, 1720, guidance=7.5, commercial=False, kind="difference", prediction="diff_eps"),
    Release("perflow", "sdxl", "hansyan/perflow-sdxl-base", "unet/diffusion_pytorch_model.v0-fix.safetensors", 1,
            NON_COMMERCIAL, 5140, guidance=2.0, commercial=False, kind="network", prediction="ddim_eps"),
    Release("hyper-unet", "sdxl", HYPER, "Hyper-SDXL-1step-Unet.safetensors", 1, RAIL, 10270,
            "3d72d3f97c08df11e4979d212c9b72bbce34cc3d7758daf660134698cf4e2dd1", eta=1.0, kind="network", start=800),
    Release("lightning-unet", "sdxl", "ByteDance/SDXL-Lightning", "sdxl_lightning_1step_unet_x0.safetensors", 1,
            OPENRAIL, 5140, "14d53ad5b440a37fc0f429d595d96bf144c5dd842aa5747383e6098c9dbfa644", kind="network",
            prediction="sample"),
    *(Release("lightning-unet", "sdxl", "ByteDance/SDXL-Lightning", f"sdxl_lightning_{k}step_unet.safetensors", k,
              OPENRAIL, 5140, sha256, kind="network")
      for k, sha256 in ((2, "15a96a3b213b8b4d6ea720b4fa5bf6723cd877170bd1a90f58e34da2968ef854"),
                        (4, "39a90a8a2a25c1372633c1e8eb1a96f85eab937bcb58cfc6ec9baf66242ec23c"),
                        (8, "471d8260fda0b17b8906feb24573ce64933d4b6b99ba7a1fa43ca051b994e869"))),
    Release("turbo", "sdxl", "stabilityai/sdxl-turbo", "unet/diffusion_pytorch_model.fp16.safetensors", 1, STABILITY,
            5140, "48fa46161a745f48d4054df3fe13804ee255486bca893403b60373c188fd1bdb", eta=1.0, commercial=False,
            kind="network"),
    *(Release("tscd-cfg", "sd3", HYPER, f"Hyper-SD3-{k}steps-CFG-lora.safetensors", k, RAIL, 472, sha256, g,
              scale=0.125)
      for k, g, sha256 in ((4, 3.0, "0ee4e529abd17b06d4295e3bb91c0d4ddae393afad86b2b43c4f5eeb9e401602"),
                           (8, 5.0, "fc6a3e73e14ed11e21e4820e960d7befcffe7e333850ada9545f239e9aa6027e"),
                           (16, 7.0, "5b4d0b99d58deb811bdbbe521a06f4dbf56a2e9148ff3211c594e0502b656bc9"))),
    *(Release("tscd-cfg", "flux", HYPER, f"Hyper-FLUX.1-dev-{k}steps-lora.safetensors", k, FLUX, 1390, sha256, 3.5,
              scale=0.125, commercial=False)
      for k, sha256 in ((8, "e0ab0fdf569cd01a382f19bd87681f628879dea7ad51fe5a3799b6c18c7b2d03"),
                        (16, "6461f67dfc1a967ae60344c3b3f350877149ccab758c273cc37f5e8a87b5842e"))),
)  # fmt: skip


def of(backbone: str) -> list[Release]:
    """What is published for a backbone; for a model of one's own, in a folder, what can be added to its kind.

    Raises:
        InputError: nothing is; says for which there is.
        ModelError: it is a folder, but not of a model.
    """
    found = [release for release in RELEASES if release.backbone == backbone]
    if not found and os.path.isdir(backbone):
        kind = read_json(Path(backbone), backbone, "model_index.json").get("_class_name")
        noise = read_json(Path(backbone), backbone, "scheduler/scheduler_config.json").get("prediction_type", "epsilon")
        found = [r for r in RELEASES if r.backbone == BASES.get(str(kind)) and r.kind != "network"]
        found = [r for r in found if noise == "epsilon" or not r.prediction]  # it answers by the base's own noise
    if not found:
        known = ", ".join(sorted({release.backbone for release in RELEASES}))
        raise InputError(f"nothing is published for {backbone[:40]}; choose from {known}, or a model of their kinds")
    return found


def chosen(backbone: str, names: Sequence[str]) -> list[Release]:
    """The releases of these methods, or of these names, in the table's order.

    Raises:
        InputError: there is none of one.
    """
    there = of(backbone)
    known = dict.fromkeys(release.method for release in there)
    if unknown := [name for name in names if name not in {*known, *(release.name for release in there)}]:
        raise InputError(
            f"no {unknown[0][:40]} is published for {backbone}; choose from {', '.join(known)}, or a name of the list"
        )
    return [release for release in there if release.method in names or release.name in names]


def hub(repository: str, file: str) -> Path:
    """A file of the Hugging Face hub, from its cache where it is there; with the hub's own progress bar.

    A download that was stopped, however that was, is gone on with where it was.

    Raises:
        InputError: it cannot be had.
    """
    return fetched(repository, [file], "put a copy somewhere and name it with fetch --file") / file


def fetch(
    release: Release,
    base_sha256: str,
    out: Path,
    get: Callable[[str, str], Path] = hub,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> AdapterFile:
    """Keep a release in `out` as an adapter of ours, made for the base whose network has this hash.

    Args:
        get: (repository, file) -> a copy of it.
        shapes: {name: shape} of that network's weights, for a base that may be of another architecture.

    Raises:
        InputError: it cannot be had.
        AdapterError: it is not the file that was published, of another kind, or damaged, or it does not fit `shapes`;
            nothing was written.
    """
    path = get(release.repository, release.file)
    sha256 = _checked(release, path)
    ours = out / f"{release.name}.safetensors"
    if release.kind != "lora":
        if shapes is not None:
            whole.check(path, shapes)
        return whole.keep(path, ours, release.card(base_sha256, 0, sha256))
    adapter = load(path)
    if shapes is not None:
        changed(shapes, adapter)
    rank = max(len(tensor) for name, tensor in adapter.items() if name.endswith("lora_A"))
    return save(ours, adapter, release.card(base_sha256, rank, sha256))


def _checked(release: Release, path: Path) -> str:
    """The sha256 of a file that was fetched, once it is the one that it must be."""
    try:
        found = digest(path)
    except OSError as problem:
        raise AdapterError(f"{path} cannot be read ({type(problem).__name__}); check the path") from problem
    expected = release.sha256 or told(path)
    if expected and found != expected:
        intact = told(path) in ("", found)
        raise AdapterError(
            f"{path.name} is not what {release.repository} published: its sha256 is {found[:12]}.., not "
            f"{expected[:12]}..; {'it is another file, or was replaced since' if intact else again(path)}"
        )
    return found


def describe(release: Release, at_hand: bool) -> str:
    """One line for people."""
    where = "at hand" if at_hand else f"{release.megabytes} MB"
    names = f"{release.method:<14} {release.name:<16}"
    return f"{names} {where:<8}  {release.kind:<10} {release.licence:<46} {release.repository}/{release.file}"
