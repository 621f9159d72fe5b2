"""The study's screen without a browser: what may be asked over HTTP, what counts, and that no byte tells the arms."""

from __future__ import annotations

import base64
import re
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
import requests
import sqlalchemy as sa
from booth import ARMS, memory, small
from fake import Painter, address, no_loops_left, served
from gradio_client import Client
from rows import METHODS
from test_mirror import rows
from voting import MINUTE, Clock

from hypersd import ui
from hypersd.__main__ import main
from hypersd.pool import Missing, Pool
from hypersd.records import CHOICES
from hypersd.study import mirror, simulate
from hypersd.study.ballots import items_of
from hypersd.study.people import annotator_of, receipt_of
from hypersd.study.report import Reports
from hypersd.study.schema import ballot, event, vote
from hypersd.study.votes import NotSaved, Store, now_us
from hypersd.ui import results
from hypersd.ui.study import answering

__all__ = ["memory", "no_loops_left"]  # fixtures
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::pandas.errors.Pandas4Warning"
)
PAIR = {"kind", "ballot", "prompt", "votes", "of", "left", "right"}
PAGE = SimpleNamespace(headers={}, client=SimpleNamespace(host="127.0.0.1"))


class Visitor:
    """What the page of one browser asks, in this process."""

    def __init__(self, pool: Pool | Missing) -> None:
        self._study, self.token = answering(pool), ""

    def __call__(self, do: str, **given: Any) -> dict[str, Any]:
        return self._study({"do": do, "token": self.token, **given}, PAGE)  # type: ignore[arg-type]

    def agree(self) -> dict[str, Any]:
        told = self("agree")
        self.token = told["token"]
        return told


def arrived(pool: Pool) -> Visitor:
    visitor = Visitor(pool)
    visitor.agree()
    return visitor


def votes(pool: Pool) -> int:
    return pool.store.read(lambda c: c.scalar(sa.select(sa.func.count()).select_from(vote)) or 0)


# A session


def test_a_session_from_consent_to_receipt(ram: Path) -> None:
    pool = small(ram, practice=2)
    visitor = Visitor(pool)
    first = visitor("begin")
    assert (first["kind"], first["known"], first["ballots"]) == ("ready", False, 6)
    receipt = visitor.agree()["receipt"]
    assert len(visitor("practice")["pairs"]) == 2
    asked = visitor("ask")
    for done in range(6):
        assert (asked["kind"], asked["votes"], asked["of"]) == ("pair", done, 6)
        told = visitor("vote", ballot=asked["ballot"], choice="left", dwell_ms=900, attributes={"alignment": "tie"})
        assert told["kind"] == "saved" and votes(pool) == done + 1
        asked = told["next"]
    assert (asked["kind"], asked["votes"], asked["receipt"]) == ("end", 6, receipt)
    assert {one["left"] for one in asked["told"]} <= set(ARMS)
    assert visitor("begin")["votes"] == 6
    assert visitor("withdraw", receipt=receipt)["said"] == "Erased: 6 votes and everything else of yours."
    assert votes(pool) == 0 and not visitor("begin")["known"]


def test_never_is_never(ram: Path) -> None:
    visitor = arrived(small(ram, reveal="never", ballots=1))
    end = visitor("vote", ballot=visitor("ask")["ballot"], choice="tie")["next"]
    assert (end["kind"], end["told"]) == ("end", [])


def test_a_reload_shows_the_same_pair_undo_the_one_before_skip_another(ram: Path) -> None:
    visitor = arrived(small(ram))
    first = visitor("ask")
    assert visitor("ask") == first
    second = visitor("vote", ballot=first["ballot"], choice="left")["next"]
    again = visitor("undo")["next"]
    assert (again["left"], again["right"]) == (first["left"], first["right"]) and again["ballot"] != first["ballot"]
    assert visitor("vote", ballot=again["ballot"], choice="right")["next"]["ballot"] == second["ballot"]
    third = visitor("skip", ballot=second["ballot"], why="reported")["next"]
    assert third["ballot"] != second["ballot"] and third["votes"] == 1


