"""Methods that draw nothing, for tests of plans and screens: names, titles and the step counts they allow."""

from __future__ import annotations

from dataclasses import dataclass

from hypersd.records import InputError, Request


@dataclass(frozen=True)
class Row:
    name: str
    title: str
    low: int = 1
    high: int = 100
    guidance: float = 1.0
    eta: float = 0.0
    sampler: str = "DDIM"
    smaller: int = 1
    licence: str = "Apache-2.0"

    lacks: tuple[int, ...] = ()

    @property
    def adapted(self) -> bool:
        return self.name != "base"

    def check(self, request: Request) -> None:
        if not self.low <= request.steps <= self.high:
            raise InputError(f"{self.name} was made for {self.low}-{self.high} steps, got {request.steps}; choose more")


METHODS = {
    row.name: row
    for row in (
        Row("base", "Base model", guidance=4.0),
        Row("lcm", "LCM", 1, 8, sampler="LCM"),
        Row("tcd", "TCD", 2, 8, eta=0.3, sampler="TCD"),
        Row("hyper", "Hyper-SD", 1, 8, eta=1.0, sampler="TCD"),
    )
}
