"""Published scores of pictures and their prompts, as tensors that a gradient can flow through.

| name | what | weights |
|---|---|---|
| `clip` | CLIP score, 100 x cosine (arXiv:2104.08718), by ViT-B/32 as in Hyper-SD | openai/clip-vit-base-patch32 |
| `aesthetic` | LAION aesthetic predictor v2, on ViT-L/14 | openai/clip-vit-large-patch14, and its head |
| `image_reward` | ImageReward v1.0 (arXiv:2304.05977), normalised as its authors do | zai-org/ImageReward |
| `pick` | PickScore v1 (arXiv:2305.01569), the cosine, as papers print it | yuvalkirstain/PickScore_v1 |
| `hps` | HPS v2.1 (arXiv:2306.09341), the cosine | xswu/HPSv2 |

Weights come from the hub, or from folders of these names below the one that HYPERSD_SCORES names. All are built from
transformers' own classes: the authors' packages ask for versions that exclude each other. Checkpoints that are pickles
are read as tensors only. Pictures are resized and normalised here, so that no PIL image stands between a picture and
the gradient of its score.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypersd.folders import read_tensors
from hypersd.hub import fetched
from hypersd.records import InputError

CLIP_MEAN, CLIP_SPREAD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGE_REWARD_MEAN, IMAGE_REWARD_SPREAD = 0.16717362830052426, 1.0333394966054072  # of its training data, as published
IMAGE_REWARD_TOKENS = 35
WIDTHS = (1024, 128, 64, 16, 1)  # of the heads of both the aesthetic predictor and ImageReward
DROPS = (1, 3, 5)  # places of their dropouts, which do nothing here but keep the numbers of the layers


class Scorer(nn.Module):
    """A published score. float [n, 3, h, w] in -1..1 and n prompts -> [n]; frozen; it comes to where pictures are."""

    name: str
    threshold: float

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        self.to(pixels.device)
        score: Tensor = super().__call__(pixels, list(prompts))
        return score


class Cosine(Scorer):
    """How well picture and prompt agree, by a CLIP: `scale` times the cosine."""

    def __init__(self, name: str, clip: Any, tokenizer: Any, scale: float = 1.0, threshold: float = 1.0) -> None:
        super().__init__()
        self.name, self.threshold, self.scale = name, threshold, scale
        self.clip, self.tokenizer = clip, tokenizer
        self.requires_grad_(False).eval()

    def forward(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        x = prepared(pixels, self.clip.config.vision_config.image_size).to(self.clip.dtype)
        most = self.clip.config.text_config.max_position_embeddings
        read = self.tokenizer(prompts, padding=True, truncation=True, max_length=most, return_tensors="pt")
        pictures = _features(self.clip.get_image_features(pixel_values=x))
        texts = _features(self.clip.get_text_features(**read.to(x.device)))
        return self.scale * F.cosine_similarity(pictures.float(), texts.float(), dim=1)

    def looks(self, pixels: Tensor) -> Tensor:
        """Mean and deviation over all patches of every feature after every layer: how a picture is drawn, more than
        what it shows. float [n, 3, h, w] in -1..1 -> [n, 2 * (layers + 1) * width]."""
        self.to(pixels.device)
        x = prepared(pixels, self.clip.config.vision_config.image_size).to(self.clip.dtype)
        layers = self.clip.vision_model(pixel_values=x, output_hidden_states=True).hidden_states
        patches = [layer[:, 1:].float() for layer in layers]  # the first one stands for the whole picture
        return torch.cat([part for y in patches for part in (y.mean(1), y.std(1, correction=0))], 1)


class Aesthetic(Scorer):
    """How beautiful a picture is, 1 to 10, whatever the prompt: a linear head on CLIP's unit vector."""

    def __init__(self, clip: Any, head: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.name, self.threshold = "aesthetic", 6.0
        self.clip, self.head = clip, head_of(clip.config.projection_dim, head)
        self.requires_grad_(False).eval()

    def forward(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        x = prepared(pixels, self.clip.config.vision_config.image_size).to(self.clip.dtype)
        vector = F.normalize(_features(self.clip.get_image_features(pixel_values=x)).float(), dim=1)
        score: Tensor = self.head(vector).squeeze(1)
        return score


class ImageReward(Scorer):
    """A BLIP reads the prompt while it looks at the picture; a linear head says how much people would like it."""

    def __init__(self, vision: Any, text: Any, head: Mapping[str, Tensor], tokenizer: Any) -> None:
        super().__init__()
        self.name, self.threshold = "image_reward", 2.0  # as ReFL: ReLU(2 - r)
        self.vision, self.text, self.tokenizer = vision, text, tokenizer
        self.head = head_of(text.config.hidden_size, head)
        self.requires_grad_(False).eval()

    def forward(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        x = prepared(pixels, self.vision.config.image_size)
        seen = self.vision(pixel_values=x).last_hidden_state
        read = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=IMAGE_REWARD_TOKENS, return_tensors="pt"
        ).to(x.device)
        states = self.text(
            input_ids=read.input_ids,
            attention_mask=read.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], device=x.device),
        ).last_hidden_state[:, 0]
        return (self.head(states).squeeze(1) - IMAGE_REWARD_MEAN) / IMAGE_REWARD_SPREAD


