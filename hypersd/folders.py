"""Model folders in diffusers' layout: which there are by name, whether every file is whole, what they hash to.

A folder is read part by part with the classes that wrote it. Weights are safetensors only, never pickles, in one file
or in shards with an index, and a folder is checked before it is believed: each weight file against its own header, and
against `manifest.json` where there is one. No code that comes with a model is ever run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hypersd.hub import REVISIONS, again, digest, fetched, place, told
from hypersd.records import InputError

if TYPE_CHECKING:
    import torch

LORAS = Path("runs/lora")  # below a base model's name, what was fetched or learned for one from the hub
ACCEPTED = "licence-accepted.txt"  # there too: which licence, of a base model that is not for commerce
MANIFEST = "manifest.json"  # {"files": {"unet/...safetensors": sha256, ...}, "bytes": {same paths: size}}
HEADER_MAX = 100_000_000  # bytes of a safetensors header; the format's own limit
TRANSFORMERS, DIFFUSERS = "model", "diffusion_pytorch_model"  # what the two libraries name their weight files


class ModelError(InputError):
    """A model's folder cannot be used. The message names the file, what is wrong with it and what to do."""


@dataclass(frozen=True)
class Part:
    """One part of a pipeline with weights: its class, the library it is of, and whether it is the denoiser."""

    library: str
    kind: str
    denoiser: bool = False

    @property
    def stem(self) -> str:
        """Name of the weight file without its ending."""
        return TRANSFORMERS if self.library == "transformers" else DIFFUSERS


CLIP, PROJECTED = Part("transformers", "CLIPTextModel"), Part("transformers", "CLIPTextModelWithProjection")
T5, VAE = Part("transformers", "T5EncoderModel"), Part("diffusers", "AutoencoderKL")
UNET = Part("diffusers", "UNet2DConditionModel", denoiser=True)
FAMILIES: dict[str, dict[str, Part]] = {  # the pipeline that model_index.json names -> its parts with weights
    "StableDiffusionPipeline": {"text_encoder": CLIP, "unet": UNET, "vae": VAE},
    "StableDiffusionXLPipeline": {"text_encoder": CLIP, "text_encoder_2": PROJECTED, "unet": UNET, "vae": VAE},
    "StableDiffusion3Pipeline": {
        "text_encoder": PROJECTED,
        "text_encoder_2": PROJECTED,
        "text_encoder_3": T5,
        "vae": VAE,
        "transformer": Part("diffusers", "SD3Transformer2DModel", denoiser=True),
    },
    "FluxPipeline": {
        "text_encoder": CLIP,
        "text_encoder_2": T5,
        "vae": VAE,
        "transformer": Part("diffusers", "FluxTransformer2DModel", denoiser=True),
    },
}

BASES = {  # the pipeline -> the base model whose descendants most of its kind are
    "StableDiffusionPipeline": "sd15",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
}


def tokenizer_of(part: str) -> str:
    """text_encoder_2 -> tokenizer_2"""
    return part.replace("text_encoder", "tokenizer")


@dataclass(frozen=True)
class Preset:
    """A base model that can be asked for by name: a folder beside the package, or a repository on the hub.

    `variant` is "fp16" where the half-precision files are enough: they are half as long to fetch. `quick` is a small
    decoder for its latents, on the hub. One that is not `commercial` waits until somebody accepts its licence.
    """

    source: str
    licence: str
    summary: str
    variant: str = ""
    quick: str = ""
    commercial: bool = True


BACKBONES = {
    "emoji": Preset(
        "assets/emoji-sd",
        "Apache-2.0, artwork credited in assets",
        "128 px emoji, trained by this repository, comes with it",
    ),
    "sd15": Preset(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "CreativeML OpenRAIL-M",
        "Stable Diffusion 1.5, 512 px, 4 GB from the Hugging Face hub",
        quick="madebyollin/taesd",
    ),
    "sdxl": Preset(
        "stabilityai/stable-diffusion-xl-base-1.0",
        "CreativeML OpenRAIL++-M",
        "Stable Diffusion XL, 1024 px, 7 GB from the Hugging Face hub",
        variant="fp16",
        quick="madebyollin/taesdxl",
    ),
    "sd3": Preset(
        "stabilityai/stable-diffusion-3-medium-diffusers",
        "Stability AI Community License, to be accepted on the hub",
        "Stable Diffusion 3 medium, 1024 px, 16 GB from the Hugging Face hub; for drawing only",
        quick="madebyollin/taesd3",
    ),
    "flux": Preset(
        "black-forest-labs/FLUX.1-dev",
        "FLUX.1 [dev] Non-Commercial License, to be accepted on the hub",
        "FLUX.1 dev, 1024 px, 34 GB from the Hugging Face hub; for drawing only",
        quick="madebyollin/taef1",
        commercial=False,
    ),
}


