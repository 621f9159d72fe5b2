"""The evaluation: what is planned, what is drawn once and for all, and a report that is equal in every run."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from judged import Thumbnails, make_artwork
from test_shared import launcher

from hypersd import evaluate, intervals, quality
from hypersd.__main__ import COMMANDS, _parts, main
from hypersd.adapters import AdapterFile
from hypersd.backbone import Backbone
from hypersd.emoji import prompts as emoji
from hypersd.evaluate import gallery, judges, ladder, measures, paper, plan, report, scoring
from hypersd.evaluate.measures import METRICS, Evidence, Texts, measured
from hypersd.evaluate.plan import Arm, Plan
from hypersd.methods import METHODS, StepRange, discover
from hypersd.records import InputError, Request

REPORT = ("report.json", "report.md", "scores.parquet", "quality.png")
ALL = tuple(metric for metric in METRICS.values() if not metric.published)


def small(**changes: Any) -> Plan:
    return plan.make(**{"limit": 3, "seeds": 2, "steps": "1,2", "teacher_steps": "3", **changes})


@pytest.fixture(scope="module", autouse=True)
def setting() -> Iterator[None]:
    """Two cheap judges, and a second method that knows 1 and 2 steps."""
    second = replace(METHODS["base"], name="second", title="Second", guidance=1.0, steps=StepRange(1, 1, (1,)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judges, "JUDGES", {"measure": Thumbnails, "reward": Thumbnails})
        patch.setitem(METHODS, "second", second)
        patch.setattr(plan, "installed", lambda backbone: discover([], ""))  # whatever adapters lie in assets
        yield


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artwork(tmp_path_factory.mktemp("real") / "artwork", small().prompts)


@pytest.fixture(scope="module")
def results(tiny_folder: Path, real: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished evaluation; not to be changed."""
    folder = tmp_path_factory.mktemp("results") / "evaluate"
    page = evaluate.run(small(), str(tiny_folder), folder, ALL, real)
    assert page == folder / "report.md"
    return folder


@pytest.fixture(scope="module")
def content(results: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((results / "report.json").read_text(encoding="utf-8"))
    return loaded


def reports(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in REPORT}


# -------------------------------------------------------------------------------------------------------- plans


def test_the_plan_knows_every_method_that_can_and_says_which_cannot() -> None:
    made = small()
    assert [str(arm) for arm in made.arms] == ["base-1", "base-2", "base-3", "second-1"]
    assert str(made.reference) == "base-3"
    assert made.impossible == ("second was made for 1 step, got 2; choose 1",)
    assert {name: len(numbers) for name, numbers in made.sets.items()} == dict.fromkeys(emoji.SETS, 3)


def test_seeds_are_shared_by_methods_and_know_nothing_of_the_rest_of_the_plan() -> None:
    some, more = small(), small(limit=7, seeds=3, sets="colour")
    seeds = {some.request(0, index, arm).seed for arm in some.arms for index in range(2)}
    assert len(seeds) == 2
    wanted = next(p for p in some.prompts if p.set == "colour")
    assert wanted in more.prompts
    assert plan.seed(wanted, 1) == more.request(more.prompts.index(wanted), 1, more.arms[0]).seed
    every = [plan.seed(prompt, index) for prompt in emoji.load() for index in range(4)]
    assert len(set(every)) == len(every)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "set": ({"sets": "seen,compositon"}, "there is no prompt set 'compositon'; did you mean composition?"),
    "no set": ({"sets": ","}, "no prompt set is chosen; choose from seen"),
    "method": ({"methods": "bsae"}, "there is no method 'bsae'; did you mean base?"),
    "far": ({"methods": "zzz"}, "there is no method 'zzz'; choose from base"),
    "steps": ({"steps": "1,two"}, "steps must be a whole number from 1 to 1,000, got 'two'"),
    "teacher": ({"teacher_steps": "500"}, "base was made for 1-100 steps, got 500"),
    "seeds": ({"seeds": "0"}, "seeds must be a whole number from 1 to 64, got '0'"),
    "limit": ({"limit": "0"}, "limit must be a whole number from 1"),
    "kind": ({"methods": 7}, "methods must be names from base"),
    "file": ({"file": "none.txt"}, "none.txt cannot be read as UTF-8 text"),
}


