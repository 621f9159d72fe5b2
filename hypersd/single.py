"""Checkpoints in one file, as they are passed around: laid out once as a folder in diffusers' layout.

    python -m hypersd draw --backbone downloads/checkpoint.safetensors --prompt "a happy cat"

Stable Diffusion 1.x, XL and 3 and FLUX.1 under their original names; diffusers translates them, and from then on the
folder is like any other. Such a file has weights only. What else a pipeline needs, configurations and tokenizers, is
that of the base model which the checkpoint was tuned from: from the hub's cache, or fetched (a few MB), or from a
folder that HYPERSD_LAYOUT names. Text encoders and autoencoder, which files of Stable Diffusion 3 and FLUX.1 often
leave out, come from there as well.

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
from collections.abc import Iterable, Mapping, Sequence
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
    check_file,
    check_tokenizers,
    header,
    read_json,
    weight_files,
    weight_patterns,
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
DENOISER, OPEN_CLIP = "model.diffusion_model.", "conditioner.embedders.1.model."
VAE = ("first_stage_model.", "vae.")
CLIP_L, CLIP_G, T5 = (f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl"))
PLACES: dict[str, dict[str, tuple[str, ...]]] = {  # pipeline -> part -> with what the names of its tensors may begin
    "StableDiffusionPipeline": {
        "text_encoder": ("cond_stage_model.transformer.",),
        "unet": (DENOISER,),
        "vae": VAE[:1],
    },
    "StableDiffusionXLPipeline": {
        "text_encoder": ("conditioner.embedders.0.transformer.",),
        "text_encoder_2": (OPEN_CLIP,),
        "unet": (DENOISER,),
        "vae": VAE[:1],
    },
    "StableDiffusion3Pipeline": {
        "text_encoder": (CLIP_L,),
        "text_encoder_2": (CLIP_G,),
        "text_encoder_3": (T5,),
        "transformer": (DENOISER, ""),
        "vae": VAE,
    },
    "FluxPipeline": {
        "text_encoder": (CLIP_L,),
        "text_encoder_2": (T5,),
        "transformer": (DENOISER, ""),
        "vae": VAE,
    },
}
WHOLE = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")  # told by their parts, all of which a file has to have
MARKS = {  # others, told by one tensor of the denoiser
    "joint_blocks.0.context_block.adaLN_modulation.1.bias": "StableDiffusion3Pipeline",
    "double_blocks.0.img_attn.norm.key_norm.scale": "FluxPipeline",
}
TRANSLATED = {  # class of a transformer -> diffusers' function, which takes away from its argument what it translates
    "SD3Transformer2DModel": "convert_sd3_transformer_checkpoint_to_diffusers",
    "FluxTransformer2DModel": "convert_flux_transformer_checkpoint_to_diffusers",
}
KIN = {  # a part of a name in a file -> the repository of another model of the same family
    "joint_blocks.37.": "stabilityai/stable-diffusion-3.5-large",
    "x_block.attn2.": "stabilityai/stable-diffusion-3.5-medium",
}
ANOTHER = "name the folder of a model of its architecture: HYPERSD_LAYOUT=folder"
SCHNELL = "black-forest-labs/FLUX.1-schnell"  # told by what it lacks: it is not told any guidance
DESCRIBED = ("model_index.json", "*/config.json", "scheduler/*", "tokenizer*/*")  # of a folder, all but its weights
OTHERS = {  # a name in a file -> what it is
    "lora_": "a LoRA",
    ".lora_A.": "a LoRA",
    ".lora.": "a LoRA",
    "cond_stage_model.model.": "of Stable Diffusion 2",
    "conditioner.embedders.0.model.": "the refiner of Stable Diffusion XL",
    "control_model.": "a ControlNet",
    "controlnet_": "a ControlNet",
    "double_stream_modulation": "of FLUX.2",
    "distilled_guidance_layer.": "of Chroma",
}
SCALES = (".scale_weight", ".weight_scale", "scaled_fp8")  # ends of names: weights to be multiplied before use
NOISES = {  # tensors that are names alone -> how a checkpoint was trained that the schedules here do not describe
    "edm_mean": "with the noise of EDM",
    "edm_vpred.sigma_max": "with the noise of EDM",
}


def laid_out(name_or_path: str | Path) -> str | Path:
    """The folder of a checkpoint in one file, laid out the first time; anything else comes back as it is.

    The folder lies in runs/models under the file's name and a digest of what it was made from, so that another file of
    the same name is laid out anew. Writing it takes as much room on the disk as the file.

    Raises:
        ModelError: it is damaged, a pickle, or of none of the families above, or what it lacks of the base model is
            not to be had.
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
    _check(found.tensors, kind, file.name)
    stat = file.stat()
    v, layout = kind in WHOLE and _predicts_v(file, found), os.environ.get("HYPERSD_LAYOUT", "")
    told = json.dumps([*found, v, stat.st_mtime_ns, layout], sort_keys=True)
    folder = FOLDERS / f"{file.stem}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"
    if not folder.is_dir():
        _lay_out(file, found.tensors, v, kind, folder)
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
    for kind in WHOLE:
        if all(_prefix(tensors, kind, part) for part in PLACES[kind]):
            return kind
    what = next((what for part, what in OTHERS.items() if any(part in key for key in tensors)), "")
    for mark, kind in MARKS.items():
        if not what and any(key in tensors for key in (mark, DENOISER + mark)):
            return kind
    raise ModelError(
        f"{name} is {what or 'no whole checkpoint'}; choose a checkpoint of Stable Diffusion 1.x or XL with UNet, text "
        "encoders and VAE in it, or one of Stable Diffusion 3 or FLUX.1"
    )


