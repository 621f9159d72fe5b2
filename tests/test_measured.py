"""What evaluate and bench published is shown, and what cannot be read is left out."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from hypersd import bench, folders
from hypersd.evaluate import report
from hypersd.ui import measured

ABOUT = {"title": "score <b>", "better": 1, "primary": True, "scale": 100, "digits": 1, "optimised": ""}
SECOND = {**ABOUT, "title": "aside", "primary": False}
REPORT: dict[str, Any] = {
    "plan": {"prompts": 12, "seeds": 2, "reference": "base@50"},
    "metrics": {"score": ABOUT, "aside": SECOND},
    "results": [
        {"set": "all", "method": "tcd", "steps": 4, "nfe": 4,
         "figures": {"score": {"value": 0.4567, "low": 0.4, "high": 0.5}, "aside": {"value": 1.0}}},
        {"set": "all", "method": "lcm", "steps": 4, "nfe": 4, "figures": {}},
        {"set": "seen", "method": "tcd", "steps": 8, "nfe": 8, "figures": {"score": {"value": 0.9}}},
    ],
}  # fmt: skip
RATIO = {"title": "ours / theirs", "good": "1", "value": 1.234, "low": 1.1, "high": 1.4}
SPEED = {"machine": {"processor": "Z80", "threads": 2}, "rounds": 9, "ratios": {"x": RATIO}}


def test_both_are_told_with_plots_and_tables(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(REPORT), encoding="utf-8")
    (tmp_path / "bench.json").write_text(json.dumps(SPEED), encoding="utf-8")
    (tmp_path / "bench.png").write_bytes(b"\x89PNG")
    page = measured.page(tmp_path)
    assert "<td>tcd</td><td>4</td><td>4</td><td>45.7</td>" in page
    assert "<td>lcm</td><td>4</td><td>4</td><td>–</td>" in page
    assert "score &lt;b&gt; ↑" in page and "aside" not in page and ">8<" not in page
    assert "<td>1.23</td><td>1.10 to 1.40</td>" in page and "Z80, 2 threads, 9 rounds" in page
    assert page.count("data:image/png") == 1


def test_nothing_published_is_nothing_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert measured.page(tmp_path / "nowhere") == ""
    (tmp_path / "report.json").write_text('{"plan": {}}', encoding="utf-8")
    (tmp_path / "bench.json").write_text("{", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert measured.page(tmp_path) == ""
    assert "report.json is not shown" in caplog.text and "bench.json is not shown" in caplog.text


def test_each_backbone_shows_the_figures_that_were_measured_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One model's figures never stand under another's pictures, and publishing one leaves the other's alone."""
    (tmp_path / "bench.json").write_text(json.dumps(SPEED), encoding="utf-8")
    monkeypatch.setattr(folders, "__file__", str(tmp_path / "hypersd/folders.py"))
    bench.publish(tmp_path, "some/tiny", "bench.json")
    assert measured.page(folders.measured("emoji")) == ""
    assert "1.10 to 1.40" in measured.page(folders.measured("tiny"))


def test_the_readme_shows_primary_figures_of_all_prompts() -> None:
    lines = report.readme(REPORT).splitlines()
    assert lines[0] == "| method | steps | NFE | score <b> ↑ |"
    assert lines[2:] == ["| tcd | 4 | 4 | 45.7 [40.0, 50.0] |", "| lcm | 4 | 4 | – |"]
