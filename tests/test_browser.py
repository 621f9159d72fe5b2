"""A first-time visitor's path in a real browser: open, type, compare, look closely, take along, come back.

HYPERSD_SCREENSHOTS names a folder for the screenshots; without it they go to pytest's own. The two of the README are
taken by the slow test at the end.
"""

from __future__ import annotations

import io
import json
import os
import threading
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
from hypersd.engine import UNWATCHED, Coming, Drawing, Engine, Watch
from hypersd.records import Request
from hypersd.ui.prompts import EXAMPLES

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
    name: str = "desktop-light"
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
        self.leave()
        self.page.goto(url)
        self.page.wait_for_selector("#hs-go")
        self.page.wait_for_function("window.hypersd && window.hypersd.viewer")

    def leave(self) -> None:
        """Go from the page: that what it was still being sent broke off, it tells nobody who is there to read it."""
        self.page.evaluate("0")  # what it has complained of until now is heard
        heard = len(self.complaints)
        self.page.goto("about:blank")
        del self.complaints[heard:]

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
        """Keep a picture of the whole page, which has to fit the width of the screen."""
        self.page.screenshot(path=self.shots / f"{self.name}-{name}.png", full_page=True)
        assert self.fits()

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
def visiting(
    browser: Any, folder: Path, size: str = "desktop", scheme: str = "light", sharp: float = 1
) -> Iterator[Visit]:
    width, height = SIZES[size]
    shots = Path(os.environ.get("HYPERSD_SCREENSHOTS", folder))
    shots.mkdir(parents=True, exist_ok=True)
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, has_touch=size == "phone",
        permissions=["clipboard-read", "clipboard-write"], device_scale_factor=sharp,
    )  # fmt: skip
    context.set_default_timeout(60_000)
    visitor = Visit(context.new_page(), shots)
    yield visitor
    context.close()
    assert visitor.complaints == []
    assert visitor.abroad == []


@pytest.mark.parametrize("visit", [(s, c) for s in SIZES for c in ("light", "dark")], indirect=True, ids="-".join)
def test_the_whole_path(visit: Visit, request: pytest.FixtureRequest) -> None:
    """Open, type, compare, look closely, sweep, stop, go on, take along; then a restart, and the link again."""
    page, visit.name = visit.page, request.node.callspec.id
    painter = Painter(0.01, keep=True)
    with served(ui.build(painter, METHODS)) as app:
        visit.open(address(app))
        visit.shot("1-open")
        look_at_a_comparison(visit)
        taken = take_along(visit, "hypersd-seed-1.png")
        painter.seconds = 0.1  # slow enough that a sweep can be stopped half-way
        links = [taken, sweep_and_stop(visit)]
        port = app.server_port
        visit.leave()
    with served(ui.build(Painter(), METHODS), server_port=port):
        visit.open(links[0])
        visit.wait_for_panels(5)
        assert page.input_value("#hs-prompt textarea") == "a red apple, noto style"
        page.goto(links[1])  # opens on the sweep
        visit.wait_for_grid(22)
        page.click("#hs-past > button")  # the history of the first server's time is still there
        page.wait_for_selector(".hs-past-item")
        lines = page.locator(".hs-past-item small").all_inner_texts()
        assert lines == ["sweep of 24, 1, 2, 4 steps", "4 methods, 4 steps, seed 1"]
        page.click("#hs-credits > button")
        page.wait_for_selector("#hs-credits a >> text=Noto Emoji")
        visit.shot("9-history-and-credits")
        visit.leave()


def look_at_a_comparison(visit: Visit) -> None:
    page = visit.page
    page.fill("#hs-prompt textarea", "a red apple, noto style")
    page.press("#hs-prompt textarea", "Enter")
    page.wait_for_selector(DONE)
    visit.shot("2-first-panel")
    visit.wait_for_panels(5)
    visit.shot("3-done")
    assert "4 steps\n8 NFE" in visit.says(DONE)
    for mode in ("slider", "flip", "difference"):
        page.click(f"[data-mode={mode}]")
        page.wait_for_timeout(100)
        visit.shot(f"4-{mode}")
    page.keyboard.press("g")
    page.get_by_label("Zoom in").first.click(click_count=4)
    visit.shot("5-zoomed")
    assert page.locator("#hs-viewer .hs-zoomed").count() == 1
    page.keyboard.press("0")


