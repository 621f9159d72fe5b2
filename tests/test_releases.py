"""Published models: written down right, kept as adapters of ours, drawn as diffusers draws the file itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hypersd import adapters, methods, releases
from hypersd.__main__ import main
from hypersd.backbone import Backbone
from hypersd.folders import cached
from hypersd.generate import draw
from hypersd.methods import METHODS, discover
from hypersd.records import InputError, Request
from hypersd.releases import RELEASES, Release
from hypersd.roles import Roles


def published(backbone: Backbone, folder: Path, *, kohya: bool, rank: int = 2, alpha: float = 1.0) -> Path:
    """A LoRA file as its makers leave it: no card, one or the other way of naming, an alpha that is not its rank."""
    torch.manual_seed(3)
    role = Roles(Backbone.load(backbone.folder).unet).add("any", rank=rank)
    tensors: dict[str, Tensor] = {}
    for name, tensor in role.adapter().items():
        layer, half = name.rsplit(".", 1)
        random = 0.1 * torch.randn(tensor.shape)
        if kohya:
            stem = f"lora_unet_{layer.replace('.', '_')}"
            tensors[f"{stem}.lora_{'down' if half == 'lora_A' else 'up'}.weight"] = random
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
        else:
            tensors[f"unet.{layer}.{half}.weight"] = random
    path = folder / "theirs.safetensors"
    save_file(tensors, path)
    return path


def taken(path: Path) -> Callable[[str, str], Path]:
    return lambda repository, file: path


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
def test_every_release_is_drawn_as_its_method_allows(release: Release) -> None:
    card = release.card("b", 64)
    method = METHODS[card.method]
    assert method.adapted
    assert card.guidance > 1 if method.name.endswith("-cfg") or method.windows else card.guidance == 1
    assert release.licence and release.megabytes > 0
    file = adapters.AdapterFile(Path(f"{release.name}.safetensors"), "s", card)
    row = discover([file], "b")[card.method]
    assert (row.eta, row.guidance, row.licence) == (release.eta, release.guidance, release.licence)
    assert row.spacing == release.spacing
    assert row.adapter(max(release.segments, row.steps.low)) == file
    assert release.segments in row.steps or release.segments == 1


def test_files_of_one_backbone_have_names_of_their_own() -> None:
    for backbone in {release.backbone for release in RELEASES}:
        names = [release.name for release in releases.of(backbone)]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("kohya", [True, False], ids=["kohya", "diffusers"])
def test_a_release_becomes_a_row_and_draws(tiny_backbone: Backbone, tmp_path: Path, kohya: bool) -> None:
    theirs = published(tiny_backbone, tmp_path, kohya=kohya)
    release = Release("hyper", "tiny", "maker/repo", "x.safetensors", 1, "their licence", 3, eta=1.0)
    file = releases.fetch(release, tiny_backbone.network_sha256, tmp_path / "lora", taken(theirs))
    assert file.card.recipe["release"] == "maker/repo/x.safetensors" and file.card.rank == 2
    row = discover([file], tiny_backbone.network_sha256)["hyper"]
    panel = draw(tiny_backbone, Request("a cat", 0, 2), row)
    assert panel.adapter_sha256 == file.sha256 and panel.eta == 1.0
    assert panel.pixels != draw(tiny_backbone, Request("a cat", 0, 2, guidance=1.0), METHODS["base"]).pixels


def test_an_alpha_is_multiplied_in(tiny_backbone: Backbone, tmp_path: Path) -> None:
    """kohya's scale is alpha / rank: what is kept has a scale of 1 and says the same."""
    theirs = published(tiny_backbone, tmp_path, kohya=True, rank=4, alpha=1.0)
    release = Release("lcm", "tiny", "maker/repo", "x", 1, "free", 1)
    file = releases.fetch(release, tiny_backbone.network_sha256, tmp_path / "lora", taken(theirs))
    from safetensors.torch import load_file

    raw, kept = load_file(theirs), adapters.load(file.path)
    name = next(iter(kept)).rsplit(".", 1)[0]
    stem = f"lora_unet_{name.replace('.', '_')}"
    down, up = (raw[f"{stem}.lora_{half}.weight"].flatten(1) for half in ("down", "up"))
    delta = kept[f"{name}.lora_B"].flatten(1) @ kept[f"{name}.lora_A"].flatten(1)
    torch.testing.assert_close(delta, up @ down / 4, rtol=0.01, atol=1e-4)


def test_what_is_no_lora_leaves_nothing(tiny_backbone: Backbone, tmp_path: Path) -> None:
    file = tmp_path / "no.safetensors"
    save_file({"a": torch.zeros(1)}, file)
    release = Release("lcm", "tiny", "maker/repo", "x", 1, "free", 1)
    with pytest.raises(adapters.AdapterError, match="is not a LoRA of a UNet"):
        releases.fetch(release, "b", tmp_path / "lora", taken(file))
    assert not (tmp_path / "lora").exists()


