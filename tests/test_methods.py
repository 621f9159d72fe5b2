"""The contract that every row of METHODS keeps."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hypersd import methods
from hypersd.adapters import AdapterFile
from hypersd.backbone import Backbone
from hypersd.generate import denoise
from hypersd.methods import METHODS, Method, StepRange
from hypersd.records import InputError, Request

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
    for steps in {method.steps.low, min(method.steps.high, 4)}:
        first, again, other = (
            denoise(tiny_backbone, Request("a cat", seed=seed, steps=steps), method).x for seed in (1, 1, 2)
        )
        assert first.shape == (1, *tiny_backbone.latent_shape)
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