def take_along(visit: Visit, sheet: str) -> str:
    """Download the contact sheet of what is open, and copy its link."""
    page = visit.page
    with page.expect_download() as got:
        page.locator("text=Contact sheet").locator("visible=true").click()
    assert got.value.suggested_filename == sheet
    with Image.open(got.value.path()) as image:
        assert json.loads(image.info[pictures.CHUNK])["panels"]
    page.locator("text=Copy link").locator("visible=true").click()
    page.wait_for_selector("text=Copied >> visible=true")
    return str(page.evaluate("navigator.clipboard.readText()"))


def sweep_and_stop(visit: Visit) -> str:
    """Draw half a grid, stop, draw the rest; the link to it."""
    page = visit.page
    page.get_by_role("tab", name="Sweep").click()
    page.wait_for_function("document.querySelector('#hs-sweep-prompts textarea')?.value === 'a red apple, noto style'")
    page.fill("#hs-sweep-steps input", "1, 2, 4")
    page.fill("#hs-sweep-seeds input", "1-2")
    page.wait_for_selector("#hs-sweep-cost >> text=/^18 pictures, 48 network calls.*; 4 pictures drawn before/")
    page.click("#hs-sweep-go")
    page.wait_for_selector(FILLED)
    page.click("#hs-sweep-stop")
    page.wait_for_selector("#hs-grid >> text=stopped")
    page.wait_for_selector("#hs-sweep-cost >> text=drawn before")
    visit.shot("6-sweep-stopped")
    page.click("#hs-sweep-go")
    visit.wait_for_grid(22)
    visit.shot("7-sweep")
    return take_along(visit, "hypersd-seed-1.png")


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


LEAVE = {
    "stop": lambda page: page.click("#hs-stop"),
    "escape": lambda page: page.keyboard.press("Escape"),
    "closing": lambda page: page.close(),
}


@pytest.mark.parametrize("how", LEAVE)
def test_stop_escape_and_closing_the_tab_stop_the_painter(
    visit: Visit, demo: gr.Blocks, painter: Painter, how: str
) -> None:
    painter.stops.clear()
    visit.open(address(demo))
    visit.page.fill("#hs-steps input", "100")
    visit.page.keyboard.press("Tab")
    visit.page.click("#hs-go")
    visit.page.wait_for_selector("text=/step [1-9]\\d* of 100/")
    LEAVE[how](visit.page)
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


@pytest.mark.parametrize("visit", [("phone", "light")], indirect=True)
def test_two_fingers_zoom_all_panels(visit: Visit, demo: gr.Blocks) -> None:
    page = visit.page
    visit.open(address(demo))
    visit.compare(5)
    page.locator(".hs-frame").first.scroll_into_view_if_needed()
    box = page.locator(".hs-frame").first.bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    hand = page.context.new_cdp_session(page)

    def touch(kind: str, *reaches: float) -> None:
        for reach in reaches:
            fingers = [{"x": middle[0] + side * reach, "y": middle[1], "id": i} for i, side in enumerate((-1, 1))]
            hand.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": fingers if reach else []})

    touch("touchStart", 15)
    touch("touchMove", 20, 30, 45)
    touch("touchEnd", 0)
    places = page.eval_on_selector_all(
        ".hs-frame > .hs-pic:first-child", "all => all.map(n => getComputedStyle(n).transform)"
    )
    assert len(set(places)) == 1
    assert float(places[0].split("(")[1].split(",")[0]) == pytest.approx(3, rel=0.05)
    assert page.evaluate("visualViewport.scale") == 1  # the pictures grow, the page does not
    touch("touchStart", 45)
    touch("touchMove", 30, 10)
    touch("touchEnd", 0)
    assert page.locator(".hs-zoomed").count() == 0


def test_a_method_that_cannot_says_what_it_can_and_one_press_draws_that(visit: Visit, demo: gr.Blocks) -> None:
    page = visit.page
    visit.open(address(demo))
    page.wait_for_function("hypersd.allowed.length")
    page.fill("#hs-steps input", "12")
    page.wait_for_selector("#hs-methods .hs-unable")
    assert page.locator("#hs-methods .hs-unable").all_inner_texts() == ["LCM", "TCD", "Hyper-SD"]
    assert page.locator("#hs-methods .hs-unable").nth(1).get_attribute("title") == "made for 2–8 steps"
    visit.compare(2)
    unable = page.locator("#hs-viewer [data-phase=unable]")
    assert unable.all_inner_texts() == [f"made for {n} steps\nCompare at 8\n{title}" for n, title in
                                        [("1–8", "LCM"), ("2–8", "TCD"), ("1–8", "Hyper-SD")]]  # fmt: skip
    visit.shot("unable")
    unable.nth(1).get_by_role("button").click()
    visit.wait_for_panels(5)
    assert page.input_value("#hs-steps input") == "8"
    assert page.locator("#hs-methods .hs-unable").count() == 0