def prepared(pixels: Tensor, side: int) -> Tensor:
    """What CLIP's own processor makes of a picture: the shorter side to `side` (bicubic), the centre, normalised."""
    x = (pixels.float() / 2 + 0.5).clamp(0, 1)
    height, width = x.shape[-2:]
    shrink = side / min(height, width)
    size = (max(side, round(height * shrink)), max(side, round(width * shrink)))
    x = F.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    x = x[..., top : top + side, left : left + side]
    return (x - x.new_tensor(CLIP_MEAN).view(3, 1, 1)) / x.new_tensor(CLIP_SPREAD).view(3, 1, 1)


def head_of(width: int, weights: Mapping[str, Tensor]) -> nn.Sequential:
    """Five linear layers with nothing between but dropout, numbered as in both published checkpoints.

    Raises:
        InputError: a layer is missing or of another size.
    """
    layers: list[nn.Module] = []
    for a, b in zip((width, *WIDTHS), WIDTHS, strict=False):
        layers.append(nn.Linear(a, b))
        if len(layers) in DROPS:
            layers.append(nn.Identity())
    head = nn.Sequential(*layers)
    _fill(head, {name.removeprefix("layers."): tensor.float() for name, tensor in weights.items()}, "the head")
    return head


def _features(found: Any) -> Tensor:
    """The projected vectors, whichever way this version of transformers hands them out."""
    vectors: Tensor = getattr(found, "pooler_output", found)
    return vectors


# --------------------------------------------------------------------------------- checkpoints of other programs


