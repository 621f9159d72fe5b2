"""The base model: prompt -> states, seed -> noise, network call, latents -> pixels; and the folders it is read from.

A folder in the layout of diffusers' StableDiffusionPipeline is read part by part with the classes that wrote it.
Weights are safetensors only, never pickles, and a folder is checked before it is believed: each weight file against
its own header, and against `manifest.json` where there is one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hypersd import nag
from hypersd.adapters import AdapterFile, fused, inspect
from hypersd.adapters import load as load_adapter
from hypersd.records import InputError
from hypersd.schedule import Schedule

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    from hypersd.compiled import Compiled, CompiledNetwork

MANIFEST = "manifest.json"  # {"files": {"unet/...safetensors": sha256, ...}, "bytes": {same paths: size}}
WEIGHTS = {  # part -> name of its weight file without the ending
    "text_encoder": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}
CACHED_PROMPTS = 256
ENGINES = ("torch", "openvino")
SMALL, FUSED_LARGE = 100_000_000, 2  # parameters; a large network is kept merged with so many adapters
FUSED_NETWORKS = 6  # kept merged with an adapter; the unchanged layers are shared with the base


class ModelError(InputError):
    """A model's folder cannot be used. The message names the file, what is wrong with it and what to do."""


@dataclass(frozen=True)
class Preset:
    """A base model that can be asked for by name: a folder beside the package, or a repository on the hub."""

    source: str
    licence: str
    summary: str


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
    ),
}


