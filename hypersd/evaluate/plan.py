"""What is to be drawn: prompts, seeds, methods and step counts, checked before anything is loaded.

A plan is written beside its pictures and never changes: a folder of another plan is refused.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypersd.backbone import Backbone
from hypersd.emoji import prompts as emoji
from hypersd.emoji.prompts import Prompt
from hypersd.methods import Method, installed
from hypersd.records import STEPS_MAX, InputError, Request, clean_prompt, real_number, whole_number

TEACHER = "base"  # the row of METHODS that the others are measured against
STEPS, TEACHER_STEPS = "1,2,4,8", "25,50"
SEEDS_MAX = 64
GIVEN = "given"  # the set of a person's own prompt file
PLAN = "plan.json"
QUICK = 3  # prompts a set


@dataclass(frozen=True, order=True)
class Arm:
    """One method at one step count."""

    method: str
    steps: int

    def __str__(self) -> str:
        return f"{self.method}-{self.steps}"


@dataclass(frozen=True)
class Plan:
    """`seeds` pictures of every prompt by every arm; `reference` is the teacher that the others are compared with.

    `impossible` says why a method was left out at a step count; `methods` are the rows that draw; `rivals` are pairs of
    arms to be compared with each other by every metric; `guidance` is the teacher's, None for what it was made for.
    """

    prompts: tuple[Prompt, ...]
    seeds: int
    arms: tuple[Arm, ...]
    reference: Arm
    impossible: tuple[str, ...] = ()
    methods: Mapping[str, Method] = field(default_factory=dict, repr=False, compare=False)
    rivals: tuple[tuple[Arm, Arm], ...] = ()
    guidance: float | None = None

    @property
    def sets(self) -> dict[str, list[int]]:
        """Numbers of the prompts of each set, in order."""
        found: dict[str, list[int]] = {}
        for number, prompt in enumerate(self.prompts):
            found.setdefault(prompt.set, []).append(number)
        return found

    def request(self, number: int, index: int, arm: Arm) -> Request:
        guidance = self.guidance if arm.method == TEACHER else None
        return Request(self.prompts[number].text, seed(self.prompts[number], index), arm.steps, guidance)

    def record(self, backbone: Backbone) -> dict[str, Any]:
        """All that decides what the pictures look like, ready for JSON."""
        return {
            "backbone": backbone.name,
            "base_sha256": backbone.sha256,
            "device": backbone.device.type,
            "dtype": str(backbone.dtype).removeprefix("torch."),
            "engine": backbone.engine,
            **({"decoder": backbone.quick} if backbone.quick else {}),
            "prompts": len(self.prompts),
            "sets": {name: len(numbers) for name, numbers in self.sets.items()},
            "prompts_sha256": emoji.sha256(self.prompts),
            "seeds": self.seeds,
            "arms": [str(arm) for arm in self.arms],
            "reference": str(self.reference),
            **({} if self.guidance is None else {"teacher_guidance": self.guidance}),
            "methods": {arm.method: self.methods[arm.method].describe() for arm in self.arms},
        }


def seed(prompt: Prompt, index: int) -> int:
    """The seed of a prompt's `index`-th noise: the same for every method, step count and machine."""
    name = f"{prompt.set}\n{prompt.text}\n{index}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def make(
    *,
    backbone: str = "emoji",
    sets: object = None,
    file: str | Path | None = None,
    methods: object = None,
    steps: object = STEPS,
    teacher_steps: object = TEACHER_STEPS,
    seeds: object = 4,
    limit: object = None,
    guidance: object = None,
    rivals: object = None,
) -> Plan:
    """The plan of what a person typed; lists may be text with commas.

    Args:
        backbone: whose adapters say which methods there are.
        sets: names of the frozen sets, all by default; `file` instead: a person's own prompts, one a line.
        methods: names of methods that can draw on it, all by default. The teacher is always drawn at `teacher_steps`.
        limit: at most so many prompts a set, spread evenly.
        guidance: of the teacher, for students that learned from it at another scale than it is drawn with.
        rivals: pairs of arms to be compared with each other, such as "hyper@1:lcm@4,hyper@1:tcd@4".

    Raises:
        InputError: something is unknown or out of its range, with the nearest name that is known.
    """
    prompts = read(Path(file)) if file is not None else _frozen(sets)
    if limit is not None:
        prompts = _spread(prompts, whole_number(limit, "limit", 1, 1_000_000))
    rows = installed(backbone)
    chosen = names(methods, rows, "method") if methods else list(rows)
    teacher = sorted(_numbers(teacher_steps, "teacher steps"))
    arms, impossible = _arms([rows[name] for name in chosen], _numbers(steps, "steps"))
    for count in teacher:
        rows[TEACHER].check(Request("a", steps=count))
    every = {*arms, *(Arm(TEACHER, count) for count in teacher)}
    order = {name: place for place, name in enumerate(rows)}
    return Plan(
        prompts=tuple(prompts),
        seeds=whole_number(seeds, "seeds", 1, SEEDS_MAX),
        arms=tuple(sorted(every, key=lambda arm: (order[arm.method], arm.steps))),
        reference=Arm(TEACHER, teacher[-1]),
        impossible=tuple(impossible),
        methods=rows,
        guidance=None if guidance is None else real_number(guidance, "guidance", 0.0, 30.0),
        rivals=tuple(_rivals(rivals, every)),
    )


