"""The nouns that travel: a Request goes in, a Panel comes out. Frozen, standard library only.

A `Request` is what a person asked for and is the same for every method; a `Panel` is one answer to it: the pixels
and everything needed to draw them again. In the study a picture is an `Item`, a question about two of them a `Ballot`,
the answer a `Vote`; what votes say about two pictures is a `Pair`.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from dataclasses import asdict, dataclass, field, fields
from typing import Any

PROMPT_CHARACTERS = 500
SEED_MAX = 2**32 - 1
NAG_SCALE = 2.0  # offered where a negative prompt is typed
STEPS_MAX = 1000  # no schedule here has more timesteps; each method allows fewer
FINAL = -1  # the place after timestep 0 where a drawing of the base model ends
CLEAN = 0  # timestep at which a distilled drawing ends: abar_0, not 1, as in diffusers' TCDScheduler


class Problem(Exception):
    """Something a person can mend. The message is a whole sentence, shown as it is at every edge, never a traceback."""


class InputError(Problem, ValueError):
    """Something a person typed cannot be used. The message says what came, what is allowed and what to type."""


@dataclass(frozen=True)
class Request:
    """One question to every method: the prompt, the seed of the shared noise and the number of network steps.

    `guidance` is the classifier-free guidance scale g in eps_unc + g (eps_cond - eps_unc); g <= 1 costs one network
    call a step, more costs two. `guidance` and `eta` of None mean "what the method was made for". Guidance above 1
    leads away from the negative prompt; where it is not, `nag` does at this scale, None and 1 not at all (nag.py).

    Raises:
        InputError: a field is not of its type or out of its range.
    """

    prompt: str
    seed: int = 0
    steps: int = 25
    guidance: float | None = None
    eta: float | None = None
    negative_prompt: str = ""
    nag: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", clean_prompt(self.prompt))
        object.__setattr__(self, "negative_prompt", clean_prompt(self.negative_prompt, "negative prompt", empty=True))
        object.__setattr__(self, "seed", whole_number(self.seed, "seed", 0, SEED_MAX))
        object.__setattr__(self, "steps", whole_number(self.steps, "steps", 1, STEPS_MAX))
        if self.guidance is not None:
            object.__setattr__(self, "guidance", real_number(self.guidance, "guidance", 0.0, 30.0))
        if self.eta is not None:
            object.__setattr__(self, "eta", real_number(self.eta, "eta", 0.0, 1.0))
        if self.nag is not None:
            object.__setattr__(self, "nag", real_number(self.nag, "nag", 1.0, 20.0))


@dataclass(frozen=True)
class Panel:
    """One picture with its provenance: enough to draw the same pixels again, and to say what they cost.

    `pixels` are width x height x 3 bytes, RGB, row by row. `nfe` counts network forward passes per picture (two a
    step under guidance, one a step under `nag`, whose second cross-attention shows in the seconds only), `seconds` is
    wall time from request to pixels with the model already in memory. `nag` is None where it had no part.
    """

    pixels: bytes
    width: int
    height: int
    prompt: str
    negative_prompt: str
    seed: int
    noise_sha256: str
    backbone: str
    base_sha256: str
    method: str
    adapter_sha256: str | None
    sampler: str
    steps: int
    nfe: int
    guidance: float
    eta: float
    dtype: str
    seconds: float
    version: str
    nag: float | None = None

    @property
    def pixels_sha256(self) -> str:
        return hashlib.sha256(self.pixels).hexdigest()

    def provenance(self) -> dict[str, Any]:
        """Every field but the pixels, which are named by their hash; what goes into a PNG's text chunk."""
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "pixels"}
        return {**kept, "pixels_sha256": self.pixels_sha256}

    def __repr__(self) -> str:
        return f"Panel({self.method}, {self.steps} steps, {self.nfe} NFE, {self.seconds:.2f} s, {self.prompt!r})"


KINDS = ("lora", "network", "difference")


@dataclass(frozen=True)
class Adapter:
    """What a LoRA file says of itself, in its safetensors metadata: enough to use it, and to train it again.

    Of its `kind`, one of KINDS, most are a LoRA. A "network" holds the whole denoiser instead, a "difference" what is
    to be added to each weight of the base; their rank is 0. `prediction` is what it answers with, "" for the same as
    the base.

    It was made by `method` for jumps within each of `segments` equal parts of the trajectory, on the base whose
    network has `base_sha256`. Its row in the app is `name`. A drawing begins at timestep `start` and its last jump
    lands at `end` (0: abar_0, not 1). `guidance` and `eta` are what to draw with; guidance 1 means that the scale is
    baked in. The adapter is merged at `scale`. `recipe` holds every setting of the training.
    """

    name: str
    method: str
    backbone: str
    base_sha256: str
    segments: int
    rank: int
    guidance: float
    eta: float
    updates: int
    data: str
    commit: str
    recipe: dict[str, Any] = field(hash=False)  # the rest tells adapters apart; a row of METHODS can be a key
    start: int = 999
    end: int = 0
    scale: float = 1.0
    kind: str = "lora"
    prediction: str = ""


CHOICES = ("left", "right", "tie", "both_bad")