@pytest.mark.parametrize(("given", "sentence"), BAD.values(), ids=BAD)
def test_what_cannot_be_planned_is_explained(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError) as told:
        small(**given)
    assert sentence in str(told.value)


@pytest.mark.parametrize(("text", "sentence"), [
    ("", "is empty; write one prompt a line"),
    ("a cat\n\na dog\n", "line 2 is blank; delete it"),
    ("a cat\na dog\na  cat\n", "line 3 repeats line 1 ('a cat'); delete one of them"),
    ("a cat\n" + "x" * 600, "line 2 has 600 characters, at most 500"),
])  # fmt: skip
def test_a_bad_prompt_file_names_its_line(text: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as told:
        plan.read(file)
    assert sentence in str(told.value)
    file.write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="cannot be read as UTF-8"):
        plan.read(file)


def test_own_prompts_are_a_set_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\na dog", encoding="utf-8")
    assert small(file=file).prompts == (
        emoji.Prompt("given", "a cat", "a cat"),
        emoji.Prompt("given", "a dog", "a dog"),
    )


def test_an_unknown_metric_is_told_the_near_miss() -> None:
    with pytest.raises(InputError, match="there is no metric 'r_precison'; did you mean r_precision"):
        evaluate.chosen("r_precison")
    assert [metric.name for metric in evaluate.chosen("recall, precision")] == ["precision", "recall"]
    assert {m.name for m in ALL} - {m.name for m in evaluate.chosen(None, quick=True)} == {"memorised"}


def test_a_quick_run_is_some_thousand_network_calls() -> None:
    """Three minutes on two cores are about 4,000 guided calls of the embedded model; the time itself is for bench."""
    quick = small(limit=plan.QUICK, steps=plan.STEPS, teacher_steps="25", methods="base")
    assert len(quick.prompts) * quick.seeds * sum(arm.steps for arm in quick.arms) < 2500


# ------------------------------------------------------------------------------------------- one folder, one plan


def test_another_configuration_is_refused_and_nothing_is_touched(results: Path, tiny_folder: Path, real: Path) -> None:
    before = {file: file.read_bytes() for file in results.rglob("*") if file.is_file()}
    for changes, word in (({"seeds": 1}, "seeds"), ({"limit": 2}, "prompts"), ({"steps": "1"}, "arms")):
        with pytest.raises(InputError, match=f"another configuration .it differs in .*{word}.*choose a new folder"):
            evaluate.run(small(**changes), str(tiny_folder), results, ALL, real)
    assert before == {file: file.read_bytes() for file in results.rglob("*") if file.is_file()}


def test_another_decoder_is_another_configuration(results: Path, tiny_folder: Path, real: Path, tmp_path: Path) -> None:
    """Its pictures are others; and the other way round, those of the model's own."""
    quick = str(tiny.build_decoder(tmp_path / "quick"))
    with pytest.raises(InputError, match=r"it differs in decoder\); choose a new folder"):
        evaluate.run(small(), str(tiny_folder), results, ALL, real, decoder=quick)
    plan.claim(tmp_path / "new", small().record(Backbone.load(tiny_folder, decoder=quick)))
    with pytest.raises(InputError, match=r"it differs in decoder\); choose a new folder"):
        plan.claim(tmp_path / "new", small().record(Backbone.load(tiny_folder)))


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "holiday.txt").write_text("x")
    with pytest.raises(InputError, match="holds other files; choose a new folder"):
        plan.claim(tmp_path, {"a": 1})
    with pytest.raises(InputError, match="cannot be used"):
        plan.claim(tmp_path / "holiday.txt", {"a": 1})
    assert [file.name for file in tmp_path.iterdir()] == ["holiday.txt"]


def test_a_damaged_or_foreign_picture_is_named(results: Path, tiny_backbone: Backbone, tmp_path: Path) -> None:
    folder = shutil.copytree(results, tmp_path / "copy")
    file = gallery.path(folder, Arm("base", 1), 2, 1)
    good = file.read_bytes()
    for bad in (good[:100], gallery.path(folder, Arm("base", 2), 2, 1).read_bytes()):
        file.write_bytes(bad)
        with pytest.raises(InputError, match=r"0002-1\.png.*delete it and run the same command again"):
            gallery.read(small(), folder, Arm("base", 1), tiny_backbone.sha256)
    file.unlink()
    assert gallery.fill(small(), folder, tiny_backbone) == 1
    again = gallery.read(small(), folder, Arm("base", 1), tiny_backbone.sha256)
    assert torch.equal(again.pixels, gallery.read(small(), results, Arm("base", 1), tiny_backbone.sha256).pixels)


