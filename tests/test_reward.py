"""Reward models: they find a taste that is there and none where there is none, and come back from disk as they were."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import liking
import pytest
import torch
from listing import ROOT
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from hypersd.emoji import scorer
from hypersd.feedback import pairs, reward
from hypersd.feedback.pairs import Preferences
from hypersd.feedback.reward import Aligned, Card, Look, Preferring, Trained, keep_best
from hypersd.records import InputError, Problem
from hypersd.train import Recipe, Run, Step

START = scorer.ASSETS / "emoji-scorer-a"
RECIPE = replace(reward.RECIPE, updates=75, batch=16, cooldown=40)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Card, Path]:
    folder = tmp_path_factory.mktemp("reward")
    return reward.train(liking.preferences(), folder / "run", folder / "out", RECIPE), folder / "out"


def test_a_taste_is_found(learned: tuple[Card, Path]) -> None:
    card, _ = learned
    assert card.low <= card.accuracy <= card.high and card.accuracy >= 0.75, card


def accuracy(made: Preferences, recipe: Recipe, folder: Path) -> tuple[float, int]:
    """Of a reward that learned from the train split: on all other pairs, and how many those are."""
    objective = Preferring(made, scorer.load(START))
    run = Run(objective, recipe, folder)
    run.advance()
    with run.averaged():
        found = [objective.accuracy(split) for split in ("validation", "test")]
    pairs_ = sum(len(made.split(split)) for split in ("validation", "test"))
    return sum(one.value * one.prompts for one in found) / sum(one.prompts for one in found), pairs_


def test_where_there_is_none_it_is_right_half_of_the_time(tmp_path: Path) -> None:
    """The control: if this were much above a half, something would leak from one split into another."""
    found, count = accuracy(liking.preferences(agreement=0.5), replace(RECIPE, updates=30, cooldown=10), tmp_path)
    assert abs(found - 0.5) < 3 * 0.5 / count**0.5, f"{found} of {count} pairs"


@pytest.mark.slow
@pytest.mark.parametrize("agreement", [0.7, 0.85, 1.0])
def test_it_comes_near_to_what_annotators_agree_in_and_not_above(agreement: float, tmp_path: Path) -> None:
    """Votes that contradict the common taste are in all splits, so nobody can be right about more of them."""
    found, count = accuracy(liking.preferences(1000, agreement=agreement), replace(RECIPE, updates=150), tmp_path)
    error = (agreement * (1 - agreement) / count) ** 0.5
    assert agreement - 0.08 - 2 * error <= found <= agreement + 3 * error, f"{found} of {count} pairs"


def test_it_comes_back_from_disk(learned: tuple[Card, Path]) -> None:
    card, out = learned
    kept = Trained(out)
    assert kept.card == card and kept.threshold == card.threshold
    x = torch.rand(3, 3, 64, 64) * 2 - 1
    redder = x.clone()
    redder[:, 0] += 0.5
    prompts = list(liking.PROMPTS[:3])
    assert (kept(redder, prompts) > kept(x, prompts)).all()
    torch.testing.assert_close(kept(x, prompts), kept(x, prompts), rtol=0, atol=0)


def test_pictures_get_a_gradient(learned: tuple[Card, Path]) -> None:
    x = (torch.rand(2, 3, 64, 64) * 2 - 1).requires_grad_()
    kept = Trained(learned[1])
    kept(x, ["a cat", "a dog"]).sum().backward()
    assert x.grad is not None and float(x.grad.abs().min(0).values.max()) > 0
    assert not any(p.grad is not None for p in kept.model.parameters())


def test_the_gradient_is_the_slope(learned: tuple[Card, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both terms, in double precision throughout."""
    judge = Trained(learned[1])
    states = scorer.text_states(judge.model.scorer, ["a cat"]).clone().double()
    model = judge.model.double()
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.autograd.gradcheck(lambda x: model(x, states), (x.requires_grad_(),), fast_mode=True)


@pytest.mark.parametrize("kind", ["reward", "scorer"])
def test_a_tensor_is_scored_as_its_png_is(learned: tuple[Card, Path], kind: str, tmp_path: Path) -> None:
    """Drawn pictures come as tensors, voted ones as files: both must mean the same."""
    judge = Trained(learned[1]) if kind == "reward" else Aligned(START)
    coarse = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 255
    smooth = nn.functional.interpolate(coarse, (128, 128), mode="bilinear")  # as drawings are, and noise is not
    pixels = smooth.permute(0, 2, 3, 1).round().to(torch.uint8)
    shown = pairs.Shown()
    for number, picture in enumerate(pixels):
        Image.fromarray(picture.numpy()).save(tmp_path / f"{number}.png")
        shown.add(Image.open(tmp_path / f"{number}.png"))
    as_file = shown.tensor().float()
    as_tensor = pixels.permute(0, 3, 1, 2) / 127.5 - 1
    prompts = ["a cat"] * 4
    scale = 1.0 if isinstance(judge, Aligned) else float(scorer.inverse_temperature(judge.model.scorer.scale))
    torch.testing.assert_close(judge(as_file, prompts) / scale, judge(as_tensor, prompts) / scale, rtol=0, atol=1e-3)


