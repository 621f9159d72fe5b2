"""LoRA files against diffusers' loader and naming, and what a bad one is told."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hypersd.adapters import (
    KEY,
    AdapterError,
    AdapterFile,
    Lora,
    _dotted,
    _kohya_named,
    dressed,
    found,
    inspect,
    load,
    save,
)
from hypersd.backbone import Backbone
from hypersd.folders import ModelError, network_sha256, write_manifest
from hypersd.generate import denoise
from hypersd.methods import METHODS
from hypersd.records import Adapter, Request
from hypersd.roles import Roles

CAT = Request("a happy cat", seed=3, steps=2, guidance=4.0)


@pytest.fixture(scope="module")
def adapter(tiny_folder: Path) -> dict[str, Tensor]:
    """A random LoRA of the tiny model, rank 2."""
    role = Roles(Backbone.load(tiny_folder).unet).add("any", rank=2)
    generator = torch.Generator().manual_seed(1)
    # a half-precision file gives back these very numbers
    return {n: (0.1 * torch.randn(t.shape, generator=generator)).half().float() for n, t in role.adapter().items()}


@pytest.fixture(scope="module")
def card(tiny_backbone: Backbone) -> Adapter:
    return Adapter(
        name="mine", method="tcd", backbone="tiny", base_sha256=tiny_backbone.network_sha256, segments=2, rank=2,
        guidance=1.0, eta=0.3, updates=7, data="abc", commit="def", recipe={"lr": 0.1, "betas": [0.9, 0.99]}, start=800,
    )  # fmt: skip


@pytest.fixture
def file(tmp_path: Path, adapter: dict[str, Tensor], card: Adapter) -> AdapterFile:
    return save(tmp_path / "lora.safetensors", adapter, card)


@pytest.fixture(scope="module")
def pipeline(tiny_folder: Path) -> StableDiffusionPipeline:
    made = StableDiffusionPipeline.from_pretrained(tiny_folder, local_files_only=True)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def stock(pipeline: StableDiffusionPipeline) -> Iterator[Callable[[Path | None], Tensor]]:
    """Latents that diffusers' own pipeline ends at, with a LoRA file that its own loader reads."""

    def draw(path: Path | None) -> Tensor:
        if path:
            pipeline.load_lora_weights(path.parent, weight_name=path.name)
        options: dict[str, Any] = {"num_inference_steps": CAT.steps, "guidance_scale": CAT.guidance}
        generator = torch.Generator().manual_seed(CAT.seed)
        latents: Tensor = pipeline(CAT.prompt, generator=generator, output_type="latent", **options).images
        pipeline.unload_lora_weights()
        return latents

    yield draw
    pipeline.unload_lora_weights()


def ours(backbone: Backbone, file: AdapterFile | None) -> Tensor:
    """Latents of the same drawing, by our loop: DDIM, whatever method the adapter was made for."""
    row = replace(METHODS["base"], adapted=True, adapters=(file,)) if file else METHODS["base"]
    with torch.inference_mode():
        return denoise(backbone, CAT, row).x


# ----------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("kohya", [False, True])
def test_what_was_saved_is_found_again(tmp_path: Path, adapter: dict[str, Tensor], card: Adapter, kohya: bool) -> None:
    file = save(tmp_path / "new" / "folder" / "lora.safetensors", adapter, card, kohya=kohya)
    assert file == inspect(file.path)
    assert file.card == card
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o644
    assert [p.name for p in file.path.parent.iterdir()] == ["lora.safetensors"]
    again = load(file.path)
    assert again.keys() == adapter.keys()
    assert all(torch.equal(again[n], t) and again[n].dtype == torch.float32 for n, t in adapter.items())
    assert {t.dtype for t in load_file(file.path).values()} == {torch.float16}


def test_equal_adapters_make_equal_files(tmp_path: Path, adapter: dict[str, Tensor], card: Adapter) -> None:
    files = [save(tmp_path / name, dict(order), card) for name, order in
             (("a", adapter.items()), ("b", reversed(adapter.items())))]  # fmt: skip
    assert files[0].sha256 == files[1].sha256
    assert save(tmp_path / "c", adapter, replace(card, updates=8)).sha256 != files[0].sha256


