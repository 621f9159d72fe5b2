"""Distillation: the objective, its stages one after the other, its command line; calls, gradients, resume, refusals."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stages
import tiny
import torch
from listing import ROOT
from PIL import Image
from stages import RECIPE, SETTINGS, STAGE, Latents, objective
from torch import Tensor

import hypersd.__main__ as command_line
from hypersd import adapters, checkpoint, distill, plan
from hypersd.backbone import Backbone
from hypersd.distill import Distillation, Settings
from hypersd.emoji import training
from hypersd.generate import denoise
from hypersd.methods import METHODS, Stage, discover
from hypersd.records import InputError, Request
from hypersd.schedule import PREDICTIONS
from hypersd.train import Diverged, Recipe, RecipeChanged, Run, Step

B = 8
STEP = Step(3, RECIPE)
NEUTRAL = replace(SETTINGS, guidance=(1.0, 1.0))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Equal bits whatever the machine, and as fast: the model is tiny."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def backbone(tiny_folder: Path) -> Backbone:
    """One of its own: roles stay on a network."""
    return Backbone.load(tiny_folder)


def gradients(made: Distillation, step: Step = STEP) -> dict[str, tuple[float, list[Tensor]]]:
    """{module: (loss, gradient of every parameter)}, of each loss alone."""
    found = {}
    for name, loss in made.losses(step):
        module = made.modules()[name]
        found[name] = (float(loss.detach()), list(torch.autograd.grad(loss, list(module.parameters()))))
    return found


# ------------------------------------------------------------------------------------ calls, and who learns


@pytest.mark.parametrize(
    ("method", "stage", "settings", "calls"),
    [
        ("lcm", Stage(), SETTINGS, (1, 2, 4 * B)),  # the guided teacher is one launch of two samples
        ("tcd", Stage(), SETTINGS, (1, 2, 4 * B)),
        ("tscd", Stage(segments=8), SETTINGS, (1, 2, 4 * B)),
        ("tscd", STAGE, SETTINGS, (2, 3, 6 * B)),  # the adversary looks at the fake with gradient, the real without
        ("tcd", Stage(), NEUTRAL, (1, 2, 3 * B)),
        ("dmd", Stage(), SETTINGS, (2, 10, 21 * B)),  # where the student learns: real, fake, and 8 teacher's steps
        ("hyper", Stage(), SETTINGS, (3, 4, 9 * B)),
    ],
)
def test_network_calls_of_an_update(
    method: str, stage: Stage, settings: Settings, calls: tuple[int, int, int], backbone: Backbone, tmp_path: Path
) -> None:
    run = Run(objective(backbone, method, stage, settings), replace(RECIPE, accumulate=1), tmp_path)
    with plan.counted(backbone.unet) as counts:
        run.update()
    assert (counts["with gradient"], counts["without gradient"], counts["samples"]) == calls


def test_scores_cost_the_unified_adapter_their_calls_in_each_fifth_update_only(
    backbone: Backbone, tmp_path: Path
) -> None:
    """Consistency in all: student, teacher, target; the student's picture, and the fake that learns it; in each fifth
    the student's picture has a gradient, and real and fake compare it."""
    run = Run(objective(backbone, "hyper", Stage()), replace(RECIPE, updates=7, accumulate=1), tmp_path)
    for index in range(7):
        with plan.counted(backbone.unet) as counts:
            assert run.update()["student"] > 0
        assert (counts["with gradient"], counts["without gradient"]) == ((3, 4) if index in (0, 5) else (2, 3))


def test_a_fake_learns_in_every_update_and_the_student_in_each_fifth(backbone: Backbone, tmp_path: Path) -> None:
    run = Run(objective(backbone, "dmd", Stage()), replace(RECIPE, updates=7), tmp_path)
    assert list(run.networks) == ["student", "fake"]
    averages = []
    for index in range(7):
        with plan.counted(backbone.unet) as counts:
            entry = run.update()
        assert ("student" in entry) == (index in (0, 5)) and entry["fake"] > 0
        if index not in (0, 5):
            assert (counts["with gradient"], counts["without gradient"]) == (2, 2), "two micro-batches"
        averages.append(torch.cat([v.flatten() for v in run.average["student"].values()]))
    assert torch.equal(averages[0], averages[4]) and not torch.equal(averages[4], averages[5])


@pytest.mark.parametrize("stop", [1, 3])
def test_student_and_fake_resume_bit_for_bit(tiny_folder: Path, tmp_path: Path, stop: int) -> None:
    def begun(folder: str) -> Run:
        return Run(objective(Backbone.load(tiny_folder), "hyper", Stage()), RECIPE, tmp_path / folder)

    unbroken, broken = begun("unbroken"), begun("broken")
    while unbroken.step < RECIPE.updates:
        unbroken.update()
    while broken.step < stop:
        broken.log.append(broken.update())
    broken.save()
    again = begun("broken")
    assert again.step == stop
    while again.step < RECIPE.updates:
        again.update()
    assert all(torch.equal(tensor, weights(unbroken)[name]) for name, tensor in weights(again).items())


