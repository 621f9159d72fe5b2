"""Structure, refinement and the whole loop, on a tiny model and with a taste that can be measured."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import liking
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from judged import Thumbnails
from liking import PROMPTS, Broken, Warm, warmth
from listing import ROOT
from PIL import Image
from stages import Latents
from test_export import Tick
from torch import Tensor
from voting import definition

from hypersd import adapters, distill
from hypersd.__main__ import main
from hypersd.adapters import AdapterFile
from hypersd.backbone import Backbone
from hypersd.emoji.prompts import THINGS, Prompt
from hypersd.evaluate import judges, plan
from hypersd.feedback import loop, refl, reward, structure
from hypersd.feedback.command import _looked_at
from hypersd.feedback.refl import Asked, Refinement, added
from hypersd.feedback.structure import Instances, Outline, Segmenter, wrongness
from hypersd.generate import denoise, draw
from hypersd.methods import discover
from hypersd.plan import counted
from hypersd.records import InputError, Item, Problem, Request
from hypersd.study.ballots import Desk, Wait
from hypersd.study.definition import Study, parse
from hypersd.study.people import annotator_of, new_id, receipt_of
from hypersd.study.votes import Store
from hypersd.train import Diverged, Recipe, Run, Step

ASSETS = ROOT / "assets"
SETTINGS = distill.Settings(rank=2, guidance=(3.0, 3.0), prompts=("a cat",))
RECIPE = Recipe(updates=60, batch=4, lr=2e-2, warmup=2, weight_decay=0.0, ema=0.5)


class Captioned(Latents):
    """The tests' latents, with the captions that rewards ask for."""

    def take(self, rows: Tensor, draws: Step | None = None) -> Any:
        batch = super().take(rows, draws)
        batch.__dict__["captions"] = [("a cat", "a dog", "red heart")[row % 3] for row in rows.tolist()]
        return batch

    def masks(self, rows: Tensor) -> Tensor:
        return torch.ones(len(rows), 32, 32)


@pytest.fixture
def backbone(tiny_folder: Path) -> Backbone:
    return Backbone.load(tiny_folder)


@pytest.fixture(scope="session")
def parent(tiny_adapters: Sequence[AdapterFile]) -> AdapterFile:
    return adapters.named(tiny_adapters, "tscd-4")


def made(backbone: Backbone, parent: AdapterFile, asked: Asked | None = None, **changes: Any) -> Refinement:
    given: dict[str, Any] = {"picker": Warm(), "prompts": PROMPTS[:3], "rewards": [Warm()]} | changes
    return Refinement(
        backbone,
        Captioned.of(backbone),
        parent,
        settings=SETTINGS,
        asked=asked or Asked(4, weight=5.0, rank=2),
        **given,
    )


class Cold(Warm):
    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return -warmth(pixels)


# ------------------------------------------------------------------------------------------------- structure


def test_a_mask_that_is_found_is_not_wrong() -> None:
    masks = torch.zeros(2, 64, 64)
    masks[:, 16:48, 16:48] = 1
    right = wrongness((masks * 2 - 1) * 20, masks)
    assert float(right.max()) < 1e-3 and float(wrongness(-(masks * 2 - 1) * 20, masks).min()) > 10


def outline(folder: Path) -> Outline:
    """A segmenter with random weights, from disk."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    save_file({k: v.half() for k, v in Segmenter().state_dict().items()}, folder / structure.WEIGHTS)
    return Outline(folder)


def test_the_segmenter_sees_a_tensor_as_its_png(tmp_path: Path) -> None:
    find = outline(tmp_path)
    coarse = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 255
    pixels = F.interpolate(coarse, (128, 128), mode="bilinear").permute(0, 2, 3, 1).round().to(torch.uint8)
    small = [np.asarray(Image.fromarray(p.numpy()).resize((64, 64), Image.Resampling.BOX)) for p in pixels]
    masks = torch.ones(2, 128, 128)
    as_file = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2) / 127.5 - 1
    as_tensor = pixels.permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(find(as_file, masks), find(as_tensor, masks), rtol=0, atol=1e-3)


def test_the_segmenters_gradient_is_the_slope(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Segmenter(4).double()
    x = (torch.rand(1, 3, 8, 8, dtype=torch.float64) - 0.5).requires_grad_()
    masks = (torch.rand(1, 8, 8) < 0.5).double()
    assert torch.autograd.gradcheck(lambda x: wrongness(model(x), masks), (x,), fast_mode=True)


def test_a_segmenter_of_no_use_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="python -m hypersd segmenter"):
        structure.load(str(tmp_path), "emoji")
    outline(tmp_path)
    assert isinstance(structure.load(str(tmp_path), "emoji"), Outline)
    with pytest.raises(InputError, match=f"not what sd15 draws; .* --segmenter {structure.PUBLISHED}"):
        structure.load(str(tmp_path), "sd15")
    file = tmp_path / structure.WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"segmenter.safetensors cannot be read \(SafetensorError\); copy or make it"):
        structure.load(str(tmp_path), "emoji")


def test_the_segmenter_works_where_the_pictures_are(tmp_path: Path) -> None:
    assert outline(tmp_path)(torch.empty(2, 3, 32, 32, device="meta"), torch.ones(2, 32, 32)).device.type == "meta"


# ------------------------------------------------------------------------------------------------ refinement


def test_loras_side_by_side_add_what_both_add(backbone: Backbone, tiny_adapters: Sequence[AdapterFile]) -> None:
    one, two = (adapters.load(file.path) for file in tiny_adapters[:2])
    x, states = torch.randn(2, *backbone.latent_shape), backbone.embed(["a cat", "a dog"])

    def output(network: Any) -> Tensor:
        with torch.no_grad():
            return network(x, 500, encoder_hidden_states=states, return_dict=False)[0]

    both = adapters.dressed(adapters.dressed(backbone.unet, adapters.Lora(one)), adapters.Lora(two))
    torch.testing.assert_close(
        output(adapters.dressed(backbone.unet, adapters.Lora(added(one, two)))), output(both), rtol=1e-4, atol=1e-5
    )


def published(file: AdapterFile, folder: Path, start: int = 999) -> AdapterFile:
    """A LoRA as `fetch` leaves it, with its makers' licence and grid."""
    told = {"licence": "OpenRAIL", "spacing": "original", "release": "its/makers"}
    return adapters.save(
        folder / file.path.name, adapters.load(file.path), replace(file.card, recipe=told, start=start)
    )


