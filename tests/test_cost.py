"""What an update costs on paper is what it costs: beside counted FLOPs, kept tensors and published sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from stages import Latents
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hypersd import __main__ as command_line
from hypersd import adversary, cost, plan, roles
from hypersd.backbone import Backbone
from hypersd.distill import Distillation, Settings, preset
from hypersd.methods import METHODS
from hypersd.records import InputError
from hypersd.train import Recipe, Run, Step

RANK, BATCH = 8, 2
SETTINGS = Settings(rank=RANK, guidance=(4.0, 4.0))
RECIPE = Recipe(updates=10, batch=BATCH, lr=1e-4)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def emoji() -> cost.Network:
    return cost.read("emoji")


def written_out(model: Path | str) -> Backbone:
    """One of its own, since roles stay on a network; attention in products that can be counted."""
    loaded = Backbone.load(model)
    loaded.unet.set_attn_processor(AttnProcessor())
    return loaded


# ---------------------------------------------------------------------------------------------------- the networks


@pytest.mark.parametrize(("name", "parameters", "lora_bytes"), [
    ("sd15", 859_520_964, 269e6),  # the sizes of the published rank-64 LoRAs, float32
    ("sdxl", 2_567_463_684, 787e6),
])  # fmt: skip
def test_networks_are_the_published_ones(name: str, parameters: int, lora_bytes: float) -> None:
    network = cost.read(name)
    assert network.parameters == parameters
    assert 4 * network.lora(64) == pytest.approx(lora_bytes, rel=2e-3)
    assert all(p.is_meta for p in network.unet.parameters()), "without a byte of weights"


@pytest.mark.parametrize("name", ["emoji", "sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_a_forward_pass_is_what_is_counted(name: str) -> None:
    network = cost.read(name)
    x = torch.empty(1, *network.latent_shape, device="meta")
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        network.unet(x, x.new_empty(1), encoder_hidden_states=network._states)
    assert network.learning.forward == pytest.approx(counted.get_total_flops(), rel=1e-6)


def test_what_lies_in_front_of_the_first_lora_gets_no_gradient(emoji: cost.Network) -> None:
    reached = {layer.name: layer.reached for layer in emoji.learning.layers}
    for name in ("conv_in", "time_embedding.linear_1", "down_blocks.0.resnets.0.conv1"):
        assert not reached[name]
    assert reached["down_blocks.0.resnets.0.conv2"] and reached["conv_out"]
    assert not any(layer.reached for layer in emoji.learning.layers if layer.name.endswith("attn2.to_k")), "texts"
    assert all(layer.reached for layer in emoji.judged.layers if "conv" in layer.name), "all that a latent goes through"


def test_a_folder_without_a_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"emoji, sd15, sdxl or a folder with unet/config.json"):
        cost.read(str(tmp_path))


# -------------------------------------------------------------------------------------------------------- an update


@pytest.mark.parametrize(("method", "merged"), [("tcd", True), ("tscd", True), ("tscd", False), ("tscd-cfg", False),
                                                ("dmd", True), ("hyper", False)])  # fmt: skip
def test_an_update_costs_what_is_counted(
    method: str, merged: bool, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roles, "SMALL", 10**9 if merged else 0)
    assert ratio(str(tiny_folder), method, tmp_path, merged) == pytest.approx(1, rel=0.05)


def test_and_so_it_does_on_the_embedded_model(tmp_path: Path) -> None:
    assert ratio("emoji", "tscd", tmp_path, True) == pytest.approx(1, rel=0.05)


def ratio(model: str, method: str, folder: Path, merged: bool) -> float:
    """FLOPs on paper over those counted in the first update of the real trainer, forward and backward."""
    backbone, row = written_out(model), METHODS[method]
    run = Run(Distillation(backbone, Latents.of(backbone), row, row.stages[-1], SETTINGS), RECIPE, folder)
    with FlopCounterMode(display=False) as counted:
        run.update()
    made = cost.update(cost.read(model), row, row.stages[-1], RANK, merged=merged, indices=range(1))
    return made.flops(BATCH) / counted.get_total_flops()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_the_calls_of_an_update_cost_what_is_counted_at_full_size(name: str) -> None:
    """On meta tensors, call by call, forward and backward: TSCD's last stage, with its adversary."""
    network, row = cost.read(name), METHODS["tscd"]
    made = {work.label: work.flops(1) for work in cost.update(network, row, row.stages[-1], RANK, merged=False).work}
    unet, judge = network.unet, network.judge
    unet.set_attn_processor(AttnProcessor())
    roles_of = roles.Roles(unet, merged=False)
    with torch.device("meta"):
        roles_of.add("student", rank=RANK)
        roles_of.add("ema", rank=RANK, trainable=False)

    def call(latents: int) -> Tensor:
        x = torch.empty(latents, *network.latent_shape, device="meta")
        output: Tensor = unet(x, x.new_empty(1), encoder_hidden_states=network._states.expand(latents, -1, -1))[0]
        return output.sum()

    def seen(x: Tensor) -> list[Tensor]:
        return adversary.features(unet, x, x.new_empty(1), network._states)

    def judged(features: list[Tensor]) -> None:
        sum(verdict.sum() for verdict in judge(features)).backward()

    def fooled() -> None:
        judge.requires_grad_(False)
        judged(seen(torch.empty(1, *network.latent_shape, device="meta", requires_grad=True)))

    def telling() -> None:
        """What it sees in the fake is known from having been fooled."""
        judge.requires_grad_(True)
        with torch.no_grad():
            features = seen(torch.empty(1, *network.latent_shape, device="meta"))
        judged(features)
        judged(features)

    calls: dict[str, Callable[[], Any]] = {
        "teacher, guided": torch.no_grad()(lambda: call(2)),
        "student, learning": lambda: call(1).backward(),
        "ema": torch.no_grad()(lambda: call(1)),
        "adversary, fooled": fooled,
        "adversary, telling": telling,
    }
    assert calls.keys() == made.keys()
    for label, work in calls.items():
        worn = label.split(",")[0]
        with roles_of.wear(*[worn] if worn in ("student", "ema") else []), FlopCounterMode(display=False) as counted:
            work()
        assert made[label] == pytest.approx(counted.get_total_flops(), rel=0.05), label


