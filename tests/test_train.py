"""The loop: bit-exact resume after kill -9, data order, averages, guards."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hypersd import checkpoint, train
from hypersd.records import InputError
from hypersd.train import Diverged, Recipe, RecipeChanged, Run, Step

RECIPE = Recipe(updates=60, batch=8, lr=1e-2, warmup=5, cooldown=20, ema=0.9)


class Line:
    """Fit a small network to y = sum(x); `spoil` makes the loss infinite at that update."""

    def __init__(self, spoil: int | None = None, slow: float = 0.0) -> None:
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
        self.x = torch.randn(20, 4, generator=torch.Generator().manual_seed(3))
        self.spoil, self.slow, self.seen = spoil, slow, list[int]()

    def modules(self) -> dict[str, nn.Module]:
        return {"line": self.network}

    def describe(self) -> dict[str, Any]:
        return {"task": "line"}

    def losses(self, step: Step) -> Iterator[tuple[str, Tensor]]:
        time.sleep(self.slow)
        rows = step.rows(len(self.x))
        self.seen += rows.tolist()
        x = self.x[rows] + 0.01 * torch.randn(len(rows), 4, generator=step.generator("noise"))
        loss = (self.network(x) - x.sum(1, keepdim=True)).square().mean()
        yield "line", loss * float("inf") if step.index == self.spoil else loss

    @torch.no_grad()
    def sheet(self, folder: Path, step: int) -> dict[str, float]:
        return {"error": float((self.network(self.x) - self.x.sum(1, keepdim=True)).square().mean())}


def final_bytes(folder: Path) -> str:
    return checkpoint.sha256(sorted((folder / "checkpoints").glob("step-*"))[-1] / "tensors.safetensors")


def test_learns_and_ends_on_a_checkpoint(tmp_path: Path) -> None:
    run = Run(Line(), RECIPE, tmp_path)
    before = run.objective.sheet(tmp_path, 0)["error"]
    assert run.advance()
    assert run.draw()["error"] < 0.5 * before
    assert checkpoint.latest(tmp_path / "checkpoints").step == RECIPE.updates  # type: ignore[union-attr]
    assert (tmp_path / "loss.png").stat().st_size > 0


def test_resumed_run_equals_the_unbroken_one_byte_for_byte(tmp_path: Path) -> None:
    Run(Line(), RECIPE, tmp_path / "unbroken").advance()
    for stop in (7, 8, 31, 60):  # within the warm-up, the next update, within the cool-down, the end
        run = Run(Line(), RECIPE, tmp_path / "broken")
        while run.step < stop:
            run.log.append(run.update())
        run.save()
    assert final_bytes(tmp_path / "broken") == final_bytes(tmp_path / "unbroken")
    assert Run(Line(), RECIPE, tmp_path / "broken").log == Run(Line(), RECIPE, tmp_path / "unbroken").log


SCRIPT = """
import sys; from pathlib import Path
from tests.test_train import *
Run(Line(slow=0.01), RECIPE, Path(sys.argv[1])).advance(save_every=0.0)
"""


def test_kill_9_at_any_moment_and_resume(tmp_path: Path) -> None:
    """The process is killed while it trains and writes a checkpoint after every update."""
    Run(Line(), RECIPE, tmp_path / "unbroken").advance()
    folder = tmp_path / "killed"
    kills = 0
    for attempt in range(40):
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(folder)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=Path(__file__).parents[1],
        )
        deadline = time.monotonic() + 60
        published = set(folder.glob("checkpoints/step-*"))
        while process.poll() is None and set(folder.glob("checkpoints/step-*")) <= published:
            assert time.monotonic() < deadline, "no checkpoint within a minute"
            time.sleep(0.002)
        time.sleep(0.003 * attempt)  # so that the kills fall on different moments of a write
        if process.poll() is None and kills < 3:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait(60)
        if process.returncode == 0:
            break
    assert kills >= 1 and process.returncode == 0
    assert final_bytes(folder) == final_bytes(tmp_path / "unbroken")


INTERRUPTED = """
import os, signal, sys; from pathlib import Path
from hypersd.train import Stopped
from tests.test_train import *
class Interrupted(Line):
    def losses(self, step):
        if step.index == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        yield from super().losses(step)
try:
    Run(Interrupted(), RECIPE, Path(sys.argv[1])).advance(until=int(sys.argv[2]))
except Stopped as stopped:
    assert str(stopped).endswith("stopped after 11 of 60 updates; run the same command again to go on")
