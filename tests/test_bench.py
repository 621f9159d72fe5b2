"""The bench: fair turns, ratios of known timings, and a file that says on what machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from hypersd import bench
from hypersd.__main__ import main
from hypersd.backbone import Backbone, no_room
from hypersd.bench import Row
from hypersd.methods import METHODS
from hypersd.records import InputError, Request


@pytest.fixture(scope="module")
def content(tiny_folder: Path) -> dict[str, Any]:
    return bench.run(str(tiny_folder), 3, start_up=False)


def test_work_is_done_in_turn_forth_and_back_after_a_round_that_does_not_count() -> None:
    order: list[tuple[str, int]] = []

    def note(name: str) -> Callable[[int], None]:
        return lambda number: order.append((name, number))

    taken = bench.in_turn({name: note(name) for name in "ab"}, 3)
    assert order == [("a", -1), ("b", -1), ("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert {name: len(values) for name, values in taken.items()} == {"a": 3, "b": 3}


def test_a_ratio_adds_up_its_sides_round_by_round() -> None:
    taken = {"picture": [3.0, 30.0, 3.0], "call": [1.0, 10.0, 1.0], "decoding": [0.5, 5.0, 0.5]}
    found = bench._ratio(Row("", "", ["picture"], ["call", "call", "decoding"], "1"), taken)
    assert found["value"] == found["low"] == found["high"] == pytest.approx(3 / 2.5)


def test_the_limit_is_as_many_bare_calls_and_one_decoding(tiny_backbone: Backbone) -> None:
    _, rows = bench._work(tiny_backbone)
    limits = {row.name: row.under for row in rows if row.name.endswith("-limit")}
    assert limits["base-4-limit"] == ["network call, guided"] * 4 + ["decoding"]
    assert [name for name in limits if name.startswith("base")] == ["base-1-limit", "base-4-limit", "base-25-limit"]


def test_the_stock_pipeline_draws_the_same_picture(tiny_backbone: Backbone) -> None:
    """Else it would be another task that is timed."""
    from hypersd.generate import draw

    method = METHODS["base"]
    theirs = np.asarray(bench._stock(tiny_backbone)(7, 4, method.guidance), dtype=int)
    panel = draw(tiny_backbone, Request(f"{bench.PROMPT} 7", bench.SEED, 4), method)
    ours = np.frombuffer(panel.pixels, np.uint8).reshape(theirs.shape).astype(int)
    assert abs(theirs - ours).max() <= 1


def test_a_quick_decoder_is_the_stock_pipelines_too(tiny_folder: Path, tmp_path: Path) -> None:
    from hypersd.generate import draw

    quick = Backbone.load(tiny_folder, decoder=str(tiny.build_decoder(tmp_path / "quick")))
    work, rows = bench._work(quick)
    theirs = np.asarray(work["diffusers, 4 steps"](7), dtype=int)
    panel = draw(quick, Request(f"{bench.PROMPT} 7", bench.SEED, 4), METHODS["base"])
    ours = np.frombuffer(panel.pixels, np.uint8).reshape(theirs.shape).astype(int)
    assert abs(theirs - ours).max() <= 1
    assert not [row.name for row in rows if row.name.startswith("openvino")], "which brings its own"


def test_parts_that_rest_are_not_lent_to_a_stock_pipeline(
    tiny_folder: Path, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = [Backbone.load(tiny_folder, device="meta", offload=offload) for offload in (False, True)]
    assert [bench._resting(backbone) for backbone in held] == [False, True]
    monkeypatch.setattr(bench, "_resting", lambda _: True)
    work, rows = bench._work(tiny_backbone)
    assert not [row.name for row in rows if row.name.startswith("stock")] and "diffusers, 4 steps" not in work
    assert "base-4-limit" in {row.name for row in rows}


def test_a_gpu_has_rows_of_its_own(tiny_backbone: Backbone, caplog: pytest.LogCaptureFixture) -> None:
    """Made here on the CPU, which is not asked for them otherwise."""
    work = bench._bare(tiny_backbone)
    rows = bench._on_gpu(tiny_backbone, work)
    assert [(row.name, row.good) for row in rows] == [("batch", "more")]
    assert {label for row in rows for label in (*row.over, *row.under)} == work.keys() - {
        "network call, guided", "decoding"
    }  # fmt: skip
    four, one = work["network call of 4"](0), work["network call"](0)
    torch.testing.assert_close(four, one.repeat(4, 1, 1, 1))
    taken: dict[str, list[float]] = {}
    rows = bench._held_otherwise(tiny_backbone, 3, taken)
    assert [(row.name, row.good) for row in rows] == [("float32", "more"), ("offload", "1")]
    assert [label for row in rows for label in (*row.over, *row.under)] == list(taken)
    assert all(len(seconds) == 3 and min(seconds) > 0 for seconds in taken.values())
    assert not bench._work(tiny_backbone)[0].keys() & {"network call of 4"} and not caplog.messages


def test_a_way_that_has_no_room_is_left_out(
    tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def load(*_arguments: object, **holding: object) -> Backbone:
        if not holding["offload"]:
            raise no_room("tiny")
        return tiny_backbone

    monkeypatch.setattr(Backbone, "load", load)
    assert [row.name for row in bench._held_otherwise(tiny_backbone, 3, {})] == ["offload"]
    assert "no row in float32: the GPU has too little memory for tiny" in caplog.text


def test_the_memory_of_a_method_is_that_of_its_drawing_alone(
    tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies for other methods are dropped first, and the first drawing, which merges, does not count."""
    assert bench.gpu_memory(tiny_backbone) is None
    told: list[str] = []
    monkeypatch.setattr(tiny_backbone, "device", torch.device("cuda"))
    monkeypatch.setattr(tiny_backbone.wardrobe, "forget", lambda: told.append("forget"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: told.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: len(told) * 10**9)
    monkeypatch.setattr(bench, "draw", lambda _backbone, request, _method: told.append(request.prompt))
    assert bench.gpu_memory(tiny_backbone) == {"base, 1 steps": 4.0}
    assert told == ["forget", f"{bench.PROMPT} -1", "reset", f"{bench.PROMPT} 0"]
    content = {"ratios": {}, "once_seconds": {}, "median_seconds": {}, "peak_memory_gb": 1}
    assert "the GPU's memory, base, 1 steps" in bench.table({**content, "gpu_memory_gb": {"base, 1 steps": 4.0}})


def test_four_methods_are_timed_against_four_pipelines(
    tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "wxyz":
        monkeypatch.setitem(METHODS, name, replace(METHODS["base"], name=name, guidance=1.0))
    work, rows = bench._work(tiny_backbone)
    named = {row.name: row for row in rows}
    assert {"stock-together", "openvino-stock-together", "openvino-call", "openvino-guided"} <= set(named)
    for engine in ("", "openvino "):
        assert [panel.nfe for panel in work[f"{engine}four methods"](0)] == [8, 4, 4, 4]  # the baseline is guided
        limit = named[f"{engine.strip() and 'openvino-'}together-limit"].under
        assert [limit.count(f"{engine}{part}") for part in ("network call, guided", "network call", "decoding")] == [
            4,
            12,
            4,
        ]
    assert len(work["four pipelines"](0)) == 4
    assert "w, 4 steps" in work  # and each of them against its own limit


def test_every_figure_is_there_and_above_zero(content: dict[str, Any]) -> None:
    assert content["rounds"] == 3
    assert {"base-1-limit", "base-4-limit", "base-25-limit", "stock-1", "stock-4"} <= set(content["ratios"])
    for row in content["ratios"].values():
        assert 0 < row["low"] <= row["value"] <= row["high"]
    assert all(seconds > 0 for seconds in content["median_seconds"].values())
    assert min(content["machine"]["gigaflops"]) > 0
    assert content["machine"]["torch"] == torch.__version__ and content["machine"]["processor"]
    assert content["dtype"] == ("float16" if torch.cuda.is_available() else "float32")
    assert bool(content["gpu_memory_gb"]) == torch.cuda.is_available()


def test_results_are_a_file_a_plot_and_lines(content: dict[str, Any], tmp_path: Path) -> None:
    bench.write(tmp_path / "bench", content)
    assert json.loads((tmp_path / "bench" / "bench.json").read_text(encoding="utf-8")) == content
    assert (tmp_path / "bench" / "bench.png").read_bytes().startswith(b"\x89PNG")
    lines = bench.table(content).splitlines()
    assert any(line.startswith("base, 1 steps / network + decoder") for line in lines)
    assert lines[-1].endswith("GB")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose another folder with --out"):
        bench.write(tmp_path / "file", content)


def test_rounds_are_a_whole_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--rounds", "few", "--out", str(tmp_path / "out")]) == 2
    assert "rounds must be a whole number from 3 to 1,000, got 'few'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_library_is_told_before_the_work() -> None:
    bench.need("json")
    with pytest.raises(InputError, match=r"no_such_library is not installed; .*pip install -e '\.\[evaluate\]'"):
        bench.need("json", "no_such_library")


@pytest.mark.slow
def test_start_up_is_that_of_a_command_that_works(tiny_folder: Path, tmp_path: Path) -> None:
    assert bench._start_up(str(tiny_folder)) > 0.1
    with pytest.raises(InputError, match="the command that draws one picture failed"):
        bench._start_up(str(tmp_path))
