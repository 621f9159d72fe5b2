"""Negative prompts where there is no guidance: the formula, its limits, and a network that is left as it was."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hypersd.__main__ import main
from hypersd.adapters import AdapterFile
from hypersd.backbone import Backbone
from hypersd.generate import denoise, draw
from hypersd.methods import METHODS, Method, discover
from hypersd.nag import ALPHA, TAU, Away, away_from, carried_away
from hypersd.pictures import from_image, read_png, save_png, to_image
from hypersd.records import InputError, Item, Panel, Request

CAT = Request("a happy cat", seed=3, steps=4)
AWAY = Request("a happy cat", seed=3, steps=4, negative_prompt="red dog", nag=4)


@pytest.fixture
def hyper(tiny_backbone: Backbone, tiny_adapters: Sequence[AdapterFile]) -> Method:
    return discover(tiny_adapters, tiny_backbone.network_sha256)["hyper"]


def tokens(seed: int, spread: float = 1.0) -> Tensor:
    return spread * torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("scale", [1.0, 1.5, 4.0, 20.0])
def test_the_formula_is_that_of_the_paper(scale: float) -> None:
    """Equations 7 to 10, number by number."""
    z, other = tokens(0), tokens(1)
    expected = torch.empty_like(z)
    for n in range(2):
        for token in range(5):
            mine, theirs = z[n, token].tolist(), other[n, token].tolist()
            far = [a + (scale - 1) * (a - b) for a, b in zip(mine, theirs, strict=True)]
            ratio = sum(map(abs, far)) / sum(map(abs, mine))
            near = [min(ratio, TAU) / ratio * x for x in far]
            expected[n, token] = torch.tensor(
                [ALPHA * x + (1 - ALPHA) * a for x, a in zip(near, mine, strict=True)]
            )  # fmt: skip
    torch.testing.assert_close(carried_away(z, other, scale), expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20), spread=st.floats(0, 1e4), scale=st.floats(1, 20), tau=st.floats(0.5, 5),
    alpha=st.floats(0, 1),
)  # fmt: skip
def test_no_token_grows_beyond_the_limit(seed: int, spread: float, scale: float, tau: float, alpha: float) -> None:
    z, other = tokens(seed), tokens(seed + 1, spread)
    length, found = (x.abs().sum(-1) for x in (z, carried_away(z, other, scale, tau, alpha)))
    assert (found <= (alpha * tau + 1 - alpha) * length * 1.0001).all()
    whole = carried_away(z, other, scale, tau, 1.0)
    assert (whole.abs().sum(-1) <= tau * length * 1.0001).all()


def test_nothing_is_nothing_and_stays_finite() -> None:
    nothing = torch.zeros(1, 3, 8)
    assert torch.equal(carried_away(nothing, nothing, 5.0), nothing)
    assert torch.equal(carried_away(nothing, tokens(0)[:1, :3], 5.0), nothing), "no longer than tau times nothing"


def test_half_precision_does_not_overflow() -> None:
    z, other = (100 * torch.randn(1, 4, 1280, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    half = carried_away(z.half(), other.half(), 8.0)
    assert half.dtype == torch.float16 and half.isfinite().all()
    torch.testing.assert_close(half.float(), carried_away(z, other, 8.0), rtol=5e-3, atol=0.5)


# --------------------------------------------------------------------------------------------------- the network


def test_a_scale_of_1_and_the_prompt_itself_change_nothing(tiny_backbone: Backbone, hyper: Method) -> None:
    with torch.inference_mode():
        plain = denoise(tiny_backbone, CAT, hyper).x
        x_t, states = tiny_backbone.noise(1)[0], tiny_backbone.embed(["a cat"])
        usual = tiny_backbone.predict(x_t, 500, states)
        for other, scale in (("red dog", 1.0), ("a cat", 7.0)):  # the processor at work, and not left out
            with away_from(tiny_backbone.unet, tiny_backbone.embed([other]), scale):
                torch.testing.assert_close(tiny_backbone.predict(x_t, 500, states), usual, rtol=0, atol=1e-5)
        same = Request(CAT.prompt, 3, 4, negative_prompt=CAT.prompt, nag=7)
        torch.testing.assert_close(denoise(tiny_backbone, same, hyper).x, plain, rtol=1e-5, atol=1e-5)
    one = draw(tiny_backbone, Request("a happy cat", 3, 4, negative_prompt="red dog", nag=1), hyper)
    assert one.pixels == draw(tiny_backbone, CAT, hyper).pixels and one.nag is None


def test_only_the_attention_to_the_text_changes_and_everything_is_put_back(tiny_backbone: Backbone) -> None:
    network = tiny_backbone.unet
    before = network.attn_processors
    with away_from(network, tiny_backbone.embed(["a dog"]), 3.0):
        worn = [name for name, one in network.attn_processors.items() if isinstance(one, Away)]
    assert worn and worn == [name for name in before if ".attn2." in name]
    with pytest.raises(RuntimeError), away_from(network, torch.zeros(1, 12, 5), 3.0):  # states of another width
        tiny_backbone.predict(tiny_backbone.noise(1)[0], 500, tiny_backbone.embed(["a cat"]))
    assert {name: id(one) for name, one in network.attn_processors.items()} == {n: id(p) for n, p in before.items()}


def test_each_text_of_a_batch_is_led_away(tiny_backbone: Backbone) -> None:
    x_t = torch.cat([tiny_backbone.noise(n)[0] for n in (1, 2)])
    states = tiny_backbone.embed(["a cat", "a happy dog"])
    with torch.inference_mode(), away_from(tiny_backbone.unet, tiny_backbone.embed(["red heart"]), 4.0):
        together = tiny_backbone.predict(x_t, 500, states)
        alone = [tiny_backbone.predict(x_t[[n]], 500, states[[n]]) for n in (0, 1)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- the drawing


def test_a_step_is_one_call_with_one_latent(tiny_backbone: Backbone, hyper: Method) -> None:
    """It is counted as that: the second cross-attention is no pass of the network."""
    seen: list[int] = []
    file = hyper.adapter(4)
    assert file is not None
    worn: Any = tiny_backbone._worn(file)
    hook = worn.register_forward_hook(lambda _network, given, _out: seen.append(len(given[0])))
    try:
        panel = draw(tiny_backbone, AWAY, hyper)
    finally:
        hook.remove()
    assert seen == [1] * 4 and panel.nfe == 4
    plain = draw(tiny_backbone, CAT, hyper)
    assert panel.pixels != plain.pixels and panel.nag == 4.0
    assert draw(tiny_backbone, AWAY, hyper).pixels == panel.pixels
    assert draw(tiny_backbone, CAT, hyper).pixels == plain.pixels, "the merged network is left as it was"


def test_every_field_reaches_the_picture(tiny_backbone: Backbone, hyper: Method) -> None:
    others = [Request("a happy cat", 3, 4, negative_prompt=text, nag=n) for text, n in (("heart", 4), ("red dog", 6))]
    pixels = [draw(tiny_backbone, request, hyper).pixels for request in (AWAY, *others)]
    assert len(set(pixels)) == 3


def test_where_guidance_leads_away_nag_has_no_part(tiny_backbone: Backbone) -> None:
    def drawn(guidance: float, nag: float | None) -> Panel:
        return draw(tiny_backbone, Request("a cat", 1, 2, guidance, negative_prompt="red", nag=nag), METHODS["base"])

    guided, unguided = drawn(3.0, 5.0), drawn(1.0, 5.0)
    assert guided.pixels == drawn(3.0, None).pixels and guided.nag is None
    assert unguided.nag == 5.0 and unguided.nfe == 2


def test_in_half_precision_it_is_finite(tiny_folder: Path) -> None:
    half = Backbone.load(tiny_folder, dtype=torch.float16)
    with torch.inference_mode():
        found = denoise(half, Request("a cat", 1, 2, 1.0, negative_prompt="red", nag=8), METHODS["base"])
    assert found.x.isfinite().all() and found.nfe == 2


def test_with_openvino_torch_computes_the_network_and_says_so(tiny_folder: Path) -> None:
    pytest.importorskip("openvino")
    compiled, plain = Backbone.load(tiny_folder, engine="openvino"), Backbone.load(tiny_folder)
    request = Request("a cat", 1, 2, 1.0, negative_prompt="red", nag=5)
    with torch.inference_mode():
        found, expected = (denoise(b, request, METHODS["base"]).x for b in (compiled, plain))
    assert torch.equal(found, expected)
    assert draw(compiled, request, METHODS["base"]).dtype == "float32, openvino decoder"
    assert draw(compiled, Request("a cat", 1, 2, 1.0), METHODS["base"]).dtype == "float32, openvino"


# ------------------------------------------------------------------------------------------------- what is told


def test_the_picture_file_says_it_and_older_ones_are_read(tiny_backbone: Backbone, hyper: Method) -> None:
    panel, file = draw(tiny_backbone, AWAY, hyper), io.BytesIO()
    save_png(panel, file)
    assert read_png(file) == panel and panel.provenance()["nag"] == 4.0
    older = panel.provenance()
    del older["nag"]
    assert from_image(to_image(panel), older).nag is None


def test_pictures_without_it_keep_their_name_in_a_study(tiny_backbone: Backbone, hyper: Method) -> None:
    def configured(panel: Panel) -> str:
        kept = ("sampler", "steps", "eta", "negative_prompt", "version")
        plain = {name: getattr(panel, name) for name in kept}
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()

    without, away = draw(tiny_backbone, CAT, hyper), draw(tiny_backbone, AWAY, hyper)
    assert Item.of(without).config_sha256 == configured(without)
    assert Item.of(away).config_sha256 != configured(away)


@pytest.mark.parametrize("scale", [0.5, 21, "much", float("nan")])
def test_a_scale_out_of_its_range_is_refused(scale: Any) -> None:
    with pytest.raises(InputError, match="nag must be a number from 1 to 20"):
        Request("a cat", nag=scale)


def test_the_command_line_takes_it(tiny_folder: Path, tmp_path: Path) -> None:
    given = f"draw --backbone {tiny_folder} --steps 2 --guidance 1 --negative red --nag 5 --out {tmp_path}/a.png"
    assert main([*given.split(), "--prompt", "a happy cat"]) == 0
    panel = read_png(tmp_path / "a.png")
    assert (panel.negative_prompt, panel.nag, panel.nfe) == ("red", 5.0, 2)