@dataclass(frozen=True)
class Item:
    """One picture of the study, without its pixels: `image_sha256` names those, the rest says how they were drawn.

    `config_sha256` is of everything that defines the sampler beside its name; `seconds` is wall time. `prompt` is what
    both pictures of a ballot share, and with it `seed` and `noise_sha256`.
    """

    image_sha256: str
    prompt: str
    method: str
    base_sha256: str
    adapter_sha256: str | None
    sampler: str
    config_sha256: str
    steps: int
    nfe: int
    guidance: float
    eta: float
    seed: int
    noise_sha256: str
    width: int
    height: int
    dtype: str
    seconds: float

    @classmethod
    def of(cls, panel: Panel) -> Item:
        """The picture of a panel; its sampler is defined by these five fields."""
        kept = ("sampler", "steps", "eta", "negative_prompt", "version")
        config = {name: getattr(panel, name) for name in kept} | ({"nag": panel.nag} if panel.nag else {})
        made: dict[str, Any] = {"image_sha256": panel.pixels_sha256, "config_sha256": _sha256(config)}
        return cls(**made, **{f.name: getattr(panel, f.name) for f in fields(cls) if f.name not in made})

    @property
    def arm(self) -> str:
        """What the study compares: a method at a step count, such as "tcd@4"."""
        return f"{self.method}@{self.steps}"

    @property
    def id(self) -> str:
        """sha256 of every field but the seconds, which differ from one drawing of the same picture to the next."""
        return _sha256({**asdict(self), "guidance": float(self.guidance), "eta": float(self.eta), "seconds": None})


@dataclass(frozen=True)
class Ballot:
    """One question to one annotator: which of two pictures? Issued by the server, answered at most once, expires.

    `id` is 128 random bits in hex; `left` and `right` are ids of items; times are UTC microseconds. `propensity` is
    the probability with which this pair, this way round, was chosen. `expected` is the answer of a gold ballot, which
    is known; `repeat_of` the ballot that asked the same with the sides swapped.
    """

    id: str
    study: str
    annotator: str
    prompt: str
    left: str
    right: str
    propensity: float
    issued_us: int
    expires_us: int
    expected: str | None = None
    repeat_of: str | None = None

    @property
    def is_gold(self) -> bool:
        return self.expected is not None


@dataclass(frozen=True)
class Vote:
    """The answer to a ballot: one of CHOICES, and how long the pictures were looked at.

    `attributes` are (name, "left" | "right" | "tie") in the study's order, empty where the annotator gave none.
    """

    ballot: str
    choice: str
    dwell_ms: int
    zoomed: bool
    at_us: int
    attributes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Pair:
    """What all counted votes on two pictures of one prompt say together; a reward model learns from these.

    `margin` is (votes for - votes against) / `n_votes` in [0, 1], ties being votes for neither; both_bad is no vote
    here. `split` is "train", "validation" or "test", by prompt.
    """

    prompt: str
    chosen: Item
    rejected: Item
    votes_for: int
    votes_against: int
    ties: int
    split: str

    @property
    def n_votes(self) -> int:
        return self.votes_for + self.votes_against + self.ties

    @property
    def margin(self) -> float:
        return (self.votes_for - self.votes_against) / self.n_votes


def digest(record: Request) -> str:
    """sha256 of a record's canonical JSON: equal questions have equal digests on every machine."""
    return _sha256(asdict(record))


def _sha256(plain: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def clean_prompt(text: object, name: str = "prompt", *, empty: bool = False) -> str:
    """NFC, whitespace folded to single spaces; InputError for anything a text encoder cannot read."""
    if not isinstance(text, str):
        raise InputError(f"{name} must be text, got {type(text).__name__}; type a few words such as 'a happy cat'")
    if len(text) > 4 * PROMPT_CHARACTERS:  # far too long: not worth normalising
        raise InputError(_too_long(text, name))
    if any(unicodedata.category(c) == "Cs" for c in text):
        raise InputError(f"{name} holds half a surrogate pair, which is not text; paste it again as plain text")
    kept = "".join(c if unicodedata.category(c) != "Cc" else " " for c in text)
    folded = " ".join(unicodedata.normalize("NFC", kept).split())
    if not folded and not empty:
        raise InputError(f"{name} is empty; type a few words such as 'a happy cat'")
    if len(folded) > PROMPT_CHARACTERS:
        raise InputError(_too_long(folded, name))
    return folded


def _too_long(text: str, name: str) -> str:
    return f"{name} has {len(text):,} characters, at most {PROMPT_CHARACTERS} are allowed; shorten it"


def whole_number(value: object, name: str, low: int, high: int) -> int:
    """`value` as an int in [low, high]; accepts 4, 4.0 and "4", since sliders and shells send those."""
    number = _number(value)
    if number is None or not low <= number <= high or number != int(number):
        raise InputError(f"{name} must be a whole number from {low} to {high:,}, got {_shown(value)}")
    return int(number)


def real_number(value: object, name: str, low: float, high: float) -> float:
    """`value` as a float in [low, high]."""
    number = _number(value)
    if number is None or not low <= number <= high:
        raise InputError(f"{name} must be a number from {low:g} to {high:g}, got {_shown(value)}")
    return float(number)


def _number(value: object) -> int | float | None:
    """A number as it is, text as the number it spells, None for everything else. May be infinite or not a number,
    which no comparison with a range survives."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return value
    try:
        return float(value) if isinstance(value, str) else None
    except ValueError:
        return None


def _shown(value: object) -> str:
    if isinstance(value, int) and abs(value) >= 10**15:
        return f"a number of {len(format(value, 'x')) * 4} bits"
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