# ------------------------------------------------------------------------------------------------------ which


def find_folder(name_or_folder: str | Path) -> tuple[str, Path, str]:
    """(name, folder, licence) of a preset or a local folder; a hub preset is fetched where it is not cached.

    Raises:
        ModelError: neither a preset nor a folder, or the hub cannot be reached, or the licence waits to be accepted.
    """
    name = str(name_or_folder)
    if name not in BACKBONES:
        folder = Path(name)
        if not (name and _is_folder(folder)):
            raise ModelError(f"backbone must be one of {', '.join(BACKBONES)} or a model's folder, got {name[:80]!r}")
        return folder.resolve().name, folder, licence(name)
    preset = BACKBONES[name]
    if name == "emoji":
        return name, Path(__file__).parent.parent / preset.source, licence(name)
    check_accepted(name)
    return name, _fetch(name, preset), licence(name)


def licence(name_or_folder: str) -> str:
    preset = BACKBONES.get(name_or_folder)
    return preset.licence if preset else "as stated by the model's maker"


def check_accepted(name_or_folder: str) -> None:
    """ModelError if it is a preset that is not for commerce and nobody here has accepted that; a folder is a person's
    own."""
    preset = BACKBONES.get(name_or_folder)
    if preset is None or preset.commercial:
        return
    try:
        said = (LORAS / name_or_folder / ACCEPTED).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        said = ""
    if said != preset.licence:
        raise ModelError(
            f"{name_or_folder} is {preset.source}, not for commerce ({preset.licence}); if that suits you, type: "
            f"python -m hypersd fetch {name_or_folder} --accept-licence"
        )


def accept(name_or_folder: str) -> None:
    """Remember that somebody accepts the licence of a preset that is not for commerce.

    Raises:
        ModelError: it cannot be written down.
    """
    preset = BACKBONES.get(name_or_folder)
    if preset is None or preset.commercial:
        return
    file = LORAS / name_or_folder / ACCEPTED
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{preset.licence}\n", encoding="utf-8")
    except OSError as error:
        raise ModelError(
            f"{file} cannot be written ({error.strerror}); go to a folder that can be written to"
        ) from None


def measured(name_or_folder: str) -> Path:
    """Where README and app find what was measured of a backbone: a folder of its own for each but the embedded one."""
    assets = Path(__file__).parent.parent / "assets" / "measured"
    return assets if name_or_folder == "emoji" else assets / Path(name_or_folder).name


def cached(name: str) -> Path | None:
    """The folder of a hub preset that is on this machine already; None if it is not, or no preset. Fetches nothing."""
    from huggingface_hub import try_to_load_from_cache

    if name not in BACKBONES or name == "emoji":
        return None
    preset = BACKBONES[name]
    file = try_to_load_from_cache(preset.source, "model_index.json", revision=REVISIONS[preset.source])
    return Path(file).parent if isinstance(file, str) else None


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name longer than any file system takes
        return False


def _fetch(name: str, preset: Preset) -> Path:
    """The snapshot of a hub repository, downloaded where it is not cached; only the files that loading reads."""
    wanted = ["model_index.json", "scheduler/*.json", "tokenizer*/*"]
    for part, about in {p: a for family in FAMILIES.values() for p, a in family.items()}.items():
        wanted += [f"{part}/config.json", *weight_patterns(part, about, preset.variant)]
    try:
        return fetched(preset.source, wanted, "give the folder of a copy", preset.summary.partition(",")[0])
    except InputError as problem:
        raise ModelError(f"{name}: {problem}") from problem


