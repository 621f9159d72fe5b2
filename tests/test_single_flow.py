"""Checkpoints of SD3 and FLUX in one file: written here under their original names, drawn like their folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from modelhub import Server
from safetensors.torch import load_file, save_file
from test_single import part, pixels, renamed, vae
from torch import Tensor

from hypersd import single
from hypersd.__main__ import main
from hypersd.backbone import Backbone
from hypersd.folders import BACKBONES, ModelError

Weights = dict[str, Tensor]
DENOISER, L, G, T5 = (
    "model.diffusion_model.",
    *(f"text_encoders.{n}.transformer." for n in ("clip_l", "clip_g", "t5xxl")),
)
KIND = {"sd3": "StableDiffusion3Pipeline", "flux": "FluxPipeline"}
LINEAR = {"linear_1": "in_layer", "linear_2": "out_layer"}
SD3 = {  # from diffusers' names to those of Stability's code
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0", "pos_embed.pos_embed": "pos_embed",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2", "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0", "proj_out": "final_layer.linear",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2", "norm_out.linear": "final_layer.adaLN_modulation.1",
    "transformer_blocks": "joint_blocks", "attn.to_q": "x_block.attn.qkv", "attn.add_q_proj": "context_block.attn.qkv",
    "attn.to_out.0": "x_block.attn.proj", "attn.to_add_out": "context_block.attn.proj",
    "attn.norm_q": "x_block.attn.ln_q", "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q", "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.to_q": "x_block.attn2.qkv", "attn2.to_out.0": "x_block.attn2.proj", "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k", "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1", "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2", "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}  # fmt: skip
FLUX = {  # and to those of Black Forest Labs'
    "time_text_embed.timestep_embedder": "time_in", "time_text_embed.text_embedder": "vector_in",
    "time_text_embed.guidance_embedder": "guidance_in", **LINEAR, "context_embedder": "txt_in", "x_embedder": "img_in",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}  # fmt: skip
DOUBLE = {
    "transformer_blocks": "double_blocks", "attn.to_q": "img_attn.qkv", "attn.add_q_proj": "txt_attn.qkv",
    "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj",
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale", "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale", "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin", "ff.net.0.proj": "img_mlp.0", "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2",
}  # fmt: skip
ONE = {
    "single_transformer_blocks": "single_blocks", "attn.to_q": "linear1", "proj_out": "linear2",
    "norm.linear": "modulation.lin", "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
}  # fmt: skip


def swapped(tensor: Tensor) -> Tensor:
    """Scale and shift the other way round."""
    return torch.cat(tensor.chunk(2)[::-1])


def together(weights: Weights, first: str, *others: str) -> Weights:
    """Several matrices as one, under the name of the first."""
    found = {
        n: torch.cat([t, *(weights[n.replace(first, o)] for o in others)]) for n, t in weights.items() if first in n
    }
    return {
        n: t for n, t in weights.items() if not any(o in n and n.replace(o, first) in found for o in others)
    } | found


def sd3(weights: Weights) -> Weights:
    weights = together(together(weights, ".to_q.", ".to_k.", ".to_v."), ".add_q_proj.", ".add_k_proj.", ".add_v_proj.")
    last = max(int(n.split(".")[1]) for n in weights if n.startswith("transformer_blocks."))
    swap = ("norm_out.linear.", f"transformer_blocks.{last}.norm1_context.linear.")
    return {renamed(n, SD3): swapped(t) if n.startswith(swap) else t for n, t in weights.items()}


def flux(weights: Weights) -> Weights:
    alone = {n: t for n, t in weights.items() if n.startswith("single_")}
    alone = together(alone, ".attn.to_q.", ".attn.to_k.", ".attn.to_v.", ".proj_mlp.")
    double = together({n: t for n, t in weights.items() if n.startswith("transformer_")}, ".to_q.", ".to_k.", ".to_v.")
    double = together(double, ".add_q_proj.", ".add_k_proj.", ".add_v_proj.")
    rest = {n: t for n, t in weights.items() if "transformer_blocks" not in n}
    old = {renamed(n, FLUX | {"proj_out": "final_layer.linear"}): swapped(t) if n.startswith("norm_out.") else t
           for n, t in rest.items()}  # fmt: skip
    return old | {renamed(n, DOUBLE): t for n, t in double.items()} | {renamed(n, ONE): t for n, t in alone.items()}


def text(weights: Weights, prefix: str) -> Weights:
    """A text encoder as ComfyUI keeps it: with CLIP's wrapper, and a scale that nothing reads; CLIP-L's projection is
    left out, since Stable Diffusion 3 does without."""
    wrapped = prefix == T5 or any(n.startswith("text_model.") for n in weights)
    own = {prefix + (n if wrapped or n.startswith("text_proj") else f"text_model.{n}"): t for n, t in weights.items()}
    own.pop(f"{L}text_projection.weight", None)
    return own | {prefix.replace("transformer.", "logit_scale"): torch.tensor(4.6)}


def original(folder: Path, prefix: str, coder: str) -> dict[str, Weights]:
    """The parts of a tiny model's folder under their original names."""
    translate, readers = (sd3, (L, G, T5)) if (folder / "text_encoder_3").is_dir() else (flux, (L, T5))
    parts = {"transformer": {prefix + n: t for n, t in translate(part(folder, "transformer")).items()}}
    parts["vae"] = {n.replace("first_stage_model.", coder): t for n, t in vae(part(folder, "vae"), 4).items()}
    places = ("text_encoder", "text_encoder_2", "text_encoder_3")
    return parts | {p: text(part(folder, p), begin) for p, begin in zip(places, readers, strict=False)}