def test_the_command_lists_fetches_and_explains(
    tiny_backbone: Backbone,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = shutil.copytree(tiny_backbone.folder, tmp_path / "model")
    theirs = published(tiny_backbone, tmp_path, kohya=True)
    two = (Release("lcm", str(model), "maker/repo", "x", 1, "free", 1),
           *(Release("tscd", str(model), "maker/repo", f"{k}", k, "RAIL", 2) for k in (4, 2)))  # fmt: skip
    monkeypatch.setattr(releases, "RELEASES", two)
    monkeypatch.setattr(releases, "hub", taken(theirs))
    assert main(["fetch", str(model)]) == 0
    assert "tscd-4" in (said := capsys.readouterr().out) and "RAIL" in said and "1 MB" in said
    assert main(["fetch", str(model), "tscd", "--file", str(theirs)]) == 2
    assert "--file is one file" in capsys.readouterr().err
    assert main(["fetch", str(model), "lcm", "--file", str(theirs)]) == 0
    assert main(["fetch", str(model), "turbo"]) == 2
    assert "no turbo is published" in capsys.readouterr().err
    assert list(methods.installed(str(model))) == ["base", "lcm"]
    assert main(["fetch", str(model)]) == 0
    assert "at hand" in capsys.readouterr().out
    assert main(["fetch", "nothing"]) == 2
    assert "choose from" in capsys.readouterr().err


OWN = (
    Release("lcm", "sd15", "maker/repo", "x", 1, "free", 1),
    Release("perflow", "sd15", "maker/repo", "y", 1, "free", 1, kind="difference", prediction="diff_eps"),
    Release("hyper-unet", "sd15", "maker/repo", "z", 1, "free", 1, kind="network"),
    Release("tcd", "sdxl", "maker/repo", "x", 1, "free", 1),
)


def own(backbone: Backbone, folder: Path, prediction: str = "epsilon") -> Path:
    """A copy of a model that says what it predicts."""
    path = Path(shutil.copytree(backbone.folder, folder)) / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": prediction}))
    return folder


def test_a_model_of_ones_own_gets_what_is_published_for_its_kind(
    tiny_backbone: Backbone, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for whole networks, which would not be added to it but take its place."""
    model = own(tiny_backbone, tmp_path / "mine")
    monkeypatch.setattr(releases, "RELEASES", OWN)
    monkeypatch.setattr(releases, "hub", taken(published(tiny_backbone, tmp_path, kohya=True)))
    assert main(["fetch", str(model)]) == 0
    said = capsys.readouterr().out
    assert all((name in said) == there for name, there in
               {"lcm": True, "perflow": True, "hyper-unet": False, "tcd": False}.items())  # fmt: skip
    assert main(["fetch", str(model), "lcm"]) == 0
    assert list(methods.installed(str(model))) == ["base", "lcm"]
    assert main(["fetch", str(model), "tcd"]) == 2
    assert "no tcd is published" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["lcm", "perflow"])
def test_what_does_not_fit_a_model_of_ones_own_is_not_kept(
    tiny_backbone: Backbone,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    """Its kind of pipeline tells nothing of how wide its layers are."""
    model = own(tiny_backbone, tmp_path / "mine")
    theirs = tmp_path / "theirs.safetensors"
    layer = "mid_block.attentions.0.proj_in"
    lora = {f"unet.{layer}.lora_A.weight": torch.ones(2, 7), f"unet.{layer}.lora_B.weight": torch.ones(5, 2)}
    save_file(lora if method == "lcm" else {"conv_in.weight": torch.ones(1), "conv_out.weight": torch.ones(1)}, theirs)
    monkeypatch.setattr(releases, "RELEASES", OWN)
    monkeypatch.setattr(releases, "hub", taken(theirs))
    assert main(["fetch", str(model), method]) == 2
    assert "does not fit this base" in capsys.readouterr().err
    assert not (model / "lora").exists()


def test_one_of_several_is_had_by_its_name(
    tiny_backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(tiny_backbone.folder, tmp_path / "mine")
    several = tuple(Release("tscd", "sd15", "maker/repo", f"{k}", k, "RAIL", 2) for k in (4, 2))
    monkeypatch.setattr(releases, "RELEASES", several)
    theirs = published(tiny_backbone, tmp_path, kohya=True)
    assert main(["fetch", str(model), "tscd-2", "--file", str(theirs)]) == 0
    assert [file.path.name for file in adapters.found(model / "lora")] == ["tscd-2.safetensors"]
    assert main(["fetch", str(model), "tscd-8"]) == 2
    assert "no tscd-8 is published" in capsys.readouterr().err


def test_what_answers_with_noise_is_not_for_a_base_that_does_not(
    tiny_backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(releases, "RELEASES", OWN)
    found = {
        kind: [release.method for release in releases.of(str(own(tiny_backbone, tmp_path / kind, kind)))]
        for kind in ("epsilon", "v_prediction")
    }
    assert found == {"epsilon": ["lcm", "perflow"], "v_prediction": ["lcm"]}


def test_a_folder_that_is_no_model_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", str(tmp_path)]) == 2
    assert "model_index.json is missing" in capsys.readouterr().err


def test_nothing_is_fetched_to_see_what_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert cached("sd15") is None and cached("emoji") is None and cached("/nowhere") is None
    assert list(methods.installed("sd15")) == ["base"]


def test_the_hub_out_of_reach_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the variable is read at import
    with pytest.raises(InputError, match=r"could not be fetched from the Hugging Face hub .*HF_HUB_OFFLINE.*--file"):
        releases.hub("ByteDance/Hyper-SD", "no-such-file.safetensors")