def weight_patterns(part: str, about: Part, variant: str = "") -> list[str]:
    """What the files of a part's weights are called on the hub, in one or in shards."""
    stem = f"{about.stem}.{variant}" if variant else about.stem
    shards = [f"{part}/{stem}-*.safetensors", f"{part}/{about.stem}.safetensors.index*.json"]
    return [f"{part}/{stem}.safetensors", *shards]


# ------------------------------------------------------------------------------------------------ is it whole


def parts(folder: Path, name: str) -> dict[str, Part]:
    """The parts with weights of the pipeline in a folder.

    Raises:
        ModelError: its kind of pipeline is not one of FAMILIES.
    """
    kind = read_json(folder, name, "model_index.json").get("_class_name")
    if kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ModelError(f"{name}: model_index.json is for {kind}; choose a folder of one of {known}")
    return FAMILIES[kind]


def check_folder(folder: Path, name: str) -> None:
    """Every file that loading needs is there and as long as its header and the manifest say. Reads headers only.

    Raises:
        ModelError: names the first file that is not, and what to do.
    """
    family = parts(folder, name)
    for path in ("scheduler/scheduler_config.json", *(f"{part}/config.json" for part in family)):
        read_json(folder, name, path)
    check_tokenizers(folder, name)
    listed: dict[str, int] = _manifest(folder, name).get("bytes", {})
    for path, size in listed.items():
        check_file(folder / path, name, folder, size)
    for file in (file for part, about in family.items() for file in weight_files(folder, name, part, about)):
        check_file(file, name, folder)


def check_file(file: Path, name: str, folder: Path, size: int | None = None) -> None:
    """It is there and has `size` bytes; a weight file, where none is given, as many as its header says.

    Raises:
        ModelError: it is not, or has not.
    """
    size = _declared_bytes(file, name) if size is None else size
    path = file.relative_to(folder).as_posix()
    if not file.is_file():
        raise ModelError(f"{name}: {path} is missing; {remedy(name, file)}")
    if file.stat().st_size != size:
        found = f"{file.stat().st_size:,} bytes instead of {size:,}"
        raise ModelError(f"{name}: {path} is truncated or damaged ({found}); {remedy(name, file)}")


def check_tokenizers(folder: Path, name: str) -> None:
    """Each text encoder has a tokenizer. Raises ModelError, which names the first that is missing."""
    for tokenizer in (tokenizer_of(part) for part in parts(folder, name) if part.startswith("text_encoder")):
        files = [folder / tokenizer / file for file in ("tokenizer.json", "vocab.json")]
        if not any(file.is_file() for file in files):
            raise ModelError(f"{name}: {tokenizer}/tokenizer.json is missing; {remedy(name, files[0])}")


def weight_files(folder: Path, name: str, part: str, about: Part) -> list[Path]:
    """The part's safetensors files, more than one where they are shards; full precision where both are there.

    Raises:
        ModelError: there are none, or the index of shards cannot be read.
    """
    for variant in ("", ".fp16"):
        single = folder / part / f"{about.stem}{variant}.safetensors"
        if single.is_file():
            return [single]
        index = f"{part}/{about.stem}.safetensors.index{variant}.json"
        if (folder / index).is_file():
            shards = read_json(folder, name, index).get("weight_map", {})
            return [folder / part / Path(file).name for file in sorted(set(shards.values()))]
    raise ModelError(f"{name}: {part}/{about.stem}.safetensors is missing; {remedy(name, single)}")


def _declared_bytes(file: Path, name: str) -> int:
    path = f"{file.parent.name}/{file.name}"
    try:
        return header(file).size
    except FileNotFoundError:
        raise ModelError(f"{name}: {path} is missing; {remedy(name, file)}") from None
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{name}: {path} is truncated or damaged (no readable header); {remedy(name, file)}"
        ) from error


class Header(NamedTuple):
    """What a safetensors file begins with: {name: {"dtype", "shape", "data_offsets"}}, texts, the file's own size."""

    tensors: dict[str, Any]
    metadata: dict[str, str]
    size: int


class NoSafetensors(ValueError):
    """The first bytes are those of another format, read as a number."""