# --------------------------------------------------------------------------------------------- equal to the byte


def test_two_runs_and_a_stopped_one_give_the_same_bytes(
    results: Path, tiny_folder: Path, real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, left = gallery.draw, [30]

    def stops(*given: Any, **more: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return drawn(*given, **more)

    monkeypatch.setattr(gallery, "draw", stops)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(small(), str(tiny_folder), tmp_path / "stopped", ALL, real)
    assert not (tmp_path / "stopped" / "report.md").exists()
    half = gallery.path(tmp_path / "stopped", Arm("base", 3), 11, 1)
    half.parent.mkdir(parents=True, exist_ok=True)
    half.with_name(f".{half.stem}.0.png").write_bytes(b"half a picture")
    left[0] = 10**9
    evaluate.run(small(), str(tiny_folder), tmp_path / "stopped", ALL, real)
    assert left[0] == 10**9 - 1 - (
        12 * 2 * 4 - 28
    )  # one to see whether the method can; what was there was not drawn again
    assert reports(tmp_path / "stopped") == reports(results)
    evaluate.run(small(), str(tiny_folder), tmp_path / "stopped", ALL, real)  # and once more from what is there
    assert reports(tmp_path / "stopped") == reports(results)


def test_processes_share_the_pictures_whichever_comes_first(tiny_backbone: Backbone, tmp_path: Path) -> None:
    wanted = small(limit=1, steps="1", methods="base", teacher_steps="2")
    count = len(list(gallery.cells(wanted)))
    assert [gallery.fill(wanted, tmp_path, tiny_backbone, process, 2) for process in (1, 0)] == [count // 2] * 2
    assert len(list(tmp_path.rglob("*.png"))) == count
    assert gallery.fill(wanted, tmp_path, tiny_backbone) == 0


def test_a_run_that_is_stopped_has_something_to_compare_and_changes_networks_seldom() -> None:
    """All arms draw some prompts before the next ones come; a network is put on once for all of these."""
    wanted = small(limit=30)
    cells, count = list(gallery.cells(wanted)), len(wanted.prompts)
    assert len(set(cells)) == len(cells) == len(wanted.arms) * count * wanted.seeds and count > 2 * gallery.TOGETHER
    whole = cells[: len(wanted.arms) * gallery.TOGETHER * wanted.seeds]
    assert {number for _, number, _ in whole} == set(range(gallery.TOGETHER))
    changes = sum(a[0] != b[0] for a, b in pairwise(cells)) + 1
    assert changes == len(wanted.arms) * -(-count // gallery.TOGETHER)


def test_a_method_without_its_adapter_is_left_out_and_named(
    tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = gallery.draw

    def refuses(backbone: Backbone, request: Any, method: Any) -> Any:
        if method.name == "second":
            raise InputError("its adapter is not there; train it")
        return drawn(backbone, request, method)

    monkeypatch.setattr(gallery, "draw", refuses)
    left = gallery.possible(small(), tiny_backbone)
    assert [str(arm) for arm in left.arms] == ["base-1", "base-2", "base-3"]
    assert left.impossible[-1] == "second: its adapter is not there; train it"


OPTIONS = {
    "--sets": "seen,colour",
    "--limit": "3",
    "--seeds": "2",
    "--methods": "base",
    "--steps": "1,2",
    "--teacher-steps": "4",
    "--metrics": "sharpness,teacher_pixel,colour",
}


def start(folder: Path, out: Path, *launcher: str) -> subprocess.Popen[str]:
    command = [*(launcher or (sys.executable, "-m")), "hypersd", "evaluate", "--backbone", str(folder)]
    command += [word for option in OPTIONS.items() for word in option]
    return subprocess.Popen(
        [*command, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=evaluate_root()
    )


def evaluate_root() -> Path:
    return Path(__file__).parents[1]


def finish(process: subprocess.Popen[str]) -> None:
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said[-2000:]


@pytest.mark.slow
def test_killed_and_shared_by_processes_it_is_the_same_report(tiny_folder: Path, tmp_path: Path) -> None:
    finish(start(tiny_folder, tmp_path / "whole"))
    killed = start(tiny_folder, tmp_path / "killed")
    deadline = time.monotonic() + 300
    while len(list((tmp_path / "killed").rglob("0*.png"))) < 5:
        assert killed.poll() is None and time.monotonic() < deadline, "ended or hung before its fifth picture"
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    finish(start(tiny_folder, tmp_path / "killed"))
    finish(start(tiny_folder, tmp_path / "shared", *launcher(), "-m"))
    assert reports(tmp_path / "killed") == reports(tmp_path / "whole") == reports(tmp_path / "shared")


# --------------------------------------------------------------------------------------------------- the figures


def test_figures_are_the_means_of_the_table(results: Path, content: dict[str, Any]) -> None:
    table = pd.read_parquet(results / "scores.parquet")
    assert len(table) == 12 * 4
    rows = table[(table.method == "base") & (table.steps == 2)]
    shown = {row["set"]: row for row in content["results"] if (row["method"], row["steps"]) == ("base", 2)}
    assert shown["all"]["nfe"] == 4
    for name in ("r_precision", "kernel_distance", "teacher_feature", "diversity", "sharpness", "colour"):
        found = shown["all"]["figures"][name]
        assert found["value"] == pytest.approx(rows[name].mean(), rel=1e-5)
        assert found["low"] <= found["value"] <= found["high"]
        assert found["prompts"] == rows[name].notna().sum()
    seen = rows[rows["set"] == "seen"]
    assert shown["seen"]["figures"]["sharpness"]["value"] == pytest.approx(seen.sharpness.mean(), rel=1e-5)
    teacher = next(r for r in content["results"] if (r["set"], r["method"], r["steps"]) == ("all", "base", 3))
    assert teacher["figures"]["teacher_feature"]["value"] == pytest.approx(0, abs=1e-6)
    assert teacher["figures"]["teacher_pixel"]["value"] == 0


def test_differences_are_paired_and_corrected(content: dict[str, Any]) -> None:
    rows = content["comparisons"]
    assert {row["metric"] for row in rows} == {"r_precision", "kernel_distance", "diversity"}  # the teacher: to itself
    assert {row["against"] for row in rows} == {"base-3"}
    assert len(rows) == 9 and not any(row["asked"] for row in rows)
    assert all(row["p_holm"] >= row["p"] for row in rows)
    shown = {(r["method"], r["steps"]): r["figures"] for r in content["results"] if r["set"] == "all"}
    row = next(row for row in rows if (row["metric"], row["arm"]) == ("diversity", "second-1"))
    apart = shown["second", 1]["diversity"]["value"] - shown["base", 3]["diversity"]["value"]
    assert row["value"] == pytest.approx(apart, abs=1e-5)


def test_a_newer_method_is_compared_with_lcm_at_equal_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "lcm", replace(METHODS["base"], name="lcm"))
    pairs = [(str(a), str(b)) for a, b in report._pairs(small())]
    assert ("second-1", "lcm-1") in pairs
    assert ("lcm-2", "base-3") in pairs
    assert ("base-1", "lcm-1") not in pairs and ("lcm-1", "lcm-1") not in pairs


def test_seconds_are_kept_apart(results: Path) -> None:
    timed = json.loads((results / "seconds.json").read_text(encoding="utf-8"))
    assert list(timed["seconds"]) == ["base-3", "base-1", "base-2", "second-1"]
    assert all(row["median"] > 0 and row["pictures"] == 24 for row in timed["seconds"].values())
    assert "seconds.png" in (results / "report.md").read_text(encoding="utf-8")
    assert (results / "seconds.png").stat().st_size > 1000
    assert not any("seconds" in key for key in json.loads((results / "report.json").read_text(encoding="utf-8")))


def test_the_page_marks_what_was_optimised_and_says_what_is_missing(results: Path) -> None:
    page = (results / "report.md").read_text(encoding="utf-8")
    assert "reward scorer's score† ↑" in page
    assert "scorer a is the reward of the feedback stage" in page
    assert "- coverage (seen, composition, concept): 5 neighbours need more than 5 pictures, got 3" in page
    assert "- kernel_distance (colour): there are no real pictures of these prompts" in page
    assert "- second was made for 1 step, got 2; choose 1" in page
    for name in emoji.SETS:
        assert f"## 3 prompts: {name}" in page


def test_without_judge_and_artwork_the_rest_is_measured(
    results: Path, tiny_backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judges, "ASSETS", tmp_path)
    absent: dict[str, Callable[[], Any]] = {name: lambda: judges.EmojiJudge(tmp_path) for name in ("measure", "reward")}
    monkeypatch.setattr(judges, "JUDGES", absent)
    yard = scoring.Yardstick.load(tmp_path / "artwork", ALL)
    scores = scoring.score(small(), results, tiny_backbone.sha256, yard, ALL)
    assert set(scores.values) == {"teacher_pixel", "colour", "sharpness"}
    reasons = {sentence for row in scores.missing.values() for sentence in row}
    assert any("python -m hypersd emoji scorer" in sentence for sentence in reasons)
    made = report.summary(small(), small().record(tiny_backbone), scores, ALL)
    page = report.markdown({**made, "ladder": {"note": "", "dropped": {}}})
    assert "make it with: python -m hypersd emoji scorer" in page
    art = judges.real(tmp_path / "artwork")
    assert isinstance(art, str) and "python -m hypersd emoji artwork" in art
    assert yard.record() == {"measure": "not there", "reward": "not there"}


def test_students_are_held_to_the_teacher_at_the_guidance_that_taught_them(
    tiny_backbone: Backbone, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the teacher's pictures are drawn at it; it is part of the plan, so no folder mixes two."""
    taught = small(guidance="2.5")
    guidance = {arm.method: taught.request(0, 0, arm).guidance for arm in taught.arms}
    assert guidance == {"base": 2.5, "second": None}
    record = taught.record(tiny_backbone)
    assert record["teacher_guidance"] == 2.5 and "teacher_guidance" not in small().record(tiny_backbone)
    with pytest.raises(InputError, match="it differs in teacher_guidance"):
        plan.claim(results, {**json.loads((results / plan.PLAN).read_text(encoding="utf-8")), "teacher_guidance": 2.5})
    with pytest.raises(InputError, match="guidance must be a number from 0 to 30, got 'much'"):
        small(guidance="much")
    assert main(["evaluate", "--guidance", "2", "--publish"]) == main(["evaluate", "--guidance", "2", "--ladder"]) == 2
    assert capsys.readouterr().err.count("are of the teacher as it is drawn; leave --guidance out") == 2


@pytest.mark.parametrize("damaged", ["", "[]", "3", "null", '"text"'])
def test_a_damaged_plan_is_a_sentence(damaged: str, tmp_path: Path) -> None:
    (tmp_path / plan.PLAN).write_text(damaged, encoding="utf-8")
    with pytest.raises(InputError, match=re.escape("plan.json cannot be read); choose a new folder with --out")):
        plan.claim(tmp_path, {"backbone": "emoji"})


def test_what_is_published_is_drawn_as_the_app_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--publish", "--offload"]) == main(["bench", "--publish", "--decoder", "quick"]) == 2
    assert capsys.readouterr().err.count("leave --decoder and --offload out") == 2


def test_rivals_are_arms_that_are_drawn() -> None:
    made = small(rivals="second@1:base@2, base@1:base@3,")
    assert made.rivals == ((Arm("second", 1), Arm("base", 2)), (Arm("base", 1), Arm("base", 3)))
    for wrong, sentence in {
        "second@1": "rivals are two arms such as hyper@1:lcm@4, got 'second@1'",
        "second:base@1": "an arm is a method and a number of steps such as hyper@1, got 'second'",
        "second@one:base@1": "steps of second must be a whole number",
        "second@8:base@1": "second@8 is not drawn here; add it to --methods and --steps",
    }.items():
        with pytest.raises(InputError, match=re.escape(sentence)):
            small(rivals=wrong)


def test_rivals_are_corrected_among_themselves_and_shown_as_a_table() -> None:
    made = small(sets="seen", limit=30, rivals="base@1:base@2,second@1:base@1")
    scores = scoring.Scores(made.prompts)
    chance = np.random.default_rng(0)
    for metric in ("r_precision", "diversity", "sharpness"):
        scores.values[metric] = {arm: chance.normal(arm.steps, 1.0, len(made.prompts)) for arm in made.arms}
    scores.nfe = dict.fromkeys(made.arms, 1)
    metrics = [METRICS[name] for name in ("r_precision", "diversity", "sharpness")]
    content = report.summary(made, {}, scores, metrics)
    rows = content["comparisons"]
    asked = [row for row in rows if row["asked"]]
    assert {(row["metric"], row["arm"], row["against"]) for row in asked} == {
        (metric, *pair)
        for metric in ("r_precision", "diversity")
        for pair in (("base-1", "base-2"), ("second-1", "base-1"))
    }
    others = [row for row in rows if not row["asked"]]
    assert {row["metric"] for row in others} == {"r_precision", "diversity", "sharpness"}
    for family in (asked, others):
        assert [row["p_holm"] for row in family] == pytest.approx(
            intervals.holm([row["p"] for row in family]), abs=1e-5
        )
    table = report.rivals(content).splitlines()
    assert table[0] == "| method − against | R-precision@1, % ↑ | diversity ↑ |"
    assert [line.split(" | ")[0] for line in table[2:]] == ["| base-1 − base-2", "| second-1 − base-1"]
    first = next(row for row in asked if row["arm"] == "base-1" and row["metric"] == "diversity")
    assert f"{first['value']:.3f} [{first['low']:.3f}, {first['high']:.3f}], p " in table[2]
    page = "\n".join(report._differences(content))
    assert f"corrected for {len(asked)} comparisons." in page and f"corrected for {len(others)} comparisons." in page
    page = "\n".join(report._differences({**content, "comparisons": asked}))
    assert report.rivals(content) in page and "All others" not in page


def test_what_fails_on_the_ladder_is_dropped_with_its_figure(
    results: Path, tiny_folder: Path, real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ladder.verdict("thumbnails", tmp_path / "none")[1].startswith("No ladder has been climbed yet")
    failed = {"holds": False, "series": {"blur": {"values": {}, "tau": 0.33, "decided": 6, "holds": False}}}
    held = {"holds": True, "series": {"blur": {"values": {}, "tau": 1.0, "decided": 6, "holds": True}}}
    climbed = {"plan": {"prompts": 9, "judges": {"measure": "thumbnails"}}}
    climbed |= {"metrics": {"r_precision": failed, "diversity": held}}
    (tmp_path / ladder.FILE).write_text(json.dumps(climbed), encoding="utf-8")
    monkeypatch.setattr(judges, "ASSETS", tmp_path)
    folder = shutil.copytree(results, tmp_path / "copy")
    some = evaluate.chosen("r_precision,diversity")
    page = evaluate.run(small(), str(tiny_folder), folder, some, real)
    assert page is not None
    text = page.read_text(encoding="utf-8")
    assert "- r_precision: it does not put pictures of known quality in order (blur: 0.33 (6))" in text
    assert "R-precision@1" not in text and "diversity ↑" in text
    assert ladder.verdict("another")[1].startswith("The ladder was climbed with another judge")


# ------------------------------------------------------------------------------------------------------- metrics


def evidence(prompts: int = 8, seeds: int = 2, **changes: Any) -> Evidence:
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(prompts, seeds, 6, generator=generator), dim=-1)
    pixels = torch.randint(0, 256, (prompts, seeds, 16, 16, 3), generator=generator, dtype=torch.uint8)
    texts = Texts(features[:, 0], features[:, 0], features[:, 0])
    given: dict[str, Any] = {
        "prompts": [
            emoji.Prompt("given", f"a {'red' if i % 2 else 'plain'} thing {i}", str(i)) for i in range(prompts)
        ],
        "pixels": pixels,
        "features": features,
        "looks": features,
        "texts": texts,
        "real": features[:, -1],
        "real_looks": features[:, -1],
        "train": measures.Train(features[:, 0], 0.001),
        "teacher_pixels": pixels,
        "teacher_features": features,
        "rewarded": features,
        "reward_texts": texts,
    }
    return Evidence(**{**given, **changes})


@pytest.mark.parametrize("name", [metric.name for metric in ALL])
def test_every_metric_is_one_value_a_prompt_or_a_reason(name: str) -> None:
    values = measured(METRICS[name], evidence())
    assert isinstance(values, torch.Tensor), values
    assert values.shape == (() if name == "frechet" else (8,))
    assert values.dtype == torch.float64
    reason = "nothing is there"
    gone: dict[str, Any] = dict.fromkeys(
        (
            "features",
            "looks",
            "texts",
            "real",
            "real_looks",
            "train",
            "teacher_pixels",
            "teacher_features",
            "rewarded",
        ),
        reason,
    )
    without = measured(METRICS[name], evidence(**gone))
    assert isinstance(without, torch.Tensor) if name in ("colour", "sharpness") else without == reason


def values(name: str, e: Evidence) -> torch.Tensor:
    found = measured(METRICS[name], e)
    assert isinstance(found, torch.Tensor), found
    return found


def test_metrics_ask_the_right_things() -> None:
    e = evidence()
    assert values("memorised", e).tolist() == [0.5] * 8  # the first drawing of each is a training picture
    assert torch.isnan(values("colour", e)).tolist() == [True, False] * 4
    features, real = e.features, e.real
    assert isinstance(features, torch.Tensor) and isinstance(real, torch.Tensor)
    assert values("r_precision", evidence(features=features[:, :1])).tolist() == [1.0] * 8
    both = torch.stack([quality.recall(features[:, seed], real) for seed in range(2)]).mean(0)
    assert torch.equal(values("recall", e), both)
    assert measured(METRICS["diversity"], evidence(seeds=1)) == "diversity needs at least 2 drawings of each prompt"
    assert measured(METRICS["colour"], evidence(prompts=1)) == "no prompt of this set asks for one colour"


def test_more_of_a_good_thing_is_better() -> None:
    assert {name for name, metric in METRICS.items() if metric.primary} == {
        "r_precision", "kernel_distance", "teacher_feature", "diversity"}  # fmt: skip
    assert {metric.name for metric in ALL if metric.optimised} == {"reward"}


# ---------------------------------------------------------------------------------------------- the paper's tables


def test_the_paper_stands_beside_its_own_backbones(content: dict[str, Any]) -> None:
    results = [{**row, "steps": 25} if row["steps"] == 3 else row for row in content["results"]]
    page = report.markdown({**content, "plan": {**content["plan"], "backbone": "sd15"}, "results": results})
    assert "### Table 2, main results" in page and "### Table 4" in page
    assert "### Table 3" not in page  # of SDXL alone
    lines = page[page.index("### Table 2") :].splitlines()
    line = next(line for line in lines if line.startswith("| base | 25 |"))
    assert line.endswith("| 31.88 | 5.26 | 0.18 | 0.217 |") and "–" not in line.split("|")[3]
    assert next(line for line in lines if line.startswith("| LCM LoRA | 4 |")).count("–") == 4
    assert "aesthetic†, paper" in page


def test_another_backbone_borrows_the_layout_alone(content: dict[str, Any]) -> None:
    results = [{**row, "steps": 25} if row["steps"] == 3 else row for row in content["results"]]
    page = report.markdown({**content, "results": results})
    assert "### Table 2, main results" in page and "31.88" not in page
    assert "In the layout of" not in report.markdown(content)  # no arm of this run is in the paper
    assert [len(rows) for rows in paper.TABLES.values()] == [13, 11, 8, 11]


def test_every_row_of_the_papers_can_be_drawn_or_is_known_to_have_no_row_here() -> None:
    own = {part.method for part in paper.ABLATION}
    for row in (row for rows in paper.TABLES.values() for row in rows):
        if row.method in METHODS:
            METHODS[row.method].check(Request("a cat", steps=row.steps))
        else:
            assert row.method in own | {"dmd-feedback", "tcd-dmd", "tcd-feedback"}, row


def test_the_ablation_has_its_parts_in_order_and_says_which_are_absent(content: dict[str, Any]) -> None:
    names = {"base": "hyper", "second": "tcd"}
    results = [{**row, "method": names[row["method"]]} for row in content["results"]]
    page = report.markdown({**content, "results": results})
    lines = page[page.index("## Part by part") :].splitlines()
    tables = [number for number, line in enumerate(lines) if "↑ | 1 step | 2 steps | 3 steps |" in line]
    assert tables
    for first in tables:
        rows = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in lines[first + 2 :][: len(paper.ABLATION)]
        ]
        assert [row[0] for row in rows] == [part.label for part in paper.ABLATION]
        given = {row[0]: [cell != "–" for cell in row[1:]] for row in rows}
        assert given.pop("TCD") == [True, False, False] and given.pop("all, and likeness") == [True] * 3
        assert not any(cell for row in given.values() for cell in row)
    absent = [line for line in lines if "is not drawn here" in line]
    assert len(absent) == len(paper.ABLATION) - 2 and any(
        "distill dmd --begin tscd-1 --name tscd-dmd" in a for a in absent
    )
    assert "Part by part" not in report.markdown(content), "one part alone is no ablation"
    assert paper.at_hand({"hyper": 1, "lcm": 2, "tcd": 3}) == ["tcd", "hyper"]


@pytest.mark.parametrize("part", paper.ABLATION, ids=lambda part: part.method)
def test_each_part_is_made_under_the_name_it_is_looked_for(part: paper.Part, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or is what a later command goes on from."""
    made: list[str] = []
    for how in part.how:
        words = how.split()
        ran: list[Any] = []
        monkeypatch.setitem(COMMANDS, words[0], COMMANDS[words[0]]._replace(run=ran.append))
        assert main(words) == 0
        (given,) = ran
        begun = getattr(given, "parent", None) or getattr(given, "lora", "")
        made = [name for name in made if name != begun]
        made.append(given.name or given.method)
    assert set(made) == {part.method}


@pytest.mark.parametrize(("recipe", "name"), [({}, "hyper-distilled"), ({"asked": {"rank": 8}}, "hyper-feedback"),
                                              ({"asked": {"rank": 8, "likeness": 0.0}}, "hyper-feedback"),
                                              ({"asked": {"rank": 8, "likeness": 1.0}}, "hyper")])  # fmt: skip
def test_a_hyper_is_not_shown_as_more_than_it_is(
    recipe: dict[str, Any], name: str, tiny_adapters: Sequence[AdapterFile], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    files = [f._replace(card=replace(f.card, recipe=recipe if f.card.name == "hyper" else {})) for f in tiny_adapters]
    rows = discover(files, files[0].card.base_sha256)
    monkeypatch.setattr("hypersd.methods.installed", lambda backbone: rows)
    assert ("hyper" in _parts("emoji")) == (name == "hyper")
    told = capsys.readouterr().err
    assert not told if name == "hyper" else f"convert hyper --name {name} --out FILE" in told


# ---------------------------------------------------------------------------------------------- the command line


def test_the_command_writes_the_report(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat\na dog\na blue heart", encoding="utf-8")
    out = tmp_path / "out"
    given = ["evaluate", "--backbone", str(tiny_folder), "--prompts", str(prompts), "--out", str(out)]
    given += ["--methods", "base", "--steps", "1", "--teacher-steps", "2", "--artwork", str(tmp_path), "--quick"]
    assert main(given) == 0
    assert capsys.readouterr().out.strip() == str(out / "report.md")
    page = (out / "report.md").read_text(encoding="utf-8")
    assert "3 prompts" in page and "2 drawings of each" in page and "## All 3 prompts" in page


@pytest.mark.parametrize(("given", "sentence"), [
    (["--metrics", "kernel_distnce"], "did you mean kernel_distance?"),
    (["--methods", "bse"], "did you mean base?"),
    (["--backbone", "sd15"], "sd15 has no prompts of its own; give --prompts FILE or --sets"),
    (["--prompts", "missing.txt"], "missing.txt cannot be read"),
    (["--backbone", "sd99", "--sets", "seen"], "backbone must be one of"),
])  # fmt: skip
def test_a_wrong_input_is_one_sentence(
    given: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *given]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("hypersd: ") and said.err.count("\n") == 1 and sentence in said.err
    assert os.listdir(tmp_path) == []


def test_nothing_is_left_of_a_report_that_could_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), report._whole(tmp_path / "report.md") as half:
        half.write_text(str(1 / 0))
    assert not (tmp_path / "report.md").exists()
    assert np.isnan(float("nan")) and report._number(float("nan")) is None
