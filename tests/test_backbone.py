"""The base model against diffusers' pipeline, and what a broken folder is told."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from safetensors.torch import load_file, save_file

from hypersd import folders as module
from hypersd.backbone import Backbone
from hypersd.folders import BACKBONES, FAMILIES, ModelError, find_folder, write_manifest
from hypersd.hub import REVISIONS

PARTS = FAMILIES["StableDiffusionPipeline"]
WEIGHT_PATHS = [f"{part}/{about.stem}.safetensors" for part, about in PARTS.items()]


@pytest.fixture
def copy(tiny_folder: Path, tmp_path: Path) -> Path:
    """A folder of the tiny model that may be damaged."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def test_states_equal_the_pipelines(tiny_backbone: Backbone, tiny_folder: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, local_files_only=True)
    prompt, negative = "a happy cat, Z\u00e9bra", ""
    with torch.no_grad():
        theirs = pipeline.encode_prompt(prompt, "cpu", 1, True, negative_prompt=negative)
    assert torch.equal(tiny_backbone.embed([prompt, negative]), torch.cat(theirs))


def test_each_text_is_encoded_once(tiny_folder: Path) -> None:
    backbone = Backbone.load(tiny_folder)
    calls: list[int] = []
    backbone.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    first = backbone.embed(["a cat", "a dog", "a cat"])
    again = backbone.embed(["a dog", "a cat"])
    assert len(calls) == 2
    assert torch.equal(first[[1, 0]], again)
    assert not torch.equal(first[0], first[1])


def test_states_made_while_drawing_can_be_trained_with(tiny_folder: Path) -> None:
    backbone = Backbone.load(tiny_folder)
    with torch.inference_mode():
        backbone.embed(["a cat"])
    weight = torch.ones((), requires_grad=True)
    (backbone.embed(["a cat"]) * weight).sum().backward()  # fails for inference tensors
    assert weight.grad is not None


@pytest.mark.parametrize(
    ("prompt", "ignored"),
    [
        ("", ""),
        ("a happy cat", ""),
        ("cat " * 10, ""),  # exactly full: two of the twelve tokens mark start and end
        ("cat " * 10 + "Happy DOG", "Happy DOG"),
    ],
)
def test_what_does_not_fit_is_told(tiny_backbone: Backbone, prompt: str, ignored: str) -> None:
    assert tiny_backbone.truncated(prompt) == ignored
    read = prompt.removesuffix(ignored)
    assert torch.equal(tiny_backbone.embed([prompt]), tiny_backbone.embed([read]))


def test_a_word_may_fit_in_part(tiny_backbone: Backbone) -> None:
    assert tiny_backbone.truncated("cat " * 8 + "Zebra") == "bra"  # not a word of the vocabulary: letter by letter


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_noise_is_the_pipelines_and_named_by_its_bytes(tiny_backbone: Backbone, tiny_folder: Path, seed: int) -> None:
    x_t, sha256 = tiny_backbone.noise(seed)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, local_files_only=True)
    generator = torch.Generator().manual_seed(seed)
    theirs = pipeline.prepare_latents(1, 8, tiny.SIZE_PX, tiny.SIZE_PX, torch.float32, "cpu", generator)
    assert torch.equal(x_t, theirs)
    assert sha256 == hashlib.sha256(x_t.numpy().astype("<f4").tobytes()).hexdigest()
    assert sha256 == tiny_backbone.noise(seed)[1] != tiny_backbone.noise(seed ^ 1)[1]


def test_decode_gives_bytes_a_picture_each(tiny_backbone: Backbone) -> None:
    latents = torch.cat([tiny_backbone.noise(seed)[0] for seed in (1, 2)])
    pixels = tiny_backbone.decode(latents)
    assert (pixels.shape, pixels.dtype) == ((2, tiny.SIZE_PX, tiny.SIZE_PX, 3), torch.uint8)
    assert torch.equal(pixels[1:], tiny_backbone.decode(latents[1:]))


