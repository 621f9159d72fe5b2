"""Drawings that look, as a whole, like real pictures: in a closed-form world, and as part of a refinement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from liking import PROMPTS, Warm, warmth
from listing import ROOT
from test_feedback import RECIPE, Captioned, backbone, command, made, mask2former, parent
from torch import Tensor, nn

from hypersd import adapters
from hypersd.__main__ import main
from hypersd.adapters import AdapterFile
from hypersd.backbone import Backbone
from hypersd.emoji import scorer
from hypersd.feedback import refl, reward
from hypersd.feedback.likeness import RATE, STRENGTHS, Eye, Likeness, Strength, least, strength, unbiased
from hypersd.feedback.refl import Asked, Refinement
from hypersd.plan import counted
from hypersd.records import InputError
from hypersd.train import Run, Step

__all__ = ["backbone", "command", "mask2former", "parent"]  # fixtures
ASSETS = ROOT / "assets"
ASKED = Asked(4, "rollout", weight=0.0, likeness=1.0, rank=2)


class Seeing(Warm):
    """The tests' taste, with an eye for each colour's mean and deviation."""

    def looks(self, pixels: Tensor) -> Tensor:
        return torch.cat([pixels.mean((2, 3)), pixels.std((2, 3))], 1)


def seeing(backbone: Backbone, parent: AdapterFile, asked: Asked = ASKED, **changes: Any) -> Refinement:
    return made(backbone, parent, asked, **{"rewards": [Seeing()]} | changes)


# ----------------------------------------------------------------------------------------- the closed-form world


def world(features: int = 5) -> tuple[Likeness, Tensor]:
    """Real looks of known mean and deviation, and the likeness to them."""
    generator = torch.Generator().manual_seed(0)
    real = 3 + torch.linspace(0.5, 2, features) * torch.randn(4000, features, generator=generator)
    return Likeness((1, 4), real), real


def test_looks_are_deviations_from_the_real_ones() -> None:
    likeness, real = world()
    told = likeness.of(real)
    torch.testing.assert_close(told.mean(0), torch.zeros(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(told.std(0, correction=0), torch.ones(5))


def test_a_feature_that_never_varies_drowns_nothing() -> None:
    real = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    real[:, 1] = 7.0
    assert float(Likeness((1,), real).of(real + 1).max()) < 30


def test_the_gap_is_the_moving_average_of_what_is_drawn() -> None:
    """Exactly: each update of its kind takes it a fifth of the way, whatever else is drawn meanwhile."""
    likeness, real = world()
    optimizer, expected = likeness.optimizer(), torch.zeros(5)
    for index in range(6):
        count, looks = (1, real[index * 8 : index * 8 + 8] + 1) if index % 2 else (4, real[:8] * 50)
        optimizer.zero_grad()
        likeness.follow(looks, count).mean().backward()
        optimizer.step()
        if count == 1:
            expected = expected + RATE * (likeness.of(looks).mean(0) - expected)
    torch.testing.assert_close(likeness.gap(1).detach(), expected)
    assert likeness.squared()[1] == pytest.approx(float(expected.square().mean()))


def test_the_students_gradient_is_that_of_half_the_squared_gap() -> None:
    likeness, real = world()
    shift = torch.tensor([0.3, -1.0, 0.0, 2.0, 0.5], requires_grad=True)
    likeness.gaps.data[0] = likeness.of(real + shift).mean(0).detach()
    (slope,) = torch.autograd.grad(likeness(real + shift, 1).mean(), shift)
    (truth,) = torch.autograd.grad(likeness.of(real + shift).mean(0).square().mean() / 2, shift)
    torch.testing.assert_close(slope, truth)


def test_two_players_take_a_student_to_the_real_mean() -> None:
    """A student that is a shift, seen eight drawings at a time, ends where its mean is the real one."""
    likeness, real = world()
    shift = nn.Parameter(torch.tensor([4.0, -3.0, 1.0, 0.0, 2.0]))
    players = torch.optim.SGD([shift], lr=0.5), likeness.optimizer()
    generator = torch.Generator().manual_seed(1)
    after = []
    for _ in range(600):
        drawn = real[torch.randint(len(real), (8,), generator=generator)] + shift
        loss = likeness(drawn, 1).mean() + likeness.follow(drawn, 1).mean()
        for player in players:
            player.zero_grad()
        loss.backward()
        for player in players:
            player.step()
        after.append(shift.detach().clone())
    deviation = real.std(0)
    assert float((torch.stack(after[300:]).mean(0) / deviation).abs().max()) < 0.1
    assert float((torch.stack(after[:10]).mean(0) / deviation).abs().max()) > 1


def test_one_real_picture_is_too_few() -> None:
    with pytest.raises(InputError, match="two or more, got 1; give more as --data"):
        Likeness((1,), torch.zeros(1, 4))


def test_the_squared_gap_of_few_drawings_is_right_on_average() -> None:
    """Drawings that follow their real picture tell it better than as many that do not."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(400, 20, 3, generator=generator)
    shift = torch.tensor([0.0, 0.1, -0.2])
    near = real + shift + 0.3 * torch.randn(real.shape, generator=generator)
    apart = torch.randn(real.shape, generator=generator) + shift
    found = {name: [unbiased(d - r) for d, r in zip(drawn, real, strict=True)]
             for name, drawn in (("near", near), ("apart", apart))}  # fmt: skip
    truth = float(shift.square().mean())
    for values in found.values():
        assert np.mean(values) == pytest.approx(truth, abs=3 * np.std(values) / len(values) ** 0.5)
    assert np.std(found["near"]) < np.std(found["apart"]) / 2


