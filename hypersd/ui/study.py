"""The study's screen: what the browser may ask, and the little that it is told.

A ballot reaches the browser as its id, the prompt and two PNGs without names, both in one answer; a click comes back
as the id and a choice. These calls are no events of Gradio: they wait in no queue, and stand in no run history.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr

from hypersd.pool import Missing, Pool
from hypersd.records import Ballot, InputError, Item, Problem, whole_number
from hypersd.study.ballots import Desk, Wait
from hypersd.study.guards import network_of
from hypersd.study.people import annotator_of, new_id, receipt_of
from hypersd.ui.board import State, address

HTML = "<div class='hs-study'></div>"
JS = "hypersd.mountStudy(element.querySelector('.hs-study'));"
BUSY = {"kind": "wait", "said": "The app cannot reach its database just now.", "seconds": 5}
REPLACED = 5  # ballots whose pictures are gone, before one gives up


def build(demo: gr.Blocks, tabs: gr.Tabs, pool: Pool | Missing) -> None:
    """Lay the screen out inside its tab. A link with `study` in it opens this tab."""
    gr.HTML(
        {}, html_template=HTML, js_on_load=JS, elem_id="hs-study", server_functions=[answering(pool)],
        apply_default_css=False,
    )  # fmt: skip

    def from_address(page: gr.Request) -> Any:
        return gr.Tabs(selected="study") if "study" in page.query_params else gr.skip()

    demo.load(from_address, None, tabs, api_visibility="private", show_progress="hidden", queue=False)


def answering(pool: Pool | Missing) -> Callable[[Any, gr.Request], State]:
    """The one function that the study's page calls: {"do": one of ACTIONS, ...} -> what to show."""

    def study(given: Any, page: gr.Request) -> State:
        try:
            if not isinstance(given, dict) or str(given.get("do")) not in ACTIONS:
                raise InputError("this is nothing that the study can be asked")
            if pool.problem or pool.desk is None:
                return _not_yet(pool)
            return ACTIONS[str(given["do"])](pool, pool.desk, given, _network(page))
        except InputError as problem:
            return {"kind": "refused", "said": _sentence(str(problem))}
        except Problem as problem:
            return {"kind": "failed", "said": _sentence(str(problem))}

    return study


def _not_yet(pool: Pool | Missing) -> State:
    if pool.problem or isinstance(pool, Missing):
        return {"kind": "none", "said": _sentence(f"There is no study now: {pool.problem}")}
    if pool.store.paused:
        return {"kind": "none", "said": _sentence(pool.store.paused)}
    ready = pool.size - len(pool.lacking())
    return {"kind": "drawing", "ready": ready, "of": pool.size}


# What can be asked. Each gets the desk, what the browser sent, which is not to be trusted, and the visitor's network.


def begin(pool: Pool, desk: Desk, given: State, network: str) -> State:
    """What the study is, and how far this browser's annotator has come."""
    study = desk.study
    told = {
        "kind": "ready", "name": study.name, "consent": study.consent, "licence": study.licence,
        "ballots": study.ballots, "practice": study.practice, "attributes": list(study.attributes),
        "dwell_ms": study.minimum_dwell_ms, "known": False, "votes": 0,
        "notice": pool.notice,
    }  # fmt: skip
    if desk.closed():
        return {"kind": "none", "said": "This study is closed. Thank you to all who voted."}
    token = given.get("token")
    if token:
        receipt = receipt_of(token)
        if desk.consented(annotator_of(receipt)):
            told |= {"known": True, "receipt": receipt, "votes": desk.progress(annotator_of(receipt)).votes}
    return told


def agree(pool: Pool, desk: Desk, given: State, network: str) -> State:
    """A new annotator: a token that nobody else knows, and the receipt that goes with it."""
    token = new_id()
    receipt = receipt_of(token)
    desk.consent(annotator_of(receipt))
    return {"kind": "agreed", "token": token, "receipt": receipt}


def practice(pool: Pool, desk: Desk, given: State, network: str) -> State:
    """Pairs whose better side is known and told; nothing of them counts."""
    pairs = [{**_pictures(pool, left, right), "prompt": left.prompt, "better": better}
             for left, right, better in desk.practice()]  # fmt: skip
    return {"kind": "practice", "pairs": pairs}


