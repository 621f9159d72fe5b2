"""Checkpoints in one file, as they are passed around: laid out once as a folder in diffusers' layout.

    python -m hypersd draw --backbone downloads/checkpoint.safetensors --prompt "a happy cat"

Stable Diffusion 1.x and XL under their original names; diffusers translates them, and from then on the folder is like
any other. Such a file has weights only. What else a pipeline needs, configurations and tokenizers, is that of the base
model which the checkpoint was tuned from: from the hub's cache, or fetched (a few MB), or from a folder that
HYPERSD_LAYOUT names.

That it predicts v instead of the noise it may say by a tensor `v_pred`, by ModelSpec's metadata
(https://github.com/Stability-AI/ModelSpec; ComfyUI writes `predict_key`), or by `parameterization: v` in a YAML file
beside it, as CompVis' trainer has it; that its last timestep is noise alone, by a tensor `ztsnr`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from hypersd.folders import (
    BACKBONES,
    BASES,
    FAMILIES,
    Header,
    ModelError,
    Part,
    check_tokenizers,
    header,
    read_json,
    write_manifest,
)
from hypersd.hub import fetched
from hypersd.records import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from hypersd.schedule import Schedule

ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
FOLDERS = Path("runs/models")
DAY = 24 * 3600.0  # seconds
UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP = ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")
OPEN_CLIP = "conditioner.embedders.1.model."
TEXT = {"StableDiffusionPipeline": CLIP[:1], "StableDiffusionXLPipeline": (CLIP[1], OPEN_CLIP)}
DESCRIBED = ("model_index.json", "*/config.json", "scheduler/*", "tokenizer*/*")  # of a folder, all but its weights
OTHERS = {  # a name in a file -> what it is
    "lora_": "a LoRA",
    ".lora_A.": "a LoRA",
    ".lora.": "a LoRA",
    "cond_stage_model.model.": "of Stable Diffusion 2",
    "conditioner.embedders.0.model.": "the refiner of Stable Diffusion XL",
    "joint_blocks.": "of Stable Diffusion 3",
    "double_blocks.": "of FLUX",
    "control_model.": "a ControlNet",
}
NOISES = {  # tensors that are names alone -> how a checkpoint was trained that the schedules here do not describe
    "edm_mean": "with the noise of EDM",
    "edm_vpred.sigma_max": "with the noise of EDM",
}


def laid_out(name_or_path: str | Path) -> str | Path:
    """The folder of a checkpoint in one file, laid out the first time; anything else comes back as it is.

    The folder lies in runs/models under the file's name and a digest of what it was made from, so that another file of
    the same name is laid out anew. Writing it takes as much room on the disk as the file.

    Raises:
        ModelError: it is damaged, no checkpoint of Stable Diffusion 1.x or XL, a pickle, or the base model's
            configuration is not to be had.
    """
    file = Path(name_or_path)
    if not str(name_or_path).endswith(ENDINGS) or os.path.isdir(file):
        return name_or_path
    if not os.path.isfile(file):  # nor if its name is longer than any file system takes, where Path.is_file raises
        raise ModelError(f"there is no file {str(file)[:80]!r}; check the path")
    if file.suffix != ".safetensors":
        raise ModelError(
            f"{file.name} may be a pickle, which can run any code when it is opened; take the same checkpoint as "
            ".safetensors, or convert it with a tool that you trust"
        )
    found = _header(file)
    kind = family(found.tensors, file.name)
    _check(found.tensors, file.name)
    stat = file.stat()
    v, layout = _predicts_v(file, found), os.environ.get("HYPERSD_LAYOUT", "")
    told = json.dumps([*found, v, stat.st_mtime_ns, layout], sort_keys=True)
    folder = FOLDERS / f"{file.stem}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"
    if not folder.is_dir():
        _lay_out(file, v, "ztsnr" in found.tensors, kind, folder)
    return folder


def _header(file: Path) -> Header:
    """What the file begins with; it is as long as it says."""
    try:
        found = header(file)
    except (OSError, ValueError) as error:
        raise ModelError(f"{file.name} has no readable header ({type(error).__name__}); fetch it again") from error
    if (size := file.stat().st_size) != found.size:
        raise ModelError(f"{file.name} has {size:,} bytes instead of {found.size:,}; fetch it again")
    return found


def family(tensors: Iterable[str], name: str) -> str:
    """The pipeline of FAMILIES that a checkpoint is of, by the names of its tensors.

    Raises:
        ModelError: of none of those; says what it is, if that is known.
    """
    whole = any(key.startswith(UNET) for key in tensors) and any(key.startswith(VAE) for key in tensors)
    for kind, prefixes in TEXT.items():
        if whole and all(any(key.startswith(prefix) for key in tensors) for prefix in prefixes):
            return kind
    what = next((what for part, what in OTHERS.items() if any(part in key for key in tensors)), "no whole checkpoint")
    raise ModelError(
        f"{name} is {what}; choose a checkpoint of Stable Diffusion 1.x or XL in one file, with UNet, text encoders "
        "and VAE in it"
    )


def _check(tensors: Mapping[str, Any], name: str) -> None:
    """Its noise and its numbers are of kinds that can be drawn with. Raises ModelError where they are not."""
    if noise := next((noise for key, noise in NOISES.items() if key in tensors), ""):
        raise ModelError(f"{name} was trained {noise}, which is not supported; choose another checkpoint")
    parts = (UNET, VAE, *CLIP, OPEN_CLIP)
    weights = (entry for key, entry in tensors.items() if key.startswith(parts) and not key.endswith("position_ids"))
    if odd := sorted({str(entry.get("dtype")) for entry in weights} - FLOATS):
        raise ModelError(f"{name} has weights of type {odd[0]}; choose the checkpoint in half or full precision")


def _predicts_v(file: Path, found: Header) -> bool:
    """Whether it says so. A YAML file beside it that cannot be read is a ModelError: it was put there to be heeded."""
    import yaml

    told = (found.metadata.get(f"modelspec.{key}") for key in ("prediction_type", "predict_key"))
    if "v_pred" in found.tensors or any(value in ("v", "v_prediction") for value in told):
        return True
    beside = file.with_suffix(".yaml")
    if not beside.is_file():
        return False
    try:
        params = yaml.safe_load(beside.read_text(encoding="utf-8"))["model"]["params"]
        return bool(params.get("parameterization") == "v")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ModelError(
            f"{beside.name} is no configuration of {file.name} ({type(error).__name__}); mend it, or take it away"
        ) from error


def _lay_out(file: Path, v: bool, ztsnr: bool, kind: str, folder: Path) -> None:
    """All or nothing: the folder gets its name when everything is in it. One part after the other is in memory."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    layout = _layout(kind)
    FOLDERS.mkdir(parents=True, exist_ok=True)
    for left in FOLDERS.glob(".laid-out-*"):  # by a process that was killed, or it would be younger
        if time.time() - left.stat().st_mtime > DAY:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=FOLDERS, prefix=".laid-out-") as staging:
        place = Path(staging) / folder.name
        for path in (p for pattern in DESCRIBED for p in layout.glob(pattern) if p.is_file()):
            (place / path.relative_to(layout)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place / path.relative_to(layout))
        _describe(place, v, ztsnr)
        try:
            with safe_open(file, "pt") as tensors:
                for part, about in tqdm(FAMILIES[kind].items(), desc=f"laying out {file.name}", unit="part"):
                    weights = _translated(tensors, part, about, layout, file.name)
                    save_file(weights, place / part / f"{about.stem}.safetensors", {"format": "pt"})
            write_manifest(place)
            os.replace(place, folder)
        except (OSError, SafetensorError) as error:
            if not folder.is_dir():  # another process may have been quicker
                raise ModelError(
                    f"{file.name} could not be laid out in {FOLDERS} ({error}); it takes as much room as the file"
                ) from error