@pytest.fixture(params=["sd3", "flux"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model; nothing but such a folder can say how a file is laid out."""
    from diffusers.loaders import single_file_utils

    monkeypatch.chdir(tmp_path)
    place = (tiny.build_sd3 if request.param == "sd3" else tiny.build_flux)(tmp_path / "model")
    if request.param == "sd3":  # whose original has no projection there
        weights = part(place, "text_encoder")
        save_file(weights | {"text_projection.weight": torch.eye(16)}, place / "text_encoder/model.safetensors",
                  {"format": "pt"})  # fmt: skip
    else:  # diffusers' translation knows FLUX's own width only
        convert = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers
        narrow = tuple(32 if value == 3072 else value for value in convert.__code__.co_consts)
        monkeypatch.setattr(convert, "__code__", convert.__code__.replace(co_consts=narrow))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the variables are read at import
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HYPERSD_LAYOUT", str(place))
    return place


def written(folder: Path, *held: str, prefix: str = DENOISER, coder: str = "first_stage_model.") -> Path:
    """A checkpoint in one file, with all parts or some."""
    parts = original(folder, prefix, coder)
    chosen = [parts[p] for p in held or parts]
    save_file(
        {n: t.contiguous() for tensors in chosen for n, t in tensors.items()}, folder.parent / "tuned.safetensors"
    )
    return folder.parent / "tuned.safetensors"


@pytest.mark.parametrize(
    ("held", "prefix", "coder"),
    [
        ((), DENOISER, "first_stage_model."),  # sd3_medium_incl_clips_t5xxl
        ((), DENOISER, "vae."),  # FLUX as ComfyUI saves it
        (("transformer", "vae", "text_encoder"), DENOISER, "first_stage_model."),
        (("transformer", "vae"), DENOISER, "first_stage_model."),  # sd3_medium, sd3.5_large
        (("transformer",), "", ""),  # flux1-dev
        (("transformer",), DENOISER, ""),
    ],
)
def test_it_draws_what_the_folder_draws(folder: Path, held: tuple[str, ...], prefix: str, coder: str) -> None:
    """What it lacks is taken from the layout; what it has is not."""
    file = written(folder, *held, prefix=prefix, coder=coder)
    expected = pixels(Backbone.load(folder))
    for name in held or ("text_encoder", "text_encoder_2", "vae", "transformer"):
        for weights in (folder / name).glob("*.safetensors"):
            save_file({n: torch.zeros_like(t) for n, t in load_file(weights).items()}, weights, {"format": "pt"})
    assert pixels(Backbone.load(file)) == expected


MEDIUM: dict[str, Any] = {
    "sample_size": 128, "in_channels": 16, "out_channels": 16, "num_layers": 24, "num_attention_heads": 24,
    "attention_head_dim": 64, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
}  # fmt: skip
LARGE = {**MEDIUM, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"}
DUAL = {**MEDIUM, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm", "pos_embed_max_size": 384}
THREE_FIVE = "stabilityai/stable-diffusion-3.5"


@pytest.mark.parametrize(
    ("kind", "config", "count", "known", "source"),
    [  # some that are known of the published files
        ("StableDiffusion3Pipeline", MEDIUM, None,
         {"pos_embed": (1, 36864, 1536), "joint_blocks.0.context_block.adaLN_modulation.1.bias": (9216,),
          "joint_blocks.23.context_block.adaLN_modulation.1.bias": (3072,), "final_layer.linear.weight": (64, 1536),
          "joint_blocks.3.x_block.attn.qkv.weight": (4608, 1536), "x_embedder.proj.weight": (1536, 16, 2, 2)},
         BACKBONES["sd3"].source),
        ("StableDiffusion3Pipeline", LARGE, None, {"joint_blocks.37.x_block.mlp.fc1.weight": (9728, 2432),
         "joint_blocks.37.context_block.attn.ln_q.weight": (64,)}, f"{THREE_FIVE}-large"),
        ("StableDiffusion3Pipeline", DUAL, None, {"pos_embed": (1, 147456, 1536),
         "joint_blocks.12.x_block.attn2.qkv.weight": (4608, 1536),
         "joint_blocks.12.x_block.attn2.ln_k.weight": (64,)}, f"{THREE_FIVE}-medium"),
        ("FluxPipeline", {"guidance_embeds": True}, 780,
         {"double_blocks.18.img_attn.norm.key_norm.scale": (128,), "guidance_in.in_layer.weight": (3072, 256),
          "double_blocks.0.txt_attn.qkv.weight": (9216, 3072), "double_blocks.0.img_mod.lin.bias": (18432,),
          "single_blocks.37.linear1.weight": (21504, 3072), "single_blocks.37.linear2.weight": (3072, 15360),
          "img_in.weight": (3072, 64), "vector_in.in_layer.weight": (3072, 768), "txt_in.weight": (3072, 4096)},
         BACKBONES["flux"].source),
        ("FluxPipeline", {"guidance_embeds": False}, 776, {"final_layer.adaLN_modulation.1.weight": (6144, 3072)},
         "black-forest-labs/FLUX.1-schnell"),
    ],
    ids=["sd3", "sd3.5-large", "sd3.5-medium", "flux-dev", "flux-schnell"],
)  # fmt: skip
def test_every_tensor_of_the_true_networks_finds_its_place(
    kind: str, config: dict[str, Any], count: int | None, known: dict[str, tuple[int, ...]], source: str, tmp_path: Path
) -> None:
    import diffusers

    about, translate = single.FAMILIES[kind]["transformer"], flux if kind == "FluxPipeline" else sd3
    with torch.device("meta"):
        network = getattr(diffusers, about.kind)(**config)
    network.save_config(tmp_path / "transformer")
    names = translate(network.state_dict())
    assert known.items() <= {name: tuple(tensor.shape) for name, tensor in names.items()}.items()
    assert count in (None, len(names))
    assert single.family(names, "it") == kind and single._source(kind, names) == source

    class File:
        keys, get_tensor = names.keys, names.__getitem__

    found = single._translated(File(), kind, "transformer", tmp_path, "it")
    assert {key: tensor.shape for key, tensor in found.items()} == {
        key: tensor.shape for key, tensor in network.state_dict().items()
    }


def test_what_it_lacks_comes_from_the_hub(
    folder: Path, server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And not what it has. FLUX without guidance is schnell, whose repository is another."""
    monkeypatch.delenv("HYPERSD_LAYOUT")
    file, name = written(folder, "transformer", "vae"), "sd3" if (folder / "text_encoder_3").is_dir() else "flux"
    server.offer(BACKBONES[name].source, folder)
    assert pixels(Backbone.load(file)) == pixels(Backbone.load(folder))
    sent = {path.removeprefix(f"{BACKBONES[name].source}/") for path in server.sent}
    assert "text_encoder/model.safetensors" in sent and "transformer/config.json" in sent
    assert not {path for path in sent if path.startswith(("transformer/", "vae/")) and path.endswith(".safetensors")}
    assert [r.message.partition(":")[0] for r in caplog.records] == [f"fetching {BACKBONES[name].source}"]


def test_what_it_lacks_and_cannot_be_had_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(folder, "transformer", "text_encoder")
    monkeypatch.delenv("HYPERSD_LAYOUT")
    said = (
        r"tokenizers of its kind and text_encoder_2, (text_encoder_3, )?vae, which tuned\.safetensors lacks, are needed"
    )
    with pytest.raises(ModelError, match=said + r" once: .* could not be fetched .*HYPERSD_LAYOUT=folder"):
        single.laid_out(file)
    monkeypatch.setenv("HYPERSD_LAYOUT", str(folder))
    weights = folder / "vae/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ModelError, match=r"model: vae/\S+ is truncated or damaged .*copy the model's folder again"):
        single.laid_out(file)
    weights.unlink()
    with pytest.raises(ModelError, match=r"model: vae/\S+ is missing; copy the model's folder again"):
        single.laid_out(file)
    assert not single.FOLDERS.exists()


def test_weights_of_the_layout_take_no_room_twice(folder: Path) -> None:
    made = Path(single.laid_out(written(folder, "transformer")))
    assert (made / "vae/diffusion_pytorch_model.safetensors").stat().st_nlink == 2
    assert (made / "transformer/diffusion_pytorch_model.safetensors").stat().st_nlink == 1


def test_a_file_that_is_cut_off_says_so(folder: Path) -> None:
    file = written(folder)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"tuned\.safetensors has [\d,]+ bytes instead of [\d,]+; fetch it again"):
        single.laid_out(file)


def test_a_tensor_too_few_or_too_many_is_named(folder: Path) -> None:
    file = written(folder, prefix="")
    tensors = load_file(file)
    lost = next(name for name in tensors if name.endswith(("x_block.mlp.fc1.bias", "img_in.bias")))
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, file)
    with pytest.raises(ModelError, match=rf"its transformer lacks '{lost}'; fetch it again"):
        single.laid_out(file)
    file = written(folder)
    save_file(load_file(file) | {f"{DENOISER}motion.weight": torch.zeros(2)}, file)
    with pytest.raises(ModelError, match=r"has 1 tensors such as motion\.weight that model has no place for; choose"):
        single.laid_out(file)
    assert not list(single.FOLDERS.iterdir()), "nothing was laid out"