def test_a_role_takes_what_was_loaded(tiny_folder: Path, file: AdapterFile, adapter: dict[str, Tensor]) -> None:
    role = Roles(Backbone.load(tiny_folder).unet).add("student", rank=2)
    role.load_adapter(load(file.path))
    assert all(torch.equal(role.adapter()[n], t) for n, t in adapter.items())


@pytest.mark.parametrize("kohya", [False, True])
def test_diffusers_draws_the_same_picture_with_it(
    tmp_path: Path, tiny_backbone: Backbone, adapter: dict[str, Tensor], card: Adapter, kohya: bool,
    stock: Callable[[Path | None], Tensor],
) -> None:  # fmt: skip
    file = save(tmp_path / "lora.safetensors", adapter, card, kohya=kohya)
    plain, theirs = stock(None), stock(file.path)
    torch.testing.assert_close(ours(tiny_backbone, file), theirs, rtol=0, atol=1e-3)
    torch.testing.assert_close(ours(tiny_backbone, None), plain, rtol=0, atol=1e-3)
    assert (theirs - plain).abs().max() > 0.1


@pytest.mark.parametrize("alpha", [None, 1.0, 4.0])
def test_kohya_files_of_others_say_how_strong_they_are(
    tmp_path: Path, tiny_backbone: Backbone, adapter: dict[str, Tensor], card: Adapter, alpha: float | None,
    stock: Callable[[Path | None], Tensor],
) -> None:  # fmt: skip
    """alpha / rank scales a layer; without an alpha the scale is 1."""
    file = save(tmp_path / "lora.safetensors", adapter, card, kohya=True)
    tensors = {n: t for n, t in load_file(file.path).items() if not n.endswith(".alpha")}
    if alpha is not None:
        tensors |= {n.replace("lora_down.weight", "alpha"): torch.tensor(alpha) for n in tensors if "lora_down" in n}
    file = rewrite(file, tensors)
    scale = 1.0 if alpha is None else alpha / 2
    again = load(file.path)
    assert all(torch.equal(again[n], t * scale if n.endswith("lora_B") else t) for n, t in adapter.items())
    torch.testing.assert_close(ours(tiny_backbone, file), stock(file.path), rtol=0, atol=1e-3)


def rewrite(file: AdapterFile, tensors: dict[str, Tensor]) -> AdapterFile:
    """The same file with other tensors in it."""
    with safe_open(file.path, "pt") as opened:
        metadata = opened.metadata()
    save_file(tensors, file.path, metadata=metadata)
    return inspect(file.path)


# ------------------------------------------------------------------------------------- the names of a real UNet


@pytest.fixture(scope="module")
def sd15() -> nn.Module:
    """Stable Diffusion 1.5's architecture without its numbers."""
    with torch.device("meta"):
        return UNet2DConditionModel(cross_attention_dim=768)


