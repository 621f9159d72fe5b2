"""An annotator in a real browser: by keys, on a phone, with a reload, two tabs, a double click, a tab that closes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import gradio as gr
import pytest
import sqlalchemy as sa
from booth import ARMS, memory, small
from fake import Painter, address, eventually, no_loops_left, served
from rows import METHODS
from test_browser import Visit, browser, visit

from hypersd import ui
from hypersd.pool import Pool
from hypersd.study.ballots import items_of
from hypersd.study.schema import event, vote
from hypersd.study.votes import Answer

__all__ = ["browser", "memory", "no_loops_left", "visit"]  # fixtures
pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings(
        "ignore::ResourceWarning",
        "ignore::pytest.PytestUnraisableExceptionWarning",
        "ignore::pandas.errors.Pandas4Warning",
    ),
]
OPEN = "[data-choice=left]:not([aria-disabled])"
BALLOTS = 5


@pytest.fixture(scope="module")
def booth(memory: Any) -> Pool:
    return small(memory, ballots=BALLOTS, minimum_dwell_ms=150)


@pytest.fixture(scope="module")
def demo(booth: Pool) -> Iterator[gr.Blocks]:
    with served(ui.build(Painter(), METHODS, credits="", pool=booth)) as app:
        yield app


def stored(booth: Pool) -> list[str]:
    return booth.store.read(lambda c: list(c.scalars(sa.select(vote.c.choice).order_by(vote.c.seq))))


def arrive(visit: Visit, demo: gr.Blocks) -> None:
    """Open, agree, practise, and stand before the first pair."""
    page = visit.page
    page.goto(f"{address(demo)}?study")
    page.click("text=I agree, begin")
    page.click("text=Practise with 1 pair")
    page.wait_for_selector(OPEN)
    page.keyboard.press("1")
    page.click("text=Go on")
    page.click("text=Start")
    stands_at(visit, 1)


def stands_at(visit: Visit, number: int) -> None:
    visit.page.wait_for_selector(f".hs-study-count >> text=/^{number} of {BALLOTS}$/")
    visit.page.wait_for_selector(OPEN)


@pytest.mark.parametrize("visit", [("desktop", "light"), ("phone", "dark")], indirect=True, ids="-".join)
def test_a_whole_session(visit: Visit, demo: gr.Blocks, booth: Pool, request: pytest.FixtureRequest) -> None:
    page, before, name = visit.page, len(stored(booth)), request.node.callspec.id
    told: list[str] = []
    page.on("response", lambda answer: told.append(answer.text()) if "component_server" in answer.url else None)
    arrive(visit, demo)
    for number, key in enumerate("1209", 1):
        stands_at(visit, number)
        boxes = [page.locator(".hs-study-frame").nth(n).bounding_box() for n in (0, 1)]
        assert boxes[0]["width"] == boxes[1]["width"] and boxes[0]["y"] == boxes[1]["y"], "side by side, equally large"
        assert visit.fits()
        visit.shot(f"study-{name}-{number}")
        page.keyboard.press(key) if "desktop" in name else page.tap(f"[data-choice] >> nth={number - 1}")
        page.wait_for_selector("[data-tone=good] >> text=Saved")
    stands_at(visit, 5)
    words = re.sub(r"data:image/png;base64,[^\"]*", "", page.content() + "".join(told))
    hidden = {word for one in items_of(booth.store).values() for word in (one.id, one.image_sha256, one.noise_sha256)}
    assert not [word for word in {*ARMS, "base@1", *hidden} if word in words], "neither page nor answers tell the arms"
    page.click("[data-choice=both_bad]")
    page.wait_for_selector("text=That was the last pair")
    assert page.locator(".hs-study-receipt code").inner_text() == page.input_value(".hs-study-own input")
    page.click("text=What you compared")
    assert any(arm in visit.says(".hs-study-told") for arm in ARMS)
    visit.shot(f"study-{name}-end")

    assert stored(booth)[before:] == ["left", "right", "tie", "both_bad", "both_bad"]
    page.get_by_role("tab", name="Results").click()
    page.wait_for_selector("text=How far to trust this")
    assert visit.fits()
    visit.shot(f"results-{name}")


def test_a_reload_goes_on_where_it_was_and_undo_goes_back(visit: Visit, demo: gr.Blocks, booth: Pool) -> None:
    page, before = visit.page, len(stored(booth))
    arrive(visit, demo)
    first = page.get_attribute(".hs-study-picture", "src")
    page.keyboard.press("1")
    stands_at(visit, 2)
    second = page.get_attribute(".hs-study-picture", "src")
    page.reload()
    stands_at(visit, 2)
    assert page.get_attribute(".hs-study-picture", "src") == second
    page.keyboard.press("u")
    stands_at(visit, 1)
    assert page.get_attribute(".hs-study-picture", "src") == first and "Taken back" in visit.says(".hs-study-note")
    page.keyboard.press("2")
    stands_at(visit, 2)
    page.keyboard.press("s")
    page.wait_for_selector("text=Skipped")
    stands_at(visit, 2)
    page.keyboard.press("z")
    assert page.locator(".hs-zoomed").count() == 1
    page.keyboard.press("ArrowRight")
    assert page.eval_on_selector(".hs-study-pair", "n => n.style.getPropertyValue('--x')") == "58%"
    page.keyboard.press("0")
    stands_at(visit, 3)
    assert stored(booth)[before:] == ["left", "right", "tie"]
    zoomed = booth.store.read(lambda c: list(c.scalars(sa.select(vote.c.zoomed).order_by(vote.c.seq.desc()).limit(2))))
    assert zoomed == [1, 0]


def test_voting_is_closed_until_both_pictures_were_there_for_a_while(
    visit: Visit, demo: gr.Blocks, booth: Pool
) -> None:
    page, before = visit.page, len(stored(booth))
    arrive(visit, demo)
    page.click("[data-choice=left]", click_count=2, delay=5)  # the second click meets the next pair, which is closed
    stands_at(visit, 2)
    for _ in range(3):
        page.keyboard.press("1")
    stands_at(visit, 3)
    page.wait_for_timeout(200)
    assert stored(booth)[before:] == ["left", "left"]
    assert page.evaluate("document.querySelector('.hs-study-vote').contains(document.activeElement)") is False
    page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_two_tabs_are_one_annotator(visit: Visit, demo: gr.Blocks, booth: Pool) -> None:
    page, before = visit.page, len(stored(booth))
    arrive(visit, demo)
    other = Visit(page.context.new_page(), visit.shots)
    other.page.goto(f"{address(demo)}?study")
    stands_at(other, 1)
    page.keyboard.press("1")
    stands_at(visit, 2)
    other.page.keyboard.press("2")  # the same ballot, answered already
    other.page.wait_for_selector("text=You already voted: left.")
    stands_at(other, 2)
    other.page.keyboard.press("2")
    stands_at(other, 3)
    page.keyboard.press("2")
    page.wait_for_selector("text=Saved")
    stands_at(visit, 3)
    assert stored(booth)[before:] == ["left", "right"]
    assert other.complaints == []


def test_a_double_click_is_one_vote_and_back_leaves_it(visit: Visit, demo: gr.Blocks, booth: Pool) -> None:
    page, before = visit.page, len(stored(booth))
    arrive(visit, demo)
    page.dblclick("[data-choice=right]")
    stands_at(visit, 2)
    assert stored(booth)[before:] == ["right"]
    page.goto(address(demo))
    page.wait_for_selector("role=tab[name=Study]")
    page.go_back()
    stands_at(visit, 2)
    assert stored(booth)[before:] == ["right"], "going back takes nothing back and votes for nothing"


def test_a_tab_closed_right_after_the_click_has_voted(visit: Visit, demo: gr.Blocks, booth: Pool) -> None:
    before = len(stored(booth))
    arrive(visit, demo)
    visit.page.evaluate("document.querySelector('[data-choice=tie]').click()")
    visit.page.close()
    eventually(lambda: stored(booth)[before:] == ["tie"], 10)


def test_not_saved_is_said_and_trying_again_is_safe(
    visit: Visit, demo: gr.Blocks, booth: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, before = visit.page, len(stored(booth))
    arrive(visit, demo)
    picture = page.get_attribute(".hs-study-picture", "src")
    with monkeypatch.context() as patched:
        patched.setattr(booth.desk, "answer", lambda *_, **__: Answer("failed", "Not saved: the disk is full."))
        page.keyboard.press("1")
        page.wait_for_selector("[data-tone=bad] >> text=Not saved: the disk is full.")
    page.context.set_offline(True)
    page.keyboard.press("1")
    page.wait_for_selector("[data-tone=bad] >> text=Not saved, try again")
    visit.shot("study-not-saved")
    assert page.get_attribute(".hs-study-picture", "src") == picture
    page.context.set_offline(False)
    page.click("[data-tone=bad] >> text=Try again >> nth=-1")
    page.wait_for_selector("[data-tone=good] >> text=Saved")
    assert stored(booth)[before:] == ["left"]
    visit.complaints[:] = [said for said in visit.complaints if "ERR_INTERNET_DISCONNECTED" not in said]


def test_withdrawing_erases_and_forgets(visit: Visit, demo: gr.Blocks, booth: Pool) -> None:
    page, before = visit.page, len(stored(booth))
    arrive(visit, demo)
    page.keyboard.press("1")
    stands_at(visit, 2)
    page.click("text=Receipt and withdrawal")
    page.click("text=Erase these votes")
    page.click("text=Yes, erase them for good")
    page.wait_for_selector("text=You have withdrawn")
    assert len(stored(booth)) == before
    assert page.evaluate("localStorage.getItem('hypersd-study')") is None
    assert booth.store.read(lambda c: c.scalar(sa.select(event.c.kind).order_by(event.c.seq.desc()))) == "withdraw"
    page.click("text=Begin anew")
    page.wait_for_selector("text=I agree, begin")


def test_keys_of_the_other_screens_rest_here(visit: Visit, demo: gr.Blocks) -> None:
    page = visit.page
    arrive(visit, demo)
    for key in "crnfd/":
        page.keyboard.press(key)
    page.keyboard.press("?")
    page.wait_for_selector("dialog[open]")
    page.keyboard.press("1")  # while the dialog is open, nobody votes
    page.keyboard.press("Escape")
    page.wait_for_timeout(200)
    assert not page.evaluate("document.body.matches('.hs-running')")
    stands_at(visit, 1)