def _prefix(tensors: Iterable[str], kind: str, part: str) -> str | None:
    """With what the names of a part's tensors begin in a file; None if it does not have the part."""
    return next((p for p in PLACES[kind][part] if any(key.startswith(p) for key in tensors)), None)


def _check(tensors: Mapping[str, Any], kind: str, name: str) -> None:
    """Its noise and its numbers are of kinds that can be drawn with. Raises ModelError where they are not."""
    if noise := next((noise for key, noise in NOISES.items() if key in tensors), ""):
        raise ModelError(f"{name} was trained {noise}, which is not supported; choose another checkpoint")
    if any(key.endswith(SCALES) for key in tensors):
        raise ModelError(f"{name} has weights with scales beside them; choose the checkpoint in half or full precision")
    parts = tuple(prefix for prefixes in PLACES[kind].values() for prefix in prefixes)
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


def _lay_out(file: Path, tensors: Mapping[str, Any], v: bool, kind: str, folder: Path) -> None:
    """All or nothing: the folder gets its name when everything is in it. One part after the other is in memory."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    absent = [part for part in PLACES[kind] if _prefix(tensors, kind, part) is None]
    layout = _layout(kind, tensors, absent, file.name)
    FOLDERS.mkdir(parents=True, exist_ok=True)
    for left in FOLDERS.glob(".laid-out-*"):  # by a process that was killed, or it would be younger
        if time.time() - left.stat().st_mtime > DAY:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=FOLDERS, prefix=".laid-out-") as staging:
        place = Path(staging) / folder.name
        try:
            for path in (p for pattern in DESCRIBED for p in layout.glob(pattern) if p.is_file()):
                _copy(path, place / path.relative_to(layout))
            _describe(place, v, "ztsnr" in tensors and kind in WHOLE)
            with safe_open(file, "pt") as weights:
                for part, about in tqdm(FAMILIES[kind].items(), desc=f"laying out {file.name}", unit="part"):
                    for path in _held(layout, part, about) if part in absent else ():
                        _link(path, place / path.relative_to(layout))
                    if part not in absent:
                        found = _translated(weights, kind, part, layout, file.name)
                        save_file(found, place / part / f"{about.stem}.safetensors", {"format": "pt"})
            write_manifest(place)
            os.replace(place, folder)
        except (OSError, SafetensorError) as error:
            if not folder.is_dir():  # another process may have been quicker
                raise ModelError(
                    f"{file.name} could not be laid out in {FOLDERS} ({error}); it takes as much room as the file"
                ) from error


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _link(source: Path, target: Path) -> None:
    """The same bytes under another name, which costs no room; a copy where the file system cannot do that."""
    try:
        os.link(source.resolve(), target)  # in the hub's cache a file is a link itself
    except OSError:
        _copy(source, target)


def _held(layout: Path, part: str, about: Part) -> list[Path]:
    """The files of a part's weights, and what says which of them has what."""
    return [*weight_files(layout, layout.name, part, about), *(layout / part).glob(f"{about.stem}*.index*.json")]


def _layout(kind: str, tensors: Iterable[str], absent: Sequence[str], name: str) -> Path:
    """A folder with the configurations and tokenizers of the file's base model, and with the weights of `absent`."""
    if chosen := os.environ.get("HYPERSD_LAYOUT"):
        folder = Path(chosen)
        if read_json(folder, folder.name, "model_index.json").get("_class_name") != kind:
            raise ModelError(f"HYPERSD_LAYOUT must name a folder with a {kind}, got {chosen[:80]!r}")
        _check_layout(folder, folder.name, kind, absent)
        return folder
    source = _source(kind, tensors)
    wanted = [*DESCRIBED, *(pattern for part in absent for pattern in weight_patterns(part, FAMILIES[kind][part]))]
    also = f" and {', '.join(absent)}, which {name} lacks," if absent else ""
    try:
        instead = "name the folder of any model of its kind: HYPERSD_LAYOUT=folder"
        folder = fetched(source, wanted, instead, f"what {name} lacks" if absent else "")
        _check_layout(folder, BASES[kind], kind, absent)  # offline, the client is content with whatever is cached
        return folder
    except InputError as problem:
        raise ModelError(f"configurations and tokenizers of its kind{also} are needed once: {problem}") from problem