def test_every_name_of_sd15_survives_kohyas_underscores(sd15: nn.Module) -> None:
    names = [name for name, layer in sd15.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    assert len(names) > 280
    for name in names:
        stems = {key.split(".")[0] for key in _kohya_named(f"{name}.lora_A", torch.ones(1, 1))}
        assert {_dotted(stem.removeprefix("lora_unet_")) for stem in stems} == {name}


def test_kohya_keys_are_those_of_diffusers_own_conversion(sd15: nn.Module, adapter: dict[str, Tensor]) -> None:
    with torch.device("meta"):
        made = Roles(sd15).add("student", rank=2).adapter()
    for one in (made, adapter):
        theirs = convert_state_dict_to_kohya({f"unet.{name}.weight": tensor for name, tensor in one.items()})
        own: dict[str, Tensor] = {}
        for name, tensor in one.items():
            own |= _kohya_named(name, tensor)
        assert own.keys() == theirs.keys()
        assert all(own[k].shape == theirs[k].shape for k in own)
    assert all(float(own[k]) == float(theirs[k]) for k in own if k.endswith(".alpha"))


# --------------------------------------------------------------------------------------------------------- merging


def test_dressed_equals_the_role_and_leaves_the_base_alone(tiny_folder: Path, adapter: dict[str, Tensor]) -> None:
    backbone = Backbone.load(tiny_folder)
    before = {n: p.clone() for n, p in backbone.unet.named_parameters()}
    worn = dressed(backbone.unet, Lora(adapter))
    assert all(torch.equal(before[n], p) for n, p in backbone.unet.named_parameters())
    x, states = torch.cat([backbone.noise(1)[0], backbone.noise(2)[0]]), backbone.embed(["a cat", "a dog"])
    merged = worn(x, 499, encoder_hidden_states=states, return_dict=False)[0]
    roles = Roles(backbone.unet)
    roles.add("student", rank=2).load_adapter(adapter)
    with roles.wear("student"):
        torch.testing.assert_close(backbone.predict(x, 499, states).detach(), merged, rtol=1e-5, atol=1e-5)
    assert (backbone.predict(x, 499, states) - merged).abs().max() > 1e-2


def test_dressed_shares_what_the_adapter_leaves_alone(tiny_backbone: Backbone, adapter: dict[str, Tensor]) -> None:
    few = {n: t for n, t in adapter.items() if n.startswith("mid_block")}
    touched = {f"{n.rsplit('.', 1)[0]}.weight" for n in few}
    base, worn = tiny_backbone.unet, dressed(tiny_backbone.unet, Lora(few))
    assert touched
    for name, weight in worn.named_parameters():
        assert (weight is base.get_parameter(name)) == (name not in touched)
        assert not weight.requires_grad
    assert not worn.training


def test_half_of_the_scale_is_half_of_the_change(tiny_backbone: Backbone, adapter: dict[str, Tensor]) -> None:
    base, half, whole = (dressed(tiny_backbone.unet, Lora(adapter, scale)) for scale in (0.0, 0.5, 1.0))
    name = "mid_block.resnets.0.conv1.weight"
    w0, w1, w2 = (network.get_parameter(name) for network in (base, half, whole))
    assert torch.equal(w0, tiny_backbone.unet.get_parameter(name))
    torch.testing.assert_close(w2 - w0, 2 * (w1 - w0))


@pytest.mark.parametrize("change", ["layer", "shape", "rank", "half"])
def test_an_adapter_of_another_base_is_not_merged(
    tiny_backbone: Backbone, adapter: dict[str, Tensor], change: str
) -> None:
    name = next(n for n in adapter if n.endswith("mid_block.attentions.0.proj_in.lora_A"))
    given = dict(adapter)
    if change == "layer":
        given |= {"mid_block.other.lora_A": torch.ones(2, 4), "mid_block.other.lora_B": torch.ones(4, 2)}
    elif change == "shape":
        given[name] = torch.ones(2, 99, *given[name].shape[2:])
    elif change == "rank":
        given[name] = torch.ones(3, *given[name].shape[1:])
    else:
        del given[name]
    with pytest.raises(AdapterError, match=r"does not fit this base: its layer mid_block\.\S+ is missing or of"):
        dressed(tiny_backbone.unet, Lora(given))


def test_a_network_with_roles_on_is_not_merged_into(tiny_folder: Path, adapter: dict[str, Tensor]) -> None:
    """Its layers are wrapped: a merge would have to write into the base that all roles share."""
    unet = Backbone.load(tiny_folder).unet
    Roles(unet).add("student", rank=2)
    before = {n: p.clone() for n, p in unet.named_parameters()}
    with pytest.raises(AdapterError, match="does not fit this base"):
        dressed(unet, Lora(adapter))
    assert all(torch.equal(before[n], p) for n, p in unet.named_parameters())


# ------------------------------------------------------------------------------------------- what a backbone draws


def test_an_adapter_is_merged_once(tiny_folder: Path, file: AdapterFile, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = Backbone.load(tiny_folder)
    made: list[int] = []

    def counting(*arguments: Any) -> Any:
        made.append(1)
        return dressed(*arguments)

    monkeypatch.setattr("hypersd.wardrobe.dressed", counting)
    first, again = ours(backbone, file), ours(backbone, file)
    assert torch.equal(first, again) and len(made) == 1


def test_an_adapter_that_was_drawn_with_can_be_trained_through(tiny_folder: Path, file: AdapterFile) -> None:
    backbone = Backbone.load(tiny_folder)
    ours(backbone, file)  # in inference mode, where the merged network is made
    x = backbone.noise(1)[0].requires_grad_()
    backbone.predict(x, 499, backbone.embed(["a cat"]), file).sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0


def test_the_scale_of_the_card_is_kept(tmp_path: Path, tiny_backbone: Backbone, adapter: dict[str, Tensor],
                                       card: Adapter) -> None:  # fmt: skip
    file = save(tmp_path / "none.safetensors", adapter, replace(card, scale=0.0))
    assert torch.equal(ours(tiny_backbone, file), ours(tiny_backbone, None))


def test_a_file_that_was_replaced_while_the_app_runs(
    tiny_folder: Path, file: AdapterFile, adapter: dict[str, Tensor], card: Adapter
) -> None:
    backbone = Backbone.load(tiny_folder)
    before = ours(backbone, file)
    save(file.path, {n: 2 * t for n, t in adapter.items()}, card)
    assert torch.equal(ours(backbone, file), before)  # it is in memory
    with pytest.raises(ModelError, match=r"lora\.safetensors was replaced by another file; start the app again"):
        ours(Backbone.load(tiny_folder), file)
    file.path.unlink()
    with pytest.raises(AdapterError, match=r"lora\.safetensors cannot be read \(FileNotFoundError\); check the path"):
        ours(Backbone.load(tiny_folder), file)


def test_an_adapter_of_another_base_is_not_drawn_with(
    tmp_path: Path, tiny_backbone: Backbone, adapter: dict[str, Tensor], card: Adapter
) -> None:
    file = save(tmp_path / "lora.safetensors", adapter, replace(card, base_sha256="0" * 64))
    with pytest.raises(ModelError, match=r"another base than tiny; train it again with: python -m hypersd distill tcd"):
        ours(tiny_backbone, file)


# --------------------------------------------------------------------------------------------------- bad files


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def cut_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def text(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\n")


def pickled(path: Path) -> None:
    torch.save({"mid_block.lora_A": torch.ones(2)}, path)


def old_pickled(path: Path) -> None:
    torch.save({"mid_block.lora_A": torch.ones(2)}, path, _use_new_zipfile_serialization=False)


def a_list(path: Path) -> None:
    path.write_bytes((2).to_bytes(8, "little") + b"[]")


def no_offsets(path: Path) -> None:
    path.write_bytes((8).to_bytes(8, "little") + b'{"a":{}}')


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[Callable[[Path], None], str] = {
    cut: r"is truncated or damaged \([\d,]+ bytes instead of [\d,]+\); copy it again",
    longer: r"is truncated or damaged \([\d,]+ bytes instead of [\d,]+\); copy it again",
    cut_header: r"is truncated or damaged \(no readable header\); copy it again",
    empty: r"is truncated or damaged \(no readable header\); copy it again",
    a_list: r"is truncated or damaged \(no readable header\); copy it again",
    no_offsets: r"is truncated or damaged \(no readable header\); copy it again",
    text: r"is not a safetensors file \(pickles are never read\); convert it first",
    pickled: r"is not a safetensors file \(pickles are never read\); convert it first",
    old_pickled: r"is not a safetensors file \(pickles are never read\); convert it first",
    folder: r"cannot be read \(IsADirectoryError\); check the path",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_a_broken_file_is_named_and_left_out(
    file: AdapterFile, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture, adapter: dict[str, Tensor]
) -> None:
    good = save(file.path.with_name("good.safetensors"), adapter, file.card)
    damage(file.path)
    for read in (inspect, load):
        with pytest.raises(AdapterError, match=rf"^lora\.safetensors {DAMAGES[damage]}$"):
            read(file.path)
    assert found(file.path.parent) == (good,)
    assert "lora.safetensors" in caplog.text


def with_metadata(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load_file(path)
    with safe_open(path, "pt") as opened:
        told = json.loads(opened.metadata()[KEY])
    save_file(tensors, path, metadata={KEY: json.dumps(change(told))})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda told: {**told, "colour": 1}, "the field 'colour' is unknown; it may be of a later version"),
        (lambda told: {k: v for k, v in told.items() if k != "rank"}, "the field 'rank' is missing"),
        (lambda told: {**told, "segments": 0}, "segments must be a whole number from 1 to 1,000, got 0"),
        (lambda told: {**told, "segments": "many"}, "segments must be a whole number .* got 'many'"),
        (lambda told: {**told, "scale": None}, "scale must be a number .* got None"),
        (lambda told: {**told, "guidance": float("nan")}, "guidance must be a number from 0 to 30, got nan"),
        (lambda told: {**told, "start": -1}, "start must be a whole number .* got -1"),
        (lambda told: {**told, "method": ["tcd"]}, r"method must be text, got \['tcd'\]"),
        (lambda told: {**told, "name": ""}, "name or recipe is empty"),
        (lambda told: {**told, "recipe": None}, "name or recipe is empty"),
        (lambda told: [told], "they are no JSON object"),
        (lambda told: 3, "they are no JSON object"),
    ],
)
def test_metadata_that_say_something_else(
    file: AdapterFile, change: Callable[[dict[str, Any]], Any], sentence: str
) -> None:
    with_metadata(file.path, change)
    with pytest.raises(AdapterError, match=rf"^lora\.safetensors: its metadata cannot be used: {sentence}$"):
        inspect(file.path)
    assert found(file.path.parent) == ()


def test_fields_with_a_default_may_be_missing(file: AdapterFile) -> None:
    with_metadata(file.path, lambda told: {k: v for k, v in told.items() if k not in ("start", "end", "scale")})
    assert inspect(file.path).card == replace(file.card, start=999, end=0, scale=1.0)


def test_a_lora_of_somebody_else_can_be_loaded_but_does_not_show_itself(
    file: AdapterFile, adapter: dict[str, Tensor]
) -> None:
    save_file(load_file(file.path), file.path)
    assert load(file.path).keys() == adapter.keys()
    with pytest.raises(AdapterError, match=rf"^lora\.safetensors does not say how it was made .*'{KEY}'.*distill"):
        inspect(file.path)


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ({"unet.mid_block.alpha": (1,)}, r"not a LoRA of a UNet: it holds unet\.mid_block\.alpha"),
        ({"text_encoder.q.lora_A.weight": (2, 2)}, r"not a LoRA of a UNet: it holds text_encoder"),
        ({"lora_unet_a.lora_down.weight": (2, 2), "lora_te_b.lora_down.weight": (2, 2)}, r"alone: it holds"),
        ({"unet.new.lora_A.weight": (2, 4)}, r"the two halves of new do not fit together"),
        ({"unet.new.lora_A.weight": (3, 4), "unet.new.lora_B.weight": (4, 2)}, r"the two halves of new do not fit"),
        ({"unet.new.lora_A.weight": (), "unet.new.lora_B.weight": ()}, r"the two halves of new do not fit together"),
    ],
)
def test_tensors_that_are_no_lora(file: AdapterFile, extra: dict[str, tuple[int, ...]], sentence: str) -> None:
    rewrite(file, {**load_file(file.path), **{n: torch.ones(shape) for n, shape in extra.items()}})
    with pytest.raises(AdapterError, match=sentence):
        load(file.path)