def blip_names(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """ImageReward's checkpoint -> {"vision": ..., "text": ..., "head": ...} with transformers' names."""
    changes = (
        (r"^cls_token$", "embeddings.class_embedding"),
        (r"^pos_embed$", "embeddings.position_embedding"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
        (r"^norm\.", "post_layernorm."),
        (r"^blocks\.", "encoder.layers."),
        (r"\.norm([12])\.", r".layer_norm\1."),
        (r"\.attn\.proj\.", ".self_attn.projection."),
        (r"\.attn\.", ".self_attn."),
    )
    parts: dict[str, dict[str, Tensor]] = {"vision": {}, "text": {}, "head": {}}
    for key, tensor in state.items():
        if key.startswith("blip.visual_encoder."):
            name = key.removeprefix("blip.visual_encoder.")
            for pattern, other in changes:
                name = re.sub(pattern, other, name)
            parts["vision"][name] = tensor
        elif key.startswith("blip.text_encoder."):
            parts["text"][key.removeprefix("blip.text_encoder.")] = tensor
        elif key.startswith("mlp."):
            parts["head"][key.removeprefix("mlp.")] = tensor
    return parts


def clip_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP with open_clip's names -> transformers' CLIPModel. Projections are stored the other way round there."""
    changes = (
        (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
        (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
        (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
        (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),  # spelt so in transformers
        (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
        (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
        (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
        (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
        (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
        (r"^ln_final\.", "text_model.final_layer_norm."),
        (r"\.ln_([12])\.", r".layer_norm\1."),
        (r"\.mlp\.c_fc\.", ".mlp.fc1."),
        (r"\.mlp\.c_proj\.", ".mlp.fc2."),
        (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    )
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = key
        for pattern, other in changes:
            name = re.sub(pattern, other, name)
        if match := re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", name):
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                found[f"{match[1]}.self_attn.{part}_proj.{match[2]}"] = third
        elif key in ("visual.proj", "text_projection"):
            kind = "visual" if key == "visual.proj" else "text"
            found[f"{kind}_projection.weight"] = tensor.T
        else:
            found[name] = tensor
    return found


def _fill(module: nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    """Every parameter from `weights`. Raises InputError: one is missing or of another size."""
    own = module.state_dict()
    for name, tensor in own.items():
        if name.endswith("position_ids"):
            continue
        if name not in weights or weights[name].shape != tensor.shape:
            size = tuple(weights[name].shape) if name in weights else "nothing"
            raise InputError(f"{what} needs {name} of {tuple(tensor.shape)}, its checkpoint has {size}")
    module.load_state_dict({name: weights.get(name, tensor) for name, tensor in own.items()})


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint; of a pickle nothing but tensors is read.

    Raises:
        InputError: it cannot be read, or holds anything else.
    """
    import pickle

    if path.suffix == ".safetensors":
        return read_tensors(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__}); copy it again") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


# ------------------------------------------------------------------------------------------- where weights are


@dataclass(frozen=True)
class Published:
    """One row of the table: `sources` are (hub repository, file in it or "" for a whole model)."""

    name: str
    title: str
    licence: str
    gigabytes: float
    sources: tuple[tuple[str, str], ...]
    build: Callable[[Sequence[Path]], Scorer]
    optimised: str = ""


def _clip_from(folder: Path) -> tuple[Any, Any]:
    from transformers import CLIPModel, CLIPTokenizer

    clip = CLIPModel.from_pretrained(folder, local_files_only=True)
    return clip, CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _build_clip(places: Sequence[Path]) -> Scorer:
    return Cosine("clip", *_clip_from(places[0]), scale=100.0, threshold=35.0)


def _build_pick(places: Sequence[Path]) -> Scorer:
    return Cosine("pick", *_clip_from(places[0]), threshold=0.25)


def _build_aesthetic(places: Sequence[Path]) -> Scorer:
    return Aesthetic(_clip_from(places[0])[0], _tensors(places[1]))


def _build_hps(places: Sequence[Path]) -> Scorer:
    """The shape of ViT-H/14 and the tokenizer come from the model that HPS began with."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    clip = CLIPModel(CLIPConfig.from_pretrained(places[0], local_files_only=True))
    _fill(clip, clip_names(_tensors(places[1])), "hps")
    return Cosine("hps", clip, CLIPTokenizer.from_pretrained(places[0], local_files_only=True), threshold=0.32)


def _build_image_reward(places: Sequence[Path]) -> Scorer:
    from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig, BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    parts = blip_names(_tensors(places[0]))
    words, width = parts["text"]["embeddings.word_embeddings.weight"].shape
    seen, layers = parts["vision"]["embeddings.class_embedding"].shape[-1], len(_layers(parts["vision"]))
    vision = BlipVisionModel(BlipVisionConfig(
        hidden_size=seen, intermediate_size=4 * seen, num_hidden_layers=layers, num_attention_heads=max(1, seen // 64),
        image_size=16 * round((parts["vision"]["embeddings.position_embedding"].shape[1] - 1) ** 0.5), patch_size=16,
        layer_norm_eps=1e-6,
    ))  # fmt: skip
    text = BlipTextModel(BlipTextConfig(
        vocab_size=words, hidden_size=width, encoder_hidden_size=seen, intermediate_size=4 * width, is_decoder=True,
        num_hidden_layers=len(_layers(parts["text"])), num_attention_heads=max(1, width // 64),
        max_position_embeddings=len(parts["text"]["embeddings.position_embeddings.weight"]),
        bos_token_id=words - 2, sep_token_id=min(102, words - 1),
    ), add_pooling_layer=False)  # fmt: skip
    _fill(vision, parts["vision"], "image_reward's eye")
    _fill(text, parts["text"], "image_reward's reader")
    tokenizer = BertTokenizer.from_pretrained(places[1], local_files_only=True)
    return ImageReward(vision, text, parts["head"], tokenizer)


def _layers(state: Mapping[str, Tensor]) -> set[str]:
    return {match[1] for key in state if (match := re.match(r"encoder\.layers?\.(\d+)\.", key))}


H14 = ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "")
IN_THE_PAPER = "Hyper-SD was trained to raise it (section 3.2)"
PUBLISHED: dict[str, Published] = {
    row.name: row
    for row in (
        Published("clip", "CLIP score", "MIT", 0.6, (("openai/clip-vit-base-patch32", ""),), _build_clip),
        Published("aesthetic", "LAION aesthetic", "Apache-2.0, CLIP MIT", 1.7,
                  (("openai/clip-vit-large-patch14", ""),
                   ("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")),
                  _build_aesthetic, IN_THE_PAPER),
        Published("image_reward", "ImageReward", "Apache-2.0", 1.8,
                  (("zai-org/ImageReward", "ImageReward.pt"), ("google-bert/bert-base-uncased", "")),
                  _build_image_reward, IN_THE_PAPER),
        Published("pick", "PickScore", "MIT", 3.9, (("yuvalkirstain/PickScore_v1", ""),), _build_pick),
        Published("hps", "HPS v2.1", "Apache-2.0", 3.9, (H14, ("xswu/HPSv2", "HPS_v2.1_compressed.pt")), _build_hps),
    )
}  # fmt: skip
WHOLE = ["*.json", "*.txt", "*.safetensors"]  # what is fetched of a repository that is a model


@lru_cache(maxsize=len(PUBLISHED))
def load(name: str) -> Scorer:
    """A published score by name.

    Its files are looked for in the folder HYPERSD_SCORES/<name>, one entry a source, named as the repository or its
    file is; then in the hub's cache and on the hub.

    Raises:
        InputError: there is no such score; or its weights cannot be had, and where they would come from.
    """
    if name not in PUBLISHED:
        raise InputError(f"there is no published score {name[:40]!r}; choose from {', '.join(PUBLISHED)}")
    row = PUBLISHED[name]
    try:
        return row.build([_place(row, repository, file) for repository, file in row.sources])
    except InputError:
        raise
    except Exception as error:  # transformers and the hub raise anything
        where = " and ".join(repository for repository, _ in row.sources)
        raise InputError(
            f"{name} cannot be had: its weights ({row.gigabytes:g} GB, {row.licence}) are {where} on the Hugging Face "
            f"hub ({type(error).__name__}); or put them into a folder {name} and name the one above in HYPERSD_SCORES"
        ) from error


def _place(row: Published, repository: str, file: str) -> Path:
    """The file or the folder of a source; fetched where it is neither local nor cached."""
    if above := os.environ.get("HYPERSD_SCORES"):
        here = Path(above) / row.name / (file or repository.rpartition("/")[2])
        if here.exists():
            return here
    instead = f"put its weights ({row.gigabytes:g} GB, {row.licence}) into a folder {row.name} and name the one above"
    return fetched(repository, [file] if file else WHOLE, f"{instead} in HYPERSD_SCORES") / file