def _layout(kind: str) -> Path:
    """A folder with the configurations and tokenizers of the family's base model."""
    if chosen := os.environ.get("HYPERSD_LAYOUT"):
        folder = Path(chosen)
        if read_json(folder, folder.name, "model_index.json").get("_class_name") != kind:
            raise ModelError(f"HYPERSD_LAYOUT must name a folder with a {kind}, got {chosen[:80]!r}")
        check_tokenizers(folder, folder.name)
        return folder
    source = BACKBONES[BASES[kind]].source
    try:
        folder = fetched(source, DESCRIBED, "name the folder of any model of its kind: HYPERSD_LAYOUT=folder")
        check_tokenizers(folder, BASES[kind])  # offline, the client is content with whatever is cached
        return folder
    except InputError as problem:
        raise ModelError(f"configurations and tokenizers of its kind are needed once: {problem}") from problem


def _translated(tensors: Any, part: str, about: Part, layout: Path, name: str) -> dict[str, Tensor]:
    """One part's weights under diffusers' names, all that its configuration asks for and nothing else."""
    config = read_json(layout, layout.name, f"{part}/config.json")
    try:
        expected = _expected(about, config)
        found = _renamed(tensors, part, config, expected)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise ModelError(
            f"{name}: its {part} cannot be read as {layout.name}/{part}/config.json describes it ({reason}); name the "
            "folder of a model of its architecture: HYPERSD_LAYOUT=folder"
        ) from error
    if lost := sorted(expected.keys() - found.keys()):
        raise ModelError(f"{name}: its {part} lacks {len(lost)} tensors such as {lost[0]}; fetch it again")
    # Counted under their original names: the translation passes over some without a word, such as motion modules.
    if about.denoiser and (more := sum(key.startswith(UNET) for key in tensors.keys()) - len(expected)):  # noqa: SIM118
        known = "".join(f" such as {key}" for key in sorted(found.keys() - expected.keys())[:1])
        raise ModelError(
            f"{name}: its {part} has {more} tensors{known} that {layout.name} has no place for; choose another "
            "checkpoint, or name the folder of a model of its architecture: HYPERSD_LAYOUT=folder"
        )
    for key, shape in expected.items():
        if found[key].shape != shape:
            raise ModelError(
                f"{name}: {key} of its {part} is {tuple(found[key].shape)}, in {layout.name} it is {tuple(shape)}; "
                "choose a checkpoint that was not made for inpainting, or name the folder of a model of its "
                "architecture: HYPERSD_LAYOUT=folder"
            )
    return {key: found[key].contiguous() for key in expected}


