"""One update, by roles of one network or by three copies of it, as a program whose memory can be looked at.

python tests/copies.py one|three dmd|lcm

Prints a JSON line: bytes of the network, the process's peak from before the objective was made, the update's losses.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hypersd.backbone import Backbone
from hypersd.distill import Distillation, Settings
from hypersd.methods import METHODS, Stage
from hypersd.plan import MadeUp
from hypersd.roles import Roles
from hypersd.train import Recipe, Run

SETTINGS = Settings(rank=4, guidance=(2.0, 2.0))
RECIPE = Recipe(updates=1, batch=2, lr=1e-4, warmup=1, weight_decay=0.0, ema=0.9)


class Copies(Distillation):
    """As it is usually written: student, teacher and a third one are networks of their own.

    The third is DMD's fake, which learns, or LCM's target, which begins as the student.
    """

    def __init__(self, backbone: Backbone, *given: Any) -> None:
        self.real, self.third = copy.deepcopy(backbone.unet), copy.deepcopy(backbone.unet)
        super().__init__(backbone, *given)
        self.student = self.network
        self.name = self.method.learners[-1] if len(self.method.learners) > 1 else "ema"
        self.others = Roles(self.third)
        self.others.add(self.name, rank=self.settings.rank).load_adapter(self.roles[self.name].adapter())

    def modules(self) -> dict[str, nn.Module]:
        return {name: self.others[name] if name == self.name else self.roles[name] for name in self.method.learners}

    def guided(self, x_t: Tensor, t: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        return self._by(self.real, lambda: super(Copies, self).guided(x_t, t, states))

    def estimate(
        self, role: str, x_t: Tensor, t: Tensor, states: Tensor, *, learn: bool | None = None
    ) -> tuple[Tensor, Tensor]:
        if role != self.name:
            return super().estimate(role, x_t, t, states, learn=learn)
        with self.others.wear(role), torch.set_grad_enabled(bool(learn)):
            return self._by(self.third, lambda: self.schedule.split(self._call(x_t, t, states), x_t, t))

    def _by(self, network: Any, work: Any) -> tuple[Tensor, Tensor]:
        self.network = network
        try:
            return work()
        finally:
            self.network = self.student


def peak() -> int:
    """Bytes that were resident at most, since the last `forget`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def forget() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


if __name__ == "__main__":
    torch.set_num_threads(1)
    backbone = Backbone.load("emoji")
    data = MadeUp.of(backbone, RECIPE.batch)
    size = sum(p.nbytes for p in backbone.unet.parameters())
    forget()
    before = peak()
    kind = Copies if sys.argv[1] == "three" else Distillation
    objective = kind(backbone, data, METHODS[sys.argv[2]], Stage(), SETTINGS)
    with tempfile.TemporaryDirectory() as folder:
        entry = Run(objective, RECIPE, Path(folder)).update()
    losses = {name: entry[name] for name in objective.method.learners}
    print(json.dumps({"network": size, "more": peak() - before, "losses": losses}))  # noqa: T201