@pytest.mark.parametrize(("name", "steps", "start"), [("lcm-1", 4, 999), ("tscd-cfg-8", 8, 999), ("dmd-1", 1, 800)])
def test_what_is_judged_is_drawn_as_the_app_draws_it(
    backbone: Backbone, tiny_adapters: Sequence[AdapterFile], tmp_path: Path, name: str, steps: int, start: int
) -> None:
    """On the grid of a release, with the guidance of one that keeps it, from the timestep of one that begins later."""
    parent = published(adapters.named(tiny_adapters, name), tmp_path, start)
    row = discover([parent], backbone.network_sha256)[parent.card.name]
    fresh = Backbone.load(backbone.folder)
    drawn = torch.cat([denoise(fresh, Request(p, n, steps), row).x for n, p in enumerate(PROMPTS[:2])])
    objective = made(backbone, parent, Asked(steps, rank=2), prompts=PROMPTS[:2])
    for refined in (True, False):
        torch.testing.assert_close(objective.drawn(refined=refined), drawn, rtol=1e-3, atol=1e-3)


def test_a_parent_of_another_base_is_refused(backbone: Backbone, parent: AdapterFile) -> None:
    other = parent._replace(card=replace(parent.card, base_sha256="0" * 64))
    with pytest.raises(InputError, match=r"another base than tiny; .* distill tscd --begin .*tscd-4.safetensors"):
        made(backbone, other)
    other = parent._replace(card=replace(parent.card, name="lcm"))
    with pytest.raises(InputError, match="calls itself 'lcm', which is another method's"):
        made(backbone, other)


