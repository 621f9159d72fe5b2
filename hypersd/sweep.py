"""A grid of pictures before it is drawn: prompts, seeds and methods against step counts, and what it will cost."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import NamedTuple, Protocol

from hypersd.records import SEED_MAX, STEPS_MAX, InputError, Panel, Request, clean_prompt, whole_number

CELLS_MAX = 64  # more cannot be taken in at a glance, and would keep everybody else waiting


class MethodRow(Hashable, Protocol):
    """What is read here of a row of METHODS; `methods.base.Method` is one."""

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def guidance(self) -> float: ...
    @property
    def smaller(self) -> int: ...
    @property
    def adapted(self) -> bool: ...
    @property
    def licence(self) -> str: ...
    @property
    def lacks(self) -> tuple[int, ...]: ...  # megabytes of each file that is to be downloaded before it can draw
    def check(self, request: Request) -> None: ...


@dataclass(frozen=True)
class Square:
    """One picture of a grid, `calls` network forward passes dear; `problem` says why its method cannot draw it."""

    request: Request
    method: str
    title: str
    calls: int
    problem: str = ""


class Label(NamedTuple):
    """What sets a row apart from its neighbours: one thing in front, the others below it."""

    title: str
    detail: str = ""


@dataclass(frozen=True)
class Grid:
    """`squares` lie row by row, few steps first, which is also the order of drawing: the first row is there first.

    `caption` is what all squares share, `columns` are step counts in rising order.
    """

    caption: str
    rows: tuple[Label, ...]
    columns: tuple[int, ...]
    squares: tuple[Square, ...]


def plan(
    prompts: object,
    seeds: object,
    steps: object,
    names: Sequence[str],
    methods: Mapping[str, MethodRow],
    *,
    guidance: object = None,
    negative_prompt: object = "",
) -> Grid:
    """The grid of every prompt, seed and method against every step count.

    Args:
        prompts: lines of text, or a list of texts.
        seeds, steps: a list of numbers, or text such as "1, 2, 4-8".
        names: methods, drawn in the table's order.
        guidance, negative_prompt: as in `Request`, the same for all squares.

    Raises:
        InputError: something cannot be read, or the grid has more than CELLS_MAX squares.
    """
    texts, chosen = _prompts(prompts), _methods(names, methods)
    numbers, columns = _numbers(seeds, "seeds", 0, SEED_MAX), sorted(_numbers(steps, "steps", 1, STEPS_MAX))
    count = len(texts) * len(numbers) * len(chosen) * len(columns)
    if count > CELLS_MAX:
        raise InputError(
            f"this grid has {count:,} pictures, at most {CELLS_MAX} are allowed; "
            "choose fewer prompts, seeds, methods or step counts"
        )
    rows = list(product(texts, numbers, chosen))
    squares = [
        _square(Request(text, seed, n, guidance, negative_prompt=negative_prompt), row)  # type: ignore[arg-type]
        for text, seed, row in rows
        for n in columns
    ]
    varies = [len(chosen) > 1, len(texts) > 1, len(numbers) > 1]
    labels = [_words(text, seed, row) for text, seed, row in rows]
    return Grid(
        caption=" · ".join(word for word, moves in zip(labels[0], varies, strict=True) if not moves),
        rows=tuple(_label([word for word, moves in zip(words, varies, strict=True) if moves]) for words in labels),
        columns=tuple(columns),
        squares=tuple(squares),
    )


def _words(text: str, seed: int, row: MethodRow) -> tuple[str, str, str]:
    return row.title, text, f"seed {seed}"


def _label(words: Sequence[str]) -> Label:
    return Label(words[0], " · ".join(words[1:])) if words else Label("")


def _square(request: Request, row: MethodRow) -> Square:
    try:
        row.check(request)
    except InputError as problem:
        return Square(request, row.name, row.title, 0, str(problem))
    return Square(request, row.name, row.title, calls(request, row))


# What a method allows


@cache
def allowed_steps(row: MethodRow) -> tuple[int, ...]:
    """The step counts a method was made for, in rising order, asked of its own `check`."""
    return tuple(n for n in range(1, STEPS_MAX + 1) if not _square(Request("steps", steps=n), row).problem)


def spans(numbers: Sequence[int]) -> str:
    """Rising numbers as people write them: 1-4, 8."""
    starts = [n for i, n in enumerate(numbers) if not i or numbers[i - 1] != n - 1]
    ends = [n for i, n in enumerate(numbers) if n + 1 not in numbers[i + 1 : i + 2]]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


# What it costs


def calls(request: Request, row: MethodRow) -> int:
    """Network forward passes of one picture, as `generate.denoise` counts them: two a step under guidance."""
    guidance = row.guidance if request.guidance is None else request.guidance
    return request.steps * (2 if guidance > 1 else 1)


@dataclass(frozen=True)
class Cost:
    """`pictures` still to draw and `calls` network passes for them; `seconds` is None before anything was measured.

    `kept` pictures were drawn before, `impossible` ones never will be.
    """

    pictures: int
    calls: int
    seconds: float | None
    kept: int = 0
    impossible: int = 0

    def __str__(self) -> str:
        """One line for people, such as "24 pictures, 96 network calls, about 12 s"."""
        parts = [f"{_count(self.pictures, 'picture')}, {_count(self.calls, 'network call')}, {_time(self.seconds)}"]
        if not self.pictures:
            parts = ["nothing left to draw"] if self.kept else ["no picture of this grid can be drawn"]
        if self.kept:
            parts.append(f"{_count(self.kept, 'picture')} drawn before")
        if self.impossible:
            parts.append(f"{_count(self.impossible, 'place')} empty, as the method does not allow so many steps")
        return "; ".join(parts)


class Pace:
    """How long pictures take here and now: seconds = something a picture + something a network call.

    Learned from the pictures drawn so far by least squares, the older the less they count.
    """

    FORGET = 0.9

    def __init__(self) -> None:
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)  # of 1, calls, seconds, calls^2, calls * seconds

    def note(self, panel: Panel) -> None:
        """Learn from a picture that has just been drawn."""
        x, y = float(panel.nfe), panel.seconds
        new = (1.0, x, y, x * x, x * y)
        self._sums = tuple(self.FORGET * old + more for old, more in zip(self._sums, new, strict=True))  # type: ignore[assignment]

    def seconds(self, pictures: int, calls: int) -> float | None:
        """What so many pictures with so many calls in all will take; None before the first picture."""
        n, x, y, xx, xy = self._sums
        if not x:
            return None
        spread = n * xx - x * x
        slope = (n * xy - x * y) / spread if spread > 1e-6 * n * xx else y / x
        slope = min(max(slope, 0.0), y / x)  # neither calls nor pictures give time back
        return pictures * (y - slope * x) / n + calls * slope


def cost(grid: Grid, pace: Pace, kept: Callable[[Request, str], bool] = lambda request, method: False) -> Cost:
    """What is left to pay for a grid; `kept` says which pictures are there already."""
    possible = [square for square in grid.squares if not square.problem]
    left = [square for square in possible if not kept(square.request, square.method)]
    passes = sum(square.calls for square in left)
    return Cost(
        pictures=len(left),
        calls=passes,
        seconds=pace.seconds(len(left), passes),
        kept=len(possible) - len(left),
        impossible=len(grid.squares) - len(possible),
    )


def _count(n: int, word: str) -> str:
    return f"{n:,} {word}{'s' * (n != 1)}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "time not known before the first picture"
    if seconds < 1:
        return "less than a second"
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 90 * 60 else f"about {seconds / 3600:.1f} h"


# Reading what people type


def _prompts(given: object) -> list[str]:
    lines = given.split("\n") if isinstance(given, str) else given
    if not isinstance(lines, list | tuple):
        raise InputError(f"prompts must be text, one a line, got {type(given).__name__}")
    filled = [line for line in lines if not isinstance(line, str) or line.strip()]
    _not_too_many(len(filled), "prompts")
    return list(dict.fromkeys(map(clean_prompt, filled))) or [clean_prompt("")]


def _methods(names: object, methods: Mapping[str, MethodRow]) -> list[MethodRow]:
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise InputError(f"methods must be a list of names from {', '.join(methods)}")
    unknown = [name[:40] for name in names if name not in methods]
    if unknown:
        raise InputError(f"there is no method {unknown[0]!r}; choose from {', '.join(methods)}")
    if not names:
        raise InputError("no method is chosen; tick at least one")
    return [row for name, row in methods.items() if name in names]


def _numbers(given: object, name: str, low: int, high: int) -> list[int]:
    """Distinct whole numbers in the order given; text may hold spans such as 1-4."""
    if isinstance(given, str):
        parts = re.split(r"[\s,;]+", re.sub(r"\s*[-–]\s*(?=\d)", "-", given[:2000]).strip(" \t\n,;"))
        found = [n for part in parts if part for n in _span(part, name, low, high)]
    elif isinstance(given, list | tuple):
        _not_too_many(len(given), name)
        found = [whole_number(item, name, low, high) for item in given]
    else:
        found = [whole_number(given, name, low, high)]
    if not found:
        raise InputError(f"{name} are missing; type whole numbers such as 1, 2, 4 or 1-4")
    _not_too_many(len(found), name)
    return list(dict.fromkeys(found))


def _span(part: str, name: str, low: int, high: int) -> Sequence[int]:
    first, dash, last = part.partition("-")
    if not first or not dash or not last:
        return [whole_number(part, name, low, high)]
    start, end = whole_number(first, name, low, high), whole_number(last, name, low, high)
    if end < start:
        raise InputError(f"{name} {start}-{end} run backwards; type {end}-{start}")
    _not_too_many(end - start + 1, name)
    return range(start, end + 1)


def _not_too_many(count: int, name: str) -> None:
    if count > CELLS_MAX:
        raise InputError(f"these are {count:,} {name}, at most {CELLS_MAX} are allowed; choose fewer")