def test_a_failed_commit_is_never_called_saved_and_a_retry_is(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = small(ram)
    visitor = arrived(pool)
    asked = visitor("ask")

    def full(work: object) -> None:
        raise NotSaved("Not saved: the disk is full; please try again in a moment.")

    with monkeypatch.context() as patched:
        patched.setattr(pool.store, "write", full)
        told = visitor("vote", ballot=asked["ballot"], choice="left")
    assert told == {"kind": "failed", "said": "Not saved: the disk is full; please try again in a moment."}
    assert visitor("vote", ballot=asked["ballot"], choice="left")["kind"] == "saved"
    assert visitor("vote", ballot=asked["ballot"], choice="left")["kind"] == "saved", "and again, which is nothing new"
    assert votes(pool) == 1


def test_a_saved_vote_is_told_as_saved_though_the_next_pair_fails(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = small(ram)
    visitor = arrived(pool)
    asked = visitor("ask")

    def broken(*_: object) -> None:
        raise NotSaved("the database does not answer")

    monkeypatch.setattr(pool.desk, "next", broken)
    told = visitor("vote", ballot=asked["ballot"], choice="left")
    assert (told["kind"], told["next"]["kind"]) == ("saved", "wait")


def test_a_pair_whose_picture_is_gone_is_reported_and_passed_over(ram: Path) -> None:
    pool = small(ram, prompts=["a cat"], seeds=[1])
    visitor = arrived(pool)
    lost = next(one for one in items_of(pool.store).values() if one.arm == "lcm@4")
    (pool.folder / f"{lost.image_sha256}.png").unlink()
    for _ in range(6):
        asked = visitor("ask")
        if asked["kind"] == "pair":
            visitor("vote", ballot=asked["ballot"], choice="tie")
    kinds = pool.store.read(lambda c: Counter(c.scalars(sa.select(event.c.kind))))
    assert kinds["flag"] == kinds["skip"] > 0


@pytest.mark.parametrize("rubbish", [
    None, 7, [], {}, {"do": "consent"}, {"do": ["vote"]}, {"do": "ask"}, {"do": "ask", "token": 5},
    {"do": "undo", "token": "x"},
    {"do": "vote"}, {"do": "vote", "token": "0" * 32, "ballot": "0" * 32, "choice": "best"},
    {"do": "vote", "token": "0" * 32, "ballot": {}, "choice": "left"},
    {"do": "vote", "token": "0" * 32, "ballot": "x", "choice": "left", "attributes": {"beauty": "left"}},
    {"do": "vote", "token": "0" * 32, "ballot": "x", "choice": "left", "attributes": [["alignment"]]},
    {"do": "vote", "token": "0" * 32, "ballot": "x", "choice": "left", "dwell_ms": float("nan")},
    {"do": "withdraw", "token": "0" * 32, "receipt": "AAAA"}, {"do": "begin", "token": "../../x"},
], ids=lambda given: str(given)[:50])  # fmt: skip
def test_rubbish_is_refused_in_a_sentence(rubbish: Any, ram: Path) -> None:
    pool = small(ram)
    told = answering(pool)(rubbish, PAGE)  # type: ignore[arg-type]
    assert told["kind"] == "refused" and told["said"].endswith(".")
    assert votes(pool) == 0


def test_without_a_study_the_screen_says_why(ram: Path) -> None:
    assert Visitor(Missing("the study x cannot be read"))("begin") == {
        "kind": "none", "said": "There is no study now: the study x cannot be read."}  # fmt: skip
    unable = Visitor(small(ram / "a", arms=["base@8", "nope@1"]))("begin")
    assert unable["kind"] == "none" and "needs two arms that can draw, and nope@1 cannot" in unable["said"]
    pool = small(ram / "b")
    pool.desk = None
    next(iter(pool.folder.glob("*.png"))).unlink()
    assert Visitor(pool)("begin") == {"kind": "drawing", "ready": 31, "of": 32}
    closed = small(ram / "c")
    closed.store.note("freeze", "", closed.study.sha256)
    assert "closed" in Visitor(closed)("begin")["said"]


# Over HTTP


@pytest.fixture(scope="module")
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="module")
def booth(memory: Path, clock: Clock) -> Pool:
    shares = {"gold": 0.15, "repeat": 0.2, "uniform": 0.25}
    return small(memory / "booth", clock=clock, ballots=60, shares=shares)


@pytest.fixture(scope="module")
def demo(booth: Pool) -> Iterator[gr.Blocks]:
    with served(ui.build(Painter(), METHODS, credits="", pool=booth)) as app:
        yield app


def component(demo: gr.Blocks) -> dict[str, Any]:
    return next(part for part in demo.config["components"] if part["props"].get("elem_id") == "hs-study")


def post(demo: gr.Blocks, given: Any, session: str = "evil") -> requests.Response:
    body = {"component_id": component(demo)["id"], "fn_name": "study", "session_hash": session, "data": given}
    return requests.post(f"{address(demo)}gradio_api/component_server/", json=body, timeout=20)


def token(demo: gr.Blocks) -> str:
    return str(post(demo, {"do": "agree"}).json()["token"])


def asked_of(booth: Pool, mine: str) -> str:
    assert booth.desk is not None
    return booth.desk.next(annotator_of(receipt_of(mine))).id  # type: ignore[union-attr]


def test_invented_foreign_expired_and_reused_ballots_count_nothing(demo: gr.Blocks, booth: Pool, clock: Clock) -> None:
    mine, other, before = token(demo), token(demo), votes(booth)
    own, foreign = asked_of(booth, mine), asked_of(booth, other)

    def kind(given: dict[str, Any]) -> str:
        return str(post(demo, {"do": "vote", "choice": "left", **given}).json()["kind"])

    assert kind({"token": mine, "ballot": "0" * 32}) == "unknown"
    assert kind({"token": mine, "ballot": foreign}) == "unknown"
    assert kind({"token": "0" * 32, "ballot": own}) == "unknown", "an invented annotator"
    assert kind({"ballot": own}) == "refused", "nobody"
    clock.now += 31 * MINUTE
    assert kind({"token": mine, "ballot": own}) == "expired"
    assert votes(booth) == before
    fresh = asked_of(booth, mine)
    assert kind({"token": mine, "ballot": fresh}) == "saved"
    assert kind({"token": mine, "ballot": fresh, "choice": "right"}) == "voted"
    post(demo, {"do": "undo", "token": mine})
    assert kind({"token": mine, "ballot": fresh, "choice": "right"}) == "expired", "taken back, so used up"
    stored = booth.store.read(lambda c: list(c.scalars(sa.select(vote.c.choice).where(vote.c.ballot == fresh))))
    assert stored == ["left"]


def test_no_other_way_in_counts_a_vote(demo: gr.Blocks, booth: Pool) -> None:
    mine, before = token(demo), votes(booth)
    given = {"do": "vote", "token": mine, "ballot": asked_of(booth, mine), "choice": "left"}
    base = f"{address(demo)}gradio_api/"
    for dependency in demo.config["dependencies"]:
        call = {"fn_index": dependency["id"], "data": [given], "session_hash": "evil"}
        for path in (f"run/{dependency['api_name']}", "queue/join"):
            requests.post(base + path, json=call, timeout=20)
    for name in ("vote", "__init__", "answering", "get_config", "postprocess"):
        body = {"component_id": component(demo)["id"], "fn_name": name, "session_hash": "evil", "data": given}
        assert requests.post(f"{base}component_server/", json=body, timeout=20).status_code == 404
    assert votes(booth) == before
    named = requests.get(f"{base}info", timeout=20).json()
    assert list(named["named_endpoints"]) == ["/compare", "/sweep"] and named["unnamed_endpoints"] == {}


def test_no_byte_that_reaches_the_browser_tells_the_arms_apart(demo: gr.Blocks, booth: Pool) -> None:
    """Gold, repeated and plain pairs, either way round: all that differs is an id, the prompt, a count, the pixels."""
    mine = token(demo)
    answers, kinds, asked = [], Counter[str](), post(demo, {"do": "ask", "token": mine})
    for n in range(60):
        shown = asked.json() if n == 0 else asked.json()["next"]
        answers.append(asked)
        kinds[kind_of(booth, shown["ballot"])] += 1
        assert_blind(shown, booth)
        asked = post(demo, {"do": "vote", "token": mine, "ballot": shown["ballot"], "choice": CHOICES[n % 4]})
    assert set(kinds) == {"gold", "repeat", "plain"}
    assert len({re.sub(r"\d+", "0", str({**a.headers, "date": ""})) for a in answers[1:]}) == 1, "the same headers"
    practised = post(demo, {"do": "practice", "token": mine})
    begun = post(demo, {"do": "begin", "token": mine})
    page, config = requests.get(address(demo), timeout=20), requests.get(f"{address(demo)}config", timeout=20)
    for answer in [*answers, practised, begun]:
        assert not secrets(booth, arms=True).search(without_pixels(answer.text))
    for answer in [*answers, practised, begun, page, config]:
        assert not secrets(booth, arms=False).search(answer.text + str(answer.headers))
    assert set(component(demo)["props"]) & {"value", "server_fns"} and component(demo)["props"]["value"] == {}


def test_nothing_but_the_pixels_tells_which_side_is_which(demo: gr.Blocks, booth: Pool) -> None:
    """A classifier that sees all of an answer but the pixels, and how long it took, guesses the left arm no better
    than one that sees nothing. The pictures' lengths are the pixels' own doing: PNG is what they are packed in."""
    items, features = items_of(booth.store), list[list[float]]()
    arms: list[str] = []
    for _ in range(4):
        mine = token(demo)
        asked = post(demo, {"do": "ask", "token": mine})
        while (shown := asked.json().get("next", asked.json()))["kind"] == "pair":
            bare = without_pixels(asked.text)
            digits = [int(c, 16) / 15 for c in shown["ballot"][:12]]
            told = [asked.elapsed.total_seconds(), len(bare), len(str(asked.headers)), shown["votes"], len(arms) % 7]
            features.append([*told, booth.study.prompts.index(shown["prompt"]), *digits])
            row = booth.store.read(lambda c: c.execute(sa.select(ballot).where(ballot.c.id == shown["ballot"])).one())
            arms.append(items[row.left].arm)
            asked = post(
                demo, {"do": "vote", "token": mine, "ballot": shown["ballot"], "choice": CHOICES[len(arms) % 4]}
            )
    right, chance = guessed(np.array(features), np.array(arms))
    assert len(arms) >= 200
    assert right <= chance + 3 * (chance * (1 - chance) / len(arms)) ** 0.5, (
        f"{right:.2f} of {len(arms)}, chance {chance:.2f}"
    )


def test_the_classifier_finds_what_is_there_to_find() -> None:
    rng = np.random.default_rng(0)
    arms = rng.choice(ARMS, 240)
    features = rng.normal(size=(240, 6))
    assert guessed(features, arms)[0] < 0.5
    features[:, 3] += 3 * (arms == ARMS[0])  # say, it takes longer to send
    assert guessed(features, arms)[0] > 0.5


def guessed(x: Any, arms: Any, folds: int = 8) -> tuple[float, float]:
    """Share of arms that a linear classifier finds in features it was not fitted to, and the commonest arm's share."""
    spread = x.std(0)
    x = np.c_[(x - x.mean(0)) / np.where(spread > 0, spread, 1), np.ones(len(x))]
    names = sorted(set(arms))
    y = (arms[:, None] == np.array(names)).astype(float)
    part, right = np.arange(len(x)) % folds, 0
    for fold in range(folds):
        seen, unseen = x[part != fold], x[part == fold]
        weights = np.linalg.solve(seen.T @ seen + 10 * np.eye(x.shape[1]), seen.T @ y[part != fold])
        right += int(((unseen @ weights).argmax(1) == y[part == fold].argmax(1)).sum())
    return right / len(x), float(y.mean(0).max())


def test_a_database_that_is_damaged_at_the_start_pauses_voting_and_nothing_else(ram: Path) -> None:
    """And the mirror gives the exact rows back, by the command that the owner is told of."""
    first = small(ram)
    visitor = arrived(first)
    shown = visitor("ask")
    assert visitor("vote", ballot=shown["ballot"], choice="left")["kind"] == "saved"
    place = mirror.Folder(ram / "mirror")
    mirror.flush(first.store, place)
    there = rows(first.store)
    first.store.close()
    spoiled = b"\xa5" * (ram / "study.db").stat().st_size
    (ram / "study.db").write_bytes(spoiled)
    paused = small(ram)
    with served(ui.build(Painter(), METHODS, credits="", pool=paused)) as app:
        answer = post(app, {"do": "begin"})
        assert answer.ok and "paused" in answer.json()["said"] and "Traceback" not in answer.text
        late = post(app, {"do": "vote", "token": visitor.token, "ballot": shown["ballot"], "choice": "left"}).json()
        assert late["kind"] != "saved"
        drawn = Client(address(app), verbose=False).predict("a cat", api_name="/compare")
        assert drawn, "the rest of the app works"
    (aside,) = ram.glob("study.db.damaged-*")
    assert aside.read_bytes() == spoiled
    assert main(["study", "restore", "--database", str(ram / "study.db"), "--mirror", str(ram / "mirror")]) == 0
    again = Store(ram / "study.db")
    assert again.paused == ""
    assert rows(again) == there
    again.close()


def kind_of(booth: Pool, ballot_id: str) -> str:
    found = sa.select(ballot.c.expected, ballot.c.repeat_of).where(ballot.c.id == ballot_id)
    row = booth.store.read(lambda c: c.execute(found).one())
    return "gold" if row.expected else "repeat" if row.repeat_of else "plain"


def assert_blind(shown: dict[str, Any], booth: Pool) -> None:
    assert set(shown) == PAIR and list(shown) == ["kind", "ballot", "prompt", "votes", "of", "left", "right"]
    assert re.fullmatch(r"[0-9a-f]{32}", shown["ballot"]) and shown["prompt"] in booth.study.prompts
    heads = []
    for side in ("left", "right"):
        head, body = shown[side].split(",")
        assert head == "data:image/png;base64"
        chunks = list(chunks_of(base64.b64decode(body)))
        assert {name for name, _ in chunks} == {"IHDR", "IDAT", "IEND"}, "nothing in it but pixels"
        heads.append(chunks[0])
    assert heads[0] == heads[1], "size, depth and filter of both sides are the same"


def chunks_of(png: bytes) -> Iterator[tuple[str, bytes]]:
    at = 8
    while at < len(png):
        (size,) = struct.unpack(">I", png[at : at + 4])
        yield png[at + 4 : at + 8].decode(), png[at + 8 : at + 8 + size]
        at += 12 + size
    assert at == len(png), "nothing behind it"


def without_pixels(text: str) -> str:
    return re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", text)


def secrets(booth: Pool, arms: bool) -> re.Pattern[str]:
    """What no answer may hold: ids and hashes of items; and in what the study answers, any word that tells an arm."""
    items = items_of(booth.store).values()
    words = {word for one in items for word in (one.id, one.image_sha256, one.noise_sha256, one.config_sha256)}
    if arms:
        words |= {*booth.study.drawn_arms(), *METHODS, *(row.title for row in METHODS.values()), "DDIM", "seed", "nfe"}
        words |= {"method", "steps", "seconds", "guidance", "sampler", "expected", "gold", "repeat", "propensity"}
    return re.compile("|".join(map(re.escape, sorted(words))), re.IGNORECASE)


# Results


def test_results_say_what_to_do_before_the_first_vote(ram: Path) -> None:
    shown, row, *_ = results.opened(results.reporter(small(ram)))()
    assert "No votes yet" in shown and "?study" in shown and row.visible is False
    shown, *_ = results.opened(results.reporter(Missing("the study x cannot be read")))()
    assert "The study x cannot be read." in shown


@pytest.fixture(scope="module")
def voted(memory: Path) -> Pool:
    shares = {"gold": 0.1, "repeat": 0.2, "uniform": 0.25}
    pool = small(memory / "voted", clock=simulate._Steady(now_us()), ballots=20, shares=shares)
    assert pool.desk is not None
    truth = simulate.Truth((0.0, -0.8, -1.5, -3.0), bad=0.05, spammers=0.2)
    simulate.vote(pool.desk, truth, 10, np.random.default_rng(3))
    return pool


def test_results_show_ratings_cost_wins_and_trust(voted: Pool) -> None:
    shown, _, contrast, needed, trust = results.opened(results.reporter(voted))()
    for arm in ARMS:
        assert shown.count(arm) >= 6
    assert "200 votes by 10 annotators" in shown and (shown + trust).count("<svg") == 4
    assert "Ratings of all arms" in shown and "Ratings at 4 steps" not in shown, "three arms are the pool and no more"
    order = [shown.index(f"<td>{arm}</td>") for arm in ARMS]
    assert order == sorted(order), "the better, the higher"
    assert contrast.value == "base@8 against base@4" and "points above base@4" in needed
    for words in ("Left side", "Repeated pairs", "alpha", "Circles", "First place", "median", "Left out by the filter"):
        assert words in trust
    other = results.asked(results.reporter(voted))("base@8 against lcm@4")
    assert "base@8 is" in other and other != needed
    assert results.asked(results.reporter(voted))({"rubbish": 1}) == ""


def test_a_report_is_kept_until_a_vote_comes_or_goes(voted: Pool) -> None:
    reports = Reports(voted.store, voted.study)
    first = reports.latest()
    assert reports.latest() is first
    assert first.votes == len([*first.dwell_ms]) + sum(one.votes for one in first.flagged)
    visitor = arrived(voted)
    visitor("vote", ballot=visitor("ask")["ballot"], choice="tie")
    second = reports.latest()
    assert second.votes == first.votes + 1
    visitor("undo")
    assert reports.latest().votes == first.votes


def test_results_escape_what_a_study_is_called(ram: Path) -> None:
    pool = small(ram, name="<script>alert(1)</script>", ballots=1)
    visitor = arrived(pool)
    visitor("vote", ballot=visitor("ask")["ballot"], choice="both_bad")
    shown = results.opened(results.reporter(pool))()[0]
    assert "None of them compares two arms yet" in shown, "both bad says nothing of which is better"
    assert "<script" not in shown and "&lt;script" in shown
