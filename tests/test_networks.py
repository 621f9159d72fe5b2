"""Published whole networks: kept beside the adapters, worn and taken off again, drawn as their model cards say."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_recipes import FAMILY, KINDS, PROMPT, SEED
from test_releases import taken
from torch import Tensor, nn

from hypersd import adapters, releases, whole
from hypersd.__main__ import main
from hypersd.adapters import AdapterError, AdapterFile
from hypersd.backbone import Backbone
from hypersd.generate import denoise, draw
from hypersd.methods import METHODS, Method, discover
from hypersd.records import InputError, Request
from hypersd.releases import RELEASES, Release
from hypersd.schedule import Schedule, WindowSchedule
from hypersd.wardrobe import Wardrobe

NETWORKS = [release for release in RELEASES if release.kind != "lora"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Backbone]:
    folder = tmp_path_factory.mktemp("networks")
    tiny.build(folder / "sd15", prediction="epsilon")
    tiny.build_xl(folder / "sdxl")
    return {name: Backbone.load(folder / name) for name in KINDS}


@pytest.fixture(scope="module")
def pipes(models: dict[str, Backbone]) -> dict[str, Any]:
    made = {name: kind.from_pretrained(models[name].folder, local_files_only=True) for name, kind in KINDS.items()}
    for pipe in made.values():
        pipe.set_progress_bar_config(disable=True)
    return made


def published(backbone: Backbone, path: Path, *, difference: bool = False, seed: int = 5, dtype: Any = None) -> Path:
    """A denoiser's file as its makers leave it: no card, diffusers' names."""
    generator = torch.Generator().manual_seed(seed)
    noise = {
        n: 0.05 * torch.randn(w.shape, generator=generator) for n, w in backbone.wardrobe.bare().state_dict().items()
    }
    there = backbone.unet.state_dict()
    tensors = {name: n if difference else there[name] + n for name, n in noise.items()}
    save_file({name: tensor.to(dtype or torch.float16).contiguous() for name, tensor in tensors.items()}, path)
    return path


def kept(backbone: Backbone, release: Release, file: Path, out: Path) -> AdapterFile:
    return releases.fetch(replace(release, sha256=""), backbone.network_sha256, out, taken(file))


def of(method: str, segments: int = 1, backbone: str = "sdxl") -> Release:
    return next(r for r in NETWORKS if (r.method, r.segments, r.backbone) == (method, segments, backbone))


def row(backbone: Backbone, file: AdapterFile) -> Method:
    return discover([file], backbone.network_sha256)[file.card.method]


# ------------------------------------------------------------------------------------- as the model cards have it


class PeRFlow:
    """Its makers' scheduler in double precision, in their variables: lambda, eta and a velocity, t from 1 to 0."""

    order, init_noise_sigma, config = 1, 1.0, type("Config", (dict,), {})()

    def __init__(self, config: Mapping[str, Any], prediction: str) -> None:
        betas = np.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, 1000) ** 2
        self.abar, self.prediction = np.cumprod(1 - betas), prediction

    def set_timesteps(self, steps: int, device: Any = None) -> None:
        counts = [steps // 4 + (window < steps % 4) for window in range(4)]
        times = [np.linspace(1 - w / 4, 0.75 - w / 4, num=n, endpoint=False) for w, n in enumerate(counts)]
        self.timesteps = torch.from_numpy((np.concatenate(times) * 1000).astype(int))

    def scale_model_input(self, x: Tensor, t: Any) -> Tensor:
        return x

    def step(self, eps: Tensor, t: Tensor, x: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        now = int(t) / 1000
        begin = np.ceil(now * 4) / 4
        end = begin - 0.25
        high, low = self.abar[round(begin * 1000) - 1], self.abar[max(round(end * 1000) - 1, 0)]
        if self.prediction == "ddim_eps":
            lam = np.sqrt(low / high)
            eta = np.sqrt(1 - low) - lam * np.sqrt(1 - high)
        else:
            lam = np.sqrt(low / high)
            eta = -lam * np.sqrt(1 - high / low)
        below = lam * (now - begin) + (end - now)
        arrival = (lam * (end - begin) * x + eta * (end - now) * eps) / below
        later = [int(s) / 1000 for s in self.timesteps if s < t]
        return (x + (max(later, default=0.0) - now) * (arrival - x) / (end - now),)


Card = tuple[Callable[[Any, Release], Any], dict[str, Any]]
CARDS: dict[str, Card] = {
    "hyper-unet": (lambda c, _: LCMScheduler.from_config(c), {"guidance_scale": 0, "timesteps": [800]}),
    "lightning-unet": (
        lambda c, r: EulerDiscreteScheduler.from_config(
            c, timestep_spacing="trailing", **({"prediction_type": "sample"} if r.segments == 1 else {})
        ),
        {"guidance_scale": 0},
    ),
    "turbo": (
        lambda c, _: EulerAncestralDiscreteScheduler.from_config(c, timestep_spacing="trailing"),
        {"guidance_scale": 0.0},
    ),
    "perflow": (lambda c, r: PeRFlow(c, "diff_eps" if r.backbone == "sd15" else "ddim_eps"), {}),
}
GUIDANCE = {"sd15": 7.5, "sdxl": 2.0}  # PeRFlow's


def stock(pipe: Any, base: Backbone, release: Release, file: Path, steps: int) -> Tensor:
    """The latents that the model card's own lines end with."""
    weights = {name: tensor.float() for name, tensor in load_file(file).items()}
    if release.kind == "difference":
        weights = {name: base.wardrobe.bare().state_dict()[name] + tensor for name, tensor in weights.items()}
    pipe.unet.load_state_dict(weights)
    scheduler, call = CARDS[release.method]
    side = base.picture_px // METHODS[release.method].smaller
    before = pipe.scheduler
    pipe.scheduler = scheduler({**before.config, **FAMILY}, release)
    try:
        latents = pipe(
            PROMPT, num_inference_steps=steps, generator=torch.Generator().manual_seed(SEED), output_type="latent",
            height=side, width=side, **{"guidance_scale": GUIDANCE[release.backbone], **call},
        ).images  # fmt: skip
    finally:
        pipe.scheduler = before
    assert isinstance(latents, Tensor)
    return latents


def drawings() -> Iterator[tuple[Release, int]]:
    for release in NETWORKS:
        method = METHODS[release.method]
        more = (6,) if method.windows else ()
        yield from ((release, n) for n in (*method.steps.suggested, *more) if n == release.segments or not method.exact)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' Euler with numpy 2
@pytest.mark.parametrize(("release", "steps"), list(drawings()), ids=lambda x: getattr(x, "name", x))
def test_a_network_is_drawn_as_its_card_says(
    models: dict[str, Backbone], pipes: dict[str, Any], tmp_path: Path, release: Release, steps: int
) -> None:
    base = models[release.backbone]
    dtype = torch.float32 if release.method == "hyper-unet" else torch.float16  # as published
    file = published(base, tmp_path / "theirs.safetensors", difference=release.kind == "difference", dtype=dtype)
    method = row(base, kept(base, release, file, tmp_path / "lora"))
    with torch.inference_mode():
        ours = denoise(base, Request(PROMPT, SEED, steps), method)
    expected = stock(pipes[release.backbone], base, release, file, steps)
    assert (ours.x - expected).abs().max() < 2e-3 * expected.std()
    assert ours.nfe == steps * (2 if method.windows else 1)


def test_every_published_network_has_a_card() -> None:
    assert {release.method for release in NETWORKS} == CARDS.keys()


def test_each_lightning_network_draws_its_own_number_of_steps(models: dict[str, Backbone], tmp_path: Path) -> None:
    base = models["sdxl"]
    files = [
        kept(base, of("lightning-unet", k), published(base, tmp_path / f"{k}.safetensors", seed=k), tmp_path / "lora")
        for k in (1, 4)
    ]
    method = discover(files, base.network_sha256)["lightning-unet"]
    for k, file in zip((1, 4), files, strict=True):
        assert method.adapter(k) == file
    with pytest.raises(InputError, match=r"no adapter for 8 steps here; get one with: .* fetch sdxl lightning-unet"):
        method.check(Request("a cat", steps=8))
    with pytest.raises(InputError, match="was made for 1, 2, 4, 8 steps, got 3; choose one of these"):
        method.check(Request("a cat", steps=3))


# ----------------------------------------------------------------------------------------- straight in each window


PLAIN = Schedule(torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0), 1.0)


def windows(prediction: str) -> WindowSchedule:
    return WindowSchedule.of(PLAIN, 4, prediction)


@given(n=st.integers(4, 400))
def test_the_grid_is_that_of_its_makers(n: int) -> None:
    theirs = PeRFlow({"beta_start": 0.1, "beta_end": 0.1}, "")
    theirs.set_timesteps(n)
    ours = windows("").timesteps(n)
    assert len(ours) == n and sorted(set(ours), reverse=True) == ours
    assert max(abs(a - b) for a, b in zip(ours, theirs.timesteps.tolist(), strict=True)) <= 1  # their rounding down
    assert {1000, 750, 500, 250} <= set(ours)


@given(t=st.integers(1, 1000), share=st.floats(0, 1), prediction=st.sampled_from(["ddim_eps", "diff_eps"]))
def test_a_step_stays_on_the_line_between_the_windows_ends(t: int, share: float, prediction: str) -> None:
    """Where the network is right, x_t is between both ends, and each step inside the window is exact."""
    schedule = windows(prediction)
    start, end = schedule.window(t)
    assert end < t <= start
    clean, eps = torch.randn(2, 1, 4, 2, 2, generator=torch.Generator().manual_seed(t))
    (high_a, high_s), (low_a, low_s) = (schedule.level(edge) for edge in (start, end))
    last = low_a * clean + low_s * torch.flip(eps, [0]) if prediction == "diff_eps" else low_a * clean + low_s * eps
    kept = high_a / low_a
    first = kept * last + (1 - kept**2).sqrt() * eps if prediction == "diff_eps" else high_a * clean + high_s * eps
    there = lambda time: torch.lerp(first, last, (start - time) / 250)  # noqa: E731
    found, _ = schedule.split(eps, there(t), t)
    torch.testing.assert_close(found, last, rtol=1e-3, atol=1e-3)
    s = round(end + share * (t - end))
    stepped = METHODS["perflow"].step(schedule, there(t), found, eps, t, s, 0.0, lambda: eps)
    torch.testing.assert_close(stepped, there(s), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (lambda: windows("").timesteps(3), "steps must be a whole number from 4"),
        (lambda: windows("epsilon"), "must be one of ddim_eps, diff_eps"),
        (lambda: WindowSchedule.of(PLAIN, 3), "3 windows need a noise schedule of timesteps that they divide"),
    ],
)
def test_windows_that_cannot_be_are_explained(bad: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        bad()


@given(t=st.integers(1, 1000))
def test_what_is_shown_of_a_step_is_clean(t: int) -> None:
    schedule = windows("ddim_eps")
    start, end = schedule.window(t)
    clean, eps = torch.randn(2, 1, 4, 2, 2, generator=torch.Generator().manual_seed(t))
    first, last = (schedule.level(edge).alpha * clean + schedule.level(edge).sigma * eps for edge in (start, end))
    found, noise = schedule.split(eps, torch.lerp(first, last, (start - t) / 250), t)
    torch.testing.assert_close(schedule.clean(found, noise, t), clean, rtol=1e-3, atol=5e-3)


# ------------------------------------------------------------------------------------------------ kept and refused


def test_what_is_kept_is_what_was_published(models: dict[str, Backbone], tmp_path: Path) -> None:
    theirs = published(models["sdxl"], tmp_path / "theirs.safetensors", dtype=torch.float32)
    file = kept(models["sdxl"], of("hyper-unet"), theirs, tmp_path / "lora")
    assert (file.card.kind, file.card.start, file.card.rank) == ("network", 800, 0)
    assert file == adapters.inspect(file.path)
    found = load_file(file.path)
    assert all(torch.equal(found[name], tensor.half()) for name, tensor in load_file(theirs).items())
    with pytest.raises(AdapterError, match="is a whole network and not a LoRA"):
        adapters.load(file.path)


def test_a_card_of_an_unknown_kind_is_refused(models: dict[str, Backbone], tmp_path: Path) -> None:
    theirs = published(models["sdxl"], tmp_path / "theirs.safetensors")
    with pytest.raises(AdapterError, match="kind must be one of lora, network, difference, got 'half'"):
        whole.keep(theirs, tmp_path / "x.safetensors", replace(of("turbo").card("b", 0), kind="half"))
    assert not list(tmp_path.glob("*x.safetensors*"))


def spoilt(source: Path, path: Path, how: str) -> Path:
    tensors = load_file(source)
    if how == "cut short":
        path.write_bytes(source.read_bytes()[:-100])
    elif how == "a pickle":
        torch.save(tensors, path)
    elif how == "a LoRA":
        save_file({"unet.mid_block.lora_A.weight": torch.ones(2, 2)}, path)
    else:
        tensors["conv_in.bias"][0] = torch.nan
        save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    ("how", "sentence"),
    [("cut short", "truncated or damaged"), ("a pickle", "pickles are never read"),
     ("a LoRA", "is not a UNet in diffusers' names"), ("not finite", "conv_in.bias is not finite")],
)  # fmt: skip
def test_what_is_no_network_leaves_nothing(
    models: dict[str, Backbone], tmp_path: Path, how: str, sentence: str
) -> None:
    bad = spoilt(published(models["sdxl"], tmp_path / "good.safetensors"), tmp_path / "bad.safetensors", how)
    with pytest.raises(AdapterError, match=sentence):
        kept(models["sdxl"], of("turbo"), bad, tmp_path / "lora")
    assert not list((tmp_path / "lora").glob("*"))


