"""What only a GPU can show; skipped without one. `python -m pytest -m gpu` runs these alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import test_feedback
import test_scores
import tiny
import torch

from hypersd import bench, scores
from hypersd.adapters import AdapterFile
from hypersd.backbone import Backbone, load_best
from hypersd.distill import Distillation, Settings
from hypersd.generate import draw
from hypersd.methods import discover, find
from hypersd.pictures import to_image
from hypersd.plan import MadeUp
from hypersd.records import Request
from hypersd.train import Recipe, Run
from hypersd.wardrobe import free_bytes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")]
EMOJI = Path(__file__).parent.parent / "assets" / "emoji-sd"


def test_it_is_chosen_by_itself() -> None:
    backbone = load_best("emoji")
    assert (backbone.device.type, backbone.dtype) == ("cuda", torch.float16)


def test_noise_and_pictures_are_those_of_the_cpu() -> None:
    """Half precision on one, float32 on the other: the same picture to the eye."""
    from hypersd.methods import METHODS

    here, there = Backbone.load(EMOJI), Backbone.load(EMOJI, device="cuda", dtype=torch.float16)
    assert here.noise(7)[1] == there.noise(7)[1]
    request = Request("a happy cat", seed=7, steps=8)
    one, other = (np.asarray(to_image(draw(b, request, METHODS["base"]))).astype(float) for b in (here, there))
    assert np.abs(one - other).mean() < 4


def test_adapters_are_worn_in_any_order(tiny_folder: Path, tiny_adapters: Sequence[AdapterFile]) -> None:
    roomy = Backbone.load(tiny_folder, device="cuda")
    tight = Backbone.load(tiny_folder, device="cuda")
    tight.wardrobe.free = lambda _: 0
    table = discover(tiny_adapters, roomy.network_sha256)
    for name in ("hyper", "base", "lcm", "hyper"):
        request = Request("a cat", seed=3, steps=4)
        assert draw(tight, request, table[name]).pixels == draw(roomy, request, table[name]).pixels
    assert 0 < free_bytes(torch.device("cuda")) <= torch.cuda.get_device_properties(0).total_memory


def test_what_rests_in_main_memory_draws_the_same(tiny_folder: Path) -> None:
    from hypersd.methods import METHODS

    request = Request("a cat", seed=3, steps=2)
    there = Backbone.load(tiny_folder, device="cuda")
    resting = Backbone.load(tiny_folder, device="cuda", offload=True)
    assert (resting.text_encoder.device.type, resting.unet.device.type) == ("cpu", "cuda")
    assert draw(resting, request, METHODS["base"]).pixels == draw(there, request, METHODS["base"]).pixels
    assert resting.vae.device.type == "cpu"


@pytest.mark.parametrize("name", ["tscd", "hyper"])
def test_an_update_of_training(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    backbone, method = Backbone.load(tiny_folder, device="cuda"), find(name)
    objective = Distillation(backbone, MadeUp.of(backbone, 2), method, method.stages[-1], Settings(2, (4.0, 4.0)))
    entry = Run(objective, Recipe(updates=1, batch=2, lr=1e-3), tmp_path).update()
    assert all(np.isfinite(value) for value in entry.values())


def test_rewards_and_segmenters_come_to_where_the_pictures_are(tmp_path: Path) -> None:
    find = test_feedback.outline(tmp_path)
    score = scores.Cosine("clip", test_scores.clip(), tiny.tokenizer())
    x, masks = test_scores.pictures(), torch.ones(2, 32, 32)
    here = find(x, masks), score(x, test_scores.PROMPTS)
    there = find(x.cuda(), masks), score(x.cuda(), test_scores.PROMPTS)
    for one, other in zip(here, there, strict=True):
        assert other.device.type == "cuda"
        torch.testing.assert_close(one, other.cpu(), rtol=1e-3, atol=1e-3)


def test_the_bench_adds_its_rows(tiny_folder: Path) -> None:
    content = bench.run(str(tiny_folder), 3, start_up=False)
    assert {"batch", "float32", "offload", "stock-4"} <= content["ratios"].keys()
    assert min(content["gpu_memory_gb"].values()) > 0
    resting = bench.run(str(tiny_folder), 3, start_up=False, offload=True)
    assert resting["offload"] and {"batch", "float32"} <= resting["ratios"].keys()
    assert not {"offload", "stock-4"} & resting["ratios"].keys()


def test_the_bench_names_the_gpu() -> None:
    assert torch.cuda.get_device_name() in str(bench.machine())
