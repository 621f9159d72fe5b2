"""A first-time visitor's path in a real browser: open, type, compare, look closely, take along, come back.

HYPERSD_SCREENSHOTS names a folder for the screenshots; without it they go to pytest's own.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from fake import Painter, address, eventually, no_loops_left, paint, served
from PIL import Image
from rows import METHODS

from hypersd import pictures, ui
from hypersd.records import Request

CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))
if not CHROMIUM.exists():
    pytest.skip(f"there is no browser at {CHROMIUM}; install chromium or set CHROMIUM", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings(
        "ignore::ResourceWarning",
        "ignore::pytest.PytestUnraisableExceptionWarning",
        "ignore::pandas.errors.Pandas4Warning",
    ),
]
__all__ = ["no_loops_left"]  # a fixture that runs by itself
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
DONE = "#hs-viewer .hs-card[data-phase=done]"
FILLED = "#hs-grid .hs-card[data-phase=done]"


@pytest.fixture(scope="module")
def painter() -> Painter:
    return Painter(0.01)


@pytest.fixture(scope="module")
def demo(painter: Painter) -> Iterator[gr.Blocks]:
    with served(ui.build(painter, METHODS)) as app:
        yield app


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        chromium = driver.chromium.launch(executable_path=str(CHROMIUM), args=flags)
        yield chromium
        chromium.close()


@dataclass
class Visit:
    """One page, with everything it complained about and everything it asked of others."""

    page: Any
    shots: Path
    complaints: list[str] = field(default_factory=list)
    abroad: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda asked: self._left(asked.url))

    def _left(self, url: str) -> None:
        if not url.startswith(("http://127.0.0.1", "data:", "blob:")):
            self.abroad.append(url)

    def open(self, url: str) -> None:
        self.page.goto(url)
        self.page.wait_for_selector("#hs-go")
        self.page.wait_for_function("window.hypersd && window.hypersd.viewer")

    def compare(self, count: int) -> None:
        self.page.click("#hs-go")
        self.wait_for_panels(count)

    def wait_for_panels(self, count: int) -> None:
        self.page.wait_for_function(
            f"document.querySelectorAll('{DONE}').length === {count} && !document.body.matches('.hs-running')"
        )

    def open_sweep(self, url: str) -> None:
        self.open(url)
        self.page.get_by_role("tab", name="Sweep").click()
        self.page.wait_for_selector("#hs-sweep-go")

    def wait_for_grid(self, count: int) -> None:
        self.page.wait_for_function(
            f"document.querySelectorAll('{FILLED}').length === {count} && !document.body.matches('.hs-sweeping')"
        )

    def shot(self, name: str) -> None:
        self.page.screenshot(path=self.shots / f"{name}.png", full_page=True)

    def says(self, selector: str) -> str:
        return str(self.page.inner_text(selector))

    def fits(self) -> bool:
        return bool(self.page.evaluate("document.documentElement.scrollWidth <= innerWidth"))


@pytest.fixture
def visit(browser: Any, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Visit]:
    size, scheme = getattr(request, "param", ("desktop", "light"))
    with visiting(browser, tmp_path, size, scheme) as visitor:
        yield visitor


@pytest.fixture(scope="module")
def compared(browser: Any, demo: gr.Blocks, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visit]:
    """One page with a finished comparison, for all tests that only look at it."""
    with visiting(browser, tmp_path_factory.mktemp("shots")) as visitor:
        visitor.open(address(demo))
        visitor.compare(5)
        yield visitor


@pytest.fixture
def viewer(compared: Visit) -> Visit:
    compared.page.evaluate("hypersd.viewer.fit(); hypersd.viewer.setMode('grid'); document.activeElement.blur()")
    return compared


@contextmanager
def visiting(browser: Any, folder: Path, size: str = "desktop", scheme: str = "light") -> Iterator[Visit]:
    width, height = SIZES[size]
    shots = Path(os.environ.get("HYPERSD_SCREENSHOTS", folder))
    shots.mkdir(parents=True, exist_ok=True)
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, has_touch=size == "phone",
        permissions=["clipboard-read", "clipboard-write"],
    )  # fmt: skip
    context.set_default_timeout(60_000)
    visitor = Visit(context.new_page(), shots)
    yield visitor
    context.close()
    assert visitor.complaints == []
    assert visitor.abroad == []


@pytest.mark.parametrize("visit", [(s, c) for s in SIZES for c in ("light", "dark")], indirect=True, ids="-".join)
def test_the_whole_path(visit: Visit, demo: gr.Blocks, request: pytest.FixtureRequest) -> None:
    page, name = visit.page, request.node.callspec.id
    visit.open(address(demo))
    visit.shot(f"{name}-1-open")
    assert visit.fits()
    page.fill("#hs-prompt textarea", "a red apple, noto style")
    page.press("#hs-prompt textarea", "Enter")
    page.wait_for_selector(DONE)
    visit.shot(f"{name}-2-first-panel")
    visit.wait_for_panels(5)
    visit.shot(f"{name}-3-done")
    assert visit.fits()
    assert "4 steps\n8 NFE" in visit.says(DONE)
    for mode in ("slider", "flip", "difference"):
        page.click(f"[data-mode={mode}]")
        page.wait_for_timeout(150)
        visit.shot(f"{name}-4-{mode}")
        assert visit.fits()
    page.click("[data-mode=grid]")
    page.get_by_label("Zoom in").click(click_count=4)
    visit.shot(f"{name}-5-zoomed")
    page.click("#hs-past > button")
    page.wait_for_selector(".hs-past-item")
    page.click("#hs-credits > button")
    page.wait_for_selector("#hs-credits a >> text=Noto Emoji")
    visit.shot(f"{name}-6-history-and-credits")
    assert visit.fits()


def test_the_first_panel_is_there_before_the_last(
    visit: Visit, demo: gr.Blocks, painter: Painter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(painter, "seconds", 0.05)
    visit.open(address(demo))
    visit.page.click("#hs-go")
    visit.page.wait_for_selector(DONE)
    assert visit.page.locator(DONE).count() < 5
    visit.page.wait_for_selector("text=/step \\d+ of 25/")
    visit.wait_for_panels(5)


def test_stop_and_closing_the_tab_stop_the_painter(visit: Visit, demo: gr.Blocks, painter: Painter) -> None:
    for leave in (lambda: visit.page.click("#hs-stop"), lambda: visit.page.keyboard.press("Escape"),
                  lambda: visit.page.close()):  # fmt: skip
        painter.stops.clear()
        visit.open(address(demo))
        visit.page.fill("#hs-steps input", "100")
        visit.page.keyboard.press("Tab")
        visit.page.click("#hs-go")
        visit.page.wait_for_selector("text=/step [1-9]\\d* of 100/")
        leave()
        eventually(lambda: painter.stops, 10)
        if not visit.page.is_closed():
            visit.page.wait_for_selector("text=stopped")
            assert visit.page.is_visible("#hs-go")
            assert visit.page.input_value("#hs-steps input") == "100"


def test_zoom_and_position_are_shared(viewer: Visit) -> None:
    page = viewer.page
    page.locator(".hs-frame").nth(1).dblclick(position={"x": 20, "y": 20})
    places = page.eval_on_selector_all(
        ".hs-frame > .hs-pic:first-child", "all => all.map(n => getComputedStyle(n).transform)"
    )
    assert len(set(places)) == 1
    assert places[0].startswith("matrix(4, 0, 0, 4")
    assert page.locator(".hs-crisp").count() == 1
    assert page.eval_on_selector(".hs-pic", "n => getComputedStyle(n).imageRendering") == "pixelated"
    page.keyboard.press("ArrowRight")
    moved = page.eval_on_selector(".hs-pic", "n => getComputedStyle(n).transform")
    assert moved != places[0]
    page.keyboard.press("0")
    assert page.eval_on_selector(".hs-pic", "n => getComputedStyle(n).transform") == "matrix(1, 0, 0, 1, 0, 0)"
    box = page.locator(".hs-frame").first.bounding_box()
    page.mouse.move(box["x"] + 10, box["y"] + 10)
    page.keyboard.down("Control")
    page.mouse.wheel(0, -200)
    page.keyboard.up("Control")
    page.wait_for_function("document.querySelector('.hs-zoomed')")


def test_holding_space_shows_the_other_picture(viewer: Visit) -> None:
    page = viewer.page
    page.keyboard.press("f")
    page.locator("body").click(position={"x": 3, "y": 3})
    assert not page.is_visible(".hs-other")
    page.keyboard.down(" ")
    assert page.is_visible(".hs-other")
    assert "25 steps" in viewer.says(".hs-corner")
    page.keyboard.up(" ")
    assert not page.is_visible(".hs-other")
    assert "4 steps" in viewer.says(".hs-corner")


def test_the_slider_follows_hand_and_keys(viewer: Visit) -> None:
    page = viewer.page
    page.keyboard.press("s")
    box = page.locator(".hs-frame").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.25, box["y"] + 50)
    assert page.eval_on_selector(".hs-handle", "n => Math.round(n.value)") == 25
    page.focus(".hs-handle")
    page.keyboard.press("ArrowRight")
    assert page.eval_on_selector(".hs-cut", "n => getComputedStyle(n).clipPath").startswith("inset(0px 0px 0px ")
    assert page.eval_on_selector(".hs-handle", "n => Math.round(n.value)") == 26


def test_the_difference_map_is_dark_where_panels_agree(viewer: Visit) -> None:
    page = viewer.page
    page.keyboard.press("d")
    page.wait_for_function("[...document.querySelectorAll('canvas')].every(c => c.width === 64)")
    pixel = "(c, [x, y]) => [...c.getContext('2d').getImageData(x, y, 1, 1).data]"
    assert page.locator("canvas").first.evaluate(pixel, [0, 0]) == [8, 8, 16, 255]  # both white
    assert sum(page.locator("canvas").first.evaluate(pixel, [32, 32])[:3]) > 60  # two colours
    assert "MAE" in viewer.says(".hs-numbers")
    page.get_by_label("Against").select_option("0")
    assert page.locator("canvas").count() == 4
    assert page.locator(".hs-card").first.locator("canvas").count() == 0


def test_downloads_carry_metadata_or_not(viewer: Visit) -> None:
    page = viewer.page
    with page.expect_download() as first:
        page.get_by_label("Download LCM, 4 steps as PNG").click()
    assert first.value.suggested_filename == "lcm-4-steps-seed-1.png"
    expected = paint(Request("a happy cat, fluent style", 1, 4), "lcm")
    assert pictures.read_png(first.value.path()) == expected
    page.get_by_label("metadata").uncheck()
    with page.expect_download() as second:
        page.get_by_label("Download LCM, 4 steps as PNG").click()
    with Image.open(second.value.path()) as bare:
        assert bare.info == {}
        assert bare.tobytes() == expected.pixels
    page.get_by_label("metadata").check()
    with page.expect_download() as third:
        page.get_by_text("Contact sheet").click()
    with page.expect_download() as fourth:
        page.get_by_text("JSON").click()
    with Image.open(io.BytesIO(third.value.path().read_bytes())) as sheet:
        assert json.loads(sheet.info[pictures.CHUNK]) == json.loads(fourth.value.path().read_text(encoding="utf-8"))
        assert sheet.width > 5 * 256
        sheet.save(viewer.shots / "contact-sheet.png")


def test_a_copied_link_draws_the_same_after_a_restart(visit: Visit) -> None:
    page = visit.page
    with served(ui.build(Painter(), METHODS, credits="")) as app:
        visit.open(address(app))
        page.fill("#hs-prompt textarea", "a blue & green fish?")
        page.fill("#hs-seed input", "77")
        page.locator("#hs-methods").get_by_label("Hyper-SD", exact=True).uncheck()
        page.locator("#hs-quick").get_by_text("2", exact=True).click()
        visit.compare(4)
        page.get_by_text("Copy link").click()
        page.wait_for_selector("text=Copied")
        link = page.evaluate("navigator.clipboard.readText()")
        before = page.locator(DONE).first.inner_text()
        port = app.server_port
        page.goto("about:blank")
    with served(ui.build(Painter(), METHODS, credits=""), server_port=port):
        visit.open(link)
        visit.wait_for_panels(4)
        assert page.input_value("#hs-prompt textarea") == "a blue & green fish?"
        assert page.input_value("#hs-seed input") == "77"
        assert page.input_value("#hs-steps input") == "2"
        assert not page.locator("#hs-methods").get_by_label("Hyper-SD", exact=True).is_checked()
        assert page.locator(DONE).first.inner_text() == before
        page.click("#hs-past > button")  # the history of the first server's time is still there
        assert "a blue & green fish?" in visit.says(".hs-past-item")
        page.goto("about:blank")


def test_bad_input_is_answered_calmly_and_nothing_is_lost(visit: Visit, demo: gr.Blocks) -> None:
    page = visit.page
    visit.open(address(demo))
    visit.compare(5)
    long = "x" * 5000
    for selector, value, sentence in [
        ("#hs-prompt textarea", "", "Prompt is empty"),
        ("#hs-prompt textarea", long, "Prompt has 5,000 characters"),
        ("#hs-steps input", "10000", "Steps must be a whole number"),
        ("#hs-seed input", "-1", "Seed must be a whole number"),
    ]:
        before = page.input_value(selector)
        page.fill(selector, value)
        page.click("#hs-go")
        page.wait_for_selector(f"#hs-notice >> text={sentence}")
        page.wait_for_function("!document.body.matches('.hs-running')")
        assert page.input_value(selector) == value
        assert page.locator(DONE).count() == 5
        if value == "10000":
            visit.shot("bad-input")
        page.fill(selector, before)
    visit.compare(5)
    assert not page.is_visible("#hs-notice")


def test_keys_work_and_leave_typing_alone(visit: Visit, demo: gr.Blocks) -> None:
    page = visit.page
    visit.open(address(demo))
    page.locator("body").click(position={"x": 3, "y": 3})
    page.keyboard.press("r")
    page.wait_for_function("document.querySelector('#hs-prompt textarea').value !== 'a happy cat, fluent style'")
    page.keyboard.press("n")
    page.wait_for_function("document.querySelector('#hs-seed input').value !== '1'")
    page.keyboard.press("/")
    page.keyboard.type(" nrtc")
    assert page.input_value("#hs-prompt textarea").endswith(" nrtc")
    page.keyboard.press("Escape")
    page.keyboard.press("t")
    assert page.evaluate("document.body.matches('.dark')")
    page.keyboard.press("?")
    assert page.is_visible(".hs-keys")
    visit.shot("keys")
    page.keyboard.press("Escape")
    page.keyboard.press("t")
    page.keyboard.press("c")
    visit.wait_for_panels(5)


def test_the_strip_of_steps_can_be_looked_through(visit: Visit, demo: gr.Blocks) -> None:
    page = visit.page
    visit.open(address(demo))
    page.click("#hs-more > button")
    page.get_by_label("Show every step").check()
    visit.compare(5)
    visit.shot("strip")
    assert page.locator(".hs-card").first.locator(".hs-trail button").count() == 4
    picture = page.locator(".hs-card").first.locator(".hs-frame .hs-pic").first
    final = picture.get_attribute("src")
    page.get_by_label("Step 2 of 4").first.focus()
    assert picture.get_attribute("src") != final
    page.get_by_label("Step 2 of 4").first.blur()
    assert picture.get_attribute("src") == final


@pytest.mark.parametrize("visit", [(s, c) for s in SIZES for c in ("light", "dark")], indirect=True, ids="-".join)
def test_a_sweep_is_priced_drawn_and_scrolled(visit: Visit, demo: gr.Blocks, request: pytest.FixtureRequest) -> None:
    page, name = visit.page, request.node.callspec.id
    visit.open_sweep(address(demo))
    page.fill("#hs-sweep-steps input", "1, 2, 4")
    page.fill("#hs-sweep-seeds input", "1-2")
    page.wait_for_selector("#hs-sweep-cost >> text=/^22 pictures, 68 network calls/")
    page.click("#hs-sweep-go")
    visit.wait_for_grid(22)
    visit.shot(f"{name}-7-sweep")
    assert visit.fits()
    assert page.locator("#hs-grid thead th").all_inner_texts() == ["1 step", "2 steps", "4 steps"]
    names = [f"{row.title}\nseed {seed}" for seed in (1, 2) for row in METHODS.values()]
    assert page.locator("#hs-grid tbody th").all_inner_texts() == names
    assert "tcd was made for 2-8 steps, got 1" in page.locator("#hs-grid [data-phase=problem]").first.inner_text()
    box = page.locator(".hs-lattice")
    box.evaluate("n => n.scrollTo(200, 300)")
    frame = box.bounding_box()
    heads = [page.locator(f"#hs-grid {head}").last.bounding_box() for head in ("thead th", "tbody th")]
    assert heads[0]["y"] == pytest.approx(frame["y"] + 1, abs=2)  # in sight, however far it is scrolled
    assert heads[1]["x"] == pytest.approx(frame["x"] + 1, abs=2)
    page.get_by_label("Zoom in").last.click(click_count=3)
    places = page.eval_on_selector_all(f"{FILLED} .hs-pic", "all => all.map(n => getComputedStyle(n).transform)")
    assert len(set(places)) == 1
    assert places[0] != "matrix(1, 0, 0, 1, 0, 0)"


def test_a_stopped_sweep_goes_on_and_its_link_draws_it_again_after_a_restart(visit: Visit) -> None:
    page = visit.page
    with served(ui.build(Painter(0.1, keep=True), METHODS, credits="")) as app:
        visit.open_sweep(address(app))
        page.fill("#hs-sweep-prompts textarea", "a blue fish\na red & green cat?")
        page.fill("#hs-sweep-steps input", "8, 2")
        page.locator("#hs-sweep-methods").get_by_label("TCD", exact=True).uncheck()
        page.locator("body").click(position={"x": 3, "y": 3})
        page.keyboard.press("c")
        page.wait_for_function(f"document.querySelectorAll('{FILLED}').length >= 4")
        first = page.locator("#hs-grid .hs-card").evaluate_all("all => all.map(n => n.dataset.phase)")
        assert first[:4] == ["done"] * 4  # row by row
        page.keyboard.press("Escape")
        page.wait_for_selector("#hs-grid >> text=stopped")
        page.wait_for_selector("#hs-sweep-cost >> text=drawn before")
        assert page.locator(FILLED).count() < 12
        page.click("#hs-sweep-go")
        visit.wait_for_grid(12)
        with page.expect_download() as sheet:
            page.get_by_text("Contact sheet").last.click()
        with page.expect_download() as facts:
            page.get_by_text("JSON").last.click()
        known = json.loads(facts.value.path().read_text(encoding="utf-8"))
        with Image.open(sheet.value.path()) as image:
            assert json.loads(image.info[pictures.CHUNK]) == known
            image.save(visit.shots / "sweep-sheet.png")
        assert [panel["steps"] for panel in known["panels"]] == [2, 8] * 6
        page.get_by_text("Copy link").last.click()
        link = page.evaluate("navigator.clipboard.readText()")
        port = app.server_port
        page.goto("about:blank")
    with served(ui.build(Painter(), METHODS, credits=""), server_port=port):
        page.goto(link)  # opens on the sweep
        visit.wait_for_grid(12)
        assert page.input_value("#hs-sweep-prompts textarea") == "a blue fish\na red & green cat?"
        assert page.input_value("#hs-sweep-steps input") == "2,8"
        assert not page.locator("#hs-sweep-methods").get_by_label("TCD", exact=True).is_checked()
        page.goto("about:blank")


def test_a_sweep_that_cannot_be_is_answered_calmly(visit: Visit, demo: gr.Blocks) -> None:
    page = visit.page
    visit.open_sweep(address(demo))
    page.fill("#hs-sweep-seeds input", "1-40")
    page.wait_for_selector("#hs-sweep-cost >> text=/at most 64 are allowed/")
    page.click("#hs-sweep-go")
    page.wait_for_selector("#hs-sweep-notice >> text=/at most 64 are allowed/")
    page.wait_for_function("!document.body.matches('.hs-sweeping')")
    assert page.input_value("#hs-sweep-seeds input") == "1-40"


def test_everything_has_a_name(viewer: Visit) -> None:
    nameless = viewer.page.evaluate("""() =>
        [...document.querySelectorAll(['button', 'input', 'select', 'textarea'].map(tag => `main ${tag}`).join())]
        .filter(n => n.offsetParent && !(n.innerText?.trim() || n.ariaLabel || n.title || n.labels?.length))
        .map(n => n.outerHTML.slice(0, 120))""")
    assert nameless == []
    assert viewer.page.locator(".hs-viewer [role=img]:not([aria-label])").count() == 0