def ask(pool: Pool, desk: Desk, given: State, network: str) -> State:
    """The next pair, or the one that is open."""
    annotator = _annotator(given)
    for _ in range(REPLACED):
        asked = desk.next(annotator, network)
        if isinstance(asked, Wait):
            return _end(desk, given, asked) if not asked.seconds else {"kind": "wait", **vars(asked)}
        try:
            return _shown(pool, desk, asked, annotator)
        except InputError:  # its picture has gone from the disk, or is not the one any more
            desk.flag(asked.id, annotator, "a picture was missing")
            desk.skip(asked.id, annotator)
    raise Problem("the pictures of the next pair cannot be read; please try again later")


def vote(pool: Pool, desk: Desk, given: State, network: str) -> State:
    """Take a vote. Only when it is on disk, the answer says "saved"; then it brings the next pair along."""
    attributes = given.get("attributes") or {}
    if not isinstance(attributes, dict) or not all(isinstance(side, str) for side in attributes.values()):
        raise InputError("attributes must be names with left, right or tie")
    answer = desk.answer(
        _text(given, "ballot"), _annotator(given), _text(given, "choice"), attributes=attributes,
        dwell_ms=whole_number(given.get("dwell_ms", 0), "dwell_ms", 0, 2**53), zoomed=given.get("zoomed") is True,
    )  # fmt: skip
    told: State = {"kind": answer.kind, "said": answer.said}
    if answer.kind in ("failed", "early"):
        return told
    return {**told, "next": _next(pool, desk, given, network)}


def skip(pool: Pool, desk: Desk, given: State, network: str) -> State:
    """Another pair instead of this one; with `why`, because something is wrong with it."""
    ballot, annotator = _text(given, "ballot"), _annotator(given)
    if given.get("why"):
        desk.flag(ballot, annotator, _text(given, "why"))
    desk.skip(ballot, annotator)
    return {"kind": "skipped", "said": "Skipped.", "next": _next(pool, desk, given, network)}


def undo(pool: Pool, desk: Desk, given: State, network: str) -> State:
    """Take the latest vote back, and see its pair again."""
    if not desk.undo(_annotator(given)):
        return {"kind": "nothing", "said": "There is no vote to take back."}
    return {"kind": "undone", "said": "Taken back. Here is that pair again.", "next": _next(pool, desk, given, network)}


def withdraw(pool: Pool, desk: Desk, given: State, network: str) -> State:
    """Erase everything under a receipt."""
    count = desk.store.withdraw(annotator_of(_text(given, "receipt")))
    return {"kind": "withdrawn", "said": f"Erased: {count} vote{'s' * (count != 1)} and everything else of yours."}


Action = Callable[[Pool, Desk, State, str], State]
ACTIONS: Mapping[str, Action] = {
    f.__name__: f for f in (begin, agree, practice, ask, vote, skip, undo, withdraw)
}  # fmt: skip


def _next(pool: Pool, desk: Desk, given: State, network: str) -> State:
    """As `ask`, after something that was done already and must not look as if it had failed."""
    try:
        return ask(pool, desk, given, network)
    except Problem:
        return BUSY


def _shown(pool: Pool, desk: Desk, asked: Ballot, annotator: str) -> State:
    done = desk.progress(annotator)
    left, right = desk.items[asked.left], desk.items[asked.right]
    shown = {"kind": "pair", "ballot": asked.id, "prompt": asked.prompt, "votes": done.votes, "of": done.of}
    return shown | _pictures(pool, left, right)


def _pictures(pool: Pool, left: Item, right: Item) -> State:
    return {side: address(pool.read(one.image_sha256), "image/png") for side, one in (("left", left), ("right", right))}


def _end(desk: Desk, given: State, wait: Wait) -> State:
    """The last page: how consistent this annotator was, and what was compared if the study tells."""
    annotator = _annotator(given)
    done = desk.progress(annotator)
    told = [vars(one) for one in desk.reveal(annotator)]
    return {
        "kind": "end", "said": wait.said, "votes": done.votes, "of": done.of, "repeats": done.repeats,
        "agreed": done.agreed, "receipt": receipt_of(_text(given, "token")), "told": told,
    }  # fmt: skip


def _annotator(given: State) -> str:
    return annotator_of(receipt_of(_text(given, "token")))


def _text(given: State, name: str) -> str:
    if not isinstance(given.get(name), str):
        raise InputError(f"{name} must be text")
    return str(given[name])


def _network(page: gr.Request) -> str:
    """Where a visitor comes from; behind a Space's proxy that is what the proxy says."""
    forwarded = page.headers.get("x-forwarded-for", "") if os.environ.get("SPACE_ID") else ""
    host = page.client.host if page.client else ""
    return network_of(forwarded.split(",")[0] or host)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."