def test_a_page_says_what_is_downloaded_until_it_is_there(visit: Visit) -> None:
    page, painter = visit.page, Painter(coming=Coming("Downloading Stable Diffusion 1.5: 1.2 of 4.3 GB", 0.28))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    with served(ui.build(painter, METHODS)) as app:
        visit.open(address(app))
        page.wait_for_selector("#hs-coming >> text=Downloading Stable Diffusion 1.5: 1.2 of 4.3 GB.")
        visit.shot("downloading")
        painter.coming = Coming("Downloading Stable Diffusion 1.5: 2.4 of 4.3 GB", 0.56)
        page.wait_for_selector("#hs-coming >> text=2.4 of 4.3 GB.")
        painter.coming = Coming("it could not be fetched; check the network. The next drawing tries again", failed=True)
        page.wait_for_selector("#hs-coming [role=status] >> text=It could not be fetched; check the network.")
        visit.shot("download-failed")
        painter.coming = None
        page.wait_for_selector("#hs-coming", state="hidden")
        asked.clear()
        page.wait_for_timeout(2500)
        assert asked == [], "and then it asks no more"
        visit.leave()


def test_a_panel_says_what_it_waits_for(visit: Visit) -> None:
    line = "Downloading LCM: 1.2 of 4.3 MB, then 2 more files, 538.0 MB"
    come = threading.Event()

    @dataclass
    class Waiting(Painter):
        def __call__(self, request: Request, method: str, watch: Watch = UNWATCHED) -> Drawing:
            watch.loading(line)
            come.wait(60)
            return super().__call__(request, method, watch)

    with served(ui.build(Waiting(), METHODS)) as app:
        visit.open(address(app))
        visit.page.click("#hs-go")
        visit.page.wait_for_selector(f"#hs-viewer .hs-card[data-phase=loading] >> text={line}")
        visit.shot("panel-downloading")
        come.set()
        visit.wait_for_panels(5)
        visit.leave()


