"""Annotators whose taste is known: what the statistics have to find again."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hypersd.records import CHOICES, Ballot, Item, Problem
from hypersd.study import ratings
from hypersd.study.ballots import Desk, Wait
from hypersd.study.definition import Limits, Study
from hypersd.study.people import annotator_of, new_id, receipt_of
from hypersd.study.ratings import Array, softmax
from hypersd.study.table import Ints, Table
from hypersd.study.votes import Store, now_us

Rng = np.random.Generator


@dataclass(frozen=True)
class Truth:
    """How simulated annotators choose.

    `theta` are the arms' strengths in logits, the first being the anchor's 0. Every annotator, and every prompt, likes
    each arm a little more or less: normal deviations of `annotator_sd` and `prompt_sd`. `bad` is the share of "both
    bad". Of the annotators a share of `spammers` clicks without looking, each in one of four ways.
    """

    theta: tuple[float, ...]
    side: float = 0.0
    log_nu: float = -0.7
    bad: float = 0.0
    annotator_sd: float = 0.3
    prompt_sd: float = 0.5
    spammers: float = 0.0

    def chances(self, left: Array, right: Array) -> Array:
        """[..., 4] probabilities of the choices for strengths left and right [...]."""
        tie = self.log_nu + (left + right) / 2
        three = softmax(np.stack([left + self.side / 2, right - self.side / 2, tie], axis=-1))
        return np.concatenate([(1 - self.bad) * three, np.full((*three.shape[:-1], 1), self.bad)], axis=-1)

    def average(self, rng: Rng, draws: int = 20_000) -> Array:
        """The theta that an endless study finds: averaged over annotators and prompts, gaps in logits are smaller."""
        arms = len(self.theta)
        spread = (self.annotator_sd**2 + self.prompt_sd**2) ** 0.5
        felt = np.array(self.theta) + spread * rng.normal(size=(draws, arms))
        counts = np.zeros((arms, arms, 3))
        for i in range(arms):
            for j in range(arms):
                if i != j:
                    counts[i, j] = self.chances(felt[:, i], felt[:, j]).sum(axis=0)[:3]
        return ratings.fit(1e3 * counts, anchor=0).theta


# What a spammer answers, whatever is shown: probabilities of left, right, tie, both bad.
SPAM = np.array([[0.97, 0.01, 0.01, 0.01], [0.01, 0.97, 0.01, 0.01], [0.01, 0.01, 0.97, 0.01], [0.4, 0.4, 0.19, 0.01]])


def table(truth: Truth, annotators: int, ballots: int, prompts: int, rng: Rng, repeat: float = 0.0) -> Table:
    """A study of so many annotators with so many ballots each, pairs and prompts drawn evenly.

    The first `truth.spammers` of the annotators are the spammers. A share of `repeat` asks an earlier pair, swapped.
    """
    arms, count = len(truth.theta), annotators * ballots
    annotator, prompt = np.repeat(np.arange(annotators), ballots), rng.integers(prompts, size=count)
    left = rng.integers(arms, size=count)
    right = (left + rng.integers(1, arms, size=count)) % arms
    repeats = np.full(count, -1)
    again = (rng.random(count) < repeat) & (np.arange(count) % ballots >= ballots // 2)
    repeats[again] = np.flatnonzero(again) - ballots // 2  # an own vote of the first half, asked again once
    prompt[again], left[again], right[again] = prompt[repeats[again]], right[repeats[again]], left[repeats[again]]
    of_annotator = truth.annotator_sd * rng.normal(size=(annotators, arms))
    of_prompt = truth.prompt_sd * rng.normal(size=(prompts, arms))
    felt = np.array(truth.theta) + of_annotator[annotator] + of_prompt[prompt]  # [votes, arms]
    rows = np.arange(count)
    chances = truth.chances(felt[rows, left], felt[rows, right])
    spam = annotator < round(truth.spammers * annotators)
    chances[spam] = SPAM[annotator[spam] % len(SPAM)]
    choice = draw(chances, rng)
    low, high = np.minimum(left, right), np.maximum(left, right)
    return Table(
        annotators=tuple(f"{n:032x}" for n in range(annotators)),
        prompts=tuple(f"prompt {n}" for n in range(prompts)),
        arms=tuple(f"arm@{n + 1}" for n in range(arms)),
        annotator=annotator,
        prompt=prompt,
        left=left,
        right=right,
        choice=choice,
        dwell_ms=rng.integers(1500, 9000, size=count),
        unit=(prompt * arms + low) * arms + high,
        swapped=left > right,
        expected=np.full(count, -1),
        repeats=repeats,
    )


def draw(chances: Array, rng: Rng) -> Ints:
    """One choice a row of `chances` [n, 4]."""
    edges = chances.cumsum(axis=1)
    return np.asarray((rng.random((len(chances), 1)) * edges[:, -1:] > edges).sum(axis=1), dtype=np.int64)


def vote(desk: Desk, truth: Truth, annotators: int, rng: Rng) -> int:
    """Let simulated annotators do a whole study through its desk; how many votes were stored.

    `truth.theta` is in the order of the study's `drawn_arms()`.
    """
    arms, stored = desk.study.drawn_arms(), 0
    of_prompt = truth.prompt_sd * rng.normal(size=(len(desk.study.prompts), len(arms)))
    for n in range(annotators):
        annotator = annotator_of(receipt_of(new_id()))
        desk.consent(annotator)
        felt = np.array(truth.theta) + truth.annotator_sd * rng.normal(size=len(arms)) + of_prompt
        spam = SPAM[n % len(SPAM)] if n < round(truth.spammers * annotators) else None
        while not isinstance(asked := desk.next(annotator), Wait):
            stored += _vote_once(desk, truth, asked, annotator, felt, spam, rng)
    return stored


def _vote_once(
    desk: Desk, truth: Truth, asked: Ballot, annotator: str, felt: Array, spam: Array | None, rng: Rng
) -> bool:
    arms, row = desk.study.drawn_arms(), felt[desk.study.prompts.index(asked.prompt)]
    left, right = (row[[arms.index(desk.items[side].arm)]] for side in (asked.left, asked.right))
    chances = truth.chances(left, right) if spam is None else spam[None]
    choice = CHOICES[int(draw(chances, rng)[0])]
    return desk.answer(asked.id, annotator, choice, dwell_ms=int(rng.integers(1500, 9000))).kind == "saved"


# A rehearsal


def twin(study: Study) -> Study:
    """The same study under a name that says it is none, without the guards that keep people from hurrying."""
    limits = Limits(annotator_per_minute=10**6, annotator_per_day=10**6, network_per_minute=10**6)
    return replace(study, name=f"simulated: {study.name}", limits=limits)


def rehearse(address: str | Path, study: Study, images: Path, annotators: int, spammers: float, seed: int) -> int:
    """Fill a database with a study's simulated twin, and a folder with plain squares for pictures; the votes stored.

    Arms are the better the earlier they are named, those of gold pairs alone far worse.
    """
    store = Store(address, clock=_Steady(now_us()))
    if store.paused:
        raise Problem(store.paused)
    arms = study.drawn_arms()
    places = [(arm, prompt, noise) for arm in arms for prompt in study.prompts for noise in study.seeds]
    images.mkdir(parents=True, exist_ok=True)
    store.add_items([_square(images, *place) for place in places])
    theta = tuple(-0.4 * k if k < len(study.arms) else -3.0 for k in range(len(arms)))
    desk = Desk(store, study, seed=seed)
    stored = vote(desk, Truth(theta, bad=0.03, spammers=spammers), annotators, np.random.default_rng(seed))
    store.close()
    return stored


def pace(folder: Path, study: Study, count: int = 300) -> float:
    """Votes a second that one annotator after the other gets through the desk, on the disk that `folder` is on.

    A vote is a ballot issued and its answer committed.
    """
    store = Store(folder / "pace.db", clock=_Steady(now_us()))
    arms, images = study.drawn_arms(), folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    places = [(arm, prompt, noise) for arm in arms for prompt in study.prompts for noise in study.seeds]
    store.add_items([_square(images, *place) for place in places])
    desk, stored, annotator = Desk(store, twin(study), seed=0), 0, ""
    started = time.perf_counter()
    while stored < count:
        if not annotator:
            annotator = annotator_of(receipt_of(new_id()))
            desk.consent(annotator)
        asked = desk.next(annotator)
        if isinstance(asked, Wait):
            annotator = ""
        else:
            stored += desk.answer(asked.id, annotator, CHOICES[stored % 3], dwell_ms=2000).kind == "saved"
    seconds = time.perf_counter() - started
    store.close()
    return stored / seconds


class _Steady:
    """Microseconds from a beginning on: three seconds pass with every look, so that nobody seems to hurry."""

    def __init__(self, now: int) -> None:
        self.now = now

    def __call__(self) -> int:
        self.now += 3_000_000
        return self.now


def _square(folder: Path, arm: str, prompt: str, seed: int) -> Item:
    """A picture of one colour, in the folder, as an item of this arm, prompt and noise."""
    from PIL import Image

    name = hashlib.sha256(f"{arm} {prompt} {seed}".encode())
    picture = Image.new("RGB", (16, 16), tuple(name.digest()[:3]))
    sha = hashlib.sha256(picture.tobytes()).hexdigest()
    picture.save(folder / f"{sha}.png")
    method, _, steps = arm.partition("@")
    none = "0" * 64
    return Item(
        image_sha256=sha,
        prompt=prompt,
        method=method,
        base_sha256=none,
        adapter_sha256=None,
        sampler="simulated",
        config_sha256=none,
        steps=int(steps),
        nfe=int(steps),
        guidance=1.0,
        eta=0.0,
        seed=seed,
        noise_sha256=hashlib.sha256(str(seed).encode()).hexdigest(),
        width=16,
        height=16,
        dtype="uint8",
        seconds=0.0,
    )
