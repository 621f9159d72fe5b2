"""A Request becomes the Panel that stock diffusers would draw, counted and repeatable."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from hypersd import __version__
from hypersd.adapters import AdapterFile
from hypersd.backbone import Backbone
from hypersd.folders import ModelError
from hypersd.generate import StepInfo, denoise, draw
from hypersd.methods import METHODS, discover
from hypersd.pictures import to_image
from hypersd.records import InputError, Request

BASE = METHODS["base"]
CAT = Request("a happy cat", seed=3, steps=4)


@pytest.fixture(scope="module", params=["v_prediction", "epsilon", "sample"])
def both(
    request: pytest.FixtureRequest, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Backbone, StableDiffusionPipeline]:
    """Our backbone and the stock pipeline on the same weights, for a prediction type."""
    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("both") / request.param)
    config = folder / "scheduler/scheduler_config.json"
    changed = {"prediction_type": request.param, "set_alpha_to_one": request.param == "sample"}
    config.write_text(json.dumps({**json.loads(config.read_text()), **changed}))
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    pipeline.set_progress_bar_config(disable=True)
    return Backbone.load(folder), pipeline


def stock(pipeline: StableDiffusionPipeline, request: Request) -> tuple[np.ndarray, Tensor]:
    """Pixels and final latents of diffusers' own pipeline."""
    last: list[Tensor] = []

    def keep(_pipeline: object, _index: int, _t: object, given: dict[str, Tensor]) -> dict[str, Tensor]:
        last[:] = [given["latents"]]
        return {}

    drawn = pipeline(
        request.prompt,
        negative_prompt=request.negative_prompt,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        eta=request.eta or 0.0,
        generator=torch.Generator().manual_seed(request.seed),
        callback_on_step_end=keep,
    )
    return np.asarray(drawn.images[0]), last[0]


@pytest.mark.parametrize("steps", [1, 2, 4, 25])
@pytest.mark.parametrize(
    ("guidance", "negative", "eta"), [(1.0, "", None), (4.0, "", None), (4.0, "a red dog", None), (4.0, "", 0.7)]
)
def test_equals_the_stock_pipeline(
    both: tuple[Backbone, StableDiffusionPipeline], steps: int, guidance: float, negative: str, eta: float | None
) -> None:
    backbone, pipeline = both
    request = Request("a happy cat with a red heart", 5, steps, guidance, eta, negative_prompt=negative)
    their_pixels, their_latents = stock(pipeline, request)
    with torch.inference_mode():
        our_latents = denoise(backbone, request, BASE).x
    torch.testing.assert_close(our_latents, their_latents, rtol=1e-5, atol=1e-5)
    our_pixels = np.asarray(to_image(draw(backbone, request, BASE)))
    assert np.abs(our_pixels.astype(int) - their_pixels.astype(int)).max() <= 1
    assert (our_pixels != their_pixels).mean() < 0.01  # a rare half that rounds the other way, not another rounding
    assert our_pixels.std() > 1  # a flat picture would agree with anything


def test_the_panel_says_how_it_was_made(tiny_backbone: Backbone) -> None:
    panel = draw(tiny_backbone, CAT, BASE)
    assert (panel.width, panel.height) == (tiny.SIZE_PX, tiny.SIZE_PX)
    assert (panel.prompt, panel.seed, panel.steps) == (CAT.prompt, CAT.seed, CAT.steps)
    assert (panel.method, panel.sampler, panel.guidance, panel.eta) == ("base", "DDIM", 4.0, 0.0)
    assert (panel.backbone, panel.base_sha256, panel.dtype) == ("tiny", tiny_backbone.sha256, "float32")
    assert panel.noise_sha256 == tiny_backbone.noise(CAT.seed)[1]
    assert panel.version == __version__
    assert 0 < panel.seconds < 60


@pytest.mark.parametrize("guidance", [0.0, 1.0, 1.5, None])
@pytest.mark.parametrize("steps", [1, 3])
def test_nfe_is_what_the_network_saw(tiny_backbone: Backbone, guidance: float | None, steps: int) -> None:
    seen: list[int] = []
    hook = tiny_backbone.unet.register_forward_hook(lambda _network, given, _out: seen.append(len(given[0])))
    try:
        panel = draw(tiny_backbone, Request("a cat", steps=steps, guidance=guidance), BASE)
    finally:
        hook.remove()
    assert len(seen) == steps  # guidance is one batched call a step
    assert panel.nfe == sum(seen) == steps * (2 if panel.guidance > 1 else 1)


def test_the_same_request_gives_the_same_pixels(tiny_backbone: Backbone, tiny_folder: Path) -> None:
    request = Request("a happy dog", seed=7, steps=3, eta=1.0)
    first = draw(tiny_backbone, request, BASE)
    draw(tiny_backbone, CAT, BASE)
    torch.manual_seed(0)  # nothing depends on the global generator
    assert draw(tiny_backbone, request, BASE).pixels == first.pixels
    assert draw(Backbone.load(tiny_folder), request, BASE).pixels == first.pixels


@pytest.mark.parametrize(
    "other",
    [
        Request("a dog", seed=3, steps=4),
        Request("a happy cat", seed=4, steps=4),
        Request("a happy cat", seed=3, steps=5),
        Request("a happy cat", seed=3, steps=4, guidance=8),
        Request("a happy cat", seed=3, steps=4, eta=1),
        Request("a happy cat", seed=3, steps=4, negative_prompt="red"),
    ],
)
def test_every_field_reaches_the_picture(tiny_backbone: Backbone, other: Request) -> None:
    assert draw(tiny_backbone, other, BASE).pixels != draw(tiny_backbone, CAT, BASE).pixels