@pytest.mark.parametrize("folder", ["flux"], indirect=True)
def test_schnell_is_not_laid_out_as_dev(folder: Path) -> None:
    """dev is told the guidance and schnell is not; each has its scheduler."""
    file = written(folder)
    save_file({name: tensor for name, tensor in load_file(file).items() if "guidance_in." not in name}, file)
    said = r"lacks 4 tensors such as time_text_embed\.guidance_embedder.*name the folder of a model of its architecture"
    with pytest.raises(ModelError, match=said):
        single.laid_out(file)


@pytest.mark.parametrize("mark", ["scaled_fp8", "text_encoders.t5xxl.transformer.encoder.x.scale_weight"])
def test_scaled_weights_are_refused(folder: Path, mark: str) -> None:
    """They have to be multiplied first; a text encoder's scales would be passed over without a word."""
    file = written(folder)
    save_file(load_file(file) | {mark: torch.ones(1)}, file)
    with pytest.raises(ModelError, match=r"has weights with scales beside them; choose .* half or full precision"):
        single.laid_out(file)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float8_e4m3fn])
def test_other_precisions_are_taken(folder: Path, kind: torch.dtype) -> None:
    """fp8 without scales, as in sd3_medium_incl_clips_t5xxlfp8 and flux1-dev-fp8."""
    file = written(folder)
    save_file({name: tensor.to(kind) for name, tensor in load_file(file).items()}, file)
    backbone = Backbone.load(file)
    name = "x_embedder.proj" if (folder / "text_encoder_3").is_dir() else "img_in"
    weight = backbone.unet.pos_embed.proj.weight if name.startswith("x") else backbone.unet.x_embedder.weight
    assert torch.equal(weight, load_file(file)[f"{DENOISER}{name}.weight"].float())
    assert len(set(pixels(backbone))) > 20


def test_what_is_published_for_its_kind_lies_beside_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(folder, "transformer")
    assert main(["fetch", str(file)]) == 0
    assert "ByteDance/Hyper-SD" in capsys.readouterr().out
