"""The frozen base in shares, one a process, as `accelerate launch` sets it up with the file that is shipped."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stages
import tiny
import torch
import yaml
from listing import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file
from test_feedback import made
from test_shared import launcher
from torch import Tensor

from hypersd import distill
from hypersd import train as train_loop
from hypersd.adapters import found, named
from hypersd.backbone import Backbone
from hypersd.distill import Distillation
from hypersd.feedback.refl import Asked
from hypersd.methods import Stage
from hypersd.train import Run, processes

CONFIG = ROOT / "hypersd/accelerate/fsdp.yaml"
RECIPE = replace(stages.RECIPE, batch=4, accumulate=1, updates=2)
SETTINGS = replace(stages.SETTINGS, prompts=("a happy cat",))


def tscd(folder: Path) -> Distillation:
    """With an adversary, and with activations that are computed again."""
    objective = stages.objective(Backbone.load(folder / "model"), settings=SETTINGS)
    objective.roles.checkpointing()
    return objective


def hyper(folder: Path) -> Distillation:
    return stages.objective(Backbone.load(folder / "model"), "hyper", Stage(offset_noise=0.05), SETTINGS)


def half(folder: Path) -> Distillation:
    """A base in bfloat16, as large ones are."""
    return stages.objective(Backbone.load(folder / "model", dtype=torch.bfloat16), "dmd", Stage(), SETTINGS)


def rollout(folder: Path) -> Distillation:
    """Feedback, which calls the network a different number of times in each update, and decodes in one process only."""
    parent = named(found(folder / "lora"), "tscd-4")
    return made(
        Backbone.load(folder / "model"), parent, Asked(4, "rollout", pictures=2, rank=2), prompts=("a red heart",)
    )


KINDS: dict[str, Callable[[Path], Distillation]] = {"tscd": tscd, "hyper": hyper, "half": half, "rollout": rollout}
CLOSE = {"half": 0.3}  # AdamW's first steps are signs, and bfloat16 rounds small gradients to either


def held() -> int:
    """Bytes of all tensors in this process."""
    gc.collect()
    storages = [t.untyped_storage() for t in gc.get_objects() if type(t) in (Tensor, torch.nn.Parameter)]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def train(kind: str, shares: bool, folder: Path, name: str, until: int) -> dict[str, Any]:
    """A run, or the rest of one, in this process; what it held and said."""
    os.environ["ACCELERATE_USE_FSDP"] = str(shares).lower()
    before = held()
    objective = KINDS[kind](folder)
    run = Run(objective, RECIPE, folder / name / "run")
    base = [p for key, p in objective.network.named_parameters() if "lora" not in key]
    run.advance(until=until, sheet_every=0.0 if run.processes.is_main_process else 60.0)  # no two clocks are alike
    if until == RECIPE.updates and run.processes.is_main_process:
        save_file(weights(run), folder / name / "end.safetensors")
    run.processes.wait_for_everyone()
    size = sum(p.nbytes for p in base)
    return {"bytes": held() - before, "base": size, "log": run.log, "measures": run.measures}


def weights(run: Run) -> dict[str, Tensor]:
    return {f"{name}/{key}": t.clone() for name, m in run.networks.items() for key, t in m.state_dict().items()}


def work(folder: Path) -> dict[str, Any]:
    """All that two processes do here, in one go."""
    # a call takes long where each block waits for the other process
    distill.SHEET_STEPS, distill.TEACHER_STEPS = (1, 2), 4  # type: ignore[assignment]
    train_loop.plot = lambda log, path: None  # slower than the training
    gc.freeze()  # what was imported is not looked at again by `held`
    told: dict[str, Any] = {}
    for kind in KINDS:
        for name, shares in (("whole", False), ("shares", True)):
            told[f"{kind}/{name}"] = train(kind, shares, folder, f"{kind}-{name}", RECIPE.updates)
    for first in (True, False):
        name = f"tscd-{'shares' if first else 'whole'}-first"
        train("tscd", first, folder, name, 1)
        train("tscd", not first, folder, name, RECIPE.updates)
    return told


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder that two processes worked in, and what each told."""
    folder = tmp_path_factory.mktemp("fsdp")
    tiny.adapters(tiny.build(folder / "model"), folder / "lora", only=("tscd",))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [*launcher(CONFIG), str(Path(__file__)), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, [json.loads((folder / f"told-{n}.json").read_text(encoding="utf-8")) for n in range(2)]


def start(kind: str, folder: Path) -> dict[str, Tensor]:
    return weights(Run(KINDS[kind](folder), RECIPE, folder / f"{kind}-start/run"))


def strayed(one: dict[str, Tensor], other: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """How far two ends are apart, as a share of the way from the start."""
    assert one.keys() == other.keys() == start.keys()
    apart, way = (sum(float((a[k] - b[k]).double().square().sum()) for k in a) for a, b in ((one, other), (one, start)))
    return (apart / way) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_shares_of_the_base_give_what_the_whole_gives(ended: Any, kind: str) -> None:
    """Up to the order in which gradients of one tensor are summed."""
    folder, told = ended
    whole, shares = (load_file(folder / f"{kind}-{name}/end.safetensors") for name in ("whole", "shares"))
    assert strayed(whole, shares, start(kind, folder)) < CLOSE.get(kind, 1e-3)
    for mine in told:
        for entry, same in zip(mine[f"{kind}/whole"]["log"], mine[f"{kind}/shares"]["log"], strict=True):
            assert entry == pytest.approx(same, rel=0.1 * CLOSE.get(kind, 1e-3))


@pytest.mark.parametrize("kind", KINDS)
def test_each_process_holds_half_of_the_base(ended: Any, kind: str) -> None:
    for mine in ended[1]:
        whole, shares = mine[f"{kind}/whole"], mine[f"{kind}/shares"]
        spared = (whole["bytes"] - shares["bytes"]) / whole["base"]
        assert spared == pytest.approx(0.5, abs=0.05), (whole["bytes"], shares["bytes"], whole["base"])


@pytest.mark.parametrize("kind", KINDS)
def test_all_draw_and_the_first_one_writes(ended: Any, kind: str) -> None:
    """After each update, which the first one's clock alone asks for, and at the end."""
    folder, (first, second) = ended
    whole, shares = (np.asarray(Image.open(folder / f"{kind}-{n}/run/sheet.png"), int) for n in ("whole", "shares"))
    assert whole.std() > 1 and np.abs(whole - shares).max() <= (16 if kind in CLOSE else 1)
    measures = first[f"{kind}/shares"]["measures"]
    assert measures == pytest.approx(first[f"{kind}/whole"]["measures"], rel=CLOSE.get(kind, 1e-3))
    assert measures == second[f"{kind}/shares"]["measures"] and second[f"{kind}/whole"]["measures"] == {}
    lines = (folder / f"{kind}-shares/run/measures.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == RECIPE.updates + 1


@pytest.mark.parametrize("name", ["tscd-shares-first", "tscd-whole-first"])
def test_either_goes_on_from_the_other_s_checkpoint(ended: Any, name: str) -> None:
    folder, _ = ended
    whole, mixed = (load_file(folder / f"{run}/end.safetensors") for run in ("tscd-whole", name))
    assert strayed(whole, mixed, start("tscd", folder)) < 1e-3


def test_the_configuration_is_for_all_gpus_of_one_machine() -> None:
    told = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    assert told["distributed_type"] == "FSDP" and told["num_machines"] == 1
    assert told["mixed_precision"] == "no", "precision is the recipe's"


if __name__ == "__main__":
    torch.set_num_threads(1)
    told = work(Path(sys.argv[1]))
    Path(sys.argv[1], f"told-{processes().process_index}.json").write_text(json.dumps(told), encoding="utf-8")