def test_the_strength_is_where_the_parabola_is_least() -> None:
    assert least({at: 2 + 3 * (at - 1.07) ** 2 for at in STRENGTHS}) == pytest.approx(1.07)
    assert least({at: (at - 5) ** 2 for at in STRENGTHS}) == max(STRENGTHS)
    assert least({at: (at + 5) ** 2 for at in STRENGTHS}) == min(STRENGTHS)
    assert least({0.9: 1.0, 1.0: 3.0, 1.1: 3.0, 1.2: 0.5}) == 1.2  # it bends the other way


def test_the_error_of_the_strength_is_how_far_other_drawings_put_it() -> None:
    """In a world of pictures that grow brighter with it, unevenly."""
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(60):
        noise, slope = (torch.randn(512, 8, generator=generator) for _ in range(2))
        found.append(strength({at: [(1.0, (at - 1.05) * (2 + slope) + 0.3 * noise)] for at in STRENGTHS}))
    values = [told.value for told in found]
    assert np.mean(values) == pytest.approx(1.05, abs=3 * np.std(values) / 60**0.5)
    assert np.mean([told.error for told in found]) == pytest.approx(np.std(values), rel=0.3)


# ------------------------------------------------------------------------------------------------- whose looks


def test_what_is_learned_from_is_what_is_measured() -> None:
    """Looks of a tensor with a gradient equal those of the same picture as bytes, in all who have a scorer's eye."""
    pixels = torch.randint(0, 256, (2, 128, 128, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    x = (pixels.permute(0, 3, 1, 2) / 127.5 - 1).requires_grad_()
    for name in ("emoji-scorer-a", "emoji-reward"):
        eye = reward.load(ASSETS / name)
        assert isinstance(eye, Eye)
        looks = eye.looks(x)
        measured = scorer.looks(scorer.load(ASSETS / name), pixels.numpy())
        torch.testing.assert_close(looks.detach(), measured, atol=1e-5, rtol=1e-5)
        (slope,) = torch.autograd.grad(looks.sum(), x)
        assert bool(slope.abs().amax((1, 2, 3)).gt(0).all())


def test_large_pictures_are_looked_at_as_the_artwork_is() -> None:
    judge = scorer.load(ASSETS / "emoji-scorer-b")
    x = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    large = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(judge.looks(large), judge.looks(x), atol=1e-5, rtol=1e-5)


def test_a_taste_without_an_eye_is_refused(backbone: Backbone, parent: AdapterFile) -> None:
    with pytest.raises(InputError, match="none of warm tells it; leave --likeness out, or add --reward"):
        made(backbone, parent, ASKED)


# -------------------------------------------------------------------------------------------------- refinement


def drawn_in(objective: Refinement, updates: int) -> Counter[int]:
    return Counter(objective._how_far(Step(index, RECIPE))[0] for index in range(updates))


def test_likeness_is_asked_at_every_number_of_steps(
    backbone: Backbone, tiny_adapters: Sequence[AdapterFile], parent: AdapterFile
) -> None:
    """That the parent is drawn in, half of the time in the fewest."""
    times = drawn_in(seeing(backbone, adapters.named(tiny_adapters, "hyper-1")), 600)
    assert times.keys() == {1, 2, 4, 8} and 250 < times[1] < 350 and min(times.values()) > 60
    times = drawn_in(seeing(Backbone.load(backbone.folder), parent), 600)
    assert times.keys() == {4, 8} and 250 < times[4] < 350
    only = seeing(Backbone.load(backbone.folder), adapters.named(tiny_adapters, "dmd-1"), replace(ASKED, steps=1))
    assert drawn_in(only, 20) == {1: 20}


def test_the_last_step_of_the_drawing_learns(backbone: Backbone, tiny_adapters: Sequence[AdapterFile]) -> None:
    """One call with a gradient beside the anchor's, after as many without as there are steps before it."""
    objective = seeing(backbone, adapters.named(tiny_adapters, "hyper-1"))
    calls = set()
    for index in range(20):
        step = Step(index, RECIPE)
        with counted(objective.network) as counts:
            names = [name for name, _ in objective.losses(step)]
        assert names == ["student", "likeness"]
        steps, _ = objective._how_far(step)
        calls.add((steps, counts["with gradient"], counts["without gradient"]))
    assert calls == {(n, 2, 2 + n - 1) for n in (1, 2, 4, 8)}


def test_neither_players_gradient_depends_on_how_the_batch_is_cut(backbone: Backbone, parent: AdapterFile) -> None:
    found, asked = {}, replace(ASKED, pictures=3, likeness=5.0)
    for processes, accumulate in ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2)):
        objective = seeing(Backbone.load(backbone.folder), parent, asked)
        assert objective.likeness
        objective.likeness.gaps.data += 1
        recipe = replace(RECIPE, batch=8, accumulate=accumulate)
        for part in (part for process in range(processes) for part in recipe.parts(process, processes)):
            for name, loss in objective.losses(Step(0, recipe, part)):
                network = objective.modules()[name]
                (loss * len(part) / recipe.batch).backward(inputs=list(network.parameters()))
        learned = [*objective.roles["student"].parameters(), *objective.likeness.parameters()]
        found[processes, accumulate] = [p.grad for p in learned if p.grad is not None]
    whole = found.pop((1, 1))
    for gradients in found.values():
        for mine, its in zip(gradients, whole, strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-6)


