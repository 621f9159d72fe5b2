"""What a method is: how a step is taken, for how many it was made, how it is trained, how it presents itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from hypersd.adapters import AdapterFile
from hypersd.records import InputError, Request

if TYPE_CHECKING:
    from torch import Tensor

    from hypersd import train
    from hypersd.releases import Release
    from hypersd.schedule import Level, Schedule


class Step(Protocol):
    """From x_t at timestep t to x_s at timestep s (FINAL after the last); x_t, x0 and eps are [batch, c, h, w]."""

    def __call__(
        self,
        schedule: Schedule,
        x_t: Tensor,
        x0: Tensor,
        eps: Tensor,
        t: int,
        s: int,
        eta: float,
        noise: Callable[[], Tensor],  # fresh noise of the same shape, drawn from the request's own generator
    ) -> Tensor: ...


@dataclass(frozen=True)
class StepRange:
    """Step counts from `low` to `high`, and the few worth offering as buttons."""

    low: int
    high: int
    suggested: tuple[int, ...]

    def __contains__(self, steps: object) -> bool:
        return isinstance(steps, int) and self.low <= steps <= self.high

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


@dataclass(frozen=True)
class Stage:
    """One training run of a method: in how many `segments` the trajectory is cut, and what the loss is made of.

    `mse` and `adversarial` weigh its two parts. `offset_noise` is the deviation of noise that is the same all over a
    channel, added to the noise of the training latents.
    """

    segments: int = 1
    mse: float = 1.0
    adversarial: float = 0.0
    offset_noise: float = 0.0


class Places(NamedTuple):
    """Where a micro-batch stands: x_t at t, the solver's next point below, the end of the jump, the segment's top.

    x_t is [batch, c, h, w]; the rest are timesteps, int64 [batch]; `states` condition the network.
    """

    x_t: Tensor
    t: Tensor
    t_prev: Tensor
    t_end: Tensor
    t_top: Tensor
    states: Tensor


class Training(Protocol):
    """What a method's loss may ask for: the network in its roles, and places on the trajectory.

    Roles are "student", which learns, "ema", its slow average, which gives the target, and where the method names it
    as a learner "fake", which learns what the student draws.
    """

    stage: Stage

    def places(self, step: train.Step) -> Places:
        """The micro-batch: captioned latents, noised to solver points."""
        ...

    def teacher_step(self, at: Places) -> Tensor:
        """One DDIM step of the guided base from x_t down to t_prev, without gradient (Hyper-SD, eq. 1)."""
        ...

    def estimate(
        self, role: str, x_t: Tensor, t: Tensor, states: Tensor, *, learn: bool | None = None
    ) -> tuple[Tensor, Tensor]:
        """(x0, eps) as the network sees them in that role; with gradient if it shall `learn`, as the student does."""
        ...

    def guided(self, x_t: Tensor, t: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """(x0, eps) as the guided base sees them, without gradient."""
        ...

    def beginnings(self, step: train.Step) -> Places:
        """The micro-batch's captions with pure noise at the last timestep, where a drawing begins."""
        ...

    def visits(self, step: train.Step) -> Places:
        """The micro-batch where drawings stop by: one half as `beginnings`, the others' latents noised to timesteps
        that 2, 4 and 8 steps visit after it."""
        ...

    def teacher_sample(self, at: Places, steps: int) -> Tensor:
        """What the guided base draws from x_t in so many DDIM steps, without gradient."""
        ...

    def anywhere(self, x0: Tensor, step: train.Step, stream: str) -> tuple[Tensor, Tensor, Tensor]:
        """(x_t, t, noise): x0 noised to timesteps drawn from the middle 96 % of all."""
        ...

    def level(self, t: Tensor) -> Level: ...

    def fool(self, fake: Tensor, at: Places, step: train.Step) -> Tensor:
        """The student's loss before the adversary: how surely that tells that `fake`, at t_end, is no target."""
        ...

    def tell(self, real: Tensor, at: Places, step: train.Step) -> Tensor:
        """The adversary's own loss: to tell `real`, at t_end, from the fake it was shown last."""
        ...


Losses = Callable[[Training, "train.Step"], Iterator[tuple[str, "Tensor"]]]