else:
    raise AssertionError("it went on")
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
"""


@pytest.mark.parametrize("until", [60, 11])
def test_sigterm_saves_and_ends(until: int, tmp_path: Path) -> None:
    """In a process of its own: faulthandler, which pytest turns on, takes signals on a stack that is too small for
    the registers of some processors. The last update of what was asked for is no exception."""
    program = [sys.executable, "-c", INTERRUPTED, str(tmp_path), str(until)]
    subprocess.run(program, check=True, cwd=Path(__file__).parents[1])
    assert Run(Line(), RECIPE, tmp_path).step == 11


def test_every_row_once_an_epoch_in_any_number_of_pieces() -> None:
    rows = [r for i in range(25) for r in Step(i, RECIPE).rows(20).tolist()]
    assert all(Counter(rows[e : e + 20]) == Counter(range(20)) for e in range(0, 200, 20))
    assert rows[:20] != rows[20:40]
    assert rows[80:88] == Step(10, RECIPE).rows(20).tolist()


def test_random_streams_differ_and_repeat() -> None:
    def draw(step: int, stream: str, seed: int = 0) -> list[float]:
        recipe = Recipe(updates=1, batch=1, lr=1.0, seed=seed)
        return torch.rand(4, generator=Step(step, recipe).generator(stream)).tolist()

    assert draw(3, "noise") == draw(3, "noise")
    assert len({tuple(d) for d in (draw(3, "noise"), draw(4, "noise"), draw(3, "crop"), draw(3, "noise", 1))}) == 4


def test_rate_warms_up_stays_and_falls_to_zero() -> None:
    rates = [RECIPE.rate(s) for s in range(RECIPE.updates)]
    assert rates[:5] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01])
    assert set(rates[5:40]) == {0.01}
    assert rates[-1] == pytest.approx(0.01 / 20) and rates[40:] == sorted(rates[40:], reverse=True)


def test_infinite_loss_stops_and_names_the_update(tmp_path: Path) -> None:
    run = Run(Line(spoil=20), RECIPE, tmp_path)
    with pytest.raises(Diverged, match=r"update 20: line loss inf.* begin anew with a learning rate below 0\.01"):
        run.advance(save_every=0.0)
    assert Run(Line(), RECIPE, tmp_path).step == 20


def test_the_log_shows_what_led_to_an_infinite_loss(tmp_path: Path) -> None:
    """Also what came after the last checkpoint, which the same run would go on from."""
    with pytest.raises(Diverged):
        Run(Line(spoil=20), RECIPE, tmp_path).advance()
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(20))
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 21


def test_the_bar_shows_loss_gradient_and_what_is_left_from_the_first_update_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[int, str]] = []

    class Bar(train.tqdm):
        def __init__(self, **given: Any) -> None:
            super().__init__(**{**given, "dynamic_ncols": False, "ncols": 300})

        def update(self, n: float | None = 1) -> bool | None:
            done = super().update(n)
            shown.append((int(self.n), str(self)))
            return done

    monkeypatch.setattr(train, "tqdm", Bar)
    run = Run(Line(), RECIPE, tmp_path)
    run.advance(until=3)
    assert [number for number, _ in shown] == [1, 2, 3]
    losses = [entry["line"] for entry in run.log]
    assert f"line={losses[0]:.3g}, line/norm={run.log[0]['line/norm']:.3g}" in shown[0][1]
    assert f"line={sum(losses) / 3:.3g}" in shown[2][1] and "/60 [" in shown[0][1]


def test_tensorboard_shows_the_log_and_forgets_what_a_resumed_run_does_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing import event_accumulator  # type: ignore[import-untyped]

    broken = Run(Line(), RECIPE, tmp_path, tensorboard=True)
    broken.advance(until=4)
    broken.log.append(broken.update())
    broken._show(broken.log[-1])
    assert broken._board is not None
    broken._board.flush()
    run = Run(Line(), RECIPE, tmp_path, tensorboard=True)
    run.advance(until=9)
    assert run._board is not None
    run._board.close()
    shown = event_accumulator.EventAccumulator(str(tmp_path))
    shown.Reload()
    for name in ("line", "line/norm"):
        assert [(e.step, e.value) for e in shown.Scalars(name)] == [
            (entry["step"] + 1, pytest.approx(entry[name], rel=1e-6)) for entry in run.log
        ]
    assert [event.step for event in shown.Scalars("error")] == [4, 9]


def test_without_tensorboard_nothing_is_lost_but_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="TensorBoard is not installed; type: pip install tensorboard"):
        Run(Line(), RECIPE, tmp_path, tensorboard=True)
    assert Run(Line(), RECIPE, tmp_path).advance(until=1) is True


def test_another_recipe_is_refused_by_name_but_a_longer_one_is_welcome(tmp_path: Path) -> None:
    run = Run(Line(), RECIPE, tmp_path)
    run.update()
    run.save()
    with pytest.raises(RecipeChanged, match="batch: 8 then, 16 now"):
        Run(Line(), Recipe(**{**RECIPE.__dict__, "batch": 16}), tmp_path)
    assert Run(Line(), Recipe(**{**RECIPE.__dict__, "updates": 99}), tmp_path).step == 1


def test_average_lags_behind_and_is_what_the_sheet_sees(tmp_path: Path) -> None:
    run = Run(Line(), RECIPE, tmp_path)
    for _ in range(10):
        run.update()
    live = run.networks["line"].state_dict()["0.weight"].clone()
    with run.averaged():
        inside = run.networks["line"].state_dict()["0.weight"].clone()
    assert torch.equal(inside, run.average["line"]["0.weight"]) and not torch.equal(inside, live)
    assert torch.equal(run.networks["line"].state_dict()["0.weight"], live)