def test_steps_are_reported_as_they_are_taken(tiny_backbone: Backbone) -> None:
    steps: list[StepInfo] = []
    panel = draw(tiny_backbone, CAT, BASE, on_step=steps.append)
    assert [(step.index, step.total) for step in steps] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert [step.timestep for step in steps] == [999, 749, 499, 249]
    preview = steps[-1].pixels()
    assert preview.shape == (1, tiny.SIZE_PX, tiny.SIZE_PX, 3)
    assert panel.pixels == draw(tiny_backbone, CAT, BASE).pixels  # looking changes nothing


def test_stopping_ends_the_drawing_within_one_network_call(tiny_backbone: Backbone) -> None:
    class Stopped(Exception):
        pass

    calls: list[int] = []

    def stop(step: StepInfo) -> None:
        if step.index == 1:
            raise Stopped

    hook = tiny_backbone.unet.register_forward_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(Stopped):
            draw(tiny_backbone, CAT, BASE, on_step=stop)
    finally:
        hook.remove()
    assert len(calls) == 2


def test_denoise_can_be_differentiated(tiny_backbone: Backbone) -> None:
    weight = tiny_backbone.unet.conv_out.weight
    weight.requires_grad_(True)
    try:
        denoise(tiny_backbone, Request("a cat", steps=1), BASE).x.sum().backward()
        assert weight.grad is not None
        assert weight.grad.abs().sum() > 0
    finally:
        weight.requires_grad_(False)
        weight.grad = None


def test_a_wrong_number_of_steps_is_refused_before_any_work(tiny_backbone: Backbone) -> None:
    with pytest.raises(InputError, match="base was made for 1-100 steps, got 101; choose 1-100"):
        draw(tiny_backbone, Request("a cat", steps=101), BASE)


def test_damaged_weights_are_an_error_and_not_a_black_picture(tiny_folder: Path) -> None:
    backbone = Backbone.load(tiny_folder)
    backbone.unet.conv_out.bias[0] = float("nan")
    with pytest.raises(ModelError, match="numbers that are not finite"):
        draw(backbone, CAT, BASE)


@pytest.fixture
def crowded(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], Backbone]:
    """A model whose network finds the GPU full at the calls with these numbers."""

    def model(full: set[int]) -> Backbone:
        backbone, calls, network = Backbone.load(tiny_folder), itertools.count(), UNet2DConditionModel.forward

        def forward(self: UNet2DConditionModel, *inputs: Tensor, **more: object) -> object:
            if next(calls) in full:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return network(self, *inputs, **more)

        monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
        return backbone

    return model


def test_a_full_gpu_is_tried_again_with_less_memory(
    crowded: Callable[[set[int]], Backbone], tiny_backbone: Backbone
) -> None:
    backbone, steps, sizes = crowded({2}), [], []
    backbone.vae.decoder.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape[2:])))
    panel = draw(backbone, CAT, BASE, on_step=lambda step: steps.append((step.index, step.x0)))
    assert [index for index, _ in steps] == [0, 1, 2, 3], "each step is told once"
    assert (panel.dtype, panel.width, panel.height) == ("float32, tiles", 32, 32)
    assert len(sizes) > 1 and max(sizes) == (2, 2), "a picture of 4 x 4 latents is decoded in parts"
    kept: list[Tensor] = []
    draw(tiny_backbone, CAT, BASE, on_step=lambda step: kept.append(step.x0))
    assert all(torch.equal(x0, other) for (_, x0), other in zip(steps, kept, strict=True))
    assert draw(backbone, CAT, BASE).pixels == panel.pixels, "and the next ones are drawn so from the start"


def test_a_gpu_that_stays_full_is_told_of(crowded: Callable[[set[int]], Backbone]) -> None:
    with pytest.raises(InputError, match="the GPU has too little memory for tiny; end other programs on it"):
        draw(crowded(set(range(9))), CAT, BASE)


def test_the_picture_of_a_step_finds_less_memory_too(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is decoded when all steps are done, with whatever room there is by then."""
    backbone, steps = Backbone.load(tiny_folder), list[StepInfo]()
    draw(backbone, CAT, BASE, on_step=steps.append)
    decode, calls = backbone.vae.decode, iter([True])

    def crowded(*inputs: object, **more: object) -> object:
        if next(calls, False):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return decode(*inputs, **more)

    monkeypatch.setattr(backbone.vae, "decode", crowded)
    assert steps[0].pixels().shape == (1, 32, 32, 3)
    assert backbone.spares_memory


def test_a_model_that_does_not_fit_says_so(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    with pytest.raises(InputError, match="too little memory for tiny; end other programs on it, choose a smaller"):
        Backbone.load(tiny_folder, device="cuda")


def test_sparing_memory_forgets_merged_networks(tiny_folder: Path, tiny_adapters: Sequence[AdapterFile]) -> None:
    backbone = Backbone.load(tiny_folder)
    lcm = discover(tiny_adapters, backbone.network_sha256)["lcm"]
    draw(backbone, CAT, lcm)
    assert backbone.wardrobe.copies == 1
    backbone.spare_memory()
    assert backbone.wardrobe.copies == 0
    tile = backbone.vae.tile_latent_min_size
    backbone.spare_memory()
    assert backbone.vae.tile_latent_min_size == tile, "asked twice, tiles are not halved twice"