def test_prompts_weigh_alike(learned: tuple[Card, Path]) -> None:
    made = liking.preferences(60)
    often = tuple(row for row in made.rows if row.prompt == made.rows[0].prompt) * 9
    objective = Preferring(replace(made, rows=made.rows + often), scorer.load(START))
    weights: dict[str, float] = {}
    for number in objective.train_rows.tolist():
        prompt = objective.preferences.rows[number].prompt
        weights[prompt] = weights.get(prompt, 0.0) + float(objective.weight[number])
    assert max(weights.values()) == pytest.approx(min(weights.values()), rel=1e-5)


def test_soft_labels_want_their_own_logit() -> None:
    """The loss of a pair that 3 of 4 prefer is least where the scores differ by log 3."""
    gap = torch.linspace(-3, 3, 601)
    loss = nn.functional.binary_cross_entropy_with_logits(gap, torch.full_like(gap, 0.75), reduction="none")
    assert float(gap[loss.argmin()]) == pytest.approx(float(torch.log(torch.tensor(3.0))), abs=0.01)


def test_a_folder_without_a_reward_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no whole reward model.*python -m hypersd reward"):
        reward.load(tmp_path)


def test_half_a_reward_is_named(learned: tuple[Card, Path], tmp_path: Path) -> None:
    told = json.loads((learned[1] / "reward.json").read_text())
    (tmp_path / "reward.json").write_text(json.dumps(told))
    with pytest.raises(InputError, match="no whole reward model"):
        Trained(tmp_path)


# ---------------------------------------------------------------------------------------------- the best update


class Hill:
    """Its measure rises while the weight climbs to 5 and falls after it."""

    def __init__(self, measure: str = "hill") -> None:
        self.climber = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.climber.weight)
        self.measure = measure

    def modules(self) -> dict[str, nn.Module]:
        return {"hill": self.climber}

    def losses(self, step: Step) -> Iterator[tuple[str, Tensor]]:
        yield "hill", 100 - self.climber.weight.sum()

    def describe(self) -> dict[str, Any]:
        return {}

    def sheet(self, folder: Path, step: int) -> dict[str, float]:
        weight = float(self.climber.weight.detach())
        return {"value": {"hill": -abs(weight - 5.0), "down": -weight, "nan": float("nan")}[self.measure]}


CLIMB = Recipe(updates=60, batch=1, lr=0.5, warmup=1, weight_decay=0.0, ema=0.0)


def climb(folder: Path, measure: str = "hill", patience: int = 3) -> tuple[Look, Run]:
    run = Run(Hill(measure), CLIMB, folder)
    return keep_best(run, "value", every=4, patience=patience), run


def test_the_best_look_is_kept_and_not_the_last(tmp_path: Path) -> None:
    look, run = climb(tmp_path)
    assert look.step < run.step == look.step + 3 * 4, "three looks without a better one end it"
    for weights in (run.networks["hill"].state_dict(), run.average["hill"]):
        assert -abs(float(weights["weight"]) - 5) == pytest.approx(look.value)


def test_the_start_counts_too(tmp_path: Path) -> None:
    look, run = climb(tmp_path, "down")
    assert (look.step, float(run.networks["hill"].state_dict()["weight"])) == (0, 0.0)


def test_what_is_not_finite_picks_nothing(tmp_path: Path) -> None:
    with pytest.raises(Problem, match="value is nan after 0 updates"):
        climb(tmp_path, "nan")


def test_a_checkpoint_between_two_looks_changes_nothing(tmp_path: Path) -> None:
    whole, _ = climb(tmp_path / "whole")
    run = Run(Hill(), CLIMB, tmp_path / "cut")
    keep_first = run.draw()["value"]
    (tmp_path / "cut/looks.json").write_text(json.dumps([{"step": 0, "value": keep_first}]))
    run.advance(until=6)  # as if it had been killed there, three updates after the look that came last
    again, _ = climb(tmp_path / "cut")
    looks = json.loads((tmp_path / "cut/looks.json").read_text())
    assert [look["step"] % 4 for look in looks] == [0] * len(looks) and again.step in (whole.step, whole.step + 4)


KILL = """
import os, signal, sys
from pathlib import Path
import test_reward
calls = 0
def sheet(self, folder, step, then=test_reward.Hill.sheet):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return then(self, folder, step)
test_reward.Hill.sheet = sheet
test_reward.climb(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("look", [1, 2, 4])
def test_killed_and_started_again_it_ends_the_same(tmp_path: Path, look: int) -> None:
    whole, run = climb(tmp_path / "whole")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-c", KILL, str(tmp_path / "killed"), str(look)], env=environment, check=False
    )
    assert done.returncode == -signal.SIGKILL
    again, resumed = climb(tmp_path / "killed")
    assert again == whole and resumed.step == run.step
    kept = [load_file(tmp_path / name / "best.safetensors") for name in ("whole", "killed")]
    assert all(torch.equal(kept[0][key], kept[1][key]) for key in kept[0])
