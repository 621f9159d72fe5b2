"""What a public app does not draw and does not show; with real checkers of the published architecture, but tiny."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checker
import gradio as gr
import pytest
import torch
from booth import small
from fake import address, no_loops_left, paint, served
from gradio_client import Client
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import METHODS
from safetensors.torch import load_file, save_file

from hypersd import safety, ui
from hypersd.emoji import prompts as measured
from hypersd.engine import Engine, Watch, plan, stream
from hypersd.pool import Shared
from hypersd.records import InputError, Panel, Request
from hypersd.safety import HELD, MISSING, UNSEEN, Checker, Filter, check_prompt, is_public, of
from hypersd.study.definition import load as load_study
from hypersd.ui import prompts
from hypersd.ui.compare import Screen

__all__ = ["no_loops_left"]  # a fixture that runs by itself
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::pandas.errors.Pandas4Warning"
)
CAT = Request("a cat", 1, 4)
EVERYTHING, NOTHING = -2.0, 2.0  # thresholds of the cosine


# ----------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize("prompt", [
    "a nude woman", "NUDE", "núde", "n u d e", "n.u.d.e", "nuuude", "nu\u200bde", "p0rn", "$ex", "ѕeх",
    "two nipples", "ｎｕｄｅ", "a girl in a bikini", "a 7 year old in lingerie", "sexy, 12yo",
])  # fmt: skip
def test_refuses(prompt: str) -> None:
    with pytest.raises(InputError, match=r"does not draw .*; ask for something else"):
        check_prompt(prompt)


@pytest.mark.parametrize("prompt", [
    "a girl with a cat", "a bikini on a hook", "Sussex by the sea", "a bunch of grapes", "a baby in a 3d render",
    "an 80 year old man in a swimsuit", "a cockatoo", "a b c", "猫", "a child, 3 cats",
])  # fmt: skip
def test_lets_pass(prompt: str) -> None:
    check_prompt(prompt)


def test_lets_everything_pass_that_we_ask_for_ourselves() -> None:
    every = [*prompts.EXAMPLES, *prompts.SUBJECTS, *load_study().prompts]
    every += [one.text for one in measured.load()]
    assert len(every) > 400
    for prompt in every:
        check_prompt(prompt)


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=20), st.sampled_from(safety.REFUSED.split()), st.text(max_size=20))
def test_a_refused_word_is_found_in_any_company(before: str, word: str, after: str) -> None:
    with pytest.raises(InputError):
        check_prompt(f"{before} , the {word.upper()} , {after}")


@pytest.mark.parametrize("text", ["a_" * 250, "_" * 500, "a " * 250, "a" * 500, ". " * 250, "a" + " _" * 249])
def test_no_prompt_takes_long_to_read(text: str) -> None:
    began = time.process_time()
    check_prompt(text)
    assert time.process_time() - began < 0.2


# --------------------------------------------------------------------------------------------------------- pictures


def pictures(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, 40, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("care", [2.0, -2.0])
@pytest.mark.parametrize("threshold", [-0.2, 0.3, 0.5, 0.6, 0.7])
def test_flags_what_diffusers_flags(threshold: float, care: float) -> None:
    from hypersd.scores import prepared

    network, pixels = checker.network(threshold, care), pictures(12)
    flags = Checker(network)(pixels)
    clip = prepared(pixels.permute(0, 3, 1, 2) / 127.5 - 1, 28)
    with torch.no_grad():
        _, expected = network(clip_input=clip, images=torch.zeros(12, 1))
    assert flags == expected


def test_the_thresholds_tell_pictures_apart() -> None:
    seen = Checker(checker.network(0.75))(torch.cat([pictures(20), torch.zeros(1, 40, 32, 3, dtype=torch.uint8)]))
    assert set(seen) == {True, False}


def test_an_answer_that_is_no_number_is_not_harmless() -> None:
    network = checker.network(NOTHING)
    network.visual_projection.weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match="could not look at this picture"):
        Filter(lambda: Checker(network)).look([bytes(12)], 2, 2)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_reads_both_ways_of_naming_and_both_precisions(tmp_path: Path, half: bool, nested: bool) -> None:
    """The published file is in half precision and has transformers' older names."""
    file = checker.folder(tmp_path, EVERYTHING) / "model.safetensors"
    tensors = {name: tensor.half() if half else tensor for name, tensor in load_file(file).items()}
    if nested:
        tensors = {f"vision_model.{n}" if n.startswith("vision_model.") else n: t for n, t in tensors.items()}
        tensors["vision_model.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    file.unlink()
    save_file(tensors, tmp_path / (safety.WEIGHTS if half else "model.safetensors"), {"format": "pt"})
    loaded = safety.load(tmp_path)
    assert loaded.network.dtype == torch.float32
    assert loaded(pictures(3)) == [True] * 3
    for name, tensor in checker.network().vision_model.named_parameters():
        assert torch.allclose(loaded.network.vision_model.get_parameter(name), tensor, atol=1e-3)


def test_a_file_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    file = checker.folder(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    del tensors["concept_embeds_weights"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match="lacks 1 tensors such as concept_embeds_weights"):
        safety.load(tmp_path)


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    (checker.folder(tmp_path) / "model.safetensors").unlink()
    torch.save(checker.network().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.fp16\.safetensors"):
        safety.load(tmp_path)


# ------------------------------------------------------------------------------------ between drawing and showing


class Model:
    """A backbone and its `draw`, which counts."""

    sha256 = "weights"

    def __init__(self) -> None:
        self.drawn = 0

    def draw(self, backbone: object, request: Request, method: Any, *, on_step: Callable[[Any], None]) -> Panel:
        for index in range(request.steps):
            on_step(SimpleNamespace(index=index, total=request.steps, pixels=self.pixels))
        self.drawn += 1
        return paint(request, method.name)

    def pixels(self) -> torch.Tensor:
        return torch.full((1, 64, 64, 3), 7, dtype=torch.uint8)

    def truncated(self, prompt: str) -> str:
        return ""


def broken() -> Checker:
    raise OSError("no such folder")


def fails(pixels: torch.Tensor) -> list[bool]:
    raise RuntimeError("the checker's GPU is gone")


LOADS: dict[str, tuple[Callable[[], Any], str]] = {
    "flags everything": (lambda: Checker(checker.network(EVERYTHING)), HELD),
    "cannot be loaded": (broken, MISSING),
    "fails": (lambda: fails, UNSEEN),
    "forgets a picture": (lambda: lambda pixels: [], UNSEEN),
}


def engine(load: Callable[[], Any]) -> tuple[Engine, Model]:
    model = Model()
    return Engine(lambda: model, METHODS, model.draw, filter=Filter(load)), model


@pytest.mark.parametrize("kind", LOADS)
def test_fails_closed(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    load, sentence = LOADS[kind]
    draw, model = engine(load)
    for _ in range(2):
        with pytest.raises(InputError) as told:
            draw(CAT, "lcm")
        assert str(told.value) == sentence
    assert not draw.has(CAT, "lcm"), "what was not seen is not kept"
    assert model.drawn == (0 if kind == "cannot be loaded" else 2)
    assert bool(caplog.records) == (kind != "flags everything"), "the reason is in the log"


def test_what_is_harmless_is_shown_and_kept() -> None:
    draw, model = engine(lambda: Checker(checker.network(NOTHING)))
    assert draw(CAT, "lcm").panel == paint(CAT, "lcm")
    assert draw(CAT, "lcm").kept and model.drawn == 1
    with pytest.raises(InputError, match="does not draw nude"):
        draw(Request("nude", 1, 4), "lcm")
    assert model.drawn == 1


def test_the_pictures_of_the_steps_are_looked_at_too() -> None:
    draw, _ = engine(lambda: lambda pixels: [bool((one == 7).all()) for one in pixels])
    assert draw(CAT, "lcm").panel
    with pytest.raises(InputError, match="does not show this picture"):
        draw(CAT, "lcm", Watch(trail=True))


def test_a_checker_that_could_not_be_had_is_asked_for_again() -> None:
    ways = iter([broken, lambda: Checker(checker.network(NOTHING))])
    draw, _ = engine(lambda: next(ways)())
    with pytest.raises(InputError):
        draw(CAT, "lcm")
    assert draw(CAT, "lcm").panel


# ------------------------------------------------------------------------------------------- every way into the app


@pytest.fixture(scope="module")
def demo() -> Iterator[tuple[gr.Blocks, Model]]:
    draw, model = engine(LOADS["flags everything"][0])
    with served(ui.build(draw, METHODS, credits="")) as app:
        yield app, model


ASKED: dict[str, dict[str, Any]] = {  # of every endpoint that a program can call
    "/compare": {"prompt": "a cat", "reference": True},
    "/sweep": {"prompts": ["a cat"], "steps": [2, 4]},
}


def test_every_public_endpoint_passes_the_filter(demo: tuple[gr.Blocks, Model]) -> None:
    app, model = demo
    client = Client(address(app), verbose=False)
    assert set(client.view_api(return_format="dict", print_info=False)["named_endpoints"]) == set(ASKED)
    for endpoint, arguments in ASKED.items():
        panels = client.predict(**arguments, api_name=endpoint)
        assert panels and {panel["png"] for panel in panels} == {""}
        assert {panel["problem"] for panel in panels} == {HELD}
        words = {name: ["nude"] if isinstance(given, list) else "nude" for name, given in arguments.items()
                 if name.startswith("prompt")}  # fmt: skip
        assert {panel["problem"] for panel in client.predict(**{**arguments, **words}, api_name=endpoint)} == {
            "this public app does not draw nude; ask for something else"
        }
    assert model.drawn == len(METHODS) + 1 + 2 * len(METHODS)
    client.close()


def test_the_screens_show_what_the_filter_says() -> None:
    draw, _ = engine(LOADS["flags everything"][0])
    shown = Screen(Shared(draw), METHODS, ("base", 25)).draw

    async def told() -> list[str]:
        cells = plan(CAT, ["lcm", "tcd"], METHODS)
        return [item.problem for news in [n async for n in stream(cells, shown, trail=True)] for item in news]

    assert [problem for problem in asyncio.run(told()) if problem] == [HELD, HELD]


def test_the_study_does_not_open_with_a_picture_that_is_held_back(tmp_path: Path) -> None:
    draw, _ = engine(LOADS["flags everything"][0])
    pool = small(tmp_path, Shared(draw, quiet=0).in_idle)
    assert pool.desk is None and not list(tmp_path.rglob("*.png"))
    assert pool.problem == f"base@8, 'a cat', seed 1: {HELD}"


# ------------------------------------------------------------------------------------------------------ where it is on


@pytest.mark.parametrize(("environment", "public"), [
    ({}, False),
    ({"SPACE_ID": "you/space"}, True),
    ({"HYPERSD_PUBLIC": "1"}, True),
    ({"HYPERSD_PUBLIC": "0"}, False),
    ({"GRADIO_SHARE": "True"}, True),
    ({"GRADIO_SERVER_NAME": "0.0.0.0"}, True),
    ({"GRADIO_SERVER_NAME": "127.0.0.1"}, False),
])  # fmt: skip
def test_is_on_where_others_can_come(environment: dict[str, str], public: bool) -> None:
    assert is_public(environment) == public
    assert bool(of("sd15", lambda: "cpu", environment)) == public
    assert of("emoji", lambda: "cpu", environment) is None
    assert of("models/emoji", lambda: "cpu", {"HYPERSD_PUBLIC": "1"}), "another model of that name"


def test_is_off_only_by_the_word_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    assert of("sd15", lambda: "cpu", {"SPACE_ID": "you/space", "HYPERSD_SAFETY": "off"}) is None
    assert [(r.levelno, r.message) for r in caplog.records] == [
        (logging.WARNING, "the safety filter is off: HYPERSD_SAFETY=off")
    ]
    for said in ("0", "false", "of", "no"):  # no folder of that name: closed
        kept = of("sd15", lambda: "cpu", {"HYPERSD_SAFETY": said})
        assert kept
        with pytest.raises(InputError, match="cannot be loaded, so nothing is drawn"):
            kept.prepare()


def test_can_be_wanted_anywhere_and_from_a_folder(tmp_path: Path) -> None:
    kept = of("emoji", lambda: "cpu", {"HYPERSD_SAFETY": str(checker.folder(tmp_path, EVERYTHING))})
    assert kept and not kept.ready
    with pytest.raises(InputError, match="does not show this picture"):
        kept.look([bytes(30 * 30 * 3)], 30, 30)
    assert kept.ready
    assert of("emoji", lambda: "cpu", {"HYPERSD_SAFETY": "on"})
