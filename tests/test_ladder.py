"""The ladder: pictures of known order, and metrics that do or do not notice it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from judged import Thumbnails, make_artwork
from test_evaluate import evidence
from torch import Tensor

from hypersd.__main__ import main
from hypersd.backbone import Backbone
from hypersd.evaluate import judges, ladder, plan, scoring
from hypersd.evaluate.ladder import CONCERNS, Rung, climb
from hypersd.evaluate.measures import METRICS, Texts
from hypersd.records import InputError

LIMIT = 8  # prompts a set


@pytest.fixture(scope="module", autouse=True)
def setting() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judges, "JUDGES", {"measure": Thumbnails, "reward": Thumbnails})
        patch.setattr(ladder, "TEACHER_STEPS", (5, 3, 2, 1))
        yield


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prompts = plan.make(sets="seen,composition,concept", limit=LIMIT).prompts
    return make_artwork(tmp_path_factory.mktemp("real") / "artwork", prompts)


@pytest.fixture(scope="module")
def climbed(tiny_folder: Path, real: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ladder") / "ladder"
    assert ladder.run(str(tiny_folder), folder, real, limit=LIMIT) == folder / "ladder.md"
    return folder


# ------------------------------------------------------------------------------------------------- what is done


def picture(n: int = 4, side: int = 20) -> Tensor:
    return torch.randint(0, 256, (n, 1, side, side, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_blur_keeps_what_is_flat_and_smooths_the_rest() -> None:
    flat = torch.full((1, 1, 9, 9, 3), 77, dtype=torch.uint8)
    assert torch.equal(ladder.blurred(flat, 2.0), flat)
    spreads = [float(ladder.blurred(picture(), sigma).double().std()) for sigma in ladder.BLURS]
    assert spreads == sorted(spreads, reverse=True) and spreads[-1] < spreads[0] / 4
    point = torch.zeros(1, 1, 15, 15, 3, dtype=torch.uint8)
    point[0, 0, 7, 7] = 255
    soft = ladder.blurred(point, 1.0)[0, 0, :, :, 0]
    assert torch.equal(soft, soft.T) and int(soft[7, 7]) == round(255 / (2 * torch.pi) * 1.0003)


def test_noise_is_of_the_size_that_it_says() -> None:
    grey = torch.full((1, 1, 64, 64, 3), 128, dtype=torch.uint8)
    assert torch.equal(ladder.noisy(grey, 0), grey)
    assert float(ladder.noisy(grey, 10).double().std()) == pytest.approx(10, rel=0.03)


def test_colours_turn_around_grey() -> None:
    grey = torch.tensor([[[[[0, 0, 0], [99, 99, 99], [255, 255, 255]]]]], dtype=torch.uint8)
    red = torch.tensor([[[[[200, 0, 0]]]]], dtype=torch.uint8)
    assert torch.equal(ladder.turned(grey, 77), grey)
    assert torch.equal(ladder.turned(picture(), 0), picture())
    assert ladder.turned(red, 120).flatten().tolist() == [0, 200, 0]
    assert ladder.turned(red, 240).flatten().tolist() == [0, 0, 200]


def test_larger_shares_hold_the_smaller_ones() -> None:
    chosen = [ladder._chosen(20, share) for share in ladder.SHARES]
    assert [int(some.sum()) for some in chosen] == [0, 5, 10, 20]
    assert all(bool((more | ~less).all()) for less, more in itertools.pairwise(chosen))


def test_lost_kinds_are_replaced_by_those_that_are_kept() -> None:
    assert ladder._fewer(12, 1.0).tolist() == list(range(12))
    for share in ladder.KINDS[1:]:
        rows = ladder._fewer(12, share)
        assert len(rows) == 12 and len(rows.unique()) == round(12 * share)
        assert all(int(rows[row]) == row for row in rows.unique().tolist())


def test_swapped_captions_are_another_prompts() -> None:
    e = evidence(12)
    yard = scoring.Yardstick("", "", "", "")
    for share in ladder.SHARES:
        texts = ladder._swapped(e, yard, share).texts
        assert isinstance(texts, Texts) and isinstance(e.texts, Texts)
        assert int((texts.own != e.texts.own).any(1).sum()) == round(12 * share)
        assert torch.equal(texts.own.sort(0).values, e.texts.own.sort(0).values)


def test_collapsed_and_mixed_pictures() -> None:
    two = picture(8).reshape(4, 2, 20, 20, 3)
    collapsed = ladder._collapsed(two, 0.5)
    assert int((collapsed[:, 0] == collapsed[:, 1]).flatten(1).all(1).sum()) == 2
    assert torch.equal(collapsed[:, 0], two[:, 0])
    others = torch.full((4, 1, 40, 40, 3), 9, dtype=torch.uint8)
    assert int((ladder._mixed(two[:, :1], others, 0.5) == 9).flatten(1).all(1).sum()) == 2


# ----------------------------------------------------------------------------------------------------- verdicts


def rungs(values: list[float]) -> list[Rung]:
    """Pictures so sharp: a board whose squares differ by so much."""
    found = []
    for value in values:
        board = torch.full((8, 1, 16, 16, 3), 100, dtype=torch.uint8)
        board[:, :, ::2, ::2] = board[:, :, 1::2, 1::2] = 100 + int(value)
        found.append(Rung(f"{value:g}", evidence(pixels=board)))
    return found


def test_a_metric_holds_if_it_keeps_the_order_in_every_series(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "CONCERNS", {"sharpness": ("a", "b")})
    monkeypatch.setattr(ladder, "STAYS", {})
    verdict = climb({"a": rungs([90, 40, 10, 0]), "b": rungs([50, 20])})["sharpness"]
    assert verdict["holds"] and [row["tau"] for row in verdict["series"].values()] == [1.0, 1.0]
    verdict = climb({"a": rungs([90, 40, 10, 20]), "b": rungs([50, 20])})["sharpness"]
    assert not verdict["holds"]
    assert verdict["series"]["a"]["tau"] == pytest.approx(2 / 3, abs=1e-3)


def test_nothing_measured_is_not_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "CONCERNS", {"r_precision": ("a",)})
    bare = [Rung(str(i), replace(evidence(), features="no judge")) for i in range(3)]
    verdict = climb({"a": bare})["r_precision"]
    assert verdict == {"holds": False, "series": {"a": {"values": {}, "tau": None, "decided": 0, "holds": False}}}


def test_rungs_that_are_alike_decide_nothing_but_the_ends_must(monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher that is done after 8 steps: 50 and 8 differ by chance, which is nobody's mistake."""
    alike = torch.linspace(-1, 1, 40).double()
    best, same, worst = 5 + alike, 5.01 + alike.flip(0), alike
    metric = METRICS["sharpness"]
    assert ladder._order(metric, [best, same, worst]) == {"tau": 1.0, "decided": 2, "holds": True}
    assert ladder._order(metric, [worst, same, best]) == {"tau": -1.0, "decided": 2, "holds": False}
    assert ladder._order(metric, [best, worst, same]) == {"tau": 0.0, "decided": 2, "holds": False}
    assert ladder._order(metric, [best, same]) == {"tau": 0.0, "decided": 0, "holds": False}, "it saw nothing"