def header(file: Path) -> Header:
    """Read no more than 8 bytes with the header's length, and the header.

    Raises:
        OSError: the file cannot be read.
        NoSafetensors, ValueError: it is of another format, or cut short or damaged.
    """
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if length > HEADER_MAX:
            raise NoSafetensors if len(start) == 8 else ValueError("cut short")
        text = stream.read(length)
    try:
        tensors: dict[str, Any] = json.loads(text)
        metadata = dict(tensors.pop("__metadata__", {}))
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        return Header(tensors, metadata, 8 + length + end)
    except (LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("no readable header") from error


def read_json(folder: Path, name: str, path: str) -> dict[str, Any]:
    """The JSON object in one of a model's files. Raises ModelError, which names it, where there is none."""
    try:
        content = json.loads((folder / path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{name}: {path} is missing; {remedy(name, folder / path)}") from None
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{name}: {path} cannot be read ({type(error).__name__}); {remedy(name, folder / path)}"
        ) from error
    if not isinstance(content, dict):
        raise ModelError(f"{name}: {path} holds no JSON object; {remedy(name, folder / path)}")
    return content


def _manifest(folder: Path, name: str) -> dict[str, Any]:
    return read_json(folder, name, MANIFEST) if (folder / MANIFEST).is_file() else {}


def remedy(name: str, file: Path | None = None) -> str:
    """What to do about a model that is damaged or not whole; `file` is the one that it is, where that is known."""
    if name == "emoji":
        return f"restore it with `git checkout -- {BACKBONES[name].source}`"
    if name in BACKBONES:
        if file and not file.is_file():
            return "fetch it while HF_HUB_OFFLINE is not set, or give the folder of a copy"
        return again(file or place(BACKBONES[name].source))
    return "copy the model's folder again from where it came"


# -------------------------------------------------------------------------------------------------- loading it


def load_parts(folder: Path, name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Every part, in `dtype`, and a tokenizer for each text encoder, by the names diffusers gives them.

    Raises:
        ModelError: names the part that cannot be loaded, and why.
    """
    family = parts(folder, name)
    readers = [(tokenizer_of(part), about) for part, about in family.items() if part.startswith("text_encoder")]
    loaded = {tokenizer: _tokenizer(folder, name, tokenizer, about) for tokenizer, about in readers}
    return loaded | {part: _part(folder, name, part, about, dtype) for part, about in family.items()}


def _tokenizer(folder: Path, name: str, part: str, encoder: Part) -> Any:
    from transformers import AutoTokenizer, CLIPTokenizer

    kind = AutoTokenizer if encoder is T5 else CLIPTokenizer
    with _explained(folder, name, part):
        return kind.from_pretrained(folder / part, local_files_only=True)


def _part(folder: Path, name: str, part: str, about: Part, dtype: torch.dtype) -> Any:
    """One part of the model by the class that wrote it. Imports here, since they take seconds."""
    kind = getattr(import_module(about.library), about.kind)
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    options["dtype" if about.library == "transformers" else "torch_dtype"] = dtype
    if ".fp16" in weight_files(folder, name, part, about)[0].name:
        options["variant"] = "fp16"
    with _explained(folder, name, part), _quiet():
        model, report = kind.from_pretrained(folder / part, **options)
    if lost := sorted(report["missing_keys"]):  # both libraries would go on with random numbers in their place
        raise ModelError(f"{name}: {part} lacks {len(lost)} tensors such as {lost[0]}; {remedy(name)}")
    return model


def denoiser_shapes(folder: Path, name: str) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the denoiser's weights, from the headers of their files.

    Raises:
        ModelError: they are not there, or damaged.
    """
    part, files = _denoiser_files(folder, name)
    with _explained(folder, name, part):
        return {key: tuple(told["shape"]) for file in files for key, told in header(file).tensors.items()}


def denoiser_weights(folder: Path, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, value) of each of the denoiser's weights as they lie on disk, one after the other.

    Raises:
        ModelError: they are not there any more, or damaged.
    """
    from safetensors import safe_open

    part, files = _denoiser_files(folder, name)
    with _explained(folder, name, part):
        for path in files:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - no mapping
                    yield key, file.get_tensor(key)


def _denoiser_files(folder: Path, name: str) -> tuple[str, list[Path]]:
    family = parts(folder, name)
    part = next(part for part, about in family.items() if about.denoiser)
    return part, weight_files(folder, name, part, family[part])


def load_decoder(name: str, place: str, dtype: torch.dtype) -> Any:
    """A small decoder of TAESD's kind (AutoencoderTiny): `place` is "quick", for the preset's, or a folder.

    Raises:
        ModelError: there is none for this model, or it cannot be read.
        InputError: it cannot be fetched.
    """
    from diffusers import AutoencoderTiny

    preset = BACKBONES.get(name)
    known = preset.quick if preset else ""
    if place == "quick" and not known:
        raise ModelError(f"no quick decoder is known for {name}; give the folder of one instead of 'quick'")
    files = ("config.json", f"{DIFFUSERS}.safetensors")
    folder = fetched(known, files, "leave the decoder out", "a quick decoder") if place == "quick" else Path(place)
    try:
        return AutoencoderTiny.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True)
    except Exception as error:  # diffusers raises its own, the hub's and the system's errors
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        raise ModelError(f"the decoder {place} cannot be loaded ({reason}); leave it out, or give a folder") from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All of a safetensors file. Raises ModelError: it cannot be read, or is cut off."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as problem:
        raise ModelError(f"{path} cannot be read ({type(problem).__name__}); copy or make it again") from problem


@contextmanager
def _explained(folder: Path, name: str, part: str) -> Iterator[None]:
    """Any of the errors that both libraries raise, from KeyError to SafetensorError, as a ModelError."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".replace(str(folder), name).splitlines()[0][:200]
        raise ModelError(f"{name}: {part} cannot be loaded ({reason}); {remedy(name)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bar that transformers draws for every model, however small."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


# ------------------------------------------------------------------------------------------------- what it is


def weights_sha256(folder: Path, name: str) -> str:
    """One hash for all weights: sha256 over "path sha256" lines. Reads each file once (0.1 s for 50 MB).

    Raises:
        ModelError: a file is not the one the manifest names.
    """
    listed = _manifest(folder, name).get("files", {})
    lines = []
    for part, about in parts(folder, name).items():
        for file in weight_files(folder, name, part, about):
            path = file.relative_to(folder).as_posix()
            found = file_sha256(file)
            if listed.get(path, found) != found:
                raise ModelError(f"{name}: {path} is damaged (its hash is not the manifest's); {remedy(name)}")
            lines.append(f"{path} {found}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def encoders_sha256(folder: Path, name: str) -> str:
    """One hash over what turns pictures and texts into latents and states; the denoiser has no part in it."""
    encoders = {part: about for part, about in parts(folder, name).items() if not about.denoiser}
    files = [file for part, about in encoders.items() for file in weight_files(folder, name, part, about)]
    files += [folder / part / "config.json" for part in encoders]  # the scale of the latents stands here only
    for tokenizer in (tokenizer_of(part) for part in encoders if part.startswith("text_encoder")):
        files += sorted(f for f in (folder / tokenizer).iterdir() if f.is_file())
    return hashlib.sha256("".join(f"{f.name} {file_sha256(f)}\n" for f in files).encode()).hexdigest()


def network_sha256(folder: Path) -> str:
    """The hash of a model's denoiser, from its manifest where it has one; "" if there is no denoiser.

    It is what an adapter was made for. Of shards it is the hash of their hashes.
    """
    try:
        family = parts(folder, folder.name)
        part = next(part for part, about in family.items() if about.denoiser)
        files = weight_files(folder, folder.name, part, family[part])
    except ModelError:  # loading the model says what is wrong with it
        return ""
    listed: dict[str, Any] = {}
    with contextlib.suppress(ModelError, AttributeError):
        listed = _manifest(folder, folder.name).get("files", {})
    hashes = [str(listed.get(file.relative_to(folder).as_posix()) or file_sha256(file)) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(f"{h}\n" for h in hashes).encode()).hexdigest()


def file_sha256(file: Path) -> str:
    """Of a file's content; of one in the hub's cache its name there, which `hub` checked when it came, for gigabytes
    take seconds to hash: that the disk has changed it since is not seen."""
    return told(file) or digest(file)


def write_manifest(folder: Path) -> None:
    """List sha256 and size of every file of a model's folder in its manifest, which loading then checks against."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / MANIFEST)
    paths = [file.relative_to(folder).as_posix() for file in files]
    content = {
        "files": dict(zip(paths, map(file_sha256, files), strict=True)),
        "bytes": dict(zip(paths, (file.stat().st_size for file in files), strict=True)),
    }
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")