def test_the_moving_average_keeps_its_rate_while_the_learning_rate_rises(
    backbone: Backbone, parent: AdapterFile, tmp_path: Path
) -> None:
    objective = seeing(backbone, parent)
    assert objective.likeness
    with torch.no_grad():
        steps, last = objective._how_far(Step(0, RECIPE))
        pictures, _ = objective._rolled_out(Step(0, RECIPE), 4, steps, last)
    mean = objective.likeness.of(Seeing().looks(pictures)).mean(0)
    Run(objective, replace(RECIPE, warmup=50), tmp_path).update()
    torch.testing.assert_close(objective.likeness.gap(steps).detach(), RATE * mean, rtol=1e-3, atol=1e-4)


def test_it_resumes_bit_for_bit(tiny_folder: Path, parent: AdapterFile, tmp_path: Path) -> None:
    def begun(folder: str) -> Run:
        objective = seeing(Backbone.load(tiny_folder), parent)
        return Run(objective, replace(RECIPE, updates=4), tmp_path / folder)

    unbroken, broken = begun("unbroken"), begun("broken")
    while unbroken.step < 4:
        unbroken.update()
    broken.log += [broken.update(), broken.update()]
    broken.save()
    again = begun("broken")
    assert again.step == 2
    while again.step < 4:
        again.update()
    for name in ("student", "likeness"):
        ends = [list(run.networks[name].parameters()) for run in (unbroken, again)]
        assert all(map(torch.equal, *ends)) and any(float(p.detach().abs().max()) > 0 for p in ends[0])


