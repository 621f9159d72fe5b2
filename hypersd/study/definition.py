"""What a study asks, read from a YAML file and fixed from then on: every ballot names the sha256 of its study."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from hypersd.records import SEED_MAX, STEPS_MAX, InputError, clean_prompt, real_number, whole_number

FILE = Path(__file__).resolve().parents[2] / "assets" / "study.yaml"
ARM = re.compile(r"([a-z0-9_+-]+)@([1-9]\d*)")
ATTRIBUTE = re.compile(r"[a-z][a-z_]{0,39}")


@dataclass(frozen=True)
class Shares:
    """Of an annotator's ballots: with a known answer, asked again with the sides swapped; of the rest: drawn blindly.

    `uniform` may not be nothing: votes are weighed by the probability of their pair, which must not be nothing.
    """

    gold: float
    repeat: float
    uniform: float


@dataclass(frozen=True)
class Limits:
    """How many ballots may be answered, per minute or day."""

    annotator_per_minute: int
    annotator_per_day: int
    network_per_minute: int


@dataclass(frozen=True)
class Study:
    """One study, as `assets/study.yaml` explains it. Arms are "method@steps"; in `gold` the first one is better."""

    name: str
    consent: str
    licence: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    anchor: str
    pairs: str
    gold: tuple[tuple[str, str], ...]
    ballots: int
    votes_per_pair: int
    practice: int
    shares: Shares
    attributes: tuple[str, ...]
    reveal: str
    minimum_dwell_ms: int
    ballot_minutes: int
    limits: Limits

    @property
    def definition(self) -> str:
        """Canonical JSON: equal studies are equal text, however their files are written."""
        return json.dumps(asdict(self), sort_keys=True, ensure_ascii=False)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.definition.encode()).hexdigest()

    def arm_pairs(self) -> list[tuple[int, int]]:
        """Which arms are compared, as index pairs i < j."""
        ends = range(len(self.arms))
        return [(i, j) for i in ends for j in ends if i < j and self._are_compared(self.arms[i], self.arms[j])]

    def _are_compared(self, one: str, other: str) -> bool:
        return self.pairs == "all" or self.anchor in (one, other) or steps_of(one) == steps_of(other)

    def drawn_arms(self) -> tuple[str, ...]:
        """Every arm that a picture is needed of: the compared ones, then those of gold pairs only."""
        return tuple(dict.fromkeys([*self.arms, *(arm for pair in self.gold for arm in pair)]))


def steps_of(arm: str) -> int:
    return int(arm.rpartition("@")[2])


def load(path: str | Path = FILE) -> Study:
    """The study of a YAML file. Raises InputError: it cannot be read, or does not define a study; says where."""
    try:
        given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the study {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise InputError(f"the study {path} is not YAML{where}; compare it with assets/study.yaml") from None
    try:
        return parse(given)
    except InputError as problem:
        raise InputError(f"the study {path}: {problem}") from None


def parse(given: object) -> Study:
    """A study from plain lists, texts and numbers. Raises InputError."""
    of = _mapping(given, "the study", tuple(Study.__dataclass_fields__))
    arms = _list(of["arms"], "arms", _arm)
    gold = _list(of["gold"], "gold", _gold, least=0)
    study = Study(
        name=clean_prompt(of["name"], "name"),
        consent=_text(of["consent"], "consent"),
        licence=_text(of["licence"], "licence"),
        prompts=_list(of["prompts"], "prompts", lambda text: clean_prompt(text, "a prompt")),
        seeds=_list(of["seeds"], "seeds", lambda seed: whole_number(seed, "a seed", 0, SEED_MAX)),
        arms=arms,
        anchor=_one_of(of["anchor"], "anchor", arms),
        pairs=_one_of(of["pairs"], "pairs", ("all", "same_steps")),
        gold=gold,
        ballots=whole_number(of["ballots"], "ballots", 1, 10_000),
        votes_per_pair=whole_number(of["votes_per_pair"], "votes_per_pair", 1, 10_000_000),
        practice=whole_number(of["practice"], "practice", 0, 20),
        shares=_shares(of["shares"], bool(gold)),
        attributes=_list(of["attributes"], "attributes", _attribute, least=0),
        reveal=_one_of(of["reveal"], "reveal", ("end", "never")),
        minimum_dwell_ms=whole_number(of["minimum_dwell_ms"], "minimum_dwell_ms", 0, 60_000),
        ballot_minutes=whole_number(of["ballot_minutes"], "ballot_minutes", 1, 24 * 60),
        limits=_limits(of["limits"]),
    )
    if len(arms) < 2:
        raise InputError("arms must name two or more, such as [base@25, base@4]")
    return study


def _shares(given: object, has_gold: bool) -> Shares:
    of = _mapping(given, "shares", ("gold", "repeat", "uniform"))
    shares = Shares(**{name: real_number(of[name], f"shares.{name}", 0.0, 1.0) for name in of})
    if shares.gold + shares.repeat > 0.5:
        raise InputError("shares.gold and shares.repeat together must leave half of the ballots for the comparison")
    if shares.uniform < 0.05:
        raise InputError("shares.uniform must be 0.05 or more, so that each pair can be drawn")
    if shares.gold and not has_gold:
        raise InputError("shares.gold is above 0 but gold names no pair; add one such as [base@25, base@1]")
    return shares


def _limits(given: object) -> Limits:
    of = _mapping(given, "limits", tuple(Limits.__dataclass_fields__))
    return Limits(**{name: whole_number(of[name], f"limits.{name}", 1, 1_000_000) for name in of})


def _mapping(given: object, name: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """`given` with exactly these keys."""
    if not isinstance(given, Mapping):
        raise InputError(f"{name} must name {', '.join(keys)}, each with its value")
    for key in given:
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, 1)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(keys)}"
            raise InputError(f"{name} has no setting {str(key)[:40]!r}; {hint}")
    if missing := [key for key in keys if key not in given]:
        raise InputError(f"{name} lacks {', '.join(missing)}; see assets/study.yaml for what it means")
    return {key: given[key] for key in keys}


def _list(given: object, name: str, read: Any, least: int = 1) -> tuple[Any, ...]:
    if not isinstance(given, list) or len(given) < least:
        raise InputError(f"{name} must be a list{' of one or more' * bool(least)}, such as [first, second]")
    found = tuple(read(entry) for entry in given)
    for entry in found:
        if found.count(entry) > 1:
            raise InputError(f"{name} names {entry} twice")
    return found


def _arm(given: object) -> str:
    match = ARM.fullmatch(given) if isinstance(given, str) else None
    if match is None or int(match[2]) > STEPS_MAX:
        raise InputError(f"an arm is a method at a step count such as base@4, got {str(given)[:40]!r}")
    return match[0]


def _gold(given: object) -> tuple[str, str]:
    if not isinstance(given, list) or len(given) != 2 or given[0] == given[1]:
        raise InputError("a gold pair names two arms, the better one first, such as [base@25, base@1]")
    return _arm(given[0]), _arm(given[1])


def _attribute(given: object) -> str:
    if not isinstance(given, str) or not ATTRIBUTE.fullmatch(given):
        raise InputError(f"an attribute is a word such as alignment, got {str(given)[:40]!r}")
    return given


def _text(given: object, name: str) -> str:
    if not isinstance(given, str) or not given.strip():
        raise InputError(f"{name} must be text")
    return given.strip()


def _one_of(given: object, name: str, allowed: tuple[str, ...]) -> str:
    if not isinstance(given, str) or given not in allowed:
        raise InputError(f"{name} must be one of {', '.join(allowed)}, got {str(given)[:40]!r}")
    return given