def _expected(about: Part, config: Mapping[str, Any]) -> dict[str, Any]:
    """{tensor: shape} of a part, built without memory for its weights."""
    import torch

    library = import_module(about.library)
    kind = getattr(library, about.kind)
    with torch.device("meta"):
        model = kind(kind.config_class(**config)) if about.library == "transformers" else kind.from_config(config)
    return {key: tensor.shape for key, tensor in model.state_dict().items() if not key.endswith("position_ids")}


def _renamed(tensors: Any, part: str, config: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Tensor]:
    """diffusers' own translation of one part; its functions ask for the names of that part alone."""
    from diffusers.loaders import single_file_utils as translate

    def under(prefix: str) -> dict[str, Tensor]:
        return {key: tensors.get_tensor(key) for key in tensors.keys() if key.startswith(prefix)}  # noqa: SIM118

    if part == "unet":
        return translate.convert_ldm_unet_checkpoint(under(UNET), config)
    if part == "vae":
        return translate.convert_ldm_vae_checkpoint(under(VAE), config)
    if part == "text_encoder":
        found = translate.convert_ldm_clip_checkpoint(under(CLIP[0]) | under(CLIP[1]))
    else:
        held = SimpleNamespace(config=SimpleNamespace(**config))
        found = translate.convert_open_clip_checkpoint(held, under(OPEN_CLIP), OPEN_CLIP)
    wrapped = any(key.startswith("text_model.") for key in expected)
    return found if wrapped else {key.removeprefix("text_model."): tensor for key, tensor in found.items()}


def _describe(folder: Path, v: bool, ztsnr: bool) -> None:
    """The base model's scheduler with what the checkpoint says of its noise; its index without what is not there."""
    path = folder / "scheduler/scheduler_config.json"
    config = read_json(folder, folder.name, "scheduler/scheduler_config.json")
    config |= {"prediction_type": "v_prediction"} if v else {}
    if ztsnr:
        from hypersd.schedule import Schedule  # here, since torch takes seconds

        config |= {"trained_betas": _to_noise_alone(Schedule.from_config(config)), "timestep_spacing": "trailing"}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    path = folder / "model_index.json"
    index = read_json(folder, folder.name, path.name)
    absent = {part: [None, None] for part in ("safety_checker", "feature_extractor", "image_encoder") if part in index}
    path.write_text(json.dumps(index | absent, indent=2) + "\n", encoding="utf-8")


def _to_noise_alone(schedule: Schedule) -> list[float]:
    """Its betas, shifted and stretched until no signal is left at the end (arXiv:2305.08891, algorithm 1).

    2^-24 of abar is left, as in diffusers' EulerDiscreteScheduler, so that nothing is divided by zero.
    """
    signal = schedule.alphas_cumprod.double().sqrt()
    abar = ((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])) ** 2
    abar[-1] = 2.0**-24
    return [1 - float(abar[0]), *(1 - abar[1:] / abar[:-1]).tolist()]