def test_what_must_stay_may_rise_but_not_fall() -> None:
    assert ladder._stays([0.5, 0.6, 0.49])["holds"]
    assert not ladder._stays([0.5, 0.6, 0.4])["holds"]
    assert not ladder._stays([0.5])["holds"]


def test_every_metric_is_on_the_ladder() -> None:
    assert set(CONCERNS) == {name for name, metric in METRICS.items() if not metric.published}


# -------------------------------------------------------------------------------------------------- the command


def test_it_climbs_from_real_pictures_to_one_step(climbed: Path) -> None:
    content: dict[str, Any] = json.loads((climbed / "ladder.json").read_text(encoding="utf-8"))
    assert set(content["metrics"]) == set(CONCERNS)
    steps = content["metrics"]["kernel_distance"]["series"][ladder.STEPS]
    assert list(steps["values"]) == ["real", "autoencoder", "5 steps", "3 steps", "2 steps", "1 step"]
    alone = content["metrics"]["teacher_feature"]["series"][ladder.STEPS]["values"]
    assert list(alone) == ["5 steps", "3 steps", "2 steps", "1 step"] and alone["5 steps"] == pytest.approx(0)
    for name, series in (("sharpness", ladder.BLUR), ("diversity", ladder.COLLAPSE)):
        found = content["metrics"][name]["series"][series]
        assert found["holds"], (name, found)
    copies = list(content["metrics"]["memorised"]["series"][ladder.COPIES]["values"].values())
    assert copies == sorted(copies) and copies[-1] == 1.0 > copies[0]
    # Random weights draw nothing, so steps cannot be in order: what fails must not be quoted.
    assert not all(row["holds"] for row in content["metrics"].values())
    page = (climbed / "ladder.md").read_text(encoding="utf-8")
    assert "| sharpness | yes | blur: 1.00 (6) |" in page and "**no**" in page


def test_climbing_again_gives_the_same_bytes(climbed: Path, tiny_folder: Path, real: Path) -> None:
    before = [(climbed / name).read_bytes() for name in ("ladder.json", "ladder.md")]
    ladder.run(str(tiny_folder), climbed, real, limit=LIMIT)
    assert before == [(climbed / name).read_bytes() for name in ("ladder.json", "ladder.md")]


def test_reconstructed_pictures_are_those_of_the_autoencoder(tiny_backbone: Backbone) -> None:
    made = ladder.reconstructed(tiny_backbone, picture(2, 32))
    assert made.shape == (2, 1, 32, 32, 3) and made.dtype == torch.uint8
    assert not torch.equal(made, picture(2, 32))


def test_without_judge_or_artwork_it_says_what_to_make(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"cannot be climbed: no artwork in .*python -m hypersd emoji artwork"):
        ladder.run("emoji", tmp_path / "out", tmp_path)
    monkeypatch.setattr(judges, "JUDGES", {name: lambda: judges.EmojiJudge(tmp_path) for name in ("measure", "reward")})
    assert main(["evaluate", "--ladder", "--artwork", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "python -m hypersd emoji scorer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
