"""What a method is: how one step is taken, for how many steps it was made, and how it presents itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from hypersd.records import InputError, Request

if TYPE_CHECKING:
    from torch import Tensor

    from hypersd.schedule import Schedule


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
class Method:
    """One row of METHODS: everything the app, the command line and the tests need to know about a method.

    `guidance` and `eta` are what the method was made for, used when a request leaves them open. `spacing` is its
    grid of timesteps. `adapter` names the LoRA it needs, None for the bare base model. `otherwise` ends the sentence
    that a wrong step count gets, for example "for one step choose hyper".
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
    adapter: str | None = None
    licence: str = "Apache-2.0"
    otherwise: str = ""

    def check(self, request: Request) -> None:
        """InputError if the method was not made for the request's number of steps."""
        if request.steps not in self.steps:
            advice = self.otherwise or f"choose {self.steps}"
            plural = "step" if self.steps.high == 1 else "steps"
            raise InputError(f"{self.name} was made for {self.steps} {plural}, got {request.steps}; {advice}")

    def describe(self) -> dict[str, Any]:
        """The row without its function, ready for JSON."""
        row = {name: value for name, value in vars(self).items() if name not in ("step", "steps", "otherwise")}
        return {**row, "steps": asdict(self.steps)}