def test_drawings_come_to_look_like_the_pictures_and_the_picker_does_not_choose(
    backbone: Backbone, tiny_adapters: Sequence[AdapterFile], tmp_path: Path
) -> None:
    """Its taste may like the start best; the file has what the recipe ended with."""

    class Cold(Warm):
        def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
            return -warmth(pixels)

    def squared(objective: Refinement) -> float:
        """The gap of many drawings of the data's captions, by noises that none was trained on."""
        assert objective.likeness
        with torch.no_grad():
            drawn = torch.cat([objective._rolled_out(Step(1000 + index, RECIPE), 4, 1, 0)[0] for index in range(12)])
        return float(objective.likeness.of(Seeing().looks(drawn)).mean(0).square().mean())

    dmd = adapters.named(tiny_adapters, "dmd-1")
    objective = seeing(backbone, dmd, replace(ASKED, steps=1), picker=Cold(), prompts=PROMPTS[:6])
    before, recipe = squared(objective), replace(RECIPE, updates=60, lr=5e-3)
    found = refl.run(objective, recipe, tmp_path / "run", tmp_path / "new.safetensors", "dmd-new")
    assert found.look.step == found.file.card.updates == 60
    assert squared(objective) < before / 2
    measures = (tmp_path / "run" / "measures.jsonl").read_text().splitlines()
    assert all("gap_1" in line for line in measures) and len(measures) == 4
    both, alone = adapters.load(found.file.path), objective.roles["ema"].adapter()
    taught = refl.parted(both, 2)[1]
    assert all(np.allclose(taught[name], tensor, atol=2e-3) for name, tensor in alone.items())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_strength_that_makes_pictures_as_bright_as_real_ones_is_found(
    accumulate: int, backbone: Backbone, tiny_adapters: Sequence[AdapterFile]
) -> None:
    """In a world where brightness grows with it, by the fewest steps as much as by all others together."""
    objective = seeing(backbone, adapters.named(tiny_adapters, "hyper-1"), replace(ASKED, pictures=3))
    assert objective.likeness
    recipe, seen = replace(RECIPE, accumulate=accumulate), Counter[int]()
    right = {1: 1.04, 2: 1.1, 4: 1.1, 8: 1.1}

    def drawn(step: Step, size: int, count: int, last: int, role: str) -> tuple[Tensor, list[str]]:
        assert (role, last, len(step.part), size) == ("ema", count - 1, size, 3 if accumulate == 1 else 2)
        seen[count] += size
        faint = 0.5 * (objective.roles._worn.strength - right[count])
        return noise(step) + faint, []

    def noise(step: Step) -> Tensor:
        return step.randn("beginning", (3, 4, 4)) / 4

    parts = iter([noise(Step(recipe.updates + n, recipe, range(4 // accumulate))) for n in range(256)])
    objective._rolled_out = drawn  # type: ignore[method-assign, assignment]
    objective._real = lambda rows: Seeing().looks(next(parts)[: len(rows)])  # type: ignore[method-assign]
    assert objective.strength(recipe).value == pytest.approx(1.07, abs=1e-3)
    assert all(512 * len(STRENGTHS) <= count < 520 * len(STRENGTHS) for count in seen.values())


def test_processes_share_what_tells_the_strength(
    backbone: Backbone, parent: AdapterFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each draws as much, and nothing that another does; what all of them saw is looked at together."""
    drawn: list[set[int]] = []
    for rank in range(3):
        objective = seeing(Backbone.load(backbone.folder), parent)
        here = SimpleNamespace(process_index=rank, num_processes=3, is_main_process=rank == 0, device="cpu")
        monkeypatch.setattr(refl, "processes", lambda here=here: here)
        steps: list[int] = []

        def draw(step: Step, size: int, *_: Any, steps: list[int] = steps) -> tuple[Tensor, list[str]]:
            steps.append(step.index)
            return step.randn("beginning", (3, 4, 4)), []

        collected: list[int] = []
        monkeypatch.setattr(refl, "gather", lambda looks, to=collected: to.append(len(looks)) or looks)
        objective._rolled_out = draw  # type: ignore[method-assign, assignment]
        objective.strength(RECIPE)
        assert set(collected) == {len(set(steps)) * 4} and len(collected) == len(STRENGTHS) * 2
        drawn.append(set(steps))
    assert len(set.union(*drawn)) == sum(map(len, drawn)) == 3 * len(drawn[0]) == 129
    assert min(set.union(*drawn)) == RECIPE.updates


@pytest.mark.parametrize(
    ("best", "scale"), [(Strength(1.074, 0.02), 1.07), (Strength(0.95, 0.02), 0.95), (Strength(0.95, 0.03), None)]
)
def test_the_strength_is_said_with_the_command_that_makes_it_so(
    best: Strength, scale: float | None, command: list[str], tmp_path: Path, capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(refl.Base, "refinement", lambda self, parent, *_, **__: parent)
    monkeypatch.setattr(refl, "run", lambda parent, *_: refl.Refined(parent, reward.Look(1, 1.0), 0.0, best))
    assert main(command) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.startswith(f"its drawings are most like real pictures at {best.value:.2f} ± {best.error:.2f} of its")
    if scale is None:
        assert told.endswith("no other is beyond chance")
        return
    _, said = told.split("python -m hypersd ")
    assert main(said.replace("FILE", str(tmp_path / "made.safetensors")).split()) == 0
    before, after = (adapters.load(path) for path in (Path(said.split()[1]), tmp_path / "made.safetensors"))
    for name, tensor in after.items():
        times = scale if name.endswith("lora_B") else 1.0
        torch.testing.assert_close(tensor, times * before[name], rtol=2e-3, atol=1e-6)


def test_likeness_is_to_the_pictures_themselves_where_the_data_has_them(
    backbone: Backbone, parent: AdapterFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And else to what the autoencoder gives back of them."""
    decoded = seeing(backbone, parent).likeness
    shown = torch.rand(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(Captioned, "pixels", lambda self, rows: shown[rows], raising=False)
    objective = seeing(Backbone.load(backbone.folder), parent)
    assert decoded and objective.likeness
    mean = Seeing().looks(shown[: len(objective.data)]).mean(0)
    torch.testing.assert_close(objective.likeness.get_buffer("mean"), mean)
    assert not torch.allclose(decoded.get_buffer("mean"), mean)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--likeness", "1"], "so likeness cannot be told; type --mode rollout"),
        (["--likeness", "-1", "--mode", "rollout"], "likeness must be a number from 0 to 100, got"),
        (["--pictures", "0"], "pictures must be a whole number from 1"),
        (["--lr", "0"], "the learning rate must be above 0, got 0"),
    ],
)
def test_what_cannot_be_is_said_before_the_model_is_loaded(
    command: list[str], given: list[str], sentence: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hypersd.distill.loader", lambda _: pytest.fail("the base was loaded"))
    assert main([*command, *given]) == 2
    assert sentence in capsys.readouterr().err


def test_likeness_is_to_real_pictures(command: list[str], tmp_path: Path, capsys: Any) -> None:
    """Prompts alone are enough to refine a `dmd`, but not for this."""
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    command[1] = "dmd-1"
    given = ["--data", str(tmp_path / "prompts.txt"), "--mode", "rollout", "--likeness", "1"]
    assert main([*command, *given]) == 2
    assert "likeness is to real pictures; leave --likeness out" in capsys.readouterr().err


def test_the_command_passes_on_what_is_asked(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def refinement(self: Any, *_: Any, **given: Any) -> Any:
        asked.update(given, asked=_[2], recipe=_[3])
        raise InputError("seen enough")

    monkeypatch.setattr(refl.Base, "refinement", refinement)
    given = ["--mode", "rollout", "--likeness", "2", "--pictures", "8", "--lr", "3e-4", "--updates", "7"]
    assert main([*command, *given]) == 2
    assert (asked["asked"].likeness, asked["asked"].pictures, asked["asked"].mode) == (2.0, 8, "rollout")
    assert (asked["recipe"].lr, asked["recipe"].updates) == (3e-4, 7)