def test_hyper_goes_on_from_tscd(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    method, recipe = METHODS["hyper"], replace(RECIPE, updates=1, accumulate=1)

    def train(out: Path) -> adapters.AdapterFile:
        given = (lambda: Backbone.load(tiny_folder), Latents.of, SETTINGS, recipe, tmp_path / "runs", out)
        return distill.run(method, *given)[0]

    with pytest.raises(InputError, match=r"train it first: python -m hypersd distill tscd"):
        train(tmp_path / "empty")
    begun = tiny.adapters(tiny_folder, tmp_path / "lora")
    start = next(f for f in begun if (f.card.method, f.card.segments) == ("tscd", 1))
    (tmp_path / "lora" / "hyper-1.safetensors").unlink()
    made = train(tmp_path / "lora")
    assert made.card.recipe["start"] == start.sha256 and (made.card.method, made.card.segments) == ("hyper", 1)
    assert f"hyper: begins with {start.path}" in capsys.readouterr().out
    (tmp_path / "lora" / "hyper.safetensors").unlink()
    adapters.save(start.path.with_name("a-1.safetensors"), adapters.load(start.path), replace(start.card, name="a"))
    start.path.unlink()
    with pytest.raises(InputError, match=r"none of that name in .*lora; begin with another one, --begin a-1, or train"):
        train(tmp_path / "lora")


def test_any_method_can_begin_with_a_lora_that_is_named(
    tiny_folder: Path, tmp_path: Path, tiny_adapters: Sequence[adapters.AdapterFile]
) -> None:
    """So "TSCD, then DMD" is a row of its own, beside both."""
    recipe, start = replace(RECIPE, updates=1, accumulate=1), adapters.named(tiny_adapters, "tscd-1")
    given = (lambda: Backbone.load(tiny_folder), Latents.of, SETTINGS, recipe, tmp_path / "runs", tmp_path / "out")
    (made,) = distill.run(METHODS["dmd"], *given, name="tscd-dmd", begin=start)
    assert (made.card.name, made.card.method, made.card.recipe["start"]) == ("tscd-dmd", "dmd", start.sha256)
    table = discover([*tiny_adapters, made], made.card.base_sha256)
    assert {"dmd", "tscd", "tscd-dmd"} <= table.keys()
    with pytest.raises(InputError, match=r"there is no LoRA 'tscd-3'; choose from .*tscd-1"):
        adapters.named(tiny_adapters, "tscd-3")


def test_the_licence_of_a_release_holds_for_what_begins_with_it(
    tiny_folder: Path, tmp_path: Path, tiny_adapters: Sequence[adapters.AdapterFile]
) -> None:
    """For what begins with that, too. Where it is drawn is the method's: it was trained there."""
    file, told = adapters.named(tiny_adapters, "tcd-1"), {"licence": "CC BY-NC 4.0", "release": "they/theirs"}
    card = replace(file.card, recipe={**told, "spacing": "original", "sha256": "f" * 64})
    release = adapters.save(tmp_path / "tcd.safetensors", adapters.load(file.path), card)
    given = (lambda: Backbone.load(tiny_folder), Latents.of, SETTINGS, replace(RECIPE, updates=1), tmp_path / "runs",
             tmp_path / "out")  # fmt: skip
    (once,) = distill.run(METHODS["tcd"], *given, name="once", begin=release)
    assert distill.run(METHODS["tcd"], *given, name="once", begin=release) == [once], "a finished one is known again"
    (twice,) = distill.run(METHODS["tcd"], *given, name="twice", begin=once)
    for made in (once, twice):
        row = discover([made], made.card.base_sha256)[made.card.name]
        assert (row.licence, row.spacing) == ("CC BY-NC 4.0", "trailing")
        assert made.card.recipe["release"] == "they/theirs"


def test_a_lora_of_another_base_is_begun_with_only_by_choice(
    tiny_folder: Path, tmp_path: Path, tiny_adapters: Sequence[adapters.AdapterFile], caplog: pytest.LogCaptureFixture
) -> None:
    """A teacher that was trained further begins with the LoRAs of what it was; what fits no layer is refused."""
    start = adapters.named(tiny_adapters, "tscd-1")
    older = adapters.save(
        tmp_path / "out/tscd-1.safetensors", adapters.load(start.path), replace(start.card, base_sha256="0" * 64)
    )
    recipe = replace(RECIPE, updates=1, accumulate=1)
    given = (lambda: Backbone.load(tiny_folder), Latents.of, SETTINGS, recipe, tmp_path / "runs", tmp_path / "out")
    with pytest.raises(InputError, match=r"tscd-1\.safetensors was trained on another base than tiny.*--begin "):
        distill.run(METHODS["hyper"], *given)
    (made,) = distill.run(METHODS["dmd"], *given, begin=older)
    assert "trained on another base than tiny" in caplog.text
    assert made.card.recipe["start"] == older.sha256 and made.card.base_sha256 == start.card.base_sha256
    moved = [float((a - b).abs().max()) for a, b in zip(
        adapters.load(made.path).values(), adapters.load(older.path).values(), strict=True)]  # fmt: skip
    assert 0 < max(moved) < 0.01, "one update away from where it began"
    given = (*given[:2], replace(SETTINGS, rank=SETTINGS.rank + 1), *given[3:])
    with pytest.raises(InputError, match="with another rank"):
        distill.run(METHODS["dmd"], *given, name="other", begin=older)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dmd", "lcm"])
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are read as Linux has them")
def test_three_roles_of_one_network_do_what_three_copies_do_in_two_networks_less_memory(method: str) -> None:
    def told(form: str) -> dict[str, Any]:
        program = [sys.executable, str(ROOT / "tests/copies.py"), form, method]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
        return dict(json.loads(done.stdout))

    one, three = told("one"), told("three")
    assert one["losses"] == three["losses"], "it is the same update"
    assert 1.7 <= (three["more"] - one["more"]) / one["network"] <= 3.0


@pytest.mark.parametrize("build", [tiny.build, tiny.build_xl])  # a trailing base, and a leading one
def test_scores_are_compared_where_drawings_stop_by(build: Callable[[Path], Path], tmp_path: Path) -> None:
    """Half from noise alone, the rest from latents noised to the stops of 8 steps after the first, evenly."""
    backbone, stops = Backbone.load(build(tmp_path / "model")), list[int]()
    row = replace(METHODS["hyper"], adapted=False)
    denoise(backbone, Request("a cat", 0, 8), row, on_step=lambda info: stops.append(info.timestep))
    made, recipe = objective(backbone, "hyper", METHODS["hyper"].stages[0]), replace(RECIPE, batch=400, accumulate=1)
    step = Step(0, recipe)
    begun, at = made.beginnings(step), made.visits(step)
    first = at.t == 999
    assert torch.equal(at.x_t[first], begun.x_t[first]) and 160 < int(first.sum()) < 240
    assert set(at.t[~first].tolist()) == set(stops[1:])
    x0 = made.data.take(step.rows(len(made.data)), step).latents
    assert x0 is not None
    torch.testing.assert_close(at.x_t[~first], made.schedule.diffuse(x0, begun.x_t, at.t)[~first])


@pytest.mark.parametrize("build", [tiny.build, tiny.build_xl])
def test_the_teachers_samples_are_what_the_base_model_draws(build: Callable[[Path], Path], tmp_path: Path) -> None:
    backbone = Backbone.load(build(tmp_path / "model"))
    drawn = denoise(backbone, Request("a cat", 5, 4, guidance=3.0), METHODS["base"]).x
    made = objective(backbone, "dmd", Stage(), replace(SETTINGS, guidance=(3.0, 3.0)))
    at = made.beginnings(Step(0, replace(RECIPE, batch=1)))
    at = at._replace(x_t=backbone.noise(5)[0], states=backbone.embed(["a cat"]))
    torch.testing.assert_close(made.teacher_sample(at, 4), drawn)


def test_a_start_is_where_one_step_begins_and_more_do_not(backbone: Backbone, tmp_path: Path) -> None:
    """Trained from t = 800, and drawn from there: the file says so."""
    method, recipe = METHODS["dmd"], replace(RECIPE, updates=1)
    made = Distillation(backbone, Latents.of(backbone), method, method.stages[0], replace(SETTINGS, start=800))
    assert made.beginnings(Step(0, recipe)).t.tolist() == [800] * recipe.batch
    run = Run(made, recipe, tmp_path / "run")
    run.advance()
    file = adapters.save(tmp_path / "dmd.safetensors", made.roles["ema"].adapter(), distill.card(run, "dmd"))
    assert file.card.start == 800
    fresh, told = Backbone.load(backbone.folder), []
    for name, steps in (("dmd", 1), ("hyper", 1), ("hyper", 2)):
        other = file._replace(card=replace(file.card, method=name, name=name))
        row = discover([other], fresh.network_sha256)[name]
        denoise(fresh, Request("a cat", 0, steps), row, on_step=lambda info: told.append(info.timestep))
    assert told == [800, 800, 999, 499]
    with pytest.raises(InputError, match="start must be a whole number from 1 to 999, got 1000"):
        Distillation(Backbone.load(backbone.folder), Latents.of(backbone), method, method.stages[0],
                     replace(SETTINGS, start=1000))  # fmt: skip


def test_where_guidance_is_kept_the_teacher_is_not_guided_and_some_captions_are_empty(backbone: Backbone) -> None:
    row = METHODS["tscd-cfg"]
    made = Distillation(backbone, Latents.of(backbone), row, row.stages[0], SETTINGS)
    step = Step(0, replace(RECIPE, batch=400, accumulate=1))
    at = made.places(step)
    empty = (at.states == made.data.empty).all(2).all(1)
    assert 20 <= int(empty.sum()) <= 60, "about a tenth"
    with plan.counted(made.network) as calls:
        made.teacher_step(at)
    assert calls["samples"] == 400, "one call for each, not two"
    row.check(Request("a cat", 0, 16))
    assert row.guidance > 1


def test_each_loss_teaches_its_own_module_and_nothing_else(backbone: Backbone, tmp_path: Path) -> None:
    made = objective(backbone, ready=True)
    alone = gradients(made)
    run = Run(made, replace(RECIPE, accumulate=1, clip=1e9), tmp_path)
    run.step = STEP.index
    entry = run.update()
    for name, module in made.modules().items():
        assert entry[name] == pytest.approx(alone[name][0], rel=1e-5)
        for (parameter_name, p), gradient in zip(module.named_parameters(), alone[name][1], strict=True):
            assert p.grad is not None
            learns = bool(p.grad.abs().max() > 0) or parameter_name.endswith(".6.bias")
            assert learns, f"{name}: {parameter_name} learns nothing"  # but a last bias, where the hinges balance
            torch.testing.assert_close(p.grad, gradient)
    learners = {id(p) for module in made.modules().values() for p in module.parameters()}
    others = {name: p for name, p in backbone.unet.named_parameters() if id(p) not in learners}
    assert len(others) > 100
    assert not [name for name, p in others.items() if p.grad is not None or p.requires_grad]


def test_an_update_moves_student_adversary_and_average_only(backbone: Backbone, tmp_path: Path) -> None:
    made = objective(backbone, ready=True)
    before = {name: p.detach().clone() for name, p in backbone.unet.named_parameters()}
    heads = [p.detach().clone() for p in made.modules()["adversary"].parameters()]
    Run(made, RECIPE, tmp_path).update()
    moved = {name for name, p in backbone.unet.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".student." in name or ".ema." in name}
    assert sum(map(torch.equal, heads, made.modules()["adversary"].parameters())) <= 3  # last biases, see above


def test_gradients_are_the_same_with_activation_checkpointing(backbone: Backbone) -> None:
    made = objective(backbone, ready=True)
    plain = gradients(made)
    made.roles.checkpointing()
    for name, (loss, found) in gradients(made).items():
        assert loss == pytest.approx(plain[name][0])
        torch.testing.assert_close(found, plain[name][1], rtol=1e-4, atol=1e-6)


# ----------------------------------------------------------------------------------------- what the loss is


def test_tscd_in_one_segment_without_adversary_is_tcd(tiny_folder: Path) -> None:
    tcd, tscd = (gradients(objective(Backbone.load(tiny_folder), m, Stage(), ready=True)) for m in ("tcd", "tscd"))
    assert tcd["student"][0] == tscd["student"][0] > 0
    assert all(map(torch.equal, tcd["student"][1], tscd["student"][1]))


def test_more_segments_offset_noise_or_an_adversary_are_not_tcd(tiny_folder: Path) -> None:
    def loss(stage: Stage) -> float:
        return gradients(objective(Backbone.load(tiny_folder), "tscd", stage, ready=True))["student"][0]

    whole = loss(Stage())
    assert whole not in {loss(Stage(segments=8)), loss(Stage(offset_noise=0.05)), loss(Stage(adversarial=0.1))}
    assert loss(Stage(mse=0.5)) == pytest.approx(whole / 2)


def test_jumps_stay_within_a_segment_and_the_noisiest_latent_is_noise_alone(tiny_folder: Path) -> None:
    for k in (8, 4, 2, 1):
        backbone = Backbone.load(tiny_folder)
        made = Distillation(backbone, Latents.of(backbone), METHODS["tscd"], Stage(segments=k), SETTINGS)
        wide = Step(0, replace(RECIPE, batch=400))
        at = made.places(wide)
        assert ((at.t_end <= at.t_prev) & (at.t_prev < at.t) & (at.t <= at.t_top)).all()
        assert set((at.t - at.t_prev).tolist()) <= {24, 25}  # 24 from the first point down to 0
        assert at.t_top.unique().tolist() == sorted(backbone.schedule.timesteps(k, "trailing"))
        noisiest = at.t == 999
        assert 0 < noisiest.sum() < 40
        assert torch.equal(at.x_t[noisiest], wide.randn("noise", backbone.latent_shape)[noisiest])


def test_offset_noise_is_the_same_all_over_a_channel(tiny_folder: Path) -> None:
    plain, offset = (
        objective(Backbone.load(tiny_folder), "tscd", Stage(offset_noise=s)).places(STEP) for s in (0.0, 2.0)
    )
    _, sigma = Backbone.load(tiny_folder).schedule.level(plain.t)
    shift = ((offset.x_t - plain.x_t) / torch.where(plain.t.view(-1, 1, 1, 1) == 999, 1.0, sigma)).flatten(2)
    torch.testing.assert_close(shift, shift.mean(-1, keepdim=True).expand_as(shift), rtol=0, atol=1e-4)
    assert shift[..., 0].std() == pytest.approx(2.0, rel=0.3)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_teacher_is_guided_by_the_users_scale(prediction: str, tmp_path: Path) -> None:
    """eps_unc + g (eps_cond - eps_unc), g drawn for each latent; LCM's w is g - 1. Then one DDIM step."""
    backbone = Backbone.load(tiny.build(tmp_path, prediction))
    made = objective(backbone, "tscd", ready=True)
    at = made.places(STEP)
    x_prev = made.teacher_step(at)
    schedule = backbone.schedule
    with torch.no_grad():
        conditional, unconditional = (
            schedule.split(backbone.predict(at.x_t, at.t, states), at.x_t, at.t)
            for states in (at.states, made.data.empty.expand_as(at.states))
        )
    g = (3 + 5 * STEP.uniform("guidance")).float().view(-1, 1, 1, 1)
    assert g.unique().numel() == B and g.min() >= 3 and g.max() < 8
    x0, eps = (u + g * (c - u) for c, u in zip(conditional, unconditional, strict=True))
    lcm_x0, lcm_eps = (c + (g - 1) * (c - u) for c, u in zip(conditional, unconditional, strict=True))
    there = schedule.level(at.t_prev)
    for clean, noise in ((x0, eps), (lcm_x0, lcm_eps)):
        torch.testing.assert_close(x_prev, there.alpha * clean + there.sigma * noise, rtol=1e-4, atol=1e-4)


def test_guidance_1_asks_for_the_caption_only(tiny_folder: Path) -> None:
    backbone = Backbone.load(tiny_folder)
    made = objective(backbone, "tcd", settings=NEUTRAL, ready=True)
    at = made.places(STEP)
    with plan.counted(backbone.unet) as calls:
        once = made.teacher_step(at)
    assert calls == Counter({"without gradient": 1, "samples": B})
    nearly = objective(Backbone.load(tiny_folder), "tcd", settings=replace(SETTINGS, guidance=(1.0, 1.0 + 1e-9)))
    torch.testing.assert_close(nearly.teacher_step(nearly.places(STEP)), once, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_each_role_answers_in_x0_and_eps_whatever_the_network_predicts(prediction: str, tmp_path: Path) -> None:
    backbone = Backbone.load(tiny.build(tmp_path, prediction))
    made = objective(backbone, ready=True)
    at = made.places(STEP)
    answers = {}
    for role in ("student", "ema"):
        x0, eps = made.estimate(role, at.x_t, at.t, at.states)
        alpha, sigma = backbone.schedule.level(at.t)
        torch.testing.assert_close(alpha * x0 + sigma * eps, at.x_t, rtol=1e-4, atol=1e-4)
        assert x0.requires_grad == (role == "student")
        answers[role] = x0
    assert not torch.allclose(answers["student"], answers["ema"], atol=1e-2)
    losses = {name: loss for name, (loss, _) in gradients(made).items()}
    assert set(losses) == {"student", "adversary"} and all(np.isfinite(list(losses.values())))


def test_the_adversary_judges_between_the_end_of_the_jump_and_the_top(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake and real are noised alike, to the level that the timestep promises."""
    for k in (4, 1):
        backbone = Backbone.load(tiny_folder)
        made = objective(backbone, "tscd", replace(STAGE, segments=k))
        seen: list[tuple[Tensor, Tensor]] = []
        real = distill.adversary.features

        def note(network: Any, x: Tensor, t: Tensor, states: Tensor, seen: Any = seen, real: Any = real) -> Any:
            seen.append((x, t))
            return real(network, x, t, states)

        monkeypatch.setattr(distill.adversary, "features", note)
        step = Step(1, replace(RECIPE, batch=200))
        at = made.places(step)
        zero, one = torch.zeros_like(at.x_t), torch.ones_like(at.x_t)
        made.fool(zero, at, step)
        made.tell(one, at, step)
        monkeypatch.undo()
        (fake, t), (other, t_other) = seen
        assert torch.equal(t, t_other)
        assert ((at.t_end <= t) & (t <= at.t_top)).all() and (t > at.t_end).any()
        there, here = backbone.schedule.level(t), backbone.schedule.level(at.t_end)
        ratio = there.alpha / here.alpha
        torch.testing.assert_close(other - fake, ratio.expand_as(fake), rtol=0, atol=1e-5)  # the signal that is left
        added = (1 - ratio**2).clamp_min(0) ** 0.5  # and the noise: sigma_t^2 = ratio^2 sigma_end^2 + added^2
        torch.testing.assert_close((ratio * here.sigma) ** 2 + added**2, there.sigma**2, rtol=1e-3, atol=1e-6)
        size = (fake / added.clamp_min(1e-9))[(t > at.t_end)].std()
        assert float(size) == pytest.approx(1.0, rel=0.05)


# ------------------------------------------------------------------------------ the same update cut differently


def weights(run: Run) -> dict[str, Tensor]:
    found = {f"{n}.{k}": v.clone() for n, m in run.networks.items() for k, v in m.state_dict().items()}
    return found | {f"average.{n}.{k}": v.clone() for n, a in run.average.items() for k, v in a.items()}


def test_accumulation_is_the_same_update_for_student_and_adversary(tiny_folder: Path, tmp_path: Path) -> None:
    """To 1e-8 on average after three updates that moved the weights by up to 3e-5: AdamW makes much of a tiny
    gradient's rounding, up to the whole rate, so single weights may differ by a third of that."""
    recipe = replace(RECIPE, lr=1e-5, warmup=1)
    runs = [
        Run(objective(Backbone.load(tiny_folder), ready=True), replace(recipe, accumulate=n), tmp_path / str(n))
        for n in (1, 4)
    ]
    before = weights(runs[0])
    for _ in range(3):
        whole, pieces = (run.update() for run in runs)
        assert pieces == pytest.approx(whole, rel=1e-4)
    whole_weights, pieces_weights = map(weights, runs)
    assert {name.split(".")[0] for name in whole_weights} == {"student", "adversary", "average"}
    for name, tensor in whole_weights.items():
        apart = (pieces_weights[name] - tensor).abs()
        assert float(apart.max()) < 1e-5 and float(apart.mean()) < 1e-8, f"{name} differs by {float(apart.mean()):g}"
        assert name.endswith("6.bias") or float((tensor - before[name]).abs().max()) > 5e-6, f"{name} did not move"


def launch(model: Path, folder: Path, *options: str, **environment: str) -> subprocess.Popen[bytes]:
    given = [sys.executable, str(Path(stages.__file__)), str(model), str(folder), *options]
    root = Path(__file__).parents[1]
    return subprocess.Popen(given, cwd=root, env={**os.environ, "PYTHONPATH": str(root), **environment})


def final_bytes(folder: Path) -> str:
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    assert newest.name == f"step-{RECIPE.updates:08d}"
    return checkpoint.sha256(newest / "tensors.safetensors")


@pytest.fixture(scope="module")
def unbroken(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of RECIPE that nothing interrupted."""
    folder = tmp_path_factory.mktemp("unbroken")
    torch.set_num_threads(1)
    made = objective(Backbone.load(tiny_folder))
    made.sheet = lambda folder, step: {}  # type: ignore[method-assign]
    Run(made, RECIPE, folder).advance()
    return folder


def launch_two(model: Path, folder: Path, *options: str) -> list[int]:
    """The same program in two processes that know of each other, as `accelerate launch` starts them; how they ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    both = [launch(model, folder, *options, RANK=str(i), LOCAL_RANK=str(i), **common) for i in (0, 1)]
    return [process.wait(300) for process in both]


def test_two_processes_give_the_weights_of_one(tiny_folder: Path, tmp_path: Path, unbroken: Path) -> None:
    """gloo, each with half the batch, against one process that accumulates two halves: not a bit differs."""
    assert launch_two(tiny_folder, tmp_path, "--accumulate", "1") == [0, 0]
    assert final_bytes(tmp_path) == final_bytes(unbroken)
    mine, theirs = (json.loads((f / "log.jsonl").read_text().splitlines()[-1]) for f in (tmp_path, unbroken))
    assert mine == pytest.approx(theirs)


@pytest.mark.usefixtures("quick")
def test_two_processes_go_from_stage_to_stage_as_one_does(tiny_folder: Path, tmp_path: Path) -> None:
    """The first of them writes a stage's file, and both begin the next one with it."""
    alone = stages.all_stages(tiny_folder, tmp_path / "alone", 2)
    assert launch_two(tiny_folder, tmp_path / "both", "--all", "--accumulate", "1") == [0, 0]
    for file in alone:
        mine, theirs = adapters.load(file.path), adapters.load(tmp_path / "both/out" / file.path.name)
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    first, second = (adapters.inspect(tmp_path / "both/out" / file.path.name) for file in alone)
    assert second.card.recipe["start"] == first.sha256 and second.card.updates == 2


def test_kill_9_in_the_middle_of_an_update_in_a_later_epoch_twice(
    tiny_folder: Path, tmp_path: Path, unbroken: Path
) -> None:
    """20 latents, 8 an update in two micro-batches: the 28th asked for is in update 3 of 6, epoch 2, half way."""
    made = objective(Backbone.load(tiny_folder))
    for die_at, done in ((28, 3), (12, 4)):
        assert launch(tiny_folder, tmp_path, "--die-at", str(die_at)).wait(300) == -signal.SIGKILL
        assert checkpoint.latest(tmp_path / "checkpoints").step == done  # type: ignore[union-attr]
    made.sheet = lambda folder, step: {}  # type: ignore[method-assign]
    run = Run(made, RECIPE, tmp_path)
    assert run.advance()
    assert len(made.data.asked) == (RECIPE.updates - 4) * RECIPE.batch  # type: ignore[attr-defined]
    assert [entry["step"] for entry in run.log] == list(range(RECIPE.updates))
    assert final_bytes(tmp_path) == final_bytes(unbroken)


# ------------------------------------------------------------------------------------------- optimizers, clipping


def test_betas_rate_and_clipping_reach_both_optimizers(backbone: Backbone, tmp_path: Path) -> None:
    made = objective(backbone, ready=True)
    alone = gradients(made, Step(0, RECIPE))
    recipe = distill.stage_recipe(replace(RECIPE, accumulate=1, clip=1e-3), STAGE)
    run = Run(made, recipe, tmp_path)
    entry = run.update()
    for name, optimizer in run.optimizers.items():
        (group,) = optimizer.param_groups
        assert tuple(group["betas"]) == (0.0, 0.99)
        assert group["lr"] == recipe.rate(0) == pytest.approx(recipe.lr / 2)
        length = float(torch.cat([g.flatten() for g in alone[name][1]]).norm())
        assert entry[f"{name}/norm"] == pytest.approx(length, rel=1e-3)
        assert length > 1e-3
        clipped = torch.cat([p.grad.flatten() for p in run.networks[name].parameters() if p.grad is not None])
        assert float(clipped.norm()) == pytest.approx(1e-3, rel=1e-2)
    assert distill.stage_recipe(RECIPE, Stage()).betas == (0.9, 0.999)


# --------------------------------------------------------------------------------------------- stage after stage

SHORT = Recipe(updates=1, batch=4, lr=1e-2, warmup=1, weight_decay=0.0, ema=0.9)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "SHEET_STEPS", (1,))
    monkeypatch.setattr(distill, "TEACHER_STEPS", 2)


def train(model: Path, folder: Path, settings: Settings = SETTINGS, recipe: Recipe = SHORT, **options: Any) -> Any:
    options = {"load": lambda: Backbone.load(model), "open_data": Latents.of, **options}
    load, open_data = options.pop("load"), options.pop("open_data")
    method = METHODS[options.pop("method", "tscd")]
    return distill.run(method, load, open_data, settings, recipe, folder / "runs", folder / "out", **options)


@pytest.mark.usefixtures("quick")
def test_stages_follow_each_other_and_a_finished_one_is_kept(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases: list[weakref.ref[Any]] = []

    def load() -> Backbone:
        assert not [base for base in bases if base() is not None], "the last stage's network is still in memory"
        backbone = Backbone.load(tiny_folder)
        bases.append(weakref.ref(backbone.unet))
        return backbone

    files = train(tiny_folder, tmp_path, load=load)
    assert [f.path.name for f in files] == [f"tscd-{k}.safetensors" for k in (8, 4, 2, 1)]
    assert [f.card.recipe["start"] for f in files] == ["", *(f.sha256 for f in files[:-1])]
    for file in files:
        width = (len(distill.SHEET_STEPS) + 1) * 32
        with Image.open(tmp_path / "runs" / file.path.stem / "sheet.png") as sheet:
            assert sheet.size == (width, 32 * len(SETTINGS.prompts))
    assert len(list((tmp_path / "runs").glob("teacher-*.npy"))) == 1

    monkeypatch.setattr(distill, "commit", lambda: "another")  # the package moves on, the finished stages stay
    (tmp_path / "out" / "tscd-1.safetensors").unlink()
    monkeypatch.setattr(Run, "update", lambda self: pytest.fail("a finished stage was trained again"))
    again = train(tiny_folder, tmp_path)
    assert [f.sha256 for f in again[:-1]] == [f.sha256 for f in files[:-1]]
    old, new = (adapters.load(f.path) for f in (files[-1], again[-1]))
    assert all(torch.equal(old[name], new[name]) for name in old)

    for settings, recipe, sentence in (
        (replace(SETTINGS, rank=3), SHORT, r"settings\.rank: 2 then, 3 now"),
        (SETTINGS, replace(SHORT, lr=0.5), r"lr: 0\.01 then, 0\.5 now"),
        (replace(SETTINGS, guidance=(2.0, 4.0)), SHORT, r"settings\.guidance: \[3\.0, 8\.0\] then, \[2\.0, 4\.0\] now"),
    ):
        refused = rf"tscd-8\.safetensors was trained with another recipe \({sentence}\).*--name tscd-new"
        with pytest.raises(RecipeChanged, match=refused):  # before base and data are asked for
            train(tiny_folder, tmp_path, settings, recipe, load=None, open_data=None)
    assert [adapters.inspect(f.path).sha256 for f in files[:-1]] == [f.sha256 for f in files[:-1]]


@pytest.mark.usefixtures("quick")
def test_divergence_says_what_to_type(tiny_folder: Path, tmp_path: Path) -> None:
    def broken(backbone: Backbone) -> Latents:
        data = Latents.of(backbone)
        return replace(data, latents=torch.full_like(data.latents, float("nan")))  # type: ignore[arg-type]

    with pytest.raises(Diverged, match=r"with a learning rate below 0\.01: --lr 0\.005 --name lcm-slower$"):
        train(tiny_folder, tmp_path, method="lcm", open_data=broken)


@pytest.mark.usefixtures("quick")
def test_out_of_time_is_gone_on_with(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "commit", lambda: "the same")
    recipe = replace(SHORT, updates=2)
    (whole,) = train(tiny_folder, tmp_path / "whole", recipe=recipe, method="lcm")
    assert train(tiny_folder, tmp_path / "parts", recipe=recipe, method="lcm", minutes=0) == []
    (parts,) = train(tiny_folder, tmp_path / "parts", recipe=recipe, method="lcm", minutes=5)
    assert parts.sha256 == whole.sha256


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("tcsd", "method must be one of lcm, tcd, tscd, tscd-cfg, dmd, hyper, got 'tcsd'"),
        ("base", "method must be one of lcm, tcd, tscd, tscd-cfg, dmd, hyper, got 'base'"),
        ("tcd --batch 21", "the data holds 20 samples, fewer than a batch of 21"),
        ("tcd --batch 4 --accumulate 3", "a batch of 4 cannot be cut into 3 equal parts"),
        ("tcd --batch 0", "batch must be a whole number from 1"),
        ("tcd --updates -1", "updates must be a whole number from 1"),
        ("tcd --rank 0", "rank must be a whole number from 1"),
        ("tcd --lr nan", "the learning rate must be above 0, got nan"),
        ("tcd --guidance 8-3", "the guidance range runs from 8 down to 3; type 3-8"),
        ("tcd --guidance 0.5", "guidance must be a number from 1 to 30, got '0.5'"),
        ("tcd --name ../up", "a name has letters, digits"),
        ("tcd --name lcm", "lcm is the name of another method; type tcd-new"),
        ("tcd --out file", "nothing can be written to file (File exists)"),
        ("tcd --out file/below", "nothing can be written to file/below (Not a directory)"),
        ("tcd --backbone nowhere", "or a model's folder, got 'nowhere'"),
    ],
)
def test_a_wrong_input_is_one_sentence(
    given: str, sentence: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "opener", lambda data, runs: Latents.of)
    Path("file").write_text("kept")
    backbone = [] if "--backbone" in given else ["--backbone", str(tiny_folder)]
    out = [] if "--out" in given else ["--out", "out"]
    assert command_line.main(["distill", *given.split(), *backbone, *out]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("hypersd: ") and sentence in said
    assert not list(tmp_path.rglob("*.safetensors"))
    assert Path("file").read_text() == "kept"


@pytest.mark.usefixtures("quick")
def test_activations_may_be_kept_or_not_from_call_to_call(tiny_folder: Path, tmp_path: Path) -> None:
    """What is not kept is computed again; the run and its card know nothing of it."""
    learning: list[bool] = []

    def load() -> Backbone:
        backbone = Backbone.load(tiny_folder)
        block = backbone.unet.down_blocks[0].resnets[0]
        block.register_forward_pre_hook(lambda *_: learning.append(torch.is_grad_enabled()))
        return backbone

    given: dict[str, Any] = {"method": "lcm", "recipe": replace(SHORT, updates=2), "load": load}
    assert train(tiny_folder, tmp_path, **given, checkpointing=True, minutes=0.0) == []  # one update
    assert sum(learning) == 2
    (file,) = train(tiny_folder, tmp_path, **given)
    assert sum(learning) == 3 and "checkpointing" not in file.card.recipe


def test_prompts_alone_are_no_data_for_distillation(tiny_folder: Path, tmp_path: Path) -> None:
    def prompts(backbone: Backbone) -> Latents:
        return replace(Latents.of(backbone), latents=None)

    with pytest.raises(InputError, match=r"the data holds prompts only, and tscd learns from pictures .* for dmd"):
        train(tiny_folder, tmp_path, open_data=prompts)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.usefixtures("quick")
def test_but_they_are_enough_to_match_distributions(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DMD draws its own pictures: it learns the same whether there are others beside the captions or not."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text(
        "\n".join(f"a {x} {y}" for x in ("red", "big", "old") for y in ("cat", "dog", "bird"))
    )
    given = ["--backbone", str(tiny_folder), "--data", "prompts.txt", "--updates", "2", "--batch", "4",
             "--accumulate", "1", "--rank", "2"]  # fmt: skip
    assert command_line.main(["distill", "dmd", *given, "--out", "out", "--tensorboard"]) == 0
    assert adapters.inspect(Path("out/dmd.safetensors")).card.updates == 2
    assert list(Path("runs").rglob("events.out.tfevents.*"))
    assert command_line.main(["distill", "tcd", *given, "--out", "out"]) == 2
    made = [
        train(tiny_folder, tmp_path / name, method="dmd", open_data=data)[0]
        for name, data in (("with", Latents.of), ("without", lambda b: replace(Latents.of(b), latents=None)))
    ]
    first, second = (adapters.load(file.path) for file in made)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_the_dry_run_says_what_it_will_take(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command_line.main(["distill", "tscd", "--backbone", str(tiny_folder), "--batch", "8", "--dry-run"]) == 0
    said = capsys.readouterr().out
    for words in ("8 segment(s): MSE x 1, adversarial x 0", "1 segment(s): MSE x 0.1, adversarial x 1",
                  "in memory once", "student ", "adversary ", "in all",
                  "16 network call(s) with gradient, 24 without, 48 samples"):  # fmt: skip
        assert words in said
    assert list(tmp_path.iterdir()) == []