def _check_layout(folder: Path, name: str, kind: str, absent: Sequence[str]) -> None:
    check_tokenizers(folder, name)
    for part in absent:
        for file in weight_files(folder, name, part, FAMILIES[kind][part]):
            check_file(file, name, folder)


def _source(kind: str, tensors: Iterable[str]) -> str:
    """The repository of the model that a file is a version of."""
    if kind == "FluxPipeline" and not any("guidance_in." in key for key in tensors):
        return SCHNELL
    base = BACKBONES[BASES[kind]].source
    return next((other for part, other in KIN.items() if any(part in key for key in tensors)), base)


def _translated(tensors: Any, kind: str, part: str, layout: Path, name: str) -> dict[str, Tensor]:
    """One part's weights under diffusers' names, all that its configuration asks for and nothing else."""
    about, prefix = FAMILIES[kind][part], _prefix(tensors.keys(), kind, part) or ""
    config = read_json(layout, layout.name, f"{part}/config.json")
    given = {key: tensors.get_tensor(key) for key in tensors.keys() if key.startswith(prefix)}  # noqa: SIM118
    count, place = len(given), f"{name}: its {part}"
    try:
        expected = _expected(about, config)
        found = _renamed(given, prefix, about, config, expected)
    except KeyError as error:  # the translation looks for it under its original name
        raise ModelError(f"{place} lacks {error}; fetch it again, or {ANOTHER}") from error
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise ModelError(
            f"{place} cannot be read as {layout.name}/{part}/config.json describes it ({reason}); {ANOTHER}"
        ) from error
    if lost := sorted(expected.keys() - found.keys()):
        raise ModelError(f"{place} lacks {len(lost)} tensors such as {lost[0]}; fetch it again, or {ANOTHER}")
    spare = sorted(found.keys() - expected.keys())
    if about.kind in TRANSLATED:
        spare += sorted(given)
        more = len(spare)
    else:  # counted under original names: the translation passes over some without a word, such as motion modules
        more = count - len(expected)
    if about.denoiser and more:
        known = "".join(f" such as {key}" for key in spare[:1])
        raise ModelError(
            f"{place} has {more} tensors{known} that {layout.name} has no place for; choose another checkpoint, or "
            f"{ANOTHER}"
        )
    for key, shape in expected.items():
        if found[key].shape != shape:
            raise ModelError(
                f"{name}: {key} of its {part} is {tuple(found[key].shape)}, in {layout.name} it is {tuple(shape)}; "
                f"choose a checkpoint that was not made for inpainting, or {ANOTHER}"
            )
    return {key: found[key].contiguous() for key in expected}


def _expected(about: Part, config: Mapping[str, Any]) -> dict[str, Any]:
    """{tensor: shape} of a part, built without memory for its weights. What has two names goes by the first."""
    import torch

    library = import_module(about.library)
    kind = getattr(library, about.kind)
    with torch.device("meta"):
        model = kind(kind.config_class(**config)) if about.library == "transformers" else kind.from_config(config)
    weights = model.state_dict(keep_vars=True)
    first = {id(tensor): key for key, tensor in reversed(weights.items())}
    return {key: weights[key].shape for key in weights if key in first.values() and not key.endswith("position_ids")}


def _renamed(
    given: dict[str, Tensor], prefix: str, about: Part, config: Mapping[str, Any], expected: Mapping[str, Any]
) -> dict[str, Tensor]:
    """diffusers' own translation of one part, whose names begin with `prefix`. Of a transformer's tensors those stay in
    `given` that it does not know."""
    import torch
    from diffusers.loaders import single_file_utils as translate

    if about.kind in TRANSLATED:
        return getattr(translate, TRANSLATED[about.kind])(given)
    if about.denoiser:
        return translate.convert_ldm_unet_checkpoint(given, config)
    if prefix in VAE:
        return translate.convert_ldm_vae_checkpoint(given, config)
    if prefix == T5:
        return translate.convert_sd3_t5_checkpoint_to_diffusers(given)
    if prefix == OPEN_CLIP:
        found = translate.convert_open_clip_checkpoint(SimpleNamespace(config=SimpleNamespace(**config)), given, prefix)
    else:
        found = translate.convert_ldm_clip_checkpoint(given, prefix)
    if prefix == CLIP_L and "text_projection.weight" in expected:  # Stable Diffusion 3 does without, whatever is there
        found["text_projection.weight"] = torch.eye(config["hidden_size"])
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
