"""LoRA files for other programs and at other scales: the same picture, or so much more or less of what was learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from hypersd import adapters
from hypersd.__main__ import main
from hypersd.adapters import AdapterFile
from hypersd.convert import convert
from hypersd.feedback.refl import added, learned_rank
from hypersd.records import InputError

Files = Callable[..., AdapterFile]


@pytest.fixture
def files(tiny_adapters: Sequence[AdapterFile], tmp_path: Path) -> Files:
    """One of the tests' adapters as a file of its own that is drawn at another scale."""

    def saved(name: str, scale: float = 1.0) -> AdapterFile:
        file = adapters.named(tiny_adapters, name)
        return adapters.save(tmp_path / file.path.name, adapters.load(file.path), replace(file.card, scale=scale))

    return saved


def weights(file: AdapterFile) -> dict[str, Tensor]:
    """What a file adds to each layer: scale B A."""
    lora = adapters.load(file.path)
    downs = {name.removesuffix(".lora_A"): tensor for name, tensor in lora.items() if name.endswith("lora_A")}
    return {layer: file.card.scale * lora[f"{layer}.lora_B"].flatten(1) @ a.flatten(1) for layer, a in downs.items()}


def test_other_programs_names_hold_the_same(files: Files, tmp_path: Path) -> None:
    file = files("tscd-4")
    made = convert(file, tmp_path / "comfy.safetensors", kohya=True)
    with safe_open(made.path, "pt") as content:
        assert all(name.startswith("lora_unet_") for name in list(content.keys()))
    quiet = files("hyper-1", 0.125)
    loud = convert(quiet, tmp_path / "loud.safetensors", kohya=True)
    assert loud.card.scale == 1.0, "which is not read by them"
    for layer, weight in weights(loud).items():
        torch.testing.assert_close(weight, weights(quiet)[layer], rtol=2e-3, atol=1e-5)
    before, after = adapters.load(file.path), adapters.load(made.path)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert (made.card.name, made.card.segments) == ("tscd", 4)
    back = convert(made, tmp_path / "back.safetensors")
    assert all(torch.equal(before[name], tensor) for name, tensor in adapters.load(back.path).items())


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 2.0])
@pytest.mark.parametrize("drawn_at", [(1.0, 1.0), (0.5, 0.25)])
def test_one_on_top_of_another_adds_so_much_of_it(
    scale: float, drawn_at: tuple[float, float], files: Files, tmp_path: Path
) -> None:
    onto, file = files("tscd-4", drawn_at[0]), files("hyper-1", drawn_at[1])
    made = convert(file, tmp_path / "both.safetensors", scale=scale, onto=onto)
    whole, below, above = weights(made), weights(onto), weights(file)
    for layer, weight in whole.items():
        torch.testing.assert_close(weight, below[layer] + scale * above[layer], rtol=2e-3, atol=1e-5)
    assert made.card.rank == onto.card.rank + file.card.rank and made.card.name == "tscd"
    assert made.card.recipe["converted"] == {"lora": file.sha256, "scale": scale, "onto": onto.sha256}


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_feedback_goes_to_where_that_of_an_earlier_turn_was(scale: float, files: Files, tmp_path: Path) -> None:
    """What a second turn leaves holds the first one's too: on top of the parent that has that already, it is not
    counted twice."""
    distilled, first, both = (adapters.load(files(name).path) for name in ("tscd-4", "tcd-1", "hyper-1"))
    card = files("tscd-4").card
    rank = card.rank

    def refined(name: str, lora: dict[str, Tensor], ranks: int) -> AdapterFile:
        told = replace(card, rank=ranks, recipe={**card.recipe, "asked": {"rank": rank}})
        return adapters.save(tmp_path / name, lora, told)

    parent = refined("parent.safetensors", added(distilled, first), 2 * rank)
    feedback = refined("feedback.safetensors", both, rank)
    made = convert(feedback, tmp_path / "made.safetensors", scale=scale, onto=parent, name="tscd-less")
    plain, taught = weights(files("tscd-4")), weights(feedback)
    for layer, weight in weights(made).items():
        torch.testing.assert_close(weight, plain[layer] + scale * taught[layer], rtol=2e-3, atol=1e-5)
    assert made.card.rank == 2 * rank and learned_rank(made.card) == rank and made.card.name == "tscd-less"
    whole = convert(
        refined("whole.safetensors", added(first, both), 2 * rank), tmp_path / "all.safetensors", onto=parent
    )
    for layer, weight in weights(whole).items():
        other = plain[layer] + 2 * weights(files("tcd-1"))[layer] + taught[layer]
        torch.testing.assert_close(weight, other, rtol=2e-3, atol=1e-5)
    assert whole.card.rank == 4 * rank and not learned_rank(whole.card), "no part of it is feedback's alone"


def test_licences_are_kept(files: Files, tmp_path: Path) -> None:
    onto, file = files("tscd-4"), files("hyper-1")

    def under(file: AdapterFile, licence: str) -> AdapterFile:
        return file._replace(card=replace(file.card, recipe={**file.card.recipe, "licence": licence}))

    made = convert(under(file, "not for commerce"), tmp_path / "made.safetensors", onto=onto)
    assert made.card.recipe["licence"] == "not for commerce"
    with pytest.raises(InputError, match=r"under different licences: .*not for commerce.*another"):
        convert(under(file, "not for commerce"), tmp_path / "a.safetensors", onto=under(onto, "another"))


def test_what_cannot_be_converted_is_said(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, other, out = files("tscd-4"), files("hyper-1"), tmp_path / "out.safetensors"
    stranger = other._replace(card=replace(other.card, base_sha256="0" * 64))
    with pytest.raises(InputError, match="scale must be a number from -10 to 10"):
        convert(file, out, scale="much")
    with pytest.raises(InputError, match="were trained on different bases; they do not add up"):
        convert(file, out, onto=stranger)
    with pytest.raises(InputError, match="is there already; choose another name, or remove it"):
        convert(file, other.path, onto=other)
    with pytest.raises(InputError, match=r"is no name for a LoRA file; choose one that ends in \.safetensors"):
        convert(file, tmp_path / "out")
    with pytest.raises(InputError, match="is drawn at a scale of 0"):
        convert(file, out, onto=other._replace(card=replace(other.card, scale=0.0)))
    assert not out.exists()
    assert main(["convert", "tscd-5", "--out", str(out)]) == 2
    assert "there is no LoRA 'tscd-5'; choose from hyper, lcm" in capsys.readouterr().err


def test_the_command_takes_names_and_paths(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    feedback, onto, out = files("hyper-1"), files("tscd-4"), tmp_path / "half.safetensors"
    given = ["--scale", "0.5", "--onto", str(onto.path), "--kohya", "--out", str(out)]
    assert main(["convert", str(feedback.path), *given]) == 0
    rank = onto.card.rank + feedback.card.rank
    assert f"half.safetensors: rank {rank}, kohya, sha256" in capsys.readouterr().out
    named = ["--name", "tscd-again", "--out", str(tmp_path / "embedded.safetensors")]
    assert main(["convert", "tscd-4", *named]) == 0
    assert adapters.inspect(tmp_path / "embedded.safetensors").card.name == "tscd-again"
    assert main(["convert", "tscd-4", "--name", "lcm", "--out", str(tmp_path / "lcm.safetensors")]) == 2
    assert "embedded.safetensors: rank 16, diffusers" in capsys.readouterr().out