class Backbone:
    """One base model in memory, frozen. Latents and noise are float32; the network runs in `dtype` on `device`.

    `states` is whatever this model's network is conditioned on: made by `embed`, handed to `predict`, looked into by
    nobody else. A family with other parts brings its own class with these methods.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        licence: str,
        *,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        schedule: Schedule,
        engine: str = "torch",
    ) -> None:
        self.name, self.folder, self.licence = name, folder, licence
        self.tokenizer, self.schedule = tokenizer, schedule
        self.text_encoder = text_encoder.requires_grad_(False).eval()
        self.unet = unet.requires_grad_(False).eval()
        self.vae = vae.requires_grad_(False).eval()
        self.device: torch.device = unet.device
        self.dtype: torch.dtype = unet.dtype
        size = unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self.latent_shape: tuple[int, int, int] = (unet.config.in_channels, height, width)
        self._embed = lru_cache(CACHED_PROMPTS)(self._embed_now)
        kept = FUSED_NETWORKS if sum(p.numel() for p in unet.parameters()) < SMALL else FUSED_LARGE
        self._wearing = lru_cache(kept)(self._fuse)
        self._compiled_wearing = lru_cache(kept)(self._compile)
        self.engine, self._compiled = engine, self._trace() if engine == "openvino" else None

    @classmethod
    def load(
        cls,
        name_or_folder: str | Path,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        engine: str = "torch",
    ) -> Backbone:
        """A preset of BACKBONES by name, or any folder in StableDiffusionPipeline layout.

        Only a hub preset may use the network, and only for what is not in the local cache yet. `engine` is what
        draws, one of ENGINES: "openvino" takes some seconds to compile and is for drawing only.

        Raises:
            ModelError: no such model, or a file of it is missing, truncated or damaged.
            InputError: no such engine, or it is not installed, or not for this device or dtype.
        """
        if engine not in ENGINES:
            raise InputError(f"the engine must be one of {', '.join(ENGINES)}, got {engine[:40]!r}")
        name, folder, licence = find_folder(name_or_folder)
        check_folder(folder, name)
        parts = {part: _load_part(folder, name, part, dtype) for part in ("tokenizer", *WEIGHTS)}
        for part in WEIGHTS:
            parts[part].to(device)
        config = _read_json(folder, name, "scheduler/scheduler_config.json")
        return cls(name, folder, licence, schedule=Schedule.from_config(config), engine=engine, **parts)

    @cached_property
    def sha256(self) -> str:
        """One hash for all weights: sha256 over "path sha256" lines. Reads each file once (0.1 s for 50 MB).

        Raises:
            ModelError: a file is not the one the manifest names.
        """
        listed = _manifest(self.folder, self.name).get("files", {})
        lines = []
        for part in WEIGHTS:
            file = _weight_file(self.folder, self.name, part)
            path = file.relative_to(self.folder).as_posix()
            found = _file_sha256(file)
            if listed.get(path, found) != found:
                raise ModelError(
                    f"{self.name}: {path} is damaged (its hash is not the manifest's); {_remedy(self.name)}"
                )
            lines.append(f"{path} {found}\n")
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def picture_px(self) -> int:
        """Side of the square pictures it draws, in pixels."""
        return self.latent_shape[1] * 2 ** (len(self.vae.config.block_out_channels) - 1)

    @cached_property
    def encoders_sha256(self) -> str:
        """One hash over what turns pictures and texts into latents and states; the denoiser has no part in it."""
        parts = ("text_encoder", "vae")
        files = [_weight_file(self.folder, self.name, part) for part in parts]
        files += [self.folder / part / "config.json" for part in parts]  # the scale of the latents stands here only
        files += sorted(f for f in (self.folder / "tokenizer").iterdir() if f.is_file())
        return hashlib.sha256("".join(f"{f.name} {_file_sha256(f)}\n" for f in files).encode()).hexdigest()

    @cached_property
    def network_sha256(self) -> str:
        """sha256 of the denoiser's weight file: what an adapter was made for."""
        return _file_sha256(_weight_file(self.folder, self.name, "unet"))

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """States [n, tokens, width] of n texts, in the network's dtype. Each text is encoded once and remembered."""
        # cat copies: the remembered inference tensors, unfit for training, stay here and cannot be changed outside
        return torch.cat([self._embed(prompt) for prompt in prompts])

    def truncated(self, prompt: str) -> str:
        """The end of the prompt that does not fit into the text encoder and is ignored; "" if all of it is read."""
        room = self.tokenizer.model_max_length - 2  # the marks of start and end take one token each
        encoded = self.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets: list[tuple[int, int]] = encoded["offset_mapping"]
        return prompt[offsets[room][0] :] if len(offsets) > room else ""

    def noise(self, seed: int) -> tuple[Tensor, str]:
        """The initial latent [1, c, h, w], float32, and the sha256 of its little-endian bytes.

        Drawn on the CPU whatever the device, so that a seed means the same noise everywhere; equal to what a
        diffusers pipeline draws from `torch.Generator().manual_seed(seed)`.
        """
        x_t = torch.randn((1, *self.latent_shape), generator=torch.Generator().manual_seed(seed))
        digest = hashlib.sha256(x_t.numpy().astype("<f4", copy=False).tobytes()).hexdigest()
        return x_t.to(self.device), digest

    def predict(self, x_t: Tensor, t: int | Tensor, states: Tensor, adapter: AdapterFile | None = None) -> Tensor:
        """The network's raw output at x_t [n, c, h, w], float32; eps, v or x0 as `schedule.prediction` says.

        An adapter is merged into a copy of the layers it changes when it is first asked for; the last few are kept.

        Raises:
            ModelError, AdapterError: the adapter was made for another base, or its file cannot be read.
        """
        key = (adapter.path, adapter.sha256) if adapter else (None, "")
        if self._compiled and isinstance(t, int):
            return self._compiled_wearing(*key)(x_t, t, states)
        network = self._wearing(*key)
        output = network(x_t.to(self.dtype), t, encoder_hidden_states=states, return_dict=False)[0]
        return output.float()

    @contextmanager
    def away_from(self, negative: Tensor, scale: float, adapter: AdapterFile | None = None) -> Iterator[None]:
        """Within, `predict` with this adapter keeps away from a text, given by its states, as nag.py says.

        torch computes the network meanwhile, whatever the engine: a compiled one knows no other attention.
        """
        network = self._wearing(*(adapter.path, adapter.sha256) if adapter else (None, ""))
        compiled, self._compiled = self._compiled, None
        try:
            with nag.away_from(network, negative, scale):
                yield
        finally:
            self._compiled = compiled

    @torch.inference_mode(False)  # it is kept, and may be trained through after it was drawn with
    @torch.no_grad()
    def _fuse(self, path: Path | None, sha256: str) -> UNet2DConditionModel:
        if path is None:
            return self.unet
        file = inspect(path)
        if file.sha256 != sha256:
            raise ModelError(f"{path.name} was replaced by another file; start the app again")
        if file.card.base_sha256 != self.network_sha256:
            raise ModelError(
                f"{path.name} was trained on another base than {self.name}; "
                f"train it again with: python -m hypersd distill {file.card.method}"
            )
        return fused(self.unet, load_adapter(path), file.card.scale)

    def _trace(self) -> Compiled:
        from hypersd.compiled import Compiled

        return Compiled(self.unet, self.vae, (self.noise(0)[0], self.embed([""])))

    def _compile(self, path: Path | None, sha256: str) -> CompiledNetwork:
        assert self._compiled
        return self._compiled.network(self._fuse(path, sha256))  # the merged copy is not kept

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the latents of pictures, uint8 [n, height, width, 3] -> float32 [n, c, h, w] each."""
        image = pixels.to(self.device).permute(0, 3, 1, 2).to(self.dtype) / 127.5 - 1
        posterior = self.vae.encode(image).latent_dist
        scale = self.vae.config.scaling_factor
        return posterior.mean.float() * scale, posterior.std.float() * scale

    def picture(self, latents: Tensor) -> Tensor:
        """Latents [n, c, h, w] -> float32 [n, 3, height, width] around -1..1, with gradient if `latents` have one."""
        scaled = latents.to(self.dtype) / self.vae.config.scaling_factor
        if self._compiled:
            return self._compiled.decode(scaled)
        decoded: Tensor = self.vae.decode(scaled, return_dict=False)[0].float()
        return decoded

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [n, c, h, w] -> pixels, uint8 [n, height, width, 3] on the CPU, rounded as diffusers does."""
        image = self.picture(latents)
        return ((image / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()

    @torch.inference_mode()
    def _embed_now(self, prompt: str) -> Tensor:
        tokens = self.tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
        states: Tensor = self.text_encoder(tokens.to(self.device))[0]
        return states.to(self.dtype)


def find_folder(name_or_folder: str | Path) -> tuple[str, Path, str]:
    """(name, folder, licence) of a preset or a local folder; a hub preset is fetched where it is not cached.

    Raises:
        ModelError: neither a preset nor a folder, or the hub cannot be reached.
    """
    name = str(name_or_folder)
    if name not in BACKBONES:
        folder = Path(name)
        if not (name and _is_folder(folder)):
            raise ModelError(f"backbone must be one of {', '.join(BACKBONES)} or a model's folder, got {name[:80]!r}")
        return folder.resolve().name, folder, "as stated by the model's maker"
    preset = BACKBONES[name]
    beside = Path(__file__).parent.parent / preset.source
    if name == "emoji":
        return name, beside, preset.licence
    return name, _fetch(name, preset.source), preset.licence


def cached(name: str) -> Path | None:
    """The folder of a hub preset that is on this machine already; None if it is not, or no preset. Fetches nothing."""
    from huggingface_hub import try_to_load_from_cache

    if name not in BACKBONES or name == "emoji":
        return None
    file = try_to_load_from_cache(BACKBONES[name].source, "model_index.json")
    return Path(file).parent if isinstance(file, str) else None


def best_device() -> tuple[str, torch.dtype]:
    """Where to draw, and in which numbers: a GPU in half precision if there is one."""
    return ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)


def check_folder(folder: Path, name: str) -> None:
    """Every file that loading needs is there and as long as its header and the manifest say. Reads headers only.

    Raises:
        ModelError: names the first file that is not, and what to do.
    """
    kind = _read_json(folder, name, "model_index.json").get("_class_name")
    if kind != "StableDiffusionPipeline":
        raise ModelError(f"{name}: model_index.json is for {kind}; only StableDiffusionPipeline folders can be read")
    for path in ("scheduler/scheduler_config.json", *(f"{part}/config.json" for part in WEIGHTS)):
        _read_json(folder, name, path)
    if not any((folder / "tokenizer" / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        raise ModelError(f"{name}: tokenizer/tokenizer.json is missing; {_remedy(name)}")
    listed: dict[str, int] = _manifest(folder, name).get("bytes", {})
    expected = [(folder / path, size) for path, size in listed.items()]
    expected += [(file, _declared_bytes(file, name)) for file in (_weight_file(folder, name, part) for part in WEIGHTS)]
    for file, size in expected:
        path = file.relative_to(folder).as_posix()
        if not file.is_file():
            raise ModelError(f"{name}: {path} is missing; {_remedy(name)}")
        if file.stat().st_size != size:
            found = f"{file.stat().st_size:,} bytes instead of {size:,}"
            raise ModelError(f"{name}: {path} is truncated or damaged ({found}); {_remedy(name)}")


def write_manifest(folder: Path) -> None:
    """List sha256 and size of every file of a model's folder in its manifest, which `load` then checks against."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / MANIFEST)
    paths = [file.relative_to(folder).as_posix() for file in files]
    content = {
        "files": dict(zip(paths, map(_file_sha256, files), strict=True)),
        "bytes": dict(zip(paths, (file.stat().st_size for file in files), strict=True)),
    }
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")


def _load_part(folder: Path, name: str, part: str, dtype: torch.dtype) -> Any:
    """One part of the model by the class that wrote it. Imports here, since they take seconds."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    place = folder / part
    try:
        if part == "tokenizer":
            return CLIPTokenizer.from_pretrained(place, local_files_only=True)
        options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
        if ".fp16." in _weight_file(folder, name, part).name:
            options["variant"] = "fp16"
        if part == "text_encoder":
            with _quiet():
                model, report = CLIPTextModel.from_pretrained(place, dtype=dtype, **options)
        else:
            kind = UNet2DConditionModel if part == "unet" else AutoencoderKL
            model, report = kind.from_pretrained(place, torch_dtype=dtype, **options)
    except ModelError:
        raise
    except Exception as error:  # both libraries raise anything from KeyError to SafetensorError
        reason = f"{type(error).__name__}: {error}".replace(str(folder), name).splitlines()[0][:200]
        raise ModelError(f"{name}: {part} cannot be loaded ({reason}); {_remedy(name)}") from error
    if lost := sorted(report["missing_keys"]):  # both libraries would go on with random numbers in their place
        raise ModelError(f"{name}: {part} lacks {len(lost)} tensors such as {lost[0]}; {_remedy(name)}")
    return model


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


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name longer than any file system takes
        return False


def _fetch(name: str, repository: str) -> Path:
    """The snapshot of a hub repository, downloaded where it is not cached; only the files that `load` reads."""
    from huggingface_hub import snapshot_download

    wanted = ["model_index.json", "scheduler/*.json", "tokenizer/*", *(f"{part}/config.json" for part in WEIGHTS)]
    wanted += [f"{part}/{stem}.safetensors" for part, stem in WEIGHTS.items()]
    try:
        return Path(snapshot_download(repository, allow_patterns=wanted))
    except Exception as error:  # the hub's client raises its own, httpx's and the system's errors
        raise ModelError(
            f"{name}: {repository} could not be fetched from the Hugging Face hub ({type(error).__name__}); "
            "check the network, or give the folder of a copy"
        ) from error


def _read_json(folder: Path, name: str, path: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{name}: {path} is missing; {_remedy(name)}") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{name}: {path} cannot be read ({type(error).__name__}); {_remedy(name)}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{name}: {path} holds no JSON object; {_remedy(name)}")
    return content


def _manifest(folder: Path, name: str) -> dict[str, Any]:
    return _read_json(folder, name, MANIFEST) if (folder / MANIFEST).is_file() else {}


def _weight_file(folder: Path, name: str, part: str) -> Path:
    """The part's safetensors file: full precision where both are there."""
    files = [folder / part / f"{WEIGHTS[part]}{ending}" for ending in (".safetensors", ".fp16.safetensors")]
    for file in files:
        if file.is_file():
            return file
    raise ModelError(f"{name}: {part}/{files[0].name} is missing; {_remedy(name)}")


def _declared_bytes(file: Path, name: str) -> int:
    """The size that a safetensors file must have: 8 bytes with the header's length, the header, the last tensor."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > 100_000_000:  # the format's own limit
                raise ValueError("header too long")
            header: dict[str, Any] = json.loads(stream.read(length))
        return 8 + length + max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        path = f"{file.parent.name}/{file.name}"
        raise ModelError(f"{name}: {path} is truncated or damaged (no readable header); {_remedy(name)}") from error


def _file_sha256(file: Path) -> str:
    blob = file.resolve().name
    if file.is_symlink() and len(blob) == 64 and set(blob) <= set("0123456789abcdef"):
        return blob  # the hub's cache names large files by their sha256; hashing 4 GB again would take seconds
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _remedy(name: str) -> str:
    if name == "emoji":
        return f"restore it with `git checkout -- {BACKBONES[name].source}`"
    if name in BACKBONES:
        return "delete it from the Hugging Face cache and try again"
    return "copy the model's folder again from where it came"
