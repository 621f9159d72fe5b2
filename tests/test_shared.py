"""Work that several processes share, as `accelerate launch` starts them, ends as that of one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import liking
import pytest
import tiny
import torch
import yaml
from listing import ROOT
from safetensors.torch import load_file
from test_feedback import made

from hypersd.adapters import found, named
from hypersd.backbone import Backbone
from hypersd.emoji import scorer
from hypersd.feedback import refl, reward
from hypersd.train import Recipe, processes

CONFIG = ROOT / "hypersd/accelerate/ddp.yaml"


def launcher(config: Path = CONFIG) -> list[str]:
    """What starts two processes of the program that follows. With accelerate's --cpu there would be one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    given = ["--config_file", str(config), "--num_processes", "2", "--main_process_port", port]
    return [sys.executable, "-m", "accelerate.commands.launch", *given]


def refined(folder: Path, accumulate: int) -> None:
    """A LoRA that is taught to draw warm colours, with a random model and parent."""
    parent = named(found(folder.parent / "lora"), "tscd-4")
    objective = made(Backbone.load(folder.parent / "model"), parent, prompts=liking.PROMPTS[:2])
    recipe = Recipe(updates=3, batch=4, lr=2e-2, warmup=2, weight_decay=0.0, ema=0.5, accumulate=accumulate)
    refl.run(objective, recipe, folder / "run", folder / "new.safetensors", "tscd-new")


def rewarded(folder: Path, accumulate: int) -> None:
    """A reward model of somebody who likes warm colours."""
    recipe = replace(reward.RECIPE, updates=4, batch=8, warmup=1, cooldown=1, accumulate=accumulate)
    reward.train(liking.preferences(60), folder / "run", folder / "new", recipe, start=scorer.ASSETS / "emoji-scorer-a")


WORK: dict[str, Callable[[Path, int], None]] = {"refined": refined, "rewarded": rewarded}


@pytest.mark.parametrize("kind", WORK)
def test_two_processes_give_what_one_gives(kind: str, tmp_path: Path) -> None:
    """Started by accelerate with the configuration that is shipped, which takes CPUs where there are no GPUs: not a bit
    differs from one process that works on two halves of each batch in turn. Only the first writes."""
    tiny.adapters(tiny.build(tmp_path / "model"), tmp_path / "lora")
    command = [*launcher(), str(Path(__file__)), kind, str(tmp_path / "two"), "1"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    both = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert both.returncode == 0, both.stderr[-3000:]
    assert both.stdout.splitlines().count("one of 2") == 2
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    WORK[kind](tmp_path / "one", 2)
    torch.set_num_threads(before)
    results = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.safetensors")]
    results = [path for path in results if path.parts[0].startswith("new")]
    assert results
    for path in results:
        two, one = (load_file(tmp_path / folder / path) for folder in ("two", "one"))
        assert two.keys() == one.keys() and all(torch.equal(two[name], one[name]) for name in one), path
    assert (tmp_path / "two/run/looks.json").read_text() == (tmp_path / "one/run/looks.json").read_text()


def test_the_configuration_is_for_all_gpus_of_one_machine() -> None:
    told = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    assert told["distributed_type"] == "MULTI_GPU" and told["num_machines"] == 1
    assert told["mixed_precision"] == "no", "precision is the recipe's"


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(f"one of {processes().num_processes}\n")
    WORK[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