def test_encode_is_the_pipelines_and_decode_undoes_its_scale(tiny_backbone: Backbone) -> None:
    pixels = torch.randint(0, 256, (2, 32, 32, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    mean, deviation = tiny_backbone.encode(pixels)
    assert mean.shape == deviation.shape == (2, *tiny_backbone.latent_shape)
    image = VaeImageProcessor().preprocess(pixels.permute(0, 3, 1, 2).float() / 255)
    vae = tiny_backbone.vae
    with torch.no_grad():
        theirs = vae.encode(image).latent_dist
        picture = vae.decode(theirs.mean).sample
    torch.testing.assert_close(mean, theirs.mean * vae.config.scaling_factor, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(deviation, theirs.std * vae.config.scaling_factor, rtol=1e-5, atol=1e-5)
    expected = (VaeImageProcessor().postprocess(picture, "pt") * 255).round().permute(0, 2, 3, 1)
    assert (tiny_backbone.decode(mean).float() - expected).abs().max() <= 1
    assert expected.std() > 1


def test_pictures_have_the_size_it_draws(tiny_backbone: Backbone) -> None:
    assert tiny_backbone.picture_px == tiny.SIZE_PX
    assert tiny_backbone.decode(tiny_backbone.noise(1)[0]).shape == (1, tiny.SIZE_PX, tiny.SIZE_PX, 3)


def test_the_encoders_hash_is_theirs_alone(copy: Path) -> None:
    before = Backbone.load(copy).encoders_sha256
    with torch.no_grad():
        changed = {n: t + 1 if n == "conv_in.bias" else t for n, t in load_file(copy / WEIGHT_PATHS[1]).items()}
    save_file(changed, copy / WEIGHT_PATHS[1], metadata={"format": "pt"})
    assert WEIGHT_PATHS[1].startswith("unet/")
    assert Backbone.load(copy).encoders_sha256 == before
    config = copy / "vae/config.json"
    config.write_text(config.read_text().replace('"scaling_factor": 0.8', '"scaling_factor": 0.9'))
    assert Backbone.load(copy).encoders_sha256 != before


def test_half_precision_files_are_computed_in_float32(copy: Path) -> None:
    for path in WEIGHT_PATHS:
        halved = {name: tensor.half() for name, tensor in load_file(copy / path).items()}
        save_file(halved, copy / path, metadata={"format": "pt"})
    file = copy / WEIGHT_PATHS[1]
    file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))  # as hubs name them
    backbone = Backbone.load(copy)
    for network in (backbone.unet, backbone.vae, backbone.text_encoder):
        assert {weight.dtype for weight in network.parameters()} == {torch.float32}
    assert torch.equal(backbone.unet.conv_in.weight, halved_weight(file.parent, "conv_in.weight"))


def halved_weight(part: Path, name: str) -> torch.Tensor:
    return load_file(next(part.glob("*.safetensors")))[name].float()


def test_the_network_is_frozen(tiny_backbone: Backbone) -> None:
    for network in (tiny_backbone.unet, tiny_backbone.vae, tiny_backbone.text_encoder):
        assert not network.training
        assert not any(weight.requires_grad for weight in network.parameters())


def test_a_local_folder_needs_no_network(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert Backbone.load(tiny_folder).name == "tiny"


def remove(path: Path) -> None:
    path.unlink()


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def fill_with_text(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\n")  # what git leaves where LFS is not installed


@pytest.mark.parametrize("path", WEIGHT_PATHS)
@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (remove, "is missing"),
        (halve, "is truncated or damaged"),
        (cut_header, "is truncated or damaged"),
        (empty, "is truncated or damaged"),
        (fill_with_text, "is truncated or damaged"),
    ],
)
def test_a_broken_weight_file_is_named(copy: Path, path: str, damage: Callable[[Path], None], sentence: str) -> None:
    damage(copy / path)
    with pytest.raises(ModelError) as caught:
        Backbone.load(copy)
    message = str(caught.value)
    assert message.startswith(f"model: {path} {sentence}")
    assert message.endswith("; copy the model's folder again from where it came")
    assert str(copy) not in message


@pytest.mark.parametrize(
    "path",
    [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "tokenizer/tokenizer.json",
    ],
)
def test_any_other_missing_or_empty_file_is_named(copy: Path, path: str) -> None:
    empty(copy / path)
    with pytest.raises(ModelError, match=path.split("/")[0]):
        Backbone.load(copy)
    remove(copy / path)
    with pytest.raises(ModelError, match=f"model: {path} is missing"):
        Backbone.load(copy)


@pytest.mark.parametrize("path", WEIGHT_PATHS)
def test_a_missing_tensor_is_not_replaced_by_random_numbers(copy: Path, path: str) -> None:
    tensors = load_file(copy / path)
    lost = sorted(tensors)[0]
    del tensors[lost]
    save_file(tensors, copy / path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"model: {path.split('/')[0]} lacks 1 tensors such as .*{lost}"):
        Backbone.load(copy)


def test_weights_of_another_shape_are_refused(copy: Path) -> None:
    path = copy / "unet/config.json"
    path.write_text(path.read_text().replace('"cross_attention_dim": 16', '"cross_attention_dim": 20'))
    with pytest.raises(ModelError, match="model: unet cannot be loaded"):
        Backbone.load(copy)


def test_a_manifest_tells_changed_files(copy: Path) -> None:
    write_manifest(copy)
    sha256 = Backbone.load(copy).sha256
    path = copy / WEIGHT_PATHS[1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelError, match=f"model: {WEIGHT_PATHS[1]} is damaged"):
        _ = Backbone.load(copy).sha256
    (copy / "manifest.json").unlink()
    assert Backbone.load(copy).sha256 != sha256


def test_a_manifest_tells_missing_and_resized_files(copy: Path) -> None:
    write_manifest(copy)
    listed = json.loads((copy / "manifest.json").read_text())
    assert listed["files"].keys() == listed["bytes"].keys() > set(WEIGHT_PATHS)
    config = copy / "tokenizer/tokenizer_config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(ModelError, match=r"tokenizer/tokenizer_config\.json is truncated or damaged"):
        Backbone.load(copy)
    config.unlink()
    with pytest.raises(ModelError, match=r"tokenizer/tokenizer_config\.json is missing"):
        Backbone.load(copy)


def test_equal_weights_have_equal_hashes_wherever_they_lie(tiny_backbone: Backbone, copy: Path) -> None:
    assert Backbone.load(copy).sha256 == tiny_backbone.sha256


@pytest.mark.parametrize("name", ["", "sd16", "no/such/folder", "x" * 5000])
def test_an_unknown_backbone_is_told_what_there_is(name: str) -> None:
    with pytest.raises(ModelError, match=r"backbone must be one of emoji, sd15, sdxl, sd3, flux or a model's folder"):
        Backbone.load(name)


def test_another_family_is_told_apart(copy: Path) -> None:
    index = copy / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "KandinskyPipeline"}))
    with pytest.raises(ModelError, match=r"model: model_index\.json is for KandinskyPipeline"):
        Backbone.load(copy)


def test_every_preset_of_the_hub_names_one_commit() -> None:
    revisions = [REVISIONS[preset.source] for name, preset in BACKBONES.items() if name != "emoji"]
    assert all(re.fullmatch("[0-9a-f]{40}", revision) for revision in revisions)


def test_the_embedded_model_is_looked_for_beside_the_package() -> None:
    name, folder, licence = find_folder("emoji")
    assert (name, folder) == ("emoji", Path(module.__file__).parent.parent / "assets" / "emoji-sd")
    assert licence == BACKBONES["emoji"].licence
    assert "git checkout" in module.remedy("emoji")