@pytest.mark.parametrize("without", [[], ["mid_block.resnets.0.conv1.weight"]], ids=["another base's", "one missing"])
def test_a_network_that_does_not_fit_changes_nothing(
    models: dict[str, Backbone], tmp_path: Path, without: list[str]
) -> None:
    base, other = models["sdxl"], models["sdxl" if without else "sd15"]
    theirs = published(other, tmp_path / "theirs.safetensors")
    save_file({name: t for name, t in load_file(theirs).items() if name not in without}, theirs)
    method = row(base, kept(base, of("turbo"), theirs, tmp_path / "lora"))
    before = {name: weight.clone() for name, weight in base.unet.state_dict().items()}
    with pytest.raises(AdapterError, match=r"does not fit this base: .* differ; choose the base"):
        draw(base, Request("a cat", steps=1), method)
    assert all(torch.equal(weight, before[name]) for name, weight in base.wardrobe.bare().state_dict().items())


@pytest.mark.parametrize(
    ("backbone", "method", "licence"),
    [("sdxl", "turbo", "Stability AI"), ("sdxl", "perflow", "CC BY-NC 4.0"), ("sd15", "perflow", "CC BY-NC 4.0")],
)
def test_what_is_not_for_commerce_waits_for_a_word(
    backbone: str, method: str, licence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fetch", backbone, method, "--out", "nowhere"]) == 2
    said = capsys.readouterr().err
    assert licence in said and "say --accept-licence" in said


# ----------------------------------------------------------------------------------------------------------- worn


@pytest.mark.parametrize("difference", [False, True])
def test_pictures_do_not_depend_on_the_room(models: dict[str, Backbone], tmp_path: Path, difference: bool) -> None:
    """Networks, a LoRA and the base in turn, on a machine without room for a copy, and on one with room for all."""
    roomy, tight = (Backbone.load(models["sd15"].folder) for _ in range(2))
    tight.wardrobe.free = lambda _: 0
    kind, files = "difference" if difference else "network", []
    for seed, name in enumerate(("turbo", "hyper-unet")):
        theirs = published(roomy, tmp_path / name, difference=difference, seed=seed)
        files.append(kept(roomy, replace(of(name), kind=kind), theirs, tmp_path / "lora"))
    files += tiny.adapters(roomy.folder, tmp_path / "loras", only=("lcm",))
    table = discover(files, roomy.network_sha256)
    before = {name: weight.clone() for name, weight in tight.unet.state_dict().items()}
    for name in ("hyper-unet", "turbo", "lcm", "turbo", "base", "hyper-unet"):
        request = Request("a cat", seed=3, steps=1)
        assert draw(tight, request, table[name]).pixels == draw(roomy, request, table[name]).pixels
    assert (tight.wardrobe.copies, roomy.wardrobe.copies) == (0, 3)
    assert all(torch.equal(weight, before[name]) for name, weight in tight.wardrobe.bare().state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_base_comes_back_from_disk_to_the_bit(
    models: dict[str, Backbone], tmp_path: Path, dtype: torch.dtype
) -> None:
    base = Backbone.load(models["sdxl"].folder, dtype=dtype)
    base.wardrobe.free, reads = (lambda _: 0), [0]
    stored = base.wardrobe.stored
    assert stored

    def counted() -> Iterator[tuple[str, Tensor]]:
        reads[0] += 1
        yield from stored()

    base.wardrobe.stored = counted
    before = {name: weight.clone() for name, weight in base.unet.state_dict().items()}
    outfit = whole.Whole(published(models["sdxl"], tmp_path / "x.safetensors"))
    worn = base.wardrobe.wear("x", lambda: outfit)
    assert worn is base.unet and reads == [0]
    assert not torch.equal(worn.state_dict()["conv_in.weight"], before["conv_in.weight"])
    assert all(torch.equal(weight, before[name]) for name, weight in base.wardrobe.bare().state_dict().items())
    assert reads == [1]


def test_what_a_network_was_kept_from_is_its_hash(models: dict[str, Backbone], tmp_path: Path) -> None:
    """And nothing but its header is read to see what there is: it is gigabytes."""
    theirs = published(models["sdxl"], tmp_path / "theirs.safetensors")
    file = kept(models["sdxl"], of("turbo"), theirs, tmp_path / "lora")
    assert file.sha256 == hashlib.sha256(theirs.read_bytes()).hexdigest()
    content = bytearray(file.path.read_bytes())
    content[-1] ^= 1
    file.path.write_bytes(content)
    assert adapters.inspect(file.path) == file
    with pytest.raises(AdapterError, match="does not say what it was kept from; fetch it again"):
        whole.keep(theirs, tmp_path / "x.safetensors", of("turbo").card("b", 0))


def test_with_room_a_switch_reads_nothing_twice(
    models: dict[str, Backbone], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, asked = Backbone.load(models["sdxl"].folder), []
    files = [
        kept(base, of(name), published(base, tmp_path / f"{name}.safetensors"), tmp_path / "lora")
        for name in ("turbo", "hyper-unet")
    ]
    table = discover(files, base.network_sha256)
    read = whole.Whole.weights

    def counted(self: whole.Whole, bare: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        asked.append(self.path.stem)
        return read(self, bare)

    monkeypatch.setattr(whole.Whole, "weights", counted)
    for name in ("turbo", "hyper-unet", "base", "turbo", "hyper-unet"):
        draw(base, Request("a cat", steps=1), table[name])
    assert asked == ["turbo", "hyper-unet"]


class Torn:
    """A network whose file ends halfway."""

    def fit(self, network: nn.Module) -> dict[str, nn.Parameter]:
        return dict(network.named_parameters())

    def weights(self, bare: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        yield "weight", torch.zeros(2, 2)
        raise AdapterError("the disk is gone")


def test_what_breaks_halfway_is_taken_off_again() -> None:
    """And where the base cannot be read at once either, at the next question."""
    network, gone = nn.Linear(2, 2), [True]
    own = {name: weight.clone() for name, weight in network.state_dict().items()}

    def stored() -> Iterator[tuple[str, Tensor]]:
        yield "bias", own["bias"]
        if gone[0]:
            raise AdapterError("the disk is gone")
        yield "weight", own["weight"]

    wardrobe = Wardrobe(network, reserve=0, free=lambda _: 0, stored=stored)
    for question in (lambda: wardrobe.wear("torn", Torn), wardrobe.bare):
        with pytest.raises(AdapterError, match="the disk is gone"):
            question()
    gone[0] = False
    assert all(torch.equal(weight, own[name]) for name, weight in wardrobe.bare().state_dict().items())