def test_what_happens_in_each_fifth_update_counts_a_fifth(emoji: cost.Network) -> None:
    row = METHODS["dmd"]
    made = {work.label: work for work in cost.update(emoji, row, row.stages[-1], RANK).work}
    assert made["student, learning"].launches == pytest.approx(0.2) and made["fake, learning"].launches == 1
    assert made["teacher, guided"].latents == pytest.approx(2 * (8 + 1) / 5), "eight steps and a score, twice each"


@pytest.mark.parametrize(("name", "alone", "judged"), [("emoji", 5.3, 6.4), ("sd15", 5.5, 6.6), ("sdxl", 5.4, 6.7)])
def test_an_update_of_tscd_is_little_more_than_its_five_passes(name: str, alone: float, judged: float) -> None:
    """Two of the teacher, one of the target, two of the student; the README's figures, without adversary and with."""
    settings, recipe, _ = preset(name)
    network, row = cost.read(name), METHODS["tscd"]
    first, *_, last = (cost.update(network, row, stage, settings.rank).flops(recipe.batch, recipe.accumulate)
                       / recipe.batch / network.learning.forward for stage in row.stages)  # fmt: skip
    assert (round(first, 1), round(last, 1)) == (alone, judged)


def test_accumulation_and_checkpointing_cost_more_and_keep_less(emoji: cost.Network) -> None:
    row = METHODS["lcm"]
    made = cost.update(emoji, row, row.stages[-1], RANK)
    assert made.flops(8, 8) == pytest.approx(8 * made.flops(1)) and made.flops(8, 8) > made.flops(8, 2) > made.flops(8)
    assert made.flops(8, checkpointing=True) == pytest.approx(made.flops(8) + 8 * emoji.learning.forward)
    assert made.kept[1] < 0.5 * made.kept[0]


@pytest.mark.parametrize(("method", "merged"), [("lcm", True), ("lcm", False), ("tscd", False), ("hyper", True)])
def test_autograd_keeps_what_was_said(
    method: str, merged: bool, emoji: cost.Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roles, "SMALL", 10**9 if merged else 0)
    row = METHODS[method]
    backbone = Backbone.load("emoji")  # with fused attention, as on a GPU
    objective = Distillation(backbone, Latents.of(backbone), row, row.stages[-1], SETTINGS)
    own = {
        p.untyped_storage().data_ptr() for m in (backbone.unet, *objective.modules().values()) for p in m.parameters()
    }
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        next(objective.losses(Step(0, RECIPE)))
    found = sum(storage.nbytes() for place, storage in kept.items() if place not in own)
    made = cost.update(emoji, row, row.stages[-1], RANK, merged=merged)
    assert BATCH * made.kept[0] + made.fixed == pytest.approx(found, rel=0.05)


# ----------------------------------------------------------------------------------------------------- as a command


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    code = command_line.main(["plan", *arguments])
    said = capsys.readouterr()
    return said.out if code == 0 else said.err


def test_the_plan_says_what_it_takes_and_what_it_assumes(capsys: pytest.CaptureFixture[str]) -> None:
    said = told(capsys, "--gpus", "2", "--batch", "8", "--updates", "100", "--gpu", "a100", "--utilisation", "0.5",
                "--price-per-hour", "2")  # fmt: skip
    for words in ("tscd on emoji, 4 stage(s) of 100 updates of 8, on 2 NVIDIA A100", "4 latent(s) at a time",
                  "16.8 M parameters, frozen, in memory once", "student", "adversary", "without checkpointing",
                  "(fsdp.yaml), the base takes 0.03 GB less", "4, 2, 1 segment(s), network calls", "which cost",
                  "312 TFLOP/s", "50% of them"):  # fmt: skip
        assert words in said
    assert "no price was given" in told(capsys, "--method", "lcm")


def test_the_papers_hours_are_its_hours_on_its_own_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert "800.0 h, 800.0 GPU hours" in told(capsys, "--gpu", "a100")
    assert "100.0 h, 800.0 GPU hours, which cost 1,600" in told(
        capsys, "--gpu", "a100", "--gpus", "8", "--price-per-hour", "2"
    )


def test_hours_are_flops_over_what_the_gpus_do() -> None:
    machines = plan.Machines(plan.Gpu("any", peak=100.0, memory=80.0), count=4, utilisation=0.25, price=3.0)
    assert machines.flops == 1e14
    assert machines.takes(3.6e18) == "10.0 h, 40.0 GPU hours, which cost 120"


@pytest.mark.parametrize(("wrong", "words"), [
    (("--gpu", "abacus"), "gpu must be one of a100, h100"),
    (("--gpus", "0"), "gpus must be a whole number"),
    (("--utilisation", "35"), "utilisation must be a number from 0.01 to 1"),
    (("--gpus", "3"), "cannot be cut into 3 equal parts"),
    (("--backbone", "nothing"), "backbone must be one of emoji, sd15, sdxl"),
    (("--method", "base"), "method must be one of lcm"),
])  # fmt: skip
def test_what_cannot_be_planned_is_said(wrong: tuple[str, str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in told(capsys, *wrong)