@pytest.mark.parametrize("key", ["lora_unet_a.lora_mid.weight", "lora_unet_a.dora_scale", "lora_unet_a.hada_w1_a"])
def test_kinds_that_would_be_half_read(file: AdapterFile, key: str) -> None:
    names = ("lora_unet_a.lora_down.weight", "lora_unet_a.lora_up.weight", key)
    rewrite(file, {name: torch.ones(2, 2) for name in names})
    with pytest.raises(AdapterError, match=f"is not a LoRA of a UNet alone: it holds {key}"):
        load(file.path)


def test_a_kohya_layer_without_its_other_half(file: AdapterFile) -> None:
    rewrite(file, {"lora_unet_mid_block_a.lora_down.weight": torch.ones(2, 2)})
    with pytest.raises(AdapterError, match=r"the two halves of mid_block\.a do not fit together"):
        load(file.path)


def test_a_file_without_tensors(file: AdapterFile) -> None:
    rewrite(file, {})
    with pytest.raises(AdapterError, match=r"^lora\.safetensors is not a LoRA of a UNet: it holds no layers$"):
        load(file.path)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_not_loaded(file: AdapterFile, number: float) -> None:
    tensors = load_file(file.path)
    name = sorted(tensors)[3]
    tensors[name].view(-1)[0] = number
    rewrite(file, tensors)
    with pytest.raises(AdapterError, match=rf"^lora\.safetensors: .*{name[5:-7]} holds numbers that are not finite"):
        load(file.path)


