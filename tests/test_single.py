"""Checkpoints in one file: written here under their original names, drawn like the folder that they come from."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from hypersd import adapters, cost, single
from hypersd.__main__ import main
from hypersd.backbone import Backbone
from hypersd.cost import CONFIGS
from hypersd.folders import ModelError
from hypersd.generate import draw
from hypersd.methods import METHODS
from hypersd.records import Request

# From diffusers' names to the original ones, as CompVis' and Stability's code name their modules.
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
AROUND = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
VAE = {
    "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2", "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut", "downsamplers.0": "downsample", "upsamplers.0": "upsample",
}  # fmt: skip
OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight", "final_layer_norm": "ln_final",
    "embeddings.position_embedding.weight": "positional_embedding", "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "fc1": "c_fc", "fc2": "c_proj", "self_attn.out_proj": "attn.out_proj",
    "text_projection.weight": "text_projection",
}  # fmt: skip


def renamed(name: str, table: dict[str, str]) -> str:
    for new, old in table.items():
        name = re.sub(rf"(?<![^.]){re.escape(new)}(?![^.])", old, name)
    return name


def unet(weights: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    attended = {m[1] for name in weights if (m := re.match(r"up_blocks\.(\d+)\.attentions", name))}

    def place(found: re.Match[str]) -> str:
        side, block, kind, number = found[1], int(found[2]), found[3], int(found[4])
        if side == "down":
            row, inner = 1 + block * (layers + 1) + (layers if kind == "downsamplers" else number), "0"
            end = {"resnets": "0", "attentions": "1", "downsamplers": "0.op"}[kind]
            return f"input_blocks.{row}.{end}"
        row = block * (layers + 1) + (layers if kind == "upsamplers" else number)
        inner = {"resnets": "0", "attentions": "1", "upsamplers": "2" if found[2] in attended else "1"}[kind]
        return f"output_blocks.{row}.{inner}"

    old = {}
    for name, tensor in weights.items():
        moved = re.sub(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)", place, name)
        moved = moved.replace(".0.op.conv.", ".0.op.")
        moved = renamed(moved, AROUND | (RESNET if ".resnets." in name else {}))
        old[f"model.diffusion_model.{moved}"] = tensor
    return old


def vae(weights: dict[str, Tensor], blocks: int) -> dict[str, Tensor]:
    old = {}
    for name, tensor in weights.items():
        name = re.sub(r"encoder\.down_blocks\.(\d+)\.resnets", r"encoder.down.\1.block", name)
        name = re.sub(r"encoder\.down_blocks\.(\d+)", r"encoder.down.\1", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", name)
        name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{blocks - 1 - int(m[1])}", name)
        convolved = "attentions" in name and tensor.ndim == 2  # the original attends by 1 x 1 convolutions
        old[f"first_stage_model.{renamed(name, VAE)}"] = tensor[:, :, None, None] if convolved else tensor
    return old


def clip(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in weights.items()}


def open_clip(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    old, bare = {}, {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
    for name, tensor in bare.items():
        if found := re.match(r"(.*)\.self_attn\.q_proj\.(weight|bias)", name):
            three = [bare[name.replace("q_proj", letter)] for letter in ("q_proj", "k_proj", "v_proj")]
            old[renamed(found[1], OPEN_CLIP) + f".attn.in_proj_{found[2]}"] = torch.cat(three)
        elif not re.search(r"\.[kv]_proj\.", name):
            old[renamed(name, OPEN_CLIP)] = tensor.T.contiguous() if name == "text_projection.weight" else tensor
    return {prefix + name: tensor for name, tensor in old.items()}


def part(folder: Path, name: str) -> dict[str, Tensor]:
    (file,) = (folder / name).glob("*.safetensors")
    return load_file(file)


def original(folder: Path) -> dict[str, Tensor]:
    """All weights of a tiny model's folder under their original names."""
    tensors = unet(part(folder, "unet"), json.loads((folder / "unet/config.json").read_text())["layers_per_block"])
    tensors |= vae(part(folder, "vae"), 4)
    if not (folder / "text_encoder_2").is_dir():
        return tensors | clip(part(folder, "text_encoder"), "cond_stage_model.transformer.")
    tensors |= clip(part(folder, "text_encoder"), "conditioner.embedders.0.transformer.")
    return tensors | open_clip(part(folder, "text_encoder_2"), "conditioner.embedders.1.model.")


