"""The app with a painter instead of a model: what it answers, in which order, and how it is served."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import gradio as gr
import pytest
import requests
from fake import Painter, address, eventually, no_loops_left, paint, served
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image
from rows import METHODS, Row

from hypersd import folders, pictures, ui
from hypersd.engine import UNWATCHED, Drawing, Shelf, Watch
from hypersd.records import NAG_SCALE, PROMPT_CHARACTERS, SEED_MAX, InputError, Request
from hypersd.ui import prompts, sweep
from hypersd.ui.board import Board, distances, permalink
from hypersd.ui.compare import Screen, comparison, facts_of, parcel_of, restore
from hypersd.ui.history import LENGTH, entries, remember

__all__ = ["no_loops_left"]  # a fixture that runs by itself
SKIPPED = gr.skip()
CREDITS = "[Noto](https://example.org/noto), Apache-2.0"
# Gradio and its client leave event loops to the garbage collector, and its statistics old options of pandas.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::pandas.errors.Pandas4Warning"
)


@pytest.fixture(scope="module")
def painter() -> Painter:
    return Painter()


@pytest.fixture(scope="module")
def demo(painter: Painter) -> Iterator[gr.Blocks]:
    with served(ui.build(painter, METHODS, credits=CREDITS)) as app:
        yield app


@pytest.fixture(scope="module")
def client(demo: gr.Blocks) -> Iterator[Client]:
    connected = Client(address(demo), verbose=False)
    yield connected
    connected.close()


def screen(painter: Painter) -> Screen:
    return Screen(painter, METHODS, ("base", 25))


def press(
    painter: Painter, prompt: Any = "a cat", seed: Any = 1, steps: Any = 4, names: Any = ("base", "lcm"),
    reference: Any = ("yes",), guidance: Any = None, negative: Any = "", trail: Any = False,
    nag: Any = "3",
) -> list[Any]:  # fmt: skip
    """All that the page is told after a press of Compare, the key to the sheet replaced by what it opens at the end."""
    names = list(names) if isinstance(names, tuple) else names
    shown = screen(painter)
    given: tuple[Any, ...] = (prompt, seed, steps, names, reference, guidance, negative, nag, trail, [])
    return everything(shown, comparison(shown)(*given))


def everything(shown: Screen, told: AsyncIterator[Any]) -> list[Any]:
    """Each yield as the page sees it: what is skipped stays as it was."""

    async def listen() -> list[Any]:
        seen: list[Any] = [SKIPPED] * 5
        heard = []
        async for item in told:
            seen = [old if new == SKIPPED else new for old, new in zip(seen, item, strict=True)]
            heard.append(tuple(seen))
        return heard

    return [
        (notice, state, shown.sheets.get(key) if isinstance(key, str) else key, *rest)
        for notice, state, key, *rest in asyncio.run(listen())
    ]


# How it is served


def test_launch_settings(demo: gr.Blocks) -> None:
    assert (demo.max_file_size, demo.allowed_paths, demo.enable_monitoring) == (1 << 20, [], False)
    assert (demo.show_error, demo.ssr_mode, demo.run_history, demo.share) == (False, False, False, False)
    assert (demo.mcp_server_obj, demo.delete_cache, demo.analytics_enabled) == (None, (600, 3600), False)
    assert (demo.footer_links, demo.app.state_holder.capacity) == ([], 2000)
    assert (demo._queue.max_size, demo._queue.default_concurrency_limit, demo.api_open) == (32, 1, False)


def test_monitoring_and_run_history_are_not_there(demo: gr.Blocks) -> None:
    for path in ("monitoring", "gradio_api/runs"):
        assert requests.get(f"{address(demo)}{path}", timeout=5).status_code in (403, 404)


def test_other_sites_may_not_call(demo: gr.Blocks) -> None:
    # strict_cors: not even a page without an origin of its own, which a sandboxed frame is.
    answer = requests.get(f"{address(demo)}config", headers={"Origin": "null"}, timeout=5)
    assert "access-control-allow-origin" not in answer.headers


def test_two_endpoints_are_public(client: Client) -> None:
    assert list(client.view_api(return_format="dict", print_info=False)["named_endpoints"]) == ["/compare", "/sweep"]


def test_the_queue_cannot_be_skipped(demo: gr.Blocks) -> None:
    answer = requests.post(f"{address(demo)}gradio_api/run/compare", json={"data": ["a cat"]}, timeout=5)
    assert answer.status_code in (401, 403, 404)


def test_page_asks_nobody_else(demo: gr.Blocks) -> None:
    page = requests.get(address(demo), timeout=5).text
    assert "fonts.googleapis" not in page
    assert "cdnjs" not in page.split("<body")[1]


def test_credits_stand_below(demo: gr.Blocks) -> None:
    shown = [b["props"] for b in demo.config["components"] if b["type"] == "markdown"]
    (props,) = shown
    assert props["value"].endswith(CREDITS) and props["sanitize_html"]


def test_credits_of_the_assets_are_read() -> None:
    said = [b["props"]["value"] for b in ui.build(Painter(), METHODS).config["components"] if b["type"] == "markdown"]
    assert said[0].endswith(ui.CREDITS.read_text(encoding="utf-8").strip())


def test_licences_of_model_and_methods_are_shown() -> None:
    rows = {"base": METHODS["base"], "dmd2": Row("dmd2", "DMD2", licence="CC BY-NC 4.0")}
    components = ui.build(Painter(), rows, backbone="sdxl").config["components"]
    (said,) = [b["props"]["value"] for b in components if b["type"] == "markdown"]
    assert "| the base model, sdxl | CreativeML OpenRAIL++-M |" in said and "| DMD2 | CC BY-NC 4.0 |" in said
    assert "Noto" not in said, "the artwork is the embedded model's alone"


@pytest.mark.parametrize(("backbone", "licence"), [
    ("sd3", "Stability AI Community License"), ("flux", "FLUX.1 [dev] Non-Commercial License"),
])  # fmt: skip
def test_the_licence_of_what_the_hub_guards_is_shown(backbone: str, licence: str) -> None:
    components = ui.build(Painter(), METHODS, backbone=backbone).config["components"]
    (said,) = [b["props"]["value"] for b in components if b["type"] == "markdown"]
    assert f"| the base model, {backbone} | {licence}, to be accepted on the hub |" in said


def test_figures_are_those_of_the_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hypersd.ui.measured.page", str)
    app = ui.build(Painter(), METHODS, credits="", backbone="some/tiny")
    assert str(folders.measured("tiny")) in [block["props"].get("value") for block in app.config["components"]]


# The screen


def test_panels_come_one_by_one_and_the_last_word_is_complete() -> None:
    told = press(Painter(0.01))
    finished = [sum(tile["phase"] == "done" for tile in state["tiles"]) for _, state, *_ in told]
    assert finished == sorted(finished)
    assert {0, 1, 2, 3} == set(finished)
    *_, (notice, state, taken, past, history) = told
    assert (notice, state["status"], len(taken.panels)) == ("", "done", 3)
    assert [(t["method"], t["facts"]["steps"], t["reference"]) for t in state["tiles"]] == [
        ("base", 4, False), ("lcm", 4, False), ("base", 25, True)]  # fmt: skip
    assert past == history == [past[0]]
    assert (past[0]["link"], past[0]["title"]) == (state["link"], "a cat")
    assert past[0]["detail"] == "2 methods, 4 steps, seed 1"


def test_progress_is_told_while_a_panel_is_drawn() -> None:
    told = press(Painter(0.04), steps=25, names=("base",), reference=())
    steps = [state["tiles"][0]["step"] for _, state, *_ in told if state["tiles"][0]["phase"] == "drawing"]
    assert len(set(steps)) > 3
    assert steps == sorted(steps)


def test_every_panel_shows_what_it_cost_and_where_it_began() -> None:
    *_, (_, state, *_) = press(Painter())
    for tile in state["tiles"]:
        assert {"steps", "nfe", "seconds", "guidance", "sampler", "noise_sha256"} <= tile["facts"].keys()
    assert len({tile["facts"]["noise_sha256"] for tile in state["tiles"]}) == 1
    assert [tile["facts"]["nfe"] for tile in state["tiles"]] == [8, 4, 50]


def test_guidance_left_empty_is_the_methods_own() -> None:
    *_, (_, state, *_) = press(Painter(), guidance=" ")
    assert [tile["facts"]["guidance"] for tile in state["tiles"]] == [4, 1, 4]


def test_the_field_that_keeps_away_from_a_negative_prompt_has_the_scale_that_was_found(demo: gr.Blocks) -> None:
    """It is seen while the negative prompt shows no placeholder, so there has to be one (tests/test_browser.py)."""
    fields = {b["props"].get("elem_id"): b["props"] for b in demo.config["components"]}
    assert fields["hs-nag"]["value"] == f"{NAG_SCALE:g}" and fields["hs-negative"]["placeholder"]


@pytest.mark.parametrize(
    ("negative", "nag", "told"), [("red", "2", [None, 2.0, None]), ("red", " ", [None] * 3), (" ", "2", [None] * 3)]
)
def test_methods_without_guidance_keep_away_by_nag(negative: str, nag: str, told: list[float | None]) -> None:
    *_, (_, state, *_) = press(Painter(), negative=negative, nag=nag)
    assert [tile["facts"]["nag"] for tile in state["tiles"]] == told
    assert ("nag=2" in state["link"]) == (2.0 in told)


def test_reference_is_drawn_once_when_its_step_count_is_chosen() -> None:
    painter = Painter()
    *_, (_, state, *_) = press(painter, steps=25, names=("base",))
    assert painter.calls == ["base 25"]
    assert [tile["reference"] for tile in state["tiles"]] == [True]


def test_a_method_that_cannot_says_so_in_its_panel_and_the_others_go_on() -> None:
    *_, (_, state, *_) = press(Painter(), steps=1, names=("base", "tcd"))
    assert [tile["phase"] for tile in state["tiles"]] == ["done", "problem", "done"]
    assert "tcd was made for 2-8 steps, got 1" in state["tiles"][1]["text"]
    assert [(tile["allowed"], tile["nearest"]) for tile in state["tiles"]] == [("", 0), ("2-8", 2), ("", 0)]


def test_pictures_are_lossless_and_carry_their_provenance() -> None:
    *_, (_, state, taken, *_) = press(Painter())
    file = io.BytesIO(base64.b64decode(state["tiles"][1]["src"].split(",")[1]))
    assert pictures.read_png(file) == taken.panels[1] == paint(Request("a cat", 1, 4), "lcm")


def test_the_strip_holds_a_picture_of_each_step() -> None:
    *_, (_, state, *_) = press(Painter(), trail=True)
    assert [len(tile["trail"]) for tile in state["tiles"]] == [4, 4, 25]


def test_closing_the_generator_stops_within_one_step() -> None:
    painter = Painter(0.05)
    made = 0

    async def leave_early() -> None:
        nonlocal made
        told = comparison(screen(painter))("a cat", 1, 100, ["base"], [], None, "", "", False, [])
        async for _, state, *_ in told:
            if state["tiles"][0]["step"] >= 2:
                break
        await told.aclose()
        made = painter.steps

    asyncio.run(leave_early())
    eventually(lambda: painter.stops)
    assert painter.steps <= made + 1


BAD = {
    "empty": ({"prompt": "  "}, "Prompt is empty; type a few words"),
    "not text": ({"prompt": 7}, "Prompt must be text, got int"),
    "long": ({"prompt": "x" * 5000}, f"Prompt has 5,000 characters, at most {PROMPT_CHARACTERS}"),
    "steps 0": ({"steps": 0}, "Steps must be a whole number from 1"),
    "steps -1": ({"steps": -1}, "Steps must be a whole number from 1"),
    "steps 10000": ({"steps": 10000}, "Steps must be a whole number from 1"),
    "steps a": ({"steps": "a"}, "Steps must be a whole number from 1"),
    "steps none": ({"steps": None}, "Steps must be a whole number from 1"),
    "seed": ({"seed": SEED_MAX + 1}, "Seed must be a whole number from 0"),
    "guidance text": ({"guidance": "much"}, "Guidance must be a number from 0 to 30"),
    "guidance": ({"guidance": 99}, "Guidance must be a number from 0 to 30"),
    "nag": ({"negative": "red", "nag": "21"}, "Nag must be a number from 1 to 20"),
    "no method": ({"names": (), "reference": ()}, "No method is chosen; tick at least one"),
    "methods": ({"names": {"a": 1}}, "Methods must be a list of names"),
    "unknown": ({"names": ("nope",)}, "There is no method &#x27;nope&#x27;; choose from base, lcm, tcd, hyper"),
}


@pytest.mark.parametrize(("given", "sentence"), BAD.values(), ids=BAD)
def test_bad_input_is_a_sentence_and_nothing_else_changes(given: dict[str, Any], sentence: str) -> None:
    painter = Painter()
    [(notice, state, *rest)] = press(painter, **given)
    assert sentence in notice
    assert state == {"status": "refused"}
    assert rest == [SKIPPED] * 3
    assert painter.calls == []


def test_a_fault_of_ours_is_a_sentence_too(caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: object) -> Any:
        raise ZeroDivisionError("secret")

    *_, (_, state, *_) = press(broken)  # type: ignore[arg-type]
    assert {tile["phase"] for tile in state["tiles"]} == {"problem"}
    assert "could not be drawn" in state["tiles"][0]["text"]
    assert "secret" not in json.dumps(state)
    assert "secret" in caplog.text


def test_missing_weights_are_a_sentence() -> None:
    def unready(*_: object) -> Any:
        raise InputError("emoji: unet/model.safetensors is missing; copy it again")

    *_, (_, state, *_) = press(unready)  # type: ignore[arg-type]
    assert state["tiles"][0]["text"].startswith("emoji: unet/model.safetensors is missing")


def test_numbers_between_panels_are_the_metrics() -> None:
    *_, (_, state, taken, *_) = press(Painter())
    panels = taken.panels
    assert set(state["numbers"]) == {"0-1", "0-2", "1-2"}
    assert state["numbers"]["0-2"] == distances(panels[0], panels[2])
    assert distances(panels[0], panels[0]) == {"mae": 0.0, "psnr": None, "ssim": 1.0}


def test_of_two_sizes_the_larger_is_averaged_down() -> None:
    *_, (_, _, taken, *_) = press(Painter())
    panel = taken.panels[0]
    image = pictures.to_image(panel)
    large = image.resize((2 * panel.width, 2 * panel.height), Image.Resampling.NEAREST)
    twice = replace(panel, pixels=large.tobytes(), width=large.width, height=large.height)
    assert distances(panel, twice) == distances(twice, panel) == {"mae": 0.0, "psnr": None, "ssim": 1.0}


def test_what_takes_time_or_is_cut_off_is_said_in_the_panel() -> None:
    def slow(request: Request, method: str, watch: Watch = UNWATCHED) -> Drawing:
        watch.loading("Downloading it: 0.1 of 0.2 GB")
        return Drawing(paint(request, method), unread="and a very long tail")

    told = press(slow, names=("base",), reference=())  # type: ignore[arg-type]
    phases = list(dict.fromkeys(state["tiles"][0]["phase"] for _, state, *_ in told))
    assert phases in (["waiting", "loading", "done"], ["waiting", "done"])
    assert told[-1][1]["tiles"][0]["unread"] == "and a very long tail"


# Take it along


def unpacked(parcel: dict[str, Any]) -> bytes:
    return base64.b64decode(parcel["src"].split(",")[1])


def holding(taken: pictures.Sheet | None) -> Screen:
    """A screen that holds this sheet under the key "mine"."""
    shown = screen(Painter())
    if taken:
        shown.sheets.put("mine", taken)
    return shown


def test_a_contact_sheet_and_its_json_say_the_same() -> None:
    *_, (_, state, taken, *_) = press(Painter())
    shown = holding(taken)
    (_, picture), (_, facts) = parcel_of(shown)("mine"), facts_of(shown)("mine")
    assert (picture["name"], facts["name"]) == ("hypersd-seed-1.png", "hypersd-seed-1.json")
    known = json.loads(unpacked(facts))
    assert known["panels"] == [tile["facts"] for tile in state["tiles"]]
    assert (known["title"], known["link"]) == ("a cat · seed 1", state["link"])
    with Image.open(io.BytesIO(unpacked(picture))) as sheet:
        assert json.loads(sheet.info[pictures.CHUNK]) == known
        assert sheet.width > 3 * 256


def test_without_pictures_there_is_nothing_to_take_along() -> None:
    for shown in map(holding, (None, pictures.Sheet([]), pictures.Sheet([None]))):
        assert parcel_of(shown)("mine") == facts_of(shown)("mine")
        assert "draw it first" in parcel_of(shown)("mine")[0]


def test_what_visitors_may_take_along_does_not_fill_the_memory() -> None:
    shown, sheet = screen(Painter()), pictures.Sheet([paint(Request("a cat"), "lcm")] * 64)
    for visitor in range(100):
        shown.sheets.put(str(visitor), sheet)
    assert sheet.size == 64 * 64 * 64 * 3
    assert 80 << 18 < shown.sheets.size <= 64 << 20 < 100 * sheet.size
    assert shown.sheets.get("99") is sheet
    assert shown.sheets.get("0") is None
    small = Screen(Painter(), METHODS, ("base", 25), Shelf(10))
    *_, last = everything(small, comparison(small)("a cat", 1, 4, ["lcm"], [], None, "", "", False, []))
    assert last[2] is None  # no room for it: said when it is asked for, not at the drawing


# Sweeps


def grid(
    painter: Any, texts: Any = "a cat", seeds: Any = "1", steps: Any = "1, 2", names: Any = None, guidance: Any = "",
    negative: Any = "",
) -> list[Any]:  # fmt: skip
    """All that the page is told after a press of "Draw the grid"."""
    chosen, shown = ["base", "tcd"] if names is None else names, screen(painter)
    return everything(shown, sweep.sweeping(shown)(texts, seeds, steps, chosen, guidance, negative, []))


def test_a_grid_fills_row_by_row_and_says_what_cannot_be() -> None:
    painter = Painter(0.01)
    told = grid(painter)
    assert painter.calls == ["base 1", "base 2", "tcd 2"]
    finished = [sum(tile["phase"] == "done" for tile in state["tiles"]) for _, state, *_ in told]
    assert (finished, set(finished)) == (sorted(finished), {0, 1, 2, 3})
    *_, (notice, state, taken, past, history) = told
    assert past == history
    assert [(row["title"], row["detail"], row["link"]) for row in past] == [
        ("a cat", "sweep of 4, 1, 2 steps", state["link"])]  # fmt: skip
    assert (notice, state["status"], state["columns"], state["numbers"]) == ("", "done", [1, 2], {})
    assert [row["title"] for row in state["rows"]] == ["Base model", "TCD"]
    assert [tile["phase"] for tile in state["tiles"]] == ["done", "done", "problem", "done"]
    assert "tcd was made for 2-8 steps, got 1" in state["tiles"][2]["text"]
    assert (state["tiles"][2]["allowed"], state["tiles"][2]["nearest"]) == ("2-8", 2)
    assert [panel and panel.method for panel in taken.panels] == ["base", "base", None, "tcd"]
    assert (taken.rows, taken.heads) == (["Base model", "TCD"], ["1 step", "2 steps"])


class Patient(Painter):
    """Its third picture lasts until it is stopped."""

    waits = False

    def __call__(self, request: Request, method: str, watch: Watch = UNWATCHED) -> Drawing:
        if len(self.calls) == 2 and not self.stops and not self.has(request, method):
            self.waits = True
            eventually(watch.stop, 60)
        return super().__call__(request, method, watch)


def test_a_stopped_grid_keeps_its_pictures_and_the_next_run_fills_the_rest() -> None:
    painter = Patient(keep=True)

    async def leave_early() -> None:
        told = sweep.sweeping(screen(painter))("a cat", "1-3", "1, 8", ["base"], "", "", [])
        async for _, state, *_ in told:
            if sum(tile["phase"] == "done" for tile in state["tiles"]) >= 2:
                break
        eventually(lambda: painter.waits)  # a grid that is left between two pictures stops none
        await told.aclose()

    asyncio.run(leave_early())
    eventually(lambda: painter.stops)
    price = sweep.estimate(screen(painter))("a cat", "1-3", "1, 8", ["base"], "", "")
    assert "4 pictures, 36 network calls" in price
    assert "2 pictures drawn before" in price
    painter.calls.clear()
    *_, (_, state, *_) = grid(painter, seeds="1-3", steps="1, 8", names=["base"])
    assert [tile["kept"] for tile in state["tiles"]] == [True, True, False, False, False, False]
    assert painter.calls == ["base 1", "base 8", "base 1", "base 8"]
    assert "Nothing left to draw" in sweep.estimate(screen(painter))("a cat", "1-3", "1, 8", ["base"], "", "")


def test_the_price_is_told_before_and_becomes_seconds_once_something_was_drawn() -> None:
    painter = Painter()
    price = sweep.estimate(screen(painter))
    asked = ("a cat\na dog", "1, 2", "1 2 4", ["lcm"], "", "")
    assert "12 pictures, 28 network calls, time not known before the first picture" in price(*asked)
    grid(painter, names=["lcm"], steps="8")
    assert "12 pictures, 28 network calls, less than a second" in price(*asked)
    assert "Steps are missing" in price("a cat", "1", "", ["lcm"], "", "")


@pytest.mark.parametrize(("given", "sentence"), [
    ({"texts": ""}, "Prompt is empty"), ({"texts": None}, "Prompts must be text, one a line, got NoneType"),
    ({"steps": "a"}, "Steps must be a whole number"), ({"seeds": "1-9000"}, "These are 9,000 seeds, at most 64"),
    ({"seeds": "1-20"}, "This grid has 80 pictures, at most 64 are allowed"), ({"names": []}, "No method is chosen"),
    ({"names": "base"}, "Methods must be a list"), ({"guidance": "much"}, "Guidance must be a number"),
    ({"negative": 7}, "Negative prompt must be text"),
], ids=str)  # fmt: skip
def test_a_grid_that_cannot_be_is_a_sentence_and_nothing_else_changes(given: dict[str, Any], sentence: str) -> None:
    painter = Painter()
    [(notice, state, *rest)] = grid(painter, **given)
    assert sentence in notice
    assert (state, rest, painter.calls) == ({"status": "refused"}, [SKIPPED] * 3, [])


def test_a_sweeps_link_restores_it() -> None:
    from urllib.parse import parse_qsl

    *_, (_, state, taken, *_) = grid(Painter(), "a cat & co\na 🐕?", "3, 1-2", "4 2", ["tcd", "lcm"], "2.5", "red")
    query = dict(parse_qsl(state["link"][1:]))
    assert taken.link == state["link"]
    assert sweep.restore(query, list(METHODS)) == ["a cat & co\na 🐕?", "3,1,2", "2,4", ["lcm", "tcd"], "2.5", "red"]
    assert restore(query, list(METHODS)) == [SKIPPED] * 9  # the comparison's form stays as it is
    assert sweep.restore({"prompt": "a comparison"}, list(METHODS)) == [SKIPPED] * 6


def test_both_screens_offer_the_same_methods_and_one_method_is_enough(demo: gr.Blocks) -> None:
    ticked = [b["props"]["value"] for b in demo.config["components"] if b["props"].get("label") == "Methods"]
    assert ticked == [list(METHODS)] * 2
    alone = ui.build(Painter(), {"base": METHODS["base"]}, credits="").config["components"]
    fields = {b["props"].get("elem_id"): b["props"] for b in alone}
    assert not fields["hs-sweep-methods"]["visible"]
    assert fields["hs-sweep-prompts"]["value"].count("\n") == 2


# Links and history


def test_permalink_restores_what_was_asked() -> None:
    from urllib.parse import parse_qsl

    request = Request("a cat & a 100% 🐕?", 7, 3, 2.5, negative_prompt="red")
    query = dict(parse_qsl(permalink(request, ["lcm", "hyper"], False)[1:]))
    assert restore(query, list(METHODS)) == [request.prompt, 7, 3, ["lcm", "hyper"], [], "2.5", "red", "", None]
    away = dict(parse_qsl(permalink(replace(request, nag=4), ["lcm"], True)[1:]))
    assert restore(away, list(METHODS))[6:8] == ["red", "4"]


def test_a_link_that_says_nothing_changes_nothing() -> None:
    assert restore({}, list(METHODS)) == [SKIPPED] * 9


def test_a_broken_link_changes_nothing() -> None:
    query = {"seed": "x", "steps": "nan", "methods": "nope"}
    assert restore(query, list(METHODS)) == [SKIPPED] * 9


def test_history_keeps_the_newest_first_without_doubles_and_forgives_rubbish() -> None:
    shown = screen(Painter())
    past: Any = [None, {"link": 1}, {"link": "?x", "title": "old", "detail": "kept"}]
    for prompt, names in [("one", ["base"]), ("two", ["base"]), ("one", ["base"]), ("one", ["lcm"])]:
        *_, (*_, past, _) = everything(shown, comparison(shown)(prompt, 1, 4, names, [], None, "", "", False, past))
    assert [entry["title"] for entry in past] == ["one", "one", "two", "old"]
    for rubbish in (None, "x", [1, {}], {"a": 1}, past * 20):
        assert len(remember(rubbish, Board([], "?new"), "a", "b")) in (0, 80)
    *_, (*_, longest, _) = everything(shown, comparison(shown)("x", 1, 4, ["lcm"], [], None, "", "", False, past * 20))
    assert len(longest) == LENGTH
    assert entries(longest) == longest


def test_a_stopped_comparison_is_remembered_from_its_first_picture_on() -> None:
    async def leave_early() -> list[Any]:
        told = comparison(screen(Painter()))("a cat", 1, 4, ["lcm", "tcd"], [], None, "", "", False, [])
        async for _, _, _, past, _ in told:
            if past != SKIPPED:
                await told.aclose()
                return past
        return []

    assert [entry["title"] for entry in asyncio.run(leave_early())] == ["a cat"]


def test_every_surprise_is_a_prompt() -> None:
    seen = {prompts.surprise(n) for n in range(len(prompts.SUBJECTS) * len(prompts.STYLES))}
    assert len(seen) == len(prompts.SUBJECTS) * len(prompts.STYLES)
    assert all(Request(prompt).prompt == prompt for prompt in seen | set(prompts.EXAMPLES))
    assert all(text.rsplit(", ", 1)[1].removesuffix(" style") in prompts.STYLES for text in prompts.EXAMPLES)


# Programs


def test_api_answers_complete_panels(client: Client) -> None:
    job = client.submit(prompt="a dog", seed=3, steps=2, methods=["lcm", "tcd"], reference=True, api_name="/compare")
    panels = job.result(timeout=20)
    assert [(p["method"], p["reference"], p["problem"]) for p in panels] == [
        ("lcm", False, ""), ("tcd", False, ""), ("base", True, "")]  # fmt: skip
    assert "__type__" not in json.dumps(panels)
    assert [len(earlier) for earlier in job.outputs()] in ([1, 2, 3, 3], [1, 2, 3])
    file = io.BytesIO(base64.b64decode(panels[1]["png"].split(",")[1]))
    assert pictures.read_png(file) == paint(Request("a dog", 3, 2), "tcd")
    assert panels[1]["provenance"] == pictures.read_png_provenance(file)
    away = client.predict(prompt="a dog", steps=2, methods=["lcm"], negative_prompt="red", nag=4, api_name="/compare")
    assert away[0]["provenance"]["nag"] == 4.0


def test_api_is_documented_with_types(client: Client) -> None:
    told = client.view_api(return_format="dict", print_info=False)["named_endpoints"]["/compare"]
    types = {p["parameter_name"]: p["python_type"]["type"] for p in told["parameters"]}
    assert types == {"prompt": "str", "seed": "int", "steps": "int", "methods": "None | list[str]",
                     "guidance": "None | float", "negative_prompt": "str", "reference": "bool",
                     "nag": "None | float"}  # fmt: skip
    assert [r["python_type"]["type"].split("[")[0] for r in told["returns"]] == ["list"]
    assert "one noise" in told["description"]


def test_api_draws_grids(client: Client) -> None:
    given = {"prompts": ["a dog", "a cat"], "steps": [2, 1], "seeds": [3], "methods": ["tcd"]}
    job = client.submit(**given, api_name="/sweep")
    squares = job.result(timeout=60)
    assert [(s["prompt"], s["seed"], s["steps"], s["calls"]) for s in squares] == [
        ("a dog", 3, 1, 0), ("a dog", 3, 2, 2), ("a cat", 3, 1, 0), ("a cat", 3, 2, 2)]  # fmt: skip
    assert [bool(s["problem"]) for s in squares] == [True, False, True, False]
    assert "__type__" not in json.dumps(squares)
    file = io.BytesIO(base64.b64decode(squares[3]["png"].split(",")[1]))
    assert pictures.read_png(file) == paint(Request("a cat", 3, 2), "tcd")
    with pytest.raises(AppError, match="at most 64 are allowed"):
        client.predict(["a dog"], list(range(1, 9)), list(range(9)), api_name="/sweep")


def test_api_documents_grids_with_types(client: Client) -> None:
    told = client.view_api(return_format="dict", print_info=False)["named_endpoints"]["/sweep"]
    types = {p["parameter_name"]: p["python_type"]["type"] for p in told["parameters"]}
    assert types == {"prompts": "list[str]", "steps": "list[int]", "seeds": "list[int]", "methods": "None | list[str]",
                     "guidance": "None | float", "negative_prompt": "str"}  # fmt: skip
    assert "at most 64" in told["description"]


def test_mcp_is_offered_only_when_asked_for_and_installed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert not ui._mcp()
    monkeypatch.setenv("GRADIO_MCP_SERVER", "True")
    monkeypatch.setattr(ui, "find_spec", lambda name: None)
    assert not ui._mcp()
    assert "pip install" in caplog.text
    monkeypatch.setattr(ui, "find_spec", lambda name: name)
    assert ui._mcp()


@pytest.mark.parametrize("given", [
    {"prompt": ""}, {"prompt": "x" * 5000}, {"prompt": 5}, {"prompt": None}, {"steps": 0}, {"steps": -1},
    {"steps": 10000}, {"steps": "a"}, {"steps": [4]}, {"seed": -1}, {"seed": 2**32}, {"methods": ["nope"]},
    {"methods": "base"}, {"methods": [[]]}, {"methods": []}, {"guidance": "much"}, {"negative_prompt": {}},
], ids=lambda given: str(given)[:30])  # fmt: skip
def test_api_explains_bad_input(client: Client, given: dict[str, Any]) -> None:
    with pytest.raises(AppError) as told:
        client.predict(**{"prompt": "a cat", **given}, api_name="/compare")
    text = str(told.value)
    assert any(word in text for word in ("prompt", "steps", "seed", "method", "guidance"))
    assert "Traceback" not in text
    assert ".py" not in text


def test_api_stops_when_cancelled() -> None:
    painter = Painter(0.05)
    with served(ui.build(painter, METHODS, credits="")) as app:
        client = Client(address(app), verbose=False)
        job = client.submit(prompt="a dog", steps=100, methods=["base"], api_name="/compare")
        eventually(lambda: painter.steps >= 2)
        job.cancel()
        eventually(lambda: painter.stops)
        client.close()
    assert painter.steps < 60


def test_a_crowd_gets_its_own_pictures_or_a_clear_busy(demo: gr.Blocks) -> None:
    fn = next(d["id"] for d in demo.config["dependencies"] if d["api_name"] == "compare")

    def call(seed: int) -> str:
        base = f"{address(demo)}gradio_api/queue/"
        asked = {
            "data": ["a cat", seed, 2, ["lcm"], None, "", False, None],
            "fn_index": fn,
            "session_hash": f"crowd{seed}",
        }
        joined = requests.post(f"{base}join", json=asked, timeout=30)
        if joined.status_code != 200:
            assert (joined.status_code, "queue is full" in joined.text.lower()) == (503, True)
            return "busy"
        seen = 0
        with requests.get(f"{base}data?session_hash=crowd{seed}", stream=True, timeout=30) as answers:
            for line in answers.iter_lines():
                told = json.loads(line.removeprefix(b"data:") or "{}")
                if told.get("msg") == "process_completed":
                    return "served" if told["success"] and seen else "lost"
                if told.get("msg") == "process_generating" and isinstance(told["output"]["data"][0], list):
                    for panel in told["output"]["data"][0]:
                        if isinstance(panel, dict):  # the first message is whole, later ones are differences
                            seen += 1
                            assert panel["provenance"] == {**paint(Request("a cat", seed, 2), "lcm").provenance()}
        return "lost"

    with ThreadPoolExecutor(50) as crowd:
        fates = list(crowd.map(call, range(50)))
    assert set(fates) <= {"served", "busy"}
    assert fates.count("served") >= 32