def test_a_waiting_page_moves_nothing_and_a_step_changes_little(
    visit: Visit, demo: gr.Blocks, painter: Painter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(painter, "seconds", 0.3)  # no panel begins or ends while it is watched
    page = visit.page
    visit.open(address(demo))
    page.click("#hs-go")
    page.wait_for_selector("text=/step [2-9] of 25/")
    counted = page.evaluate("""async () => {
        let updates = 0, changes = 0;
        const viewer = hypersd.viewer, update = viewer.update.bind(viewer);
        viewer.update = (state) => { updates += 1; update(state); };
        const seen = new MutationObserver((list) => (changes += list.length));
        seen.observe(viewer.stage, { subtree: true, childList: true, attributes: true, characterData: true });
        await new Promise((go) => setTimeout(go, 600));
        seen.disconnect();
        return { updates, changes, animations: document.getAnimations().length };
    }""")
    painter.seconds = 0
    assert counted["animations"] == 0
    assert 1 <= counted["updates"] <= 6
    assert counted["changes"] <= 3 * counted["updates"]  # a name, a text and a length; never a new element
    visit.wait_for_panels(5)


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
    expected = paint(Request(EXAMPLES[0], 1, 4), "lcm")
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
        visit.leave()
    with served(ui.build(Painter(), METHODS, credits=""), server_port=port):
        visit.open(link)
        visit.wait_for_panels(4)
        assert page.input_value("#hs-prompt textarea") == "a blue & green fish?"
        assert page.input_value("#hs-seed input") == "77"
        assert page.input_value("#hs-steps input") == "2"
        assert not page.locator("#hs-methods").get_by_label("Hyper-SD", exact=True).is_checked()
        assert page.locator(DONE).first.inner_text() == before
        visit.leave()


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
        page.wait_for_timeout(500)  # gradio takes no click while the last answer is under way; no hand is so quick
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
    page.wait_for_function("document.querySelector('#hs-prompt textarea').value !== '" + EXAMPLES[0] + "'")
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


def test_a_negative_prompt_brings_the_field_for_methods_without_guidance(visit: Visit, demo: gr.Blocks) -> None:
    page = visit.page
    visit.open(address(demo))
    page.click("#hs-more > button")
    page.wait_for_selector("#hs-negative textarea", state="visible")
    assert not page.is_visible("#hs-nag")
    page.fill("#hs-negative textarea", "red")
    page.wait_for_selector("#hs-nag input", state="visible")
    page.fill("#hs-nag input", "4")
    visit.compare(5)
    facts = page.evaluate("[...document.querySelectorAll('.hs-fine')].map(line => line.textContent)")
    assert ["NAG 4" in line for line in facts] == [False, True, True, True, False]
    visit.open(page.url)  # a link that draws the same again
    page.click("#hs-more > button")
    page.wait_for_selector("#hs-nag input", state="visible")
    assert page.input_value("#hs-nag input") == "4"
    visit.compare(5)  # by now what the link says has come to all fields, and overwrites nothing that is typed
    page.fill("#hs-negative textarea", "")
    page.wait_for_selector("#hs-nag", state="hidden")


@pytest.mark.parametrize("visit", [("phone", "dark")], indirect=True)
def test_a_grid_names_its_rows_and_columns_wherever_it_is_scrolled(visit: Visit, demo: gr.Blocks) -> None:
    page = visit.page
    visit.open_sweep(address(demo))
    page.fill("#hs-sweep-steps input", "1, 2, 4")
    page.fill("#hs-sweep-seeds input", "1-2")
    page.press("#hs-sweep-seeds input", "Enter")
    visit.wait_for_grid(22)
    assert page.locator("#hs-grid thead th").all_inner_texts() == ["1 step", "2 steps", "4 steps"]
    names = [f"{row.title}\nseed {seed}" for seed in (1, 2) for row in METHODS.values()]
    assert page.locator("#hs-grid tbody th").all_inner_texts() == names
    assert page.locator("#hs-grid [data-phase=unable]").first.inner_text() == "made for 2–8 steps"
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


def test_a_sweep_in_the_history_is_drawn_again(visit: Visit, demo: gr.Blocks) -> None:
    page = visit.page
    visit.open_sweep(address(demo))
    page.fill("#hs-sweep-prompts textarea", "a blue fish\na red & green cat?")
    page.fill("#hs-sweep-steps input", "8, 2")
    page.locator("#hs-sweep-methods").get_by_label("TCD", exact=True).uncheck()
    page.locator("body").click(position={"x": 3, "y": 3})
    page.keyboard.press("c")
    visit.wait_for_grid(12)
    page.get_by_role("tab", name="Compare").click()
    page.click("#hs-past > button")
    page.get_by_text("a blue fish and 1 more").click()
    page.wait_for_selector("#hs-sweep-go")
    visit.wait_for_grid(12)
    assert page.input_value("#hs-sweep-prompts textarea") == "a blue fish\na red & green cat?"
    assert page.input_value("#hs-sweep-steps input") == "2,8"
    assert page.input_value("#hs-prompt textarea") == EXAMPLES[0]


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


LOOKS = {
    "screen-desktop": ("desktop", "light", 1.5, "prompt=blue+heart,+twemoji+style&seed=0&steps=4", "#hs-header"),
    "screen-phone": ("phone", "dark", 2, "prompts=blue+heart,+twemoji+style&seeds=0&steps=1,2,4,8", "#hs-grid"),
}


@pytest.mark.slow
def test_the_real_model_sits_for_the_readme(browser: Any, tmp_path: Path) -> None:
    """`HYPERSD_SCREENSHOTS=assets python -m pytest -m slow tests/test_browser.py` takes the README's screenshots."""
    from hypersd.backbone import Backbone
    from hypersd.methods import installed

    real = installed("emoji")
    with served(ui.build(Engine(lambda: Backbone.load("emoji"), real), real)) as app:
        for name, (size, scheme, sharp, query, top) in LOOKS.items():
            with visiting(browser, tmp_path, size, scheme, sharp) as visitor:
                page = visitor.page
                page.goto(f"{address(app)}?{query}")
                page.wait_for_selector(".hs-card[data-phase=done]", timeout=300_000)
                page.wait_for_function("!document.body.matches('.hs-running, .hs-sweeping')", timeout=300_000)
                page.evaluate("top => document.querySelector(top).scrollIntoView()", top)
                page.evaluate("document.activeElement.blur()")
                page.screenshot(path=visitor.shots / f"{name}.png")
                with Image.open(visitor.shots / f"{name}.png") as shot:
                    few = shot.convert("RGB").quantize(256, Image.Quantize.MEDIANCUT)
                few.save(visitor.shots / f"{name}.png", optimize=True)
                assert (visitor.shots / f"{name}.png").stat().st_size < 400_000
                visitor.leave()