@pytest.mark.parametrize(("name", "along"), [("lcm-1", False), ("tcd-1", True), ("tscd-4", True), ("hyper-1", True)])
def test_the_anchor_is_the_consistency_of_the_parent_s_method(
    backbone: Backbone, tiny_adapters: Sequence[AdapterFile], name: str, along: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Along the trajectory it matters where the jump ends, to LCM it does not; neither has other players."""
    objective = made(backbone, adapters.named(tiny_adapters, name), Asked(4, weight=0.0, rank=2))
    step, draw_places = Step(0, RECIPE), objective.segments.draw
    with counted(objective.network) as counts:
        (_, loss), *others = objective.losses(step)
    assert not others and (counts["with gradient"], counts["without gradient"]) == (1, 2)
    monkeypatch.setattr(
        type(objective.segments), "draw", lambda self, start, end: draw_places(start, torch.zeros_like(end))
    )
    (_, moved) = next(objective.losses(step))
    assert float(loss.detach()) > 0 and (float(loss.detach()) != float(moved.detach())) == along


@pytest.mark.parametrize(("told", "guidance"), [({"guidance": [2.5, 2.5]}, (2.5, 2.5)), ({"points": 40}, (3.0, 3.0)),
                                                ({"guidance": ["2.5", "4"]}, (2.5, 4.0)),
                                                ("nothing", (3.0, 3.0)), (None, (3.0, 3.0))])  # fmt: skip
def test_the_anchor_s_teacher_is_guided_as_the_parent_s_was(
    backbone: Backbone, parent: AdapterFile, told: Any, guidance: tuple[float, float]
) -> None:
    """Where the parent's card says how: one that was published elsewhere does not."""
    recipe = {} if told is None else {"settings": told}
    objective = made(backbone, parent._replace(card=replace(parent.card, recipe=recipe)))
    assert objective.settings.guidance == guidance
    assert objective.describe()["settings"]["guidance"] == guidance, "and so its child's card says it too"


def test_a_guidance_that_cannot_be_is_refused(backbone: Backbone, parent: AdapterFile) -> None:
    card = replace(parent.card, recipe={"settings": {"guidance": [2.5, "much"]}})
    with pytest.raises(InputError, match="guidance must be a number from 1 to 30"):
        made(backbone, parent._replace(card=card))


def test_one_step_is_held_to_the_parent_where_it_begins(
    backbone: Backbone, tiny_adapters: Sequence[AdapterFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = published(adapters.named(tiny_adapters, "dmd-1"), tmp_path, 800)
    objective = made(backbone, parent, Asked(1, weight=0.0, rank=2))
    asked, call = [], objective._call

    def recorded(x: Tensor, t: Tensor, states: Tensor) -> Tensor:
        asked.append(t.tolist())
        return call(x, t, states)

    monkeypatch.setattr(objective, "_call", recorded)
    (_, loss) = next(objective.losses(Step(0, RECIPE)))
    assert asked == [[800] * RECIPE.batch] * 2 and float(loss.detach()) == 0
    for tensor in objective.roles["student"].adapter().values():
        tensor.add_(0.05)
    assert float(next(objective.losses(Step(0, RECIPE)))[1].detach()) > 0
    with pytest.raises(InputError, match="dmd redraws no picture"):
        made(Backbone.load(backbone.folder), parent, Asked(1, structure=1.0, rank=2))


@pytest.mark.parametrize("mode", refl.MODES)
def test_the_gradient_is_the_same_however_the_batch_is_cut(backbone: Backbone, parent: AdapterFile, mode: str) -> None:
    """Three pictures of eight are decoded: by one process, by parts that hold some of them or none, by two."""
    found, cuts = {}, ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2))
    for processes, accumulate, weight in (*((*cut, 5.0) for cut in cuts), (1, 1, 0.0)):
        objective = made(Backbone.load(backbone.folder), parent, Asked(4, mode, weight=weight, pictures=3, rank=2))
        recipe = replace(RECIPE, batch=8, accumulate=accumulate)
        for part in (part for process in range(processes) for part in recipe.parts(process, processes)):
            (_, loss) = next(objective.losses(Step(0, recipe, part)))
            (loss * len(part) / recipe.batch).backward()
        learned = [p.grad.flatten() for p in objective.roles["student"].parameters() if p.grad is not None]
        found[processes, accumulate, weight] = torch.cat(learned)
    whole = found.pop((1, 1, 5.0))
    assert float((found.pop((1, 1, 0.0)) - whole).norm() / whole.norm()) > 0.1, "the rewards matter"
    for gradient in found.values():
        assert float((gradient - whole).norm() / whole.norm()) < 1e-4


def test_processes_that_share_the_base_call_it_equally_often(
    backbone: Backbone, parent: AdapterFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that has no picture to decode waits for the others' blocks otherwise; what it rolls out weighs nothing."""
    monkeypatch.setattr(refl, "sharding", lambda: True)
    calls, losses = [], []
    for weight in (0.0, 5.0):
        objective = made(Backbone.load(backbone.folder), parent, Asked(4, "rollout", weight=weight, pictures=2, rank=2))
        for part in (range(2), range(2, 4)):
            with counted(objective.network) as counts:
                losses.append(float(next(objective.losses(Step(0, RECIPE, part)))[1].detach()))
            calls.append((counts["with gradient"], counts["without gradient"]))
    assert len(set(calls)) == 1 and calls[0][0] == 2
    assert losses[0] != losses[2] and losses[1] == losses[3]


@pytest.mark.parametrize(("mode", "calls"), [("reuse", (1, 2)), ("rollout", (2, None))])
def test_reuse_takes_no_further_call(
    backbone: Backbone, parent: AdapterFile, mode: str, calls: tuple[int, int | None]
) -> None:
    """Distillation takes one call with gradient and two without; a rollout one more, and up to three without."""
    objective = made(backbone, parent, Asked(4, mode, rank=2))
    with counted(objective.network) as counts:
        list(objective.losses(Step(0, RECIPE)))
    assert counts["with gradient"] == calls[0]
    assert counts["without gradient"] == 2 if calls[1] else 2 <= counts["without gradient"] <= 5


@pytest.mark.parametrize("method", ["tscd", "hyper", "lcm"])
def test_a_rollout_goes_where_the_student_is_drawn(method: str, tmp_path: Path) -> None:
    """On a base whose own grid is another one: the same stops, with fresh noise at each where the method takes any."""
    backbone, stops = Backbone.load(tiny.build_xl(tmp_path / "model")), list[int]()
    parent = tiny.adapters(backbone.folder, tmp_path, only=(method,))[-1]
    row = discover([parent], backbone.network_sha256)[method]
    denoise(backbone, Request("a cat", 0, 4), row, on_step=lambda info: stops.append(info.timestep))
    seen = rolled_out(made(backbone, parent, Asked(4, "rollout", rank=2)), 4)
    assert [t for _, t, _, _ in seen] == stops
    for (_, _, x0, eps), (x_s, s, _, _) in pairwise(seen):
        level = backbone.schedule.level(s)
        noise = (x_s - level.alpha * x0) / level.sigma
        alike = float(torch.corrcoef(torch.stack([noise.flatten(), eps.flatten()]))[0, 1])
        assert alike > 0.999 if method == "tscd" else abs(alike) < 0.2


def test_a_rollout_begins_where_the_parent_does(
    backbone: Backbone, tiny_adapters: Sequence[AdapterFile], tmp_path: Path
) -> None:
    file = adapters.named(tiny_adapters, "hyper-1")
    early = adapters.save(tmp_path / "a.safetensors", adapters.load(file.path), replace(file.card, start=800))
    assert [t for _, t, _, _ in rolled_out(made(backbone, early, Asked(1, "rollout", rank=2)), 1)] == [800]


def test_a_release_stays_what_its_makers_say(
    backbone: Backbone, tiny_adapters: Sequence[AdapterFile], tmp_path: Path
) -> None:
    """Its licence holds for what was refined, and it is drawn at its own timesteps, in a rollout and afterwards."""
    file, told = adapters.named(tiny_adapters, "tcd-1"), {"licence": "CC BY-NC 4.0", "spacing": "original"}
    release = adapters.save(
        tmp_path / "a.safetensors", adapters.load(file.path), replace(file.card, eta=0.3, recipe={**told, "sha256": ""})
    )
    objective = made(backbone, release, Asked(4, "rollout", rank=2))
    run = Run(objective, RECIPE, tmp_path / "run")
    card = refl.card(objective, run, "tcd-new", reward.Look(0, 0.0), {})
    row = discover([release._replace(card=card)], backbone.network_sha256)["tcd-new"]
    assert (row.licence, row.spacing, row.eta) == ("CC BY-NC 4.0", "original", 0.3)
    assert [t for _, t, _, _ in rolled_out(objective, 4)] == backbone.schedule.timesteps(4, "original")


def rolled_out(objective: Refinement, steps: int) -> list[tuple[Tensor, int, Tensor, Tensor]]:
    """(x_t, t, x0, eps) of each estimate of the first rollout that takes so many."""
    seen: list[tuple[Tensor, int, Tensor, Tensor]] = []
    estimate = objective.estimate

    def watched(role: str, x_t: Tensor, t: Tensor, states: Tensor, *, learn: bool | None = None) -> Any:
        x0, eps = estimate(role, x_t, t, states, learn=learn)
        seen.append((x_t, int(t[0]), x0.detach(), eps.detach()))
        return x0, eps

    objective.estimate = watched  # type: ignore[method-assign]
    for index in range(50):
        seen.clear()
        step = Step(index, RECIPE)
        objective._rolled_out(step, 4, *objective._how_far(step))
        if len(seen) == steps:
            break
    return seen


def test_only_the_feedback_learns(backbone: Backbone, parent: AdapterFile, tmp_path: Path) -> None:
    objective = made(backbone, parent)
    before = {name: tensor.clone() for name, tensor in objective.roles["parent"].adapter().items()}
    base = [p.clone() for n, p in objective.network.named_parameters() if "lora" not in n]
    run = Run(objective, replace(RECIPE, updates=3), tmp_path)
    run.advance()
    assert all(torch.equal(before[name], t) for name, t in objective.roles["parent"].adapter().items())
    assert all(torch.equal(a, p) for a, (_, p) in zip(
        base, ((n, p) for n, p in objective.network.named_parameters() if "lora" not in n), strict=True))  # fmt: skip
    learned = objective.roles["student"].adapter()
    assert all(float(t.abs().max()) > 0 for name, t in learned.items() if name.endswith("lora_B"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", refl.MODES)
def test_what_is_liked_is_drawn_more(backbone: Backbone, parent: AdapterFile, tmp_path: Path, mode: str) -> None:
    """And the file draws just that, in the app's own way, on prompts that nothing looked at."""
    objective = made(backbone, parent, Asked(4, mode, weight=5.0, rank=2))
    found = refl.run(objective, RECIPE, tmp_path / "run", tmp_path / "new.safetensors", "tscd-new", votes="v")
    assert found.look.value > found.before and found.look.step > 0
    card = found.file.card
    assert (card.name, card.segments, card.rank, card.recipe["votes"]) == ("tscd-new", 4, 4, "v")
    assert card.recipe["parent"] == parent.sha256
    table = discover([parent, found.file], backbone.network_sha256)
    assert {"tscd", "tscd-new"} <= table.keys(), "it stands beside its parent in the app"
    fresh = Backbone.load(backbone.folder)
    new, old = (
        np.mean([_warmth(draw(fresh, Request(p, 7, 4), table[name])) for p in PROMPTS[10:16]])
        for name in ("tscd-new", "tscd")
    )
    assert new > old


def _warmth(panel: Any) -> float:
    pixels = torch.frombuffer(bytearray(panel.pixels), dtype=torch.uint8).view(1, panel.height, panel.width, 3)
    return float(warmth(pixels.permute(0, 3, 1, 2) / 127.5 - 1))


def test_the_feedback_can_be_merged_at_another_scale(backbone: Backbone, parent: AdapterFile, tmp_path: Path) -> None:
    found = refl.run(made(backbone, parent), RECIPE, tmp_path / "run", tmp_path / "new.safetensors", "tscd-new")
    alone, both = (adapters.load(p) for p in (tmp_path / "run/feedback.safetensors", found.file.path))
    name = next(iter(alone))
    along = 0 if name.endswith("lora_A") else 1
    assert torch.equal(both[name].split([2, 2], along)[1], alone[name])


def test_a_second_turn_goes_on_where_the_first_ended(backbone: Backbone, parent: AdapterFile, tmp_path: Path) -> None:
    """It begins with the first turn's pictures, keeps the distilled part, and makes no longer LoRA; tastes change."""
    first = refl.run(made(backbone, parent), RECIPE, tmp_path / "run", tmp_path / "new.safetensors", "tscd-new").file
    objective = made(Backbone.load(backbone.folder), first, rewards=[Cold()], picker=Cold())
    assert torch.equal(objective.drawn(), objective.drawn(refined=False))
    row = discover([first], backbone.network_sha256)["tscd-new"]
    fresh = Backbone.load(backbone.folder)
    drawn = [denoise(fresh, Request(p, n, 4, guidance=1.0), row).x for n, p in enumerate(PROMPTS[:3])]
    torch.testing.assert_close(objective.drawn(), torch.cat(drawn), rtol=1e-3, atol=1e-3)
    second = refl.run(objective, RECIPE, tmp_path / "run2", tmp_path / "newer.safetensors", "tscd-newer").file
    assert second.card.rank == first.card.rank == parent.card.rank + 2
    old, new = (refl.parted(adapters.load(file.path), 2) for file in (first, second))
    assert all(torch.equal(old[0][name], new[0][name]) for name in old[0])
    assert any(not torch.equal(old[1][name], new[1][name]) for name in old[1])
    with pytest.raises(InputError, match="with rank 2 and goes on with it, got rank 3; leave --rank out"):
        made(Backbone.load(backbone.folder), first, Asked(4, rank=3))


@pytest.mark.parametrize("mode", refl.MODES)
def test_feedback_resumes_bit_for_bit(mode: str, tiny_folder: Path, parent: AdapterFile, tmp_path: Path) -> None:
    def begun(folder: str) -> Run:
        objective = made(Backbone.load(tiny_folder), parent, Asked(4, mode, weight=5.0, rank=2))
        return Run(objective, replace(RECIPE, updates=4, accumulate=2), tmp_path / folder)

    unbroken, broken = begun("unbroken"), begun("broken")
    before = [p.detach().clone() for p in unbroken.networks["student"].parameters()]
    while unbroken.step < 4:
        unbroken.update()
    broken.log.append(broken.update())
    broken.save()
    again = begun("broken")
    assert again.step == 1
    while again.step < 4:
        again.update()
    ends = [list(run.networks["student"].parameters()) for run in (unbroken, again)]
    assert all(map(torch.equal, *ends)) and not all(map(torch.equal, ends[0], before))
    averages = [run.average["student"] for run in (unbroken, again)]
    assert all(torch.equal(tensor, averages[1][name]) for name, tensor in averages[0].items())


def test_each_of_several_rewards_asks_for_what_is_missing_to_its_own_threshold(
    backbone: Backbone, parent: AdapterFile
) -> None:
    """Eq. 13: two pictures, of which one is warm enough, and neither cold enough."""
    warm, cold = Warm(), Cold()
    warm.threshold, cold.threshold = 0.5, 2.0
    objective = made(backbone, parent, rewards=[warm, cold])
    pixels = torch.zeros(2, 3, 8, 8)
    pixels[0, 0], pixels[1, 0] = 1.0, 0.25
    missing = objective._missing(pixels, ["a cat", "a dog"])
    assert float(missing) == pytest.approx((0 + 0.25) + (3.0 + 2.25))


def test_a_threshold_that_is_reached_asks_for_nothing(backbone: Backbone, parent: AdapterFile) -> None:
    class Content(Warm):
        threshold = -100.0

    step = Step(0, RECIPE)
    (_, with_reward), (_, without) = (
        next(made(Backbone.load(backbone.folder), parent, Asked(4, weight=w, rank=2), rewards=[Content()]).losses(step))
        for w in (5.0, 0.0)
    )
    assert float(with_reward.detach()) == float(without.detach())


def test_structure_enters_the_loss(backbone: Backbone, parent: AdapterFile, tmp_path: Path) -> None:
    find, step = outline(tmp_path), Step(0, RECIPE)
    losses = [
        float(next(made(Backbone.load(backbone.folder), parent, Asked(4, weight=0.0, structure=w, rank=2),
                        structure=find).losses(step))[1].detach()) for w in (0.0, 1.0)
    ]  # fmt: skip
    assert losses[1] > losses[0] + 0.1


def test_a_reward_that_breaks_leaves_nothing(backbone: Backbone, parent: AdapterFile, tmp_path: Path) -> None:
    with pytest.raises(Diverged):
        refl.run(made(backbone, parent, rewards=[Broken()]), RECIPE, tmp_path / "a", tmp_path / "x.safetensors", "n")
    with pytest.raises(Problem, match="picked is nan"):
        refl.run(made(Backbone.load(backbone.folder), parent, picker=Broken()), RECIPE, tmp_path / "b",
                 tmp_path / "x.safetensors", "n")  # fmt: skip
    assert not (tmp_path / "x.safetensors").exists()


def test_where_nothing_is_better_nothing_is_written(backbone: Backbone, parent: AdapterFile, tmp_path: Path) -> None:
    with pytest.raises(Problem, match="nothing was liked better than tscd-4"):
        refl.run(made(backbone, parent, picker=Cold()), replace(RECIPE, updates=20), tmp_path / "a",
                 tmp_path / "x.safetensors", "n")  # fmt: skip
    assert not (tmp_path / "x.safetensors").exists()


def test_bad_settings_are_explained(backbone: Backbone, parent: AdapterFile) -> None:
    with pytest.raises(InputError, match="reuse, rollout, got 'both'"):
        Asked(4, "both")
    for wrong in ("nan", "-1", float("inf")):
        with pytest.raises(InputError, match="structure must be a number from 0 to 100, got"):
            Asked(4, structure=wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no picture whose structure is known; type --mode reuse"):
        Asked(4, "rollout", structure=1.0)
    with pytest.raises(InputError, match="the structure of these pictures is not known"):
        made(backbone, parent, Asked(4, structure=1.0, rank=2))
    with pytest.raises(InputError, match="has 4 segments, so steps must be a multiple of that, got 6"):
        loop.steps_for(parent, 6)
    with pytest.raises(InputError, match="no reward is given"):
        made(backbone, parent, rewards=[])
    with pytest.raises(InputError, match="there is no LoRA 'nope'; choose from tscd-4"):
        adapters.named([parent], "nope")


# -------------------------------------------------------------------------------------------------- the loop


def study_of(arms: Sequence[str]) -> Study:
    return parse(definition(prompts=list(PROMPTS), seeds=[1, 2], arms=list(arms), anchor=arms[0], gold=[], ballots=120,
                            shares={"gold": 0.0, "repeat": 0.0, "uniform": 1.0}))  # fmt: skip


def people(desk: Desk, images: dict[str, float], count: int, rng: np.random.Generator) -> None:
    """So many annotators who prefer the warmer picture, the surer the more it is warmer."""
    for _ in range(count):
        annotator = annotator_of(receipt_of(new_id()))
        desk.consent(annotator)
        while not isinstance(asked := desk.next(annotator), Wait):
            left, right = (images[desk.items[side].image_sha256] for side in (asked.left, asked.right))
            choice = "left" if rng.random() < 1 / (1 + np.exp(-1000 * (left - right))) else "right"
            desk.answer(asked.id, annotator, choice, dwell_ms=2000)


@pytest.fixture(scope="module")
def voted(
    tiny_folder: Path, tiny_adapters: Sequence[AdapterFile], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Store, Study, Path]:
    """Real drawings of three arms, in a store with the votes of four people."""
    folder = tmp_path_factory.mktemp("voted")
    study, backbone = study_of(["tscd@4", "tcd@4", "lcm@4"]), Backbone.load(tiny_folder)
    table = discover(tiny_adapters, backbone.network_sha256)
    store, warm = Store(folder / "study.db", clock=Tick()), {}
    for arm in study.drawn_arms():
        name, _, steps = arm.partition("@")
        for prompt in study.prompts:
            for seed in study.seeds:
                panel = draw(backbone, Request(prompt, seed, int(steps)), table[name])
                store.add_items([Item.of(panel)])
                warm[panel.pixels_sha256] = _warmth(panel)
                Image.frombytes("RGB", (panel.width, panel.height), panel.pixels).save(
                    folder / f"{panel.pixels_sha256}.png")  # fmt: skip
    people(Desk(store, study, seed=1), warm, 4, np.random.default_rng(0))
    return store, study, folder


def turn(
    voted: tuple[Store, Study, Path], parent: AdapterFile, tiny_folder: Path, folder: Path, least: int = 100
) -> list[str]:
    store, study, images = voted
    learn = replace(reward.RECIPE, updates=100, batch=16, cooldown=50)
    settings = loop.Settings(Asked(4, weight=1.0, rank=2), least=least, reward=learn, refine=RECIPE, teacher=2)
    base = refl.Base(lambda: Backbone.load(tiny_folder), Captioned.of, SETTINGS)
    return list(loop.run(store, study, images, parent, base, settings, folder / "runs", folder / "lora"))


@pytest.mark.slow
def test_votes_make_a_lora_that_these_people_like_better(
    voted: tuple[Store, Study, Path], parent: AdapterFile, tiny_folder: Path, tmp_path: Path
) -> None:
    lines = turn(voted, parent, tiny_folder, tmp_path)
    (file,) = adapters.found(tmp_path / "lora")
    digest = file.card.recipe["votes"][:8]
    assert any("prompts that nothing had looked at" in line for line in lines)
    assert any(line.startswith("  the reward that leads† ↑: ") for line in lines)
    assert file.card.name == f"tscd-{digest}" and any(f"tscd-{digest}@4" in line for line in lines)
    fresh = Backbone.load(tiny_folder)
    table = discover([parent, file], fresh.network_sha256)
    unseen = ["happy dog", "a red red dog", "heart a cat", "dog happy a red", "cat dog cat", "heart"]
    wins = [
        _warmth(draw(fresh, Request(p, 30 + n, 4), table[file.card.name]))
        > _warmth(draw(fresh, Request(p, 30 + n, 4), table["tscd"]))
        for p in unseen
        for n in range(4)
    ]
    assert np.mean(wins) >= 0.8, "who voted for warm pictures gets warmer ones, of prompts they never saw"
    from hypersd.study.definition import load

    new = load(next((tmp_path / "runs").rglob("study.yaml")))
    assert new.arms[-1] == f"tscd-{digest}@4" and new.sha256 != voted[1].sha256


@pytest.fixture
def refined(backbone: Backbone, parent: AdapterFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AdapterFile:
    """The parent's jumps the other way round, by its own name; judged by judges that cost nothing."""
    monkeypatch.setattr(judges, "JUDGES", {"measure": Thumbnails, "reward": Thumbnails})
    turned = {name: -t if name.endswith("lora_B") else t for name, t in adapters.load(parent.path).items()}
    return adapters.save(tmp_path / "new-4.safetensors", turned, replace(parent.card, name="tscd-new"))


def told(backbone: Backbone, parent: AdapterFile, new: AdapterFile, folder: Path, prompts: int = 4) -> list[str]:
    settings = loop.Settings(Asked(4), artwork=folder / "none", teacher=2)
    return list(loop.evaluated(backbone, parent, new, [Warm(), Warm()], PROMPTS[:prompts], settings, folder))


def test_old_and_new_are_compared_on_the_same_noises(
    backbone: Backbone, parent: AdapterFile, refined: AdapterFile, tmp_path: Path
) -> None:
    lines = told(backbone, parent, refined, tmp_path)
    assert lines[0].startswith("on 4 prompts that nothing had looked at, new less old (all of it: ")
    table = discover([parent, refined], backbone.network_sha256)
    gaps = []
    for text in PROMPTS[:4]:
        seeds = [plan.seed(Prompt("held out", text, text), index) for index in range(loop.SEEDS)]
        new, old = (np.mean([_warmth(draw(backbone, Request(text, s, 4), table[name])) for s in seeds])
                    for name in ("tscd-new", "tscd"))  # fmt: skip
        gaps.append(new - old)
    for role in ("leads", "picks"):
        (line,) = [line for line in lines if line.startswith(f"  the reward that {role}† ↑: ")]
        assert float(line.split(": ")[1].split(" [")[0]) == pytest.approx(np.mean(gaps), abs=6e-4)
    assert any(line.startswith("  diversity ↑: ") for line in lines)
    (page,) = tmp_path.rglob("report.md")
    text = page.read_text(encoding="utf-8")
    assert "† the reward that leads: the new LoRA was trained to raise it." in text
    assert "| the reward that picks† | tscd-new-4 | tscd-4 |" in text
    assert told(backbone, parent, refined, tmp_path) == lines, "asked again it says the same"


def test_a_lora_that_cannot_be_evaluated_is_there_all_the_same(
    backbone: Backbone, parent: AdapterFile, refined: AdapterFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (line,) = told(backbone, parent, refined, tmp_path, prompts=1)
    assert "no two prompts are left" in line
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    (line,) = told(backbone, parent, refined, tmp_path)
    assert line.startswith("old and new LoRA were not evaluated: ") and "pip install" in line


def test_too_few_votes_are_counted(
    voted: tuple[Store, Study, Path], parent: AdapterFile, tiny_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(Problem, match=r"100000 are needed: \d+ are missing"):
        turn(voted, parent, tiny_folder, tmp_path, least=100_000)
    assert not (tmp_path / "lora").exists()


# --------------------------------------------------------------------------------- a segmenter of transformers


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny one with random weights, as transformers keeps it."""
    pytest.importorskip("scipy", reason="transformers matches instances with scipy")
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    torch.manual_seed(0)
    swin = SwinConfig(image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
                      out_features=["stage1", "stage2", "stage3", "stage4"])  # fmt: skip
    config = Mask2FormerConfig(backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32,
                               encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=1, decoder_layers=2,
                               num_attention_heads=2, num_queries=4, num_labels=3, train_num_points=64)  # fmt: skip
    folder = tmp_path_factory.mktemp("mask2former")
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    return folder


def test_an_instance_segmenter_of_transformers_gives_a_gradient(mask2former: Path) -> None:
    find = structure.load(str(mask2former), "sd15")
    assert isinstance(find, Instances) and find.asks == "instances"
    x = (torch.rand(3, 3, 32, 32) * 2 - 1).requires_grad_()
    masks = torch.stack([F.pad(torch.ones(16, 16), (8, 8, 8, 8)), F.pad(torch.ones(8, 8), (0, 24, 0, 24))]) > 0
    nothing = (masks[:0], torch.tensor([], dtype=torch.long))
    truth = [(masks, torch.tensor([0, 2])), (masks[:1], torch.tensor([1])), nothing]
    losses = find(x, truth)
    losses.sum().backward()
    assert losses.shape == (3,) and x.grad is not None and float(losses[2].detach()) == 0
    assert [bool(part.abs().sum()) for part in x.grad] == [True, True, False]
    assert torch.equal(find(x, truth), losses), "a run that is resumed finds the same"
    with pytest.raises(InputError, match="knows 3 classes and the data has one numbered 3"):
        find(x[:1], [(masks[:1], torch.tensor([3]))])


def test_a_segmenter_of_transformers_that_is_of_no_use_is_named(mask2former: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"nothing could not be fetched .* such as {structure.PUBLISHED}"):
        structure.load(str(tmp_path / "nothing"), "sd15")
    with pytest.raises(InputError, match="Linear is not taught masks and classes alone"):
        Instances(torch.nn.Linear(1, 1))
    broken = tmp_path / "broken"
    shutil.copytree(mask2former, broken)
    (broken / "model.safetensors").write_bytes((mask2former / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(InputError, match=r"broken cannot be loaded \(SafetensorError"):
        structure.load(str(broken), "sd15")


# ---------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def coco_folder(tmp_path: Path) -> Path:
    """Four pictures in COCO's layout, each with one object of one of two categories."""
    folder, colours = tmp_path / "coco", ("red", "green", "blue", "black")
    for part in ("train2017", "annotations"):
        (folder / part).mkdir(parents=True)
    images = [{"id": n, "file_name": f"{n}.png", "width": 40, "height": 40} for n in range(4)]
    corners = [(4 + n, 6, 30, 20 + n) for n in range(4)]
    for n, (left, top, right, bottom) in enumerate(corners):
        picture = Image.new("RGB", (40, 40), "white")
        picture.paste(colours[n], (left, top, right, bottom))
        picture.save(folder / f"train2017/{n}.png")
    objects = [{"image_id": n, "category_id": (7, 90)[n % 2], "iscrowd": 0, "segmentation": [[a, b, c, b, c, d, a, d]]}
               for n, (a, b, c, d) in enumerate(corners)]  # fmt: skip
    told = {"captions": [{"image_id": n, "caption": f"a {colour} cat"} for n, colour in enumerate(colours)],
            "instances": objects}  # fmt: skip
    for kind, rows in told.items():
        content = {"images": images, "annotations": rows, "categories": [{"id": 90}, {"id": 7}]}
        (folder / f"annotations/{kind}_train2017.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def command(
    tiny_folder: Path, tiny_adapters: Sequence[AdapterFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """`refine` of the tiny model in a folder of its own, with rewards that are in the repository."""
    monkeypatch.chdir(tmp_path)
    for file in tiny_adapters:
        shutil.copy(file.path, tmp_path)
    Path("own.txt").write_text("red heart\na dog\n")
    judged = [
        "--reward",
        str(ASSETS / "emoji-reward"),
        "--picker",
        str(ASSETS / "emoji-scorer-a"),
        "--prompts",
        "own.txt",
    ]
    return ["refine", "tscd-4", "--backbone", str(tiny_folder), "--out", str(tmp_path), "--batch", "2", *judged]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--structure", "nan"], "structure must be a number from 0 to 100"),
        (["--mode", "rollout", "--structure", "1"], "type --mode reuse"),
        (["--structure", "1"], "knows single icons on white"),
        (["--structure", "1", "--segmenter", "MODEL"], "the structure of these pictures is not known"),
        (["--picker", f"{ASSETS}/../assets/emoji-reward/"], "is a reward that is optimised"),
        (["--reward", "broken"], "there is no whole reward model in broken"),
        (["--picker", "cut"], r"projection.safetensors cannot be read \(SafetensorError\)"),
        (["--runs", "a-file"], "nothing can be written to a-file"),
    ],
)
def test_what_cannot_be_refined_for_is_said_before_the_model_is_loaded(
    command: list[str],
    mask2former: Path,
    given: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distill, "loader", lambda _: pytest.fail("the base was loaded"))
    Path("a-file").touch()
    for folder, name in (("broken", "head"), ("cut", "projection")):
        shutil.copytree(ASSETS / ("emoji-reward" if name == "head" else "emoji-scorer-a"), folder)
        file = Path(folder, f"{name}.safetensors")
        file.write_bytes(file.read_bytes()[:-10])
    given = [word.replace("MODEL", str(mask2former)) for word in given]
    assert main([*command, *given]) == 2
    assert re.search(sentence, capsys.readouterr().err)


def test_another_base_is_asked_for_prompts(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The embedded model's, which are of emoji, say nothing of what another model learns."""
    assert main(command[:-2]) == 2
    said = capsys.readouterr().err
    assert f"{command[3]} has no prompts of its own for the picker;" in said and "--prompts FILE" in said


def test_the_embedded_model_has_prompts_of_its_own() -> None:
    texts = _looked_at("emoji", None)
    assert len(texts) >= 12 and {text.split()[-1] for text in texts} == {*THINGS}


def test_pictures_are_needed(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    assert main([*command, "--data", str(tmp_path / "prompts.txt")]) == 2
    assert "the data holds prompts only" in capsys.readouterr().err


def test_structure_is_learned_from_coco_by_a_segmenter_of_transformers(
    command: list[str], coco_folder: Path, mask2former: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the many updates: what the segmenter loses of the pictures' objects reaches the LoRA."""
    slopes = {}

    def run(objective: Refinement, recipe: Recipe, folder: Path, path: Path, name: str) -> refl.Refined:
        learned = [p for n, p in objective.roles["student"].named_parameters() if n.endswith("lora_B")]
        for weight in (0.0, 1.0):
            objective.asked = replace(objective.asked, structure=weight)
            (_, loss) = next(objective.losses(Step(0, recipe)))
            slopes[weight] = float(loss.detach()), torch.autograd.grad(loss, learned)[0]
        return refl.Refined(objective.parent, reward.Look(1, 1.0), 0.0, None)

    monkeypatch.setattr(refl, "run", run)
    given = ["--data", str(coco_folder), "--segmenter", str(mask2former), "--structure", "1"]
    assert main([*command, *given]) == 0
    (before, slope), (after, other) = slopes.values()
    assert after > before + 0.1 and float((other - slope).abs().max()) > 0


def test_the_taste_of_the_tests_has_all_splits() -> None:
    splits = {row.split for row in liking.preferences().rows}
    assert splits == {"train", "validation", "test"}