def arm(text: str) -> Arm:
    """An arm as it is typed, such as "hyper@1". Raises InputError: it has no method or no step count."""
    name, _, steps = text.rpartition("@")
    if not name:
        raise InputError(f"an arm is a method and a number of steps such as hyper@1, got {text[:40]!r}")
    return Arm(name, whole_number(steps, f"steps of {name[:40]}", 1, STEPS_MAX))


def _rivals(given: object, drawn: Container[Arm]) -> Iterator[tuple[Arm, Arm]]:
    """Pairs as they are typed, of arms that are drawn."""
    for pair in (part.strip() for part in str(given or "").split(",") if part.strip()):
        one, between, other = pair.partition(":")
        if not between:
            raise InputError(f"rivals are two arms such as hyper@1:lcm@4, got {pair[:60]!r}")
        for typed in (rivals := (arm(one.strip()), arm(other.strip()))):
            if typed not in drawn:
                raise InputError(
                    f"{typed.method[:40]}@{typed.steps} is not drawn here; add it to --methods and --steps"
                )
        yield rivals


def _arms(methods: Sequence[Method], steps: Sequence[int]) -> tuple[list[Arm], list[str]]:
    arms, impossible = [], []
    for method in methods:
        for count in steps:
            try:
                method.check(Request("a", steps=count))
                arms.append(Arm(method.name, count))
            except InputError as problem:
                impossible.append(str(problem))
    return arms, impossible


# Prompts


def _frozen(sets: object) -> list[Prompt]:
    chosen = names(sets, emoji.SETS, "prompt set") if sets else list(emoji.SETS)
    return [prompt for prompt in emoji.load() if prompt.set in chosen]


def read(path: Path) -> list[Prompt]:
    """A person's prompts, one a line.

    Raises:
        InputError: the file cannot be read, or a line is blank, equal to another or no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text ({type(error).__name__}); choose a text file") from None
    if not lines:
        raise InputError(f"{path} is empty; write one prompt a line")
    first: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise InputError(f"{path}, line {number} is blank; delete it, each line is one prompt")
        text = clean_prompt(line, f"{path}, line {number}")
        if text in first:
            raise InputError(f"{path}, line {number} repeats line {first[text]} ({text[:60]!r}); delete one of them")
        first[text] = number
    return [Prompt(GIVEN, text, text) for text in first]


def _spread(prompts: Iterable[Prompt], limit: int) -> list[Prompt]:
    """At most `limit` prompts of each set, spread evenly over it."""
    by_set: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_set.setdefault(prompt.set, []).append(prompt)
    return [
        some[place * len(some) // min(limit, len(some))]
        for some in by_set.values()
        for place in range(min(limit, len(some)))
    ]


# Reading what people type


def names(given: object, known: Mapping[str, Any], what: str) -> list[str]:
    """Names from a list or from text with commas, in the order of `known`; InputError with the nearest known one."""
    parts = given.split(",") if isinstance(given, str) else given
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        raise InputError(f"{what}s must be names from {', '.join(known)}")
    asked = [part.strip() for part in parts if part.strip()]
    for name in asked:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.5)
            hint = f"did you mean {near[0]}? " if near else ""
            raise InputError(f"there is no {what} {name[:40]!r}; {hint}choose from {', '.join(known)}")
    if not asked:
        raise InputError(f"no {what} is chosen; choose from {', '.join(known)}")
    return [name for name in known if name in asked]


def _numbers(given: object, what: str) -> list[int]:
    parts = given.split(",") if isinstance(given, str) else given
    if not isinstance(parts, list | tuple):
        parts = [parts]
    found = [whole_number(part.strip() if isinstance(part, str) else part, what, 1, STEPS_MAX) for part in parts]
    return sorted(set(found))


# The folder of a plan


def claim(folder: Path, record: Mapping[str, Any]) -> None:
    """Make `folder` the plan's own, or go on in it.

    Raises:
        InputError: it holds another plan's results, or anything else; nothing in it is touched.
    """
    text = json.dumps(record, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    file = folder / PLAN
    try:
        folder.mkdir(parents=True, exist_ok=True)
        visible = [found for found in folder.iterdir() if not found.name.startswith(".")]
        if not file.exists() and visible:
            raise InputError(f"{folder} holds other files; choose a new folder with --out")
        if not file.exists():
            new = folder / f".{PLAN}.{os.getpid()}"
            new.write_text(text, encoding="utf-8")
            os.replace(new, file)  # whole or not there
        found = file.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{folder} cannot be used ({error.strerror}); choose another folder with --out") from None
    if found != text:
        raise InputError(
            f"{folder} holds the results of another configuration ({_differences(found, record)}); "
            "choose a new folder with --out"
        )


def _differences(found: str, record: Mapping[str, Any]) -> str:
    try:
        old = json.loads(found)
        changed = [key for key in {**record, **old} if old.get(key) != json.loads(json.dumps(record.get(key)))]
    except (ValueError, AttributeError, TypeError):
        return f"{PLAN} cannot be read"
    return f"it differs in {', '.join(changed)}" if changed else f"{PLAN} was written by another version"