# ----------------------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e6])  # the last does not fit half precision
def test_numbers_that_are_not_finite_are_not_saved(
    file: AdapterFile, adapter: dict[str, Tensor], number: float
) -> None:
    name = sorted(adapter)[5]
    bad = {**adapter, name: torch.full_like(adapter[name], number)}
    with pytest.raises(AdapterError, match=rf"^{name} is not finite in half precision; lora\.safetensors was not"):
        save(file.path, bad, file.card)
    assert inspect(file.path) == file


def test_a_card_that_could_not_be_read_again_replaces_nothing(file: AdapterFile, adapter: dict[str, Tensor]) -> None:
    with pytest.raises(AdapterError, match="segments must be a whole number"):
        save(file.path, adapter, replace(file.card, segments=0))
    assert inspect(file.path) == file
    assert [p.name for p in file.path.parent.iterdir()] == ["lora.safetensors"]


@pytest.mark.parametrize("where", ["safetensors.torch.save_file", "os.fsync", "os.replace"])
def test_a_failing_disk_while_saving_loses_nothing(
    file: AdapterFile, adapter: dict[str, Tensor], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(where, full)
        with pytest.raises(AdapterError, match=r"was not written \(.*No space left on device\); make room"):
            save(file.path, {n: 2 * t for n, t in adapter.items()}, file.card)
    assert inspect(file.path) == file
    assert [p.name for p in file.path.parent.iterdir()] == ["lora.safetensors"]


def test_a_disk_that_is_really_full(file: AdapterFile) -> None:
    """The library then raises an error of its own, no OSError: the size of files is limited, in a process apart."""
    code = """
import sys
from pathlib import Path
from hypersd.adapters import AdapterError, inspect, load, save
import torch
path = Path(sys.argv[1])
try:
    save(path, load(path), inspect(path).card)
except AdapterError as problem:
    print(problem)
"""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    root = Path(__file__).parent.parent
    run = [sys.executable, "-B", "-c", code, str(file.path)]
    done = subprocess.run(run, cwd=root, preexec_fn=limit, capture_output=True, text=True)
    assert "lora.safetensors was not written (" in done.stdout and "File too large" in done.stdout, done.stderr
    assert inspect(file.path) == file
    assert [p.name for p in file.path.parent.iterdir()] == ["lora.safetensors"]


# ---------------------------------------------------------------------------------------------- a model's folder


def test_the_hash_of_a_base_is_the_backbones(tiny_folder: Path, tiny_backbone: Backbone, tmp_path: Path) -> None:
    assert network_sha256(tiny_folder) == tiny_backbone.network_sha256
    assert network_sha256(tmp_path) == ""
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes((tiny_folder / "unet" / weights.name).read_bytes())
    shutil.copy(tiny_folder / "model_index.json", tmp_path)
    write_manifest(tmp_path)
    assert network_sha256(tmp_path) == tiny_backbone.network_sha256
    for damaged in ("{", "[]", "{}", '{"files": {}}'):  # loading the model says what is wrong
        (tmp_path / "manifest.json").write_text(damaged)
        assert network_sha256(tmp_path) == tiny_backbone.network_sha256


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    assert found(tmp_path / "no") == found(tmp_path) == ()


def test_the_card_is_plain_json(file: AdapterFile, card: Adapter) -> None:
    with safe_open(file.path, "pt") as opened:
        assert json.loads(opened.metadata()[KEY]) == asdict(card)
