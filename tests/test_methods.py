"""The contract that every row of METHODS keeps."""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from hypersd import methods
from hypersd.adapters import AdapterFile
from hypersd.backbone import Backbone
from hypersd.generate import denoise
from hypersd.methods import METHODS, Method, StepRange
from hypersd.records import Adapter, InputError, Request

each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def test_the_base_model_comes_first() -> None:
    base = next(iter(METHODS.values()))
    assert (base.name, base.losses, base.sampler) == ("base", None, "DDIM")
    assert base.steps == StepRange(1, 100, (1, 2, 4, 8, 25))
    assert (base.guidance, base.eta) == (4.0, 0.0)


def test_every_file_has_its_row() -> None:
    folder = Path(methods.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__", "base"}
    assert {sys.modules[f"hypersd.methods.{file}"].METHOD.name for file in files} == set(METHODS)


@each_method
def test_rows_are_complete(method: Method) -> None:
    assert METHODS[method.name] is method is methods.find(method.name)
    assert 1 <= method.steps.low <= method.steps.high <= 1000
    assert method.steps.suggested
    assert all(steps in method.steps for steps in method.steps.suggested)
    assert all([method.title, method.paper, method.summary, method.licence])
    assert json.loads(json.dumps(method.describe()))["steps"]["low"] == method.steps.low


@each_method
def test_refuses_steps_it_was_not_made_for(method: Method) -> None:
    method.check(Request("a cat", steps=method.steps.low))
    method.check(Request("a cat", steps=method.steps.high))
    with pytest.raises(InputError, match=rf"{method.name} was made for {method.steps} steps?, got .*; \w+"):
        method.check(Request("a cat", steps=method.steps.high + 1))


@each_method
def test_draws_finite_latents_that_the_seed_decides(
    method: Method, tiny_backbone: Backbone, tiny_adapters: Sequence[AdapterFile]
) -> None:
    method = methods.discover(tiny_adapters, tiny_backbone.network_sha256)[method.name]
    for steps in method.steps.suggested[:2]:
        first, again, other = (
            denoise(tiny_backbone, Request("a cat", seed=seed, steps=steps), method).x for seed in (1, 1, 2)
        )
        channels, height, width = tiny_backbone.latent_shape
        assert first.shape == (1, channels, height // method.smaller, width // method.smaller)
        assert first.isfinite().all()
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_the_advice_of_a_row_ends_the_sentence() -> None:
    row = replace(METHODS["base"], name="tcd", steps=StepRange(2, 8, (4,)), otherwise="for one choose hyper")
    with pytest.raises(InputError, match=r"^tcd was made for 2-8 steps, got 1; for one choose hyper$"):
        row.check(Request("a cat", steps=1))


def test_one_step_methods_speak_of_a_step() -> None:
    row = replace(METHODS["base"], name="one", steps=StepRange(1, 1, (1,)))
    with pytest.raises(InputError, match=r"^one was made for 1 step, got 2; choose 1$"):
        row.check(Request("a cat", steps=2))


def test_an_unknown_method_is_told_what_there_is() -> None:
    with pytest.raises(InputError, match=r"method must be one of base.*, got 'bsae'"):
        methods.find("bsae")


# ------------------------------------------------------------------------------------------ adapters make rows


def lora(method: str = "tscd", segments: int = 1, name: str = "", base: str = "b", **changes: Any) -> AdapterFile:
    """As `inspect` would give it; there is no file."""
    card = Adapter(
        name=name or method, method=method, backbone="tiny", base_sha256=base, segments=segments, rank=2, guidance=1.0,
        eta=0.0, updates=0, data="", commit="", recipe={},
    )  # fmt: skip
    stem = f"{name or method}-{segments}"
    return AdapterFile(Path(f"{stem}.safetensors"), stem, replace(card, **changes))


def test_without_adapters_only_the_base_can_draw() -> None:
    assert methods.discover([], "b") == {"base": METHODS["base"]}


def test_rows_come_in_the_order_of_methods() -> None:
    files = [lora(name) for name in reversed(METHODS) if name != "base"]
    assert list(methods.discover(files, "b")) == list(METHODS)


def test_an_adapter_brings_its_row_to_life() -> None:
    file = lora("tcd", guidance=2.0, eta=0.3)
    row = methods.discover([file], "b")["tcd"]
    assert row == replace(METHODS["tcd"], guidance=2.0, eta=0.3, adapters=(file,))
    told = row.describe()
    assert told["adapters"][0]["file"] == "tcd-1.safetensors" and json.dumps(told)
    assert METHODS["tcd"].adapters == ()
    assert {row: 1}[methods.discover([file], "b")["tcd"]] == 1, "the app keeps what it knows of a row under the row"


def test_two_names_of_one_method_are_two_rows() -> None:
    files = [lora("tscd", 8), lora("tscd", 8, "long"), lora("tscd", 4), lora("lcm")]
    rows = methods.discover(files, "b")
    assert list(rows) == ["base", "lcm", "tscd", "long"]
    assert rows["tscd"].adapters == (files[0], files[2])
    assert rows["long"].adapters == (files[1],)
    assert rows["long"].step is rows["tscd"].step
    assert len({row.title for row in rows.values()}) == len(rows)
    assert rows["long"].title == "Hyper-SD (TSCD): long"


@pytest.mark.parametrize(
    ("odd", "sentence"),
    [
        (lora("tcd", base="other"), r"trained on another base; train it again with: python -m hypersd distill tcd"),
        (lora("pcm", base="other"), r"was trained on another base; get it again with: python -m hypersd fetch"),
        (lora("instaflow"), r"its method must be one of lcm, .*, dmd, hyper, hyper-unet, it says 'instaflow'"),
        (lora("base"), r"its method must be one of lcm, .*, dmd, hyper, hyper-unet, it says 'base'"),
        (lora("lcm", name="tcd"), r"it is of method lcm, but 'tcd' is another method's name; choose another --name"),
        (lora("lcm", name="base"), r"it is of method lcm, but 'base' is another method's name"),
        (lora("lcm", name="mine"), r"it is of method lcm, but 'mine' is another method's name"),
        (lora("tscd", 4), r"tscd-4\.safetensors is for the same number of segments and has the same name 'tscd'"),
    ],
)
def test_what_is_left_out_is_told(odd: AdapterFile, sentence: str, caplog: pytest.LogCaptureFixture) -> None:
    good = [lora("tscd", 4), lora("tscd", 1, "mine")]
    expected = methods.discover(good, "b")
    assert not caplog.records
    assert methods.discover([*good, odd], "b") == expected
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert re.search(rf"^{odd.path.name} is left out: .*{sentence}", record.getMessage())


@pytest.mark.parametrize(
    ("steps", "segments"), [(1, 1), (2, 2), (3, 1), (4, 4), (5, 1), (6, 2), (7, 1), (8, 8), (16, 8), (12, 4)]
)
def test_the_adapter_with_most_segments_that_divide_the_steps(steps: int, segments: int) -> None:
    row = methods.discover([lora("tscd", k) for k in (2, 8, 1, 4)], "b")["tscd"]
    chosen = row.adapter(steps)
    assert chosen is not None and chosen.card.segments == segments


def test_steps_that_no_adapter_can_do_are_refused() -> None:
    row = methods.discover([lora("tscd", 8), lora("tscd", 4)], "b")["tscd"]
    with pytest.raises(InputError, match=r"tscd has no adapter for 2 steps here; train one with: .*distill tscd"):
        row.adapter(2)
    row.check(Request("a cat", steps=4))
    with pytest.raises(InputError, match=r"tscd has no adapter for 2 steps here"):
        row.check(Request("a cat", steps=2))  # before anything is drawn
    with pytest.raises(InputError, match=r"lcm has no adapter for 4 steps here"):
        METHODS["lcm"].adapter(4)
    assert METHODS["base"].adapter(3) is None


def test_what_lies_beside_a_model_is_installed(tiny_folder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    assert list(methods.installed(str(model))) == ["base"]
    tiny.adapters(model, model / "lora")
    rows = methods.installed(str(model))
    assert list(rows) == list(METHODS)
    assert [[a.card.segments for a in row.adapters] for row in rows.values()] == [
        sorted([s.segments for s in m.stages] or m.steps.suggested if m.adapted else [], key=str)
        for m in METHODS.values()
    ]
    assert list(methods.installed(str(tmp_path / "no such model"))) == ["base"]
