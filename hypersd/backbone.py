"""The base model: prompt -> states, seed -> noise, network call, latents -> pixels. One class a family."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hypersd import folders, nag
from hypersd.adapters import AdapterFile, Lora, Outfit, dressed, inspect
from hypersd.adapters import load as load_adapter
from hypersd.folders import ModelError
from hypersd.network import SIZES, call, conditions, packed, pooled_width
from hypersd.records import InputError
from hypersd.schedule import FlowSchedule, Schedule
from hypersd.single import laid_out
from hypersd.wardrobe import GIGABYTE, Wardrobe
from hypersd.whole import Whole

if TYPE_CHECKING:
    from hypersd.compiled import Compiled, CompiledNetwork

CACHED_PROMPTS = 256
ENGINES = ("torch", "openvino")
RESERVE = 4 * GIGABYTE  # left free of adapters for drawing 1024 x 1024 pixels, most of it for the decoder
COMPILED = 6  # networks of the other engine that are kept


class Backbone:
    """One base model in memory, frozen. Latents and noise are float32; the network runs in `dtype` on `device`.

    `states` is whatever this model's network is conditioned on: made by `embed`, handed to `predict`, looked into by
    nobody else. A family with other parts brings its own class with these methods.
    """

    denoiser = "unet"  # the part that is one
    trainable = True
    tells_guidance = False  # whether the network is told the scale of guidance, instead of being called twice
    spares_memory = False  # whether a full GPU made it
    quick = ""  # the small decoder that it draws with, as it was asked for
    half = torch.float16  # what it is drawn in on a GPU

    def __init__(
        self, name: str, folder: Path, licence: str, parts: dict[str, Any], schedule: Schedule, engine: str = "torch"
    ) -> None:
        """`parts` are the tokenizers and models by the names diffusers gives them, on one device."""
        self.name, self.folder, self.licence, self.schedule = name, folder, licence, schedule
        self.tokenizer = parts["tokenizer"]
        self.text_encoder, self.unet, self.vae = (
            parts[part].requires_grad_(False).eval() for part in ("text_encoder", self.denoiser, "vae")
        )
        if self.vae.config.get("force_upcast") and self.vae.dtype == torch.float16:
            self.vae.float()  # it overflows in half precision
        self.decoder = self.vae  # or a quicker one
        self.components = parts
        self.device: torch.device = self.unet.device
        self.dtype: torch.dtype = self.unet.dtype
        self.latent_shape: tuple[int, int, int] = self._latent_shape()
        self._embed = lru_cache(CACHED_PROMPTS)(self._embed_now)
        reserve = RESERVE * self.picture_px**2 // 1024**2
        self.wardrobe = Wardrobe(self.unet, reserve, stored=lambda: folders.denoiser_weights(folder, name))
        self._compiled_wearing = lru_cache(COMPILED)(self._compile)
        self.engine, self._compiled = engine, self._trace() if engine == "openvino" else None

    @classmethod
    def load(
        cls,
        name_or_folder: str | Path,
        *,
        device: str = "cpu",
        dtype: torch.dtype | None = torch.float32,
        engine: str = "torch",
        decoder: str = "",
        offload: bool = False,
    ) -> Backbone:
        """A preset of BACKBONES by name, any folder that diffusers wrote of a pipeline in CLASSES, or a single file.

        Only a hub preset may use the network, and only for what is not in the local cache yet. Without a `dtype` it is
        the model's half precision on a GPU, float32 elsewhere. `engine` is what draws, one of ENGINES: "openvino" takes
        some seconds to compile and is for drawing only. `decoder` is "quick" or a folder, for a small decoder that
        draws a little less well; with `offload` the text encoders and the decoder visit the device only while they
        work, which leaves room for the network.

        Raises:
            ModelError: no such model, or a file of it is missing, truncated or damaged.
            InputError: no such engine, or not for this device or dtype, or not installed; or the GPU is too small.
        """
        if engine not in ENGINES:
            raise InputError(f"the engine must be one of {', '.join(ENGINES)}, got {engine[:40]!r}")
        if decoder and engine != "torch":
            raise InputError(f"the {engine} engine brings its own decoder; leave one of the two out")
        if decoder not in ("", "quick") and not Path(decoder).is_dir():  # told before gigabytes are fetched
            raise ModelError(f"the decoder must be 'quick' or the folder of one, got {decoder[:80]!r}")
        name, folder, licence = folders.find_folder(laid_out(name_or_folder))
        folders.check_folder(folder, name)
        family = CLASSES[folders.read_json(folder, name, "model_index.json")["_class_name"]]
        dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else family.half)
        parts = folders.load_parts(folder, name, dtype)
        about = folders.parts(folder, name)
        try:
            for part in about:
                parts[part].to(device if about[part].denoiser or not offload else "cpu")
        except torch.cuda.OutOfMemoryError as problem:
            raise no_room(name) from problem
        schedule = family.trajectory(folders.read_json(folder, name, "scheduler/scheduler_config.json"), parts)
        made = family(name, folder, licence, parts, schedule, engine)
        if decoder:
            made.decoder = folders.load_decoder(name, decoder, dtype).to("cpu" if offload else device)
            made.quick = decoder
        return made

    @staticmethod
    def trajectory(config: dict[str, Any], parts: dict[str, Any]) -> Schedule:
        """The noise schedule, from the scheduler's configuration and, where it depends on them, the parts."""
        return Schedule.from_config(config)

    def _latent_shape(self) -> tuple[int, int, int]:
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width

    @cached_property
    def sha256(self) -> str:
        """One hash for all weights. Reads each file once (0.1 s for 50 MB).

        Raises:
            ModelError: a file is not the one the manifest names.
        """
        return folders.weights_sha256(self.folder, self.name)

    @property
    def picture_px(self) -> int:
        """Side of the square pictures it draws, in pixels."""
        return self.latent_shape[1] * 2 ** (len(self.vae.config.block_out_channels) - 1)

    @cached_property
    def encoders_sha256(self) -> str:
        """One hash over what turns pictures and texts into latents and states; the denoiser has no part in it."""
        return folders.encoders_sha256(self.folder, self.name)

    @cached_property
    def network_sha256(self) -> str:
        """The hash of the denoiser's weights: what an adapter was made for."""
        return folders.network_sha256(self.folder)

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """States [n, tokens, width] of n texts, in the network's dtype. Each text is encoded once and remembered."""
        # cat copies: the remembered inference tensors, unfit for training, stay here and cannot be changed outside
        return torch.cat([self._embed(prompt) for prompt in prompts])

    def guided(self, states: Tensor, g: float) -> Tensor:
        """The states for guidance g, where the network is told it."""
        return states

    def sized(self, states: Tensor, smaller: int) -> Tensor:
        """The states for pictures whose side is divided by `smaller`, where the network is told how large they are."""
        return states

    def truncated(self, prompt: str) -> str:
        """The end of the prompt that does not fit into the text encoder and is ignored; "" if all of it is read."""
        room = self.tokenizer.model_max_length - 2  # the marks of start and end take one token each
        encoded = self.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets: list[tuple[int, int]] = encoded["offset_mapping"]
        return prompt[offsets[room][0] :] if len(offsets) > room else ""

    def noise(self, seed: int, smaller: int = 1) -> tuple[Tensor, str]:
        """The initial latent [1, c, h, w], float32, and the sha256 of its little-endian bytes.

        That of a smaller picture is no part of the larger one's: its height and width are divided by `smaller`.

        Drawn on the CPU whatever the device, so that a seed means the same noise everywhere; equal to what a
        diffusers pipeline draws from `torch.Generator().manual_seed(seed)`.
        """
        channels, height, width = self.latent_shape
        shape = 1, channels, height // smaller, width // smaller
        x_t = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        digest = hashlib.sha256(x_t.numpy().astype("<f4", copy=False).tobytes()).hexdigest()
        return x_t.to(self.device), digest

    def predict(self, x_t: Tensor, t: int | Tensor, states: Tensor, adapter: AdapterFile | None = None) -> Tensor:
        """The network's raw output at x_t [n, c, h, w], float32; eps, v or x0 as `schedule.prediction` says.

        An adapter is merged when it is first asked for, see `Wardrobe`.

        Raises:
            ModelError, AdapterError: the adapter was made for another base, or its file cannot be read.
        """
        if self._compiled and isinstance(t, int) and x_t.shape[1:] == self.latent_shape:
            return self._compiled_wearing(*((adapter.path, adapter.sha256) if adapter else (None, "")))(x_t, t, states)
        return self._call(self._worn(adapter), x_t.to(self.dtype), t, states).float()

    def _call(self, network: Any, x_t: Tensor, t: int | Tensor, states: Tensor) -> Tensor:
        return call(network, x_t, t, states)

    def spare_memory(self) -> None:
        """Take less of the GPU's memory from now on: fewer merged copies, decode in tiles.

        Tiles are a quarter of a picture, blended where they overlap; decoding them takes the most memory of a drawing.
        Attention is not sliced: torch's own never holds the matrix that slices are for.
        """
        self.wardrobe.spare()
        if not self.spares_memory:
            self.decoder.enable_tiling()
            self.decoder.tile_sample_min_size //= 2  # which is a whole picture
            self.decoder.tile_latent_min_size //= 2
            if self.decoder.tile_latent_min_size % 4:  # a quarter of it, by which tiles overlap, has to be whole
                self.decoder.tile_overlap_factor = 0.5
            self.spares_memory = True
        torch.cuda.empty_cache()

    @contextmanager
    def away_from(self, negative: Tensor, scale: float, adapter: AdapterFile | None = None) -> Iterator[None]:
        """Within, `predict` with this adapter keeps away from a text, given by its states, as nag.py says.

        torch computes the network meanwhile, whatever the engine: a compiled one knows no other attention.

        Raises:
            InputError: the network is no UNet.
        """
        if self.denoiser != "unet":
            raise InputError(f"nag leads UNets away from a negative prompt, not {self.name}; leave nag out")
        worn = self._worn(adapter)
        compiled, self._compiled = self._compiled, None
        try:
            with nag.away_from(worn, conditions(worn, negative)["encoder_hidden_states"], scale):
                yield
        finally:
            self._compiled = compiled

    @torch.inference_mode(False)  # what is merged is kept, and may be trained through after it was drawn with
    @torch.no_grad()
    def _worn(self, adapter: AdapterFile | None) -> Any:
        if adapter is None:
            return self.wardrobe.bare()
        return self.wardrobe.wear((adapter.path, adapter.sha256), lambda: self._read(adapter.path, adapter.sha256))

    def _read(self, path: Path, sha256: str) -> Outfit:
        """An adapter that was made for this base, to be worn."""
        file = inspect(path)
        if file.sha256 != sha256:
            raise ModelError(f"{path.name} was replaced by another file; start the app again")
        if file.card.base_sha256 != self.network_sha256:
            raise ModelError(
                f"{path.name} was trained on another base than {self.name}; "
                f"train it again with: python -m hypersd distill {file.card.method}, or fetch it again"
            )
        if file.card.kind == "lora":
            return Lora(load_adapter(path), file.card.scale)
        return Whole(path, difference=file.card.kind == "difference")

    def _trace(self) -> Compiled:
        from hypersd.compiled import Compiled

        return Compiled(self.unet, self.vae, (self.noise(0)[0], self.embed([""])))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _compile(self, path: Path | None, sha256: str) -> CompiledNetwork:
        assert self._compiled
        bare = self.wardrobe.bare()  # torch may have drawn with it, in place
        return self._compiled.network(dressed(bare, self._read(path, sha256)) if path else bare)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the latents of pictures, uint8 [n, height, width, 3] -> float32 [n, c, h, w] each."""
        image = pixels.to(self.device).permute(0, 3, 1, 2).to(self.vae.dtype) / 127.5 - 1
        with self._at_work(self.vae) as vae:
            posterior = vae.encode(image).latent_dist
        scale = self.vae.config.scaling_factor
        shift = float(self.vae.config.get("shift_factor") or 0.0)
        return (posterior.mean.float() - shift) * scale, posterior.std.float() * scale

    def picture(self, latents: Tensor) -> Tensor:
        """Latents [n, c, h, w] -> float32 [n, 3, height, width] around -1..1, with gradient if `latents` have one."""
        about, dtype = self.decoder.config, self.decoder.dtype
        scaled = latents.to(dtype) / about.scaling_factor + float(about.get("shift_factor") or 0.0)
        if self._compiled and latents.shape[1:] == self.latent_shape:
            return self._compiled.decode(scaled)
        with self._at_work(self.decoder) as decoder:
            decoded: Tensor = decoder.decode(scaled, return_dict=False)[0].float()
        return decoded

    @contextmanager
    def _at_work(self, part: Any) -> Iterator[Any]:
        """The part on the device, for as long as it works there if it rests elsewhere."""
        rests = part.device
        if rests == self.device:
            yield part
            return
        part.to(self.device)
        try:
            yield part
        finally:
            part.to(rests)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [n, c, h, w] -> pixels, uint8 [n, height, width, 3] on the CPU, rounded as diffusers does."""
        image = self.picture(latents)
        return ((image / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()

    @torch.inference_mode()
    def _embed_now(self, prompt: str) -> Tensor:
        tokens = self.tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
        with self._at_work(self.text_encoder) as encoder:
            states: Tensor = encoder(tokens.to(self.device))[0]
        return states.to(self.dtype)


class StableDiffusionXL(Backbone):
    """SDXL, arXiv:2307.01952: two text encoders, and an empty prompt that is zeros where the model was made so."""

    def __init__(
        self, name: str, folder: Path, licence: str, parts: dict[str, Any], schedule: Schedule, engine: str = "torch"
    ) -> None:
        self.tokenizer_2 = parts["tokenizer_2"]
        self.text_encoder_2 = parts["text_encoder_2"].requires_grad_(False).eval()
        index = folders.read_json(folder, name, "model_index.json")
        self._empty_is_zero: bool = index.get("force_zeros_for_empty_prompt", True)
        super().__init__(name, folder, licence, parts, schedule, engine)

    @torch.inference_mode()
    def _embed_now(self, prompt: str) -> Tensor:
        """The last layer but one of both encoders side by side, and the second one's pooled state."""
        sequences = []
        for tokenizer, encoder in ((self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2)):
            tokens = tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
            with self._at_work(encoder):
                answer = encoder(tokens.to(self.device), output_hidden_states=True)
            sequences.append(answer.hidden_states[-2])
        sequence, pooled = torch.cat(sequences, dim=-1), answer[0]
        if not prompt and self._empty_is_zero:
            sequence, pooled = torch.zeros_like(sequence), torch.zeros_like(pooled)
        side = self.picture_px
        return packed(sequence, pooled, (side, side, 0, 0, side, side)).to(self.dtype)

    def sized(self, states: Tensor, smaller: int) -> Tensor:
        resized = states.clone()
        start = pooled_width(self.unet)
        resized[:, -1, start : start + SIZES] /= smaller
        return resized


class StableDiffusion3(Backbone):
    """Stable Diffusion 3, arXiv:2403.03206: a transformer and rectified flow, three text encoders. Drawn with only."""

    denoiser = "transformer"
    trainable = False
    reads = 256  # tokens of the long text encoder, as in diffusers

    def __init__(
        self, name: str, folder: Path, licence: str, parts: dict[str, Any], schedule: Schedule, engine: str = "torch"
    ) -> None:
        if engine != "torch":
            raise InputError(f"the {engine} engine does not draw with {name}; leave it out")
        self.readers = [
            (parts[folders.tokenizer_of(p)], parts[p].eval()) for p in parts if p.startswith("text_encoder")
        ]
        super().__init__(name, folder, licence, parts, schedule, engine)

    @staticmethod
    def trajectory(config: dict[str, Any], parts: dict[str, Any]) -> Schedule:
        about = parts["transformer"].config
        return FlowSchedule.of(config, tokens=(about.sample_size // about.patch_size) ** 2, even=False)

    def truncated(self, prompt: str) -> str:
        tokenizer = self.readers[-1][0]
        offsets = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]
        room = self.reads - 1  # one token marks the end
        return prompt[offsets[room][0] :] if len(offsets) > room else ""

    @torch.inference_mode()
    def _embed_now(self, prompt: str) -> Tensor:
        """Both short encoders' last layer but one side by side, then the long one's states; and both pooled states."""
        *short, (tokenizer, long) = self.readers
        sequences, pooled = [], []
        for reader, encoder in short:
            with self._at_work(encoder):
                answer = encoder(self._tokens(reader, prompt), output_hidden_states=True)
            sequences.append(answer.hidden_states[-2])
            pooled.append(answer[0])
        with self._at_work(long):
            read = long(self._tokens(tokenizer, prompt, self.reads))[0]
        joined = torch.cat(sequences, dim=-1)
        joined = nn.functional.pad(joined, (0, read.shape[-1] - joined.shape[-1]))
        return packed(torch.cat([joined, read], dim=1), torch.cat(pooled, dim=-1)).to(self.dtype)

    def _tokens(self, tokenizer: Any, prompt: str, length: int | None = None) -> Tensor:
        read = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        tokens: Tensor = read.input_ids.to(self.device)
        return tokens

    def _call(self, network: Any, x_t: Tensor, t: int | Tensor, states: Tensor) -> Tensor:
        pooled = states[:, -1, : network.config.pooled_projection_dim]
        told = {"encoder_hidden_states": states[:, :-1], "pooled_projections": pooled}
        output: Tensor = network(x_t, timestep=self._sigma(x_t, t) * 1000, **told, return_dict=False)[0]
        return output

    def _sigma(self, x_t: Tensor, t: int | Tensor) -> Tensor:
        return (torch.as_tensor(t, device=x_t.device) / len(self.schedule)).expand(len(x_t))


class Flux(StableDiffusion3):
    """FLUX.1: patches of 2 x 2 latents as tokens, and guidance that the network is told. Drawn with only."""

    tells_guidance = True
    half = torch.bfloat16  # float16 overflows in it
    reads = 512

    @staticmethod
    def trajectory(config: dict[str, Any], parts: dict[str, Any]) -> Schedule:
        return FlowSchedule.of(config, tokens=(Flux._side(parts["vae"]) // 2) ** 2, even=True)

    @staticmethod
    def _side(vae: Any) -> int:
        """Of the latents of the pictures that the autoencoder was made for."""
        return int(vae.config.sample_size) // 2 ** (len(vae.config.block_out_channels) - 1)

    def _latent_shape(self) -> tuple[int, int, int]:
        side = self._side(self.vae)
        return self.unet.config.in_channels // 4, side, side

    @torch.inference_mode()
    def _embed_now(self, prompt: str) -> Tensor:
        """The long encoder's states, and the short one's pooled state."""
        (reader, short), (tokenizer, long) = self.readers
        with self._at_work(short):
            pooled = short(self._tokens(reader, prompt)).pooler_output
        with self._at_work(long):
            read = long(self._tokens(tokenizer, prompt, self.reads))[0]
        return packed(read, pooled).to(self.dtype)

    def _call(self, network: Any, x_t: Tensor, t: int | Tensor, states: Tensor) -> Tensor:
        width = network.config.pooled_projection_dim
        n, c, height, width_ = x_t.shape
        h, w = height // 2, width_ // 2
        tokens = x_t.view(n, c, h, 2, w, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w, c * 4)
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).to(x_t)
        output: Tensor = network(
            tokens,
            timestep=self._sigma(x_t, t).to(x_t.dtype),
            guidance=states[:, -1, width].float() if network.config.guidance_embeds else None,
            encoder_hidden_states=states[:, :-1],
            pooled_projections=states[:, -1, :width],
            txt_ids=x_t.new_zeros(states.shape[1] - 1, 3),
            img_ids=places,
            return_dict=False,
        )[0]
        return output.view(n, h, w, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(n, c, height, width_)

    def guided(self, states: Tensor, g: float) -> Tensor:
        """States that tell the network the scale of guidance."""
        told = states.clone()
        told[:, -1, self.unet.config.pooled_projection_dim] = g
        return told


CLASSES: dict[str, type[Backbone]] = {
    "StableDiffusionPipeline": Backbone,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
}


def load_best(name_or_folder: str | Path, engine: str = "torch", decoder: str = "", offload: bool = False) -> Backbone:
    """A model where and as it draws best on this machine. Raises as `Backbone.load` does."""
    device = best_device() if engine == "torch" else "cpu"
    return Backbone.load(name_or_folder, device=device, dtype=None, engine=engine, decoder=decoder, offload=offload)


def best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def no_room(name: str) -> InputError:
    """For when a model does not fit into the GPU's memory."""
    return InputError(
        f"the GPU has too little memory for {name}; end other programs on it, choose a smaller model, or "
        "hide the GPU to draw on the CPU: CUDA_VISIBLE_DEVICES= python app.py"
    )