@dataclass(frozen=True)
class Method:
    """One row of METHODS: everything the app, the command line and the tests need to know about a method.

    `guidance` and `eta` are what the method was made for, used when a request leaves them open. `spacing` is its grid
    of timesteps; with `sigma_start` the first latent is the schedule's share of noise and not all of it, as Euler
    schedulers begin; with `windows` the trajectory is straight in each of so many, as PeRFlow's; the side of its
    pictures is the base's divided by `smaller`. All methods but the base model are `adapted`: drawn with an adapter.
    `losses` and `stages` say how that is trained here, stage after stage, None and () for one that is only read from
    its makers; `begins_with` names the method whose last adapter the first stage starts from, `learners` the roles that
    are trained. With `keeps_guidance` the teacher is not guided and some captions are empty; without `pictures`
    captions are enough to learn from. `adapters` are what came of it and was found, one a stage; with `exact` each
    draws no other number of steps than its own. Those that are to be downloaded first, in their order `lacking`, are
    among them with a hash of "". `otherwise` ends the sentence that a wrong step count gets, for example "for one step
    choose hyper".
    """

    name: str
    title: str
    paper: str
    summary: str
    sampler: str
    step: Step
    steps: StepRange
    guidance: float
    eta: float
    spacing: str = "trailing"
    licence: str = "Apache-2.0"
    otherwise: str = ""
    sigma_start: bool = False
    windows: int = 0
    smaller: int = 1
    exact: bool = False
    adapted: bool = True
    losses: Losses | None = None
    stages: tuple[Stage, ...] = ()
    begins_with: str = ""
    learners: tuple[str, ...] = ("student",)
    keeps_guidance: bool = False
    pictures: bool = True
    adapters: tuple[AdapterFile, ...] = ()
    lacking: tuple[Release, ...] = ()

    @property
    def lacks(self) -> tuple[int, ...]:
        """Megabytes of each file that is to be downloaded before it can draw."""
        return tuple(release.megabytes for release in self.lacking)

    def check(self, request: Request) -> None:
        """InputError if the method was not made for the request's number of steps, or no adapter found is."""
        if request.steps not in self.steps:
            advice = self.otherwise or f"choose {self.steps}"
            plural = "step" if self.steps.high == 1 else "steps"
            raise InputError(f"{self.name} was made for {self.steps} {plural}, got {request.steps}; {advice}")
        if self.exact and request.steps not in self.steps.suggested:
            made = ", ".join(map(str, self.steps.suggested))
            raise InputError(f"{self.name} was made for {made} steps, got {request.steps}; choose one of these")
        if self.adapters:
            self.adapter(request.steps)  # one of them must be for so many

    def adapter(self, steps: int) -> AdapterFile | None:
        """The adapter to draw so many steps with; None for the base model.

        An adapter for k segments knows jumps that stay within a segment, so k must divide the number of steps, or equal
        it where the method is `exact`: then every edge is visited. Of those that qualify the one with most segments is
        closest to the base model.

        Raises:
            InputError: no adapter was found that can.
        """
        if not self.adapted:
            return None
        fitting = [a for a in self.adapters if steps % a.card.segments == 0]
        if self.exact:
            fitting = [a for a in fitting if steps == a.card.segments]
        if not fitting:
            raise InputError(f"{self.name} has no adapter for {steps} steps here; {self.remedy('one', self.adapters)}")
        return max(fitting, key=lambda a: a.card.segments)

    def remedy(self, what: str, others: Sequence[AdapterFile] = ()) -> str:
        """How to come by an adapter: `what` is "one" that is missing beside `others`, or "it", which does not fit."""
        if self.losses:
            again = "train one with" if what == "one" else "train it again with"
            return f"{again}: python -m hypersd distill {self.name}"
        backbone = others[0].card.backbone if others else "sdxl"
        return f"get {what}{' again' * (what == 'it')} with: python -m hypersd fetch {backbone} {self.name}"

    def describe(self) -> dict[str, Any]:
        """What a person or a program that draws may ask of the row, ready for JSON."""
        shown = ("name", "title", "paper", "summary", "sampler", "guidance", "eta", "spacing", "licence")
        row = {name: getattr(self, name) for name in shown}
        adapters = [{"file": a.path.name, "sha256": a.sha256, **asdict(a.card)} for a in self.adapters]
        return {**row, "steps": asdict(self.steps), "adapters": adapters}