@pytest.fixture(params=["sd15", "sdxl"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    build = tiny.build if request.param == "sd15" else tiny.build_xl
    return build(tmp_path / "model")


@pytest.fixture
def file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint in one file, where nothing but a folder of its kind can say how it is laid out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the variables are read at import
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HYPERSD_LAYOUT", str(folder))
    save_file(original(folder), tmp_path / "tuned.safetensors")
    return tmp_path / "tuned.safetensors"


def pixels(backbone: Backbone) -> bytes:
    return draw(backbone, Request("a happy cat", 3, steps=2), METHODS["base"]).pixels


def test_it_draws_what_the_folder_draws(folder: Path, file: Path) -> None:
    assert pixels(Backbone.load(file)) == pixels(Backbone.load(folder))


@pytest.mark.parametrize(
    ("name", "known"),
    [  # some that are known of the published files
        ("sd15", {"input_blocks.11.0.out_layers.3.weight": (1280, 1280, 3, 3), "output_blocks.2.1.conv.bias": (1280,),
                  "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
                  "output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
                  "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 768)}),
        ("sdxl", {"label_emb.0.0.weight": (1280, 2816), "output_blocks.2.2.conv.bias": (1280,),
                  "output_blocks.5.2.conv.bias": (640,), "output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
                  "middle_block.1.transformer_blocks.9.attn2.to_k.weight": (1280, 2048)}),
    ],
)  # fmt: skip
def test_every_tensor_of_the_true_networks_finds_its_place(
    name: str, known: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        network = UNet2DConditionModel(**CONFIGS[name])
    network.save_config(tmp_path / "unet")
    names = unet(network.state_dict(), 2)
    assert known.items() <= {k.removeprefix(single.DENOISER): tuple(t.shape) for k, t in names.items()}.items()

    class File:
        keys, get_tensor = names.keys, names.__getitem__

    found = single._translated(File(), "StableDiffusionPipeline", "unet", tmp_path, name)
    assert {key: tensor.shape for key, tensor in found.items()} == {
        key: tensor.shape for key, tensor in network.state_dict().items()
    }


def test_every_tensor_of_the_true_encoders_finds_its_place(tmp_path: Path) -> None:
    """SDXL's autoencoder and text encoders on meta tensors; the first two are Stable Diffusion 1.5's as well."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    clip_l = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    big_g = CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
                           projection_dim=1280)  # fmt: skip
    with torch.device("meta"):
        coder = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
                              down_block_types=("DownEncoderBlock2D",) * 4,
                              up_block_types=("UpDecoderBlock2D",) * 4)  # fmt: skip
        first, second = CLIPTextModel(clip_l), CLIPTextModelWithProjection(big_g)
    parts = {"vae": coder, "text_encoder": first, "text_encoder_2": second}
    names = {
        "vae": vae(coder.state_dict(), 4),
        "text_encoder": clip(first.state_dict(), "conditioner.embedders.0.transformer."),
        "text_encoder_2": open_clip(second.state_dict(), single.OPEN_CLIP),
    }
    # the published file has position_ids and logit_scale besides: 197 and 390
    assert [len(those) for those in names.values()] == [248, 196, 389]
    known = {
        "first_stage_model.decoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "conditioner.embedders.0.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
        "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (1280,),
        "conditioner.embedders.1.model.positional_embedding": (77, 1280),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
    }
    assert known.items() <= {k: tuple(t.shape) for those in names.values() for k, t in those.items()}.items()
    for part, model in parts.items():
        (model.config.save_pretrained if part.startswith("text") else model.save_config)(tmp_path / part)

        class File:
            keys, get_tensor = names[part].keys, names[part].__getitem__

        found = single._translated(File(), "StableDiffusionXLPipeline", part, tmp_path, part)
        assert {k: t.shape for k, t in found.items()} == {k: t.shape for k, t in model.state_dict().items()}


def test_it_is_laid_out_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = single.laid_out(file)
    assert isinstance(first, Path) and adapters.beside(str(file)) == (first, first / "lora")
    monkeypatch.setattr(single, "_lay_out", None)
    assert single.laid_out(file) == first and single.laid_out("emoji") == "emoji"
    assert [path.name for path in single.FOLDERS.iterdir()] == [first.name], "nothing half done stays behind"


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint that was tuned from a base model which predicts the noise."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYPERSD_LAYOUT", str(tiny.build(tmp_path / "model", prediction="epsilon")))
    save_file(original(tmp_path / "model"), tmp_path / "tuned.safetensors")
    return tmp_path / "tuned.safetensors"


V = {"v_pred": torch.zeros(0)}


@pytest.mark.parametrize(
    ("tensors", "said", "beside", "expected"),
    [
        ({}, {}, "", "epsilon"),
        (V, {}, "", "v_prediction"),
        ({}, {"modelspec.prediction_type": "v"}, "", "v_prediction"),
        ({}, {"modelspec.predict_key": "v"}, "", "v_prediction"),
        ({}, {"modelspec.prediction_type": "epsilon"}, "", "epsilon"),
        ({}, {}, "model: {params: {parameterization: v}}", "v_prediction"),
        ({}, {}, "model: {params: {timesteps: 1000}}", "epsilon"),
    ],
)
def test_what_it_says_of_its_noise_is_heeded(
    tensors: dict[str, Tensor], said: dict[str, str], beside: str, expected: str, tuned: Path
) -> None:
    plain = single.laid_out(tuned)  # a second look at the same file, when the YAML file was put there
    if tensors or said:
        save_file({**load_file(tuned), **tensors}, tuned, said)
    if beside:
        tuned.with_suffix(".yaml").write_text(beside)
    backbone = Backbone.load(tuned)
    assert backbone.schedule.prediction == expected
    assert Backbone.load(plain).schedule.prediction == "epsilon"


def test_a_yaml_file_that_cannot_be_read_is_named(tuned: Path) -> None:
    tuned.with_suffix(".yaml").write_text("model: [")
    with pytest.raises(ModelError, match=r"tuned\.yaml is no configuration of tuned\.safetensors .*take it away"):
        single.laid_out(tuned)


def test_noise_alone_at_the_end_is_what_diffusers_makes_of_it(tuned: Path) -> None:
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    save_file({**load_file(tuned), **V, "ztsnr": torch.zeros(0)}, tuned)
    backbone = Backbone.load(tuned)
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True}
    abar = backbone.schedule.alphas_cumprod
    torch.testing.assert_close(abar[:-1], DDIMScheduler(**noise).alphas_cumprod[:-1], rtol=2e-3, atol=0)
    torch.testing.assert_close(abar[-1], EulerDiscreteScheduler(**noise).alphas_cumprod[-1], rtol=1e-2, atol=0)
    assert (backbone.schedule.prediction, backbone.schedule.timesteps(4)[0]) == ("v_prediction", 999)
    assert len(set(pixels(backbone))) > 20


@pytest.mark.parametrize(
    ("mark", "what"),
    [("edm_mean", "the noise of EDM"), ("edm_vpred.sigma_max", "the noise of EDM")],
)
def test_a_noise_that_is_not_known_here_is_refused(file: Path, mark: str, what: str) -> None:
    """At once, not after gigabytes were written; drawn with another noise it would give other pictures."""
    save_file({**load_file(file), "v_pred": torch.zeros(0), mark: torch.zeros(1)}, file)
    with pytest.raises(ModelError, match=rf"tuned\.safetensors was trained .*{what}.* choose another checkpoint"):
        single.laid_out(file)
    assert not single.FOLDERS.exists()


def test_whole_numbers_are_no_weights(file: Path) -> None:
    """They are of files that were quantised with scales of their own. CLIP's positions are whole numbers anyway."""
    tensors = load_file(file)
    positions = next(k for k in tensors if k.endswith("embeddings.position_embedding.weight")).rpartition(".")[0]
    tensors[positions.replace("position_embedding", "position_ids")] = torch.arange(tiny.TOKENS)[None]
    save_file(tensors, file)
    assert Path(single.laid_out(file)).is_dir()
    save_file({name: tensor.to(torch.int8) for name, tensor in tensors.items()}, file)
    with pytest.raises(ModelError, match=r"has weights of type I8; choose the checkpoint in half or full precision"):
        single.laid_out(file)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_other_precisions_are_taken(file: Path, kind: torch.dtype) -> None:
    tensors = {name: tensor.to(kind) for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    weight = Backbone.load(file).unet.conv_in.weight
    assert torch.equal(weight, tensors["model.diffusion_model.input_blocks.0.0.weight"].float())


def test_a_larger_network_is_not_cut_to_fit(file: Path) -> None:
    tensors = load_file(file)
    block = re.compile(r"(model\.diffusion_model\.middle_block\.1\.transformer_blocks)\.0\.")
    more = {block.sub(r"\1.7.", name): tensor.clone() for name, tensor in tensors.items() if block.match(name)}
    save_file(tensors | more, file)
    first = r"mid_block\.attentions\.0\.transformer_blocks\.7\."
    with pytest.raises(ModelError, match=rf"its unet has {len(more)} tensors such as {first}.* has no place for"):
        single.laid_out(file)


def test_what_a_killed_process_left_goes_and_what_another_writes_stays(file: Path) -> None:
    left, new = (single.FOLDERS / f".laid-out-{name}/x" for name in ("left", "new"))
    for path in (left, new):
        path.parent.mkdir(parents=True)
        path.touch()
    os.utime(left.parent, (0, 0))
    single.laid_out(file)
    assert not left.parent.exists() and new.exists()


def test_what_is_published_for_its_kind_lies_beside_it(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", str(file)]) == 0
    said = capsys.readouterr().out
    assert "latent-consistency/lcm-lora-sd" in said and f"python -m hypersd fetch {file} hyper" in said


def test_what_the_translation_passes_over_is_not_left_out(tuned: Path) -> None:
    motion = {"model.diffusion_model.input_blocks.1.2.motion.weight": torch.zeros(2)}
    save_file(load_file(tuned) | motion, tuned)
    with pytest.raises(ModelError, match=r"its unet has 1 tensors that .* has no place for; choose another"):
        single.laid_out(tuned)


def test_a_layout_that_lacks_something_can_be_mended(folder: Path, file: Path, tmp_path: Path) -> None:
    """Nothing is laid out from it, so that the same command works afterwards."""
    (folder / "tokenizer").rename(tmp_path / "away")
    with pytest.raises(
        ModelError, match=r"^model: tokenizer/tokenizer\.json is missing; copy the model's folder again"
    ):
        single.laid_out(file)
    (tmp_path / "away").rename(folder / "tokenizer")
    config = (folder / "unet/config.json").read_text()
    (folder / "unet/config.json").write_text(json.dumps({**json.loads(config), "block_out_channels": 3}))
    with pytest.raises(
        ModelError, match=r"its unet cannot be read as model/unet/config\.json describes it \(TypeError"
    ):
        single.laid_out(file)
    (folder / "unet/config.json").write_text(config)
    assert Backbone.load(file).picture_px == Backbone.load(folder).picture_px


def test_what_an_update_costs_is_found_from_a_file(folder: Path, file: Path) -> None:
    assert cost.read(str(file)).learning.forward == cost.read(str(folder)).learning.forward > 0


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for name in ("nowhere.safetensors", "n" * 300 + ".safetensors"):
        with pytest.raises(ModelError, match=r"there is no file '.*'; check the path"):
            Backbone.load(tmp_path / name)


FLUX = "double_blocks.0.img_attn.norm.key_norm.scale"


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        ({"lora_unet_mid_block.lora_down.weight": (4, 8)}, "is a LoRA"),
        ({"first_stage_model.decoder.conv_in.weight": (4, 8)}, "is no whole checkpoint"),
        ({FLUX: (8,), "double_blocks.0.img_attn.qkv.lora_A.weight": (4, 8)}, "is a LoRA"),
        ({FLUX: (8,), "controlnet_blocks.0.weight": (4, 8)}, "is a ControlNet"),
        ({FLUX: (8,), "double_stream_modulation_img.lin.weight": (4, 8)}, r"of FLUX\.2"),
        ({FLUX: (8,), "distilled_guidance_layer.in_proj.weight": (4, 8)}, "of Chroma"),
        ({f"{p}x": (4, 8) for p in ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.model.")},
         "of Stable Diffusion 2"),
        ({f"{p}x": (4, 8) for p in ("model.diffusion_model.", "first_stage_model.", "conditioner.embedders.0.model.")},
         "is the refiner"),
    ],
)  # fmt: skip
def test_other_files_are_told_apart(tmp_path: Path, tensors: dict[str, tuple[int, ...]], what: str) -> None:
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=rf"other\.safetensors .*{what}.*choose a checkpoint of Stable Diffusion"):
        single.laid_out(tmp_path / "other.safetensors")


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x02")
    with pytest.raises(ModelError, match=r"model\.ckpt may be a pickle.*take the same checkpoint as \.safetensors"):
        Backbone.load(tmp_path / "model.ckpt")


def test_a_tensor_that_is_missing_is_named(file: Path) -> None:
    tensors = load_file(file)
    del tensors["model.diffusion_model.middle_block.0.in_layers.2.weight"]
    save_file(tensors, file)
    with pytest.raises(ModelError, match=r"its unet lacks 1 tensors such as mid_block\.resnets\.0\.conv1\.weight"):
        single.laid_out(file)
    assert not list(single.FOLDERS.iterdir()), "nothing was laid out"


def test_one_for_inpainting_is_refused(file: Path) -> None:
    tensors = load_file(file)
    tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(8, 9, 3, 3)
    save_file(tensors, file)
    said = r"conv_in\.weight of its unet is \(8, 9, 3, 3\), in model it is .*not made for inpainting"
    with pytest.raises(ModelError, match=said):
        single.laid_out(file)


def test_without_a_layout_it_says_what_to_do(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HYPERSD_LAYOUT")
    with pytest.raises(ModelError, match=r"are needed once: .* could not be fetched .*HYPERSD_LAYOUT=folder"):
        single.laid_out(file)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    monkeypatch.setenv("HYPERSD_LAYOUT", str(tmp_path / "other"))
    with pytest.raises(ModelError, match="HYPERSD_LAYOUT must name a folder with a StableDiffusion"):
        single.laid_out(file)


def test_a_header_without_a_bottom_is_a_sentence(tmp_path: Path) -> None:
    text = b'{"a":' + b"[" * 200_000
    (tmp_path / "deep.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ModelError, match=r"deep\.safetensors has no readable header \(ValueError\); fetch it again"):
        single.laid_out(tmp_path / "deep.safetensors")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_file_is_a_sentence(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    place = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    save_file({"model.diffusion_model.x": torch.zeros(4)}, place)
    whole = place.read_bytes()
    cut, at = data.draw(st.integers(0, len(whole))), data.draw(st.integers(0, len(whole) - 1))
    changed = bytearray(whole[:cut])
    if at < cut:
        changed[at] ^= data.draw(st.integers(1, 255))
    place.write_bytes(changed)
    with pytest.raises(ModelError):
        single.laid_out(place)
