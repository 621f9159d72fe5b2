"""From scores to the report: report.json, report.md, scores.parquet and quality.png.

All four are equal to the byte for equal pictures. How long pictures took differs from run to run, so it is kept apart,
in seconds.json and seconds.png.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hypersd import bench, intervals
from hypersd.evaluate import paper
from hypersd.evaluate.measures import Metric
from hypersd.evaluate.plan import TEACHER, Arm, Plan
from hypersd.evaluate.scoring import Scores, flat

ALL = "all"
BASELINE = "lcm"  # what a newer method has to beat at equal steps
DIGITS = 6  # kept of every figure


# ------------------------------------------------------------------------------------------------- the figures


def summary(plan: Plan, record: Mapping[str, Any], scores: Scores, metrics: Sequence[Metric]) -> dict[str, Any]:
    """Everything the report says, ready for JSON."""
    known = [m for m in metrics if m.name in scores.values or m.name in scores.single]
    return {
        "plan": dict(record),
        "adapters": {str(arm): sha for arm, sha in scores.adapters.items() if sha},
        "metrics": {m.name: _about(m) for m in known},
        "missing": {m.name: scores.missing[m.name] for m in metrics if m.name in scores.missing},
        "impossible": list(plan.impossible),
        "results": list(_results(plan, scores, known)),
        "comparisons": _comparisons(plan, scores, known),
    }


def _about(metric: Metric) -> dict[str, Any]:
    kept = ("title", "better", "primary", "scale", "digits", "optimised")
    return {name: getattr(metric, name) for name in kept}


def _results(plan: Plan, scores: Scores, metrics: Sequence[Metric]) -> Iterator[dict[str, Any]]:
    for name, numbers in {**plan.sets, ALL: list(range(len(plan.prompts)))}.items():
        drawn = intervals.draws(len(numbers))
        for arm in plan.arms:
            figures = {}
            for metric in metrics:
                if (values := scores.values.get(metric.name, {}).get(arm)) is not None:
                    found = intervals.estimate(values[numbers], drawn)
                    if found.prompts:
                        figures[metric.name] = _plain(found._asdict())
                elif (value := scores.single.get(metric.name, {}).get(arm, {}).get(name)) is not None:
                    figures[metric.name] = _plain({"value": value, "prompts": len(numbers)})
            yield {"set": name, "method": arm.method, "steps": arm.steps, "nfe": scores.nfe[arm], "figures": figures}


def _comparisons(plan: Plan, scores: Scores, metrics: Sequence[Metric]) -> list[dict[str, Any]]:
    """Each arm beside the teacher, and beside the baseline at equal steps, by primary metrics; the plan's rivals beside
    each other by all that have a value a prompt.

    Rivals by primary metrics are `asked` for, few and by name, so Holm corrects them among themselves; the others are
    looked through for whatever they show, and are corrected over all of them.
    """
    drawn = intervals.draws(len(plan.prompts))
    found: list[dict[str, Any]] = []
    for metric in metrics:
        values = scores.values.get(metric.name, {})
        for arm, against in dict.fromkeys((*plan.rivals, *(_pairs(plan) if metric.primary else ()))):
            if metric.name.startswith("teacher_") and against == plan.reference:
                continue  # the teacher's distance to itself
            if arm in values and against in values:
                asked = metric.primary and (arm, against) in plan.rivals
                names = {"metric": metric.name, "arm": str(arm), "against": str(against), "asked": asked}
                found.append({**names, **intervals.difference(values[arm], values[against], drawn)._asdict()})
    for family in ([row for row in found if row["asked"]], [row for row in found if not row["asked"]]):
        for row, p in zip(family, intervals.holm([row["p"] for row in family]), strict=True):
            row["p_holm"] = p
    return [_plain(row) for row in found]


def _pairs(plan: Plan) -> Iterator[tuple[Arm, Arm]]:
    for arm in plan.arms:
        if arm != plan.reference:
            yield arm, plan.reference
        rival = Arm(BASELINE, arm.steps)
        if arm.method not in (TEACHER, BASELINE) and rival in plan.arms:
            yield arm, rival


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN; figures are rounded so that the file can be read."""
    return {key: _number(value) if isinstance(value, float) else value for key, value in row.items()}


def _number(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


# ------------------------------------------------------------------------------------------------ for people


def markdown(content: Mapping[str, Any]) -> str:
    """The report as a page: tables a set, differences, the paper's tables, what could not be measured."""
    plan = content["plan"]
    parts = [
        "# Evaluation",
        f"{plan['backbone']} (weights {plan['base_sha256'][:12]}), {plan['prompts']} prompts "
        f"({plan['prompts_sha256'][:12]}), {plan['seeds']} drawings of each, the same noise for every method. "
        f"Figures are means over prompts with 95 % bootstrap intervals over prompts. "
        f"The teacher is {_teacher(plan)}. {content['ladder']['note']}",
        "![quality against network calls](quality.png)",
        "How long pictures took is in seconds.json and seconds.png, apart from this page, which is equal in every run.",
    ]
    names = list(dict.fromkeys(row["set"] for row in content["results"]))
    for name in names if len(names) > 2 else [ALL]:
        rows = [row for row in content["results"] if row["set"] == name]
        head = f"All {plan['prompts']} prompts" if name == ALL else f"{plan['sets'][name]} prompts: {name}"
        parts += [f"## {head}", _table(content, rows, primary=True)]
        parts += [_table(content, rows, primary=False)]
    parts += _marks(content) + _differences(content) + _ablation(content) + _paper(content) + _left_out(content)
    return "\n\n".join(part for part in parts if part) + "\n"


def readme(content: Mapping[str, Any]) -> str:
    """The table of all prompts, primary metrics only."""
    return _table(content, [row for row in content["results"] if row["set"] == ALL], primary=True)


def _table(content: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], *, primary: bool) -> str:
    """One line an arm. Primary figures come with their intervals, the others have theirs in report.json."""
    shown = [
        name
        for name, about in content["metrics"].items()
        if about["primary"] == primary and any(name in row["figures"] for row in rows)
    ]
    if not shown:
        return ""
    heads = [_head(content["metrics"][name]) for name in shown]
    lines = [_line(["method", "steps", "NFE", *heads]), _line(["---"] * (3 + len(heads)))]
    for row in rows:
        cells = [_cell(content["metrics"][name], row["figures"].get(name), primary) for name in shown]
        lines.append(_line([row["method"], str(row["steps"]), str(row["nfe"]), *cells]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _head(about: Mapping[str, Any]) -> str:
    arrow = {1: " ↑", -1: " ↓", 0: ""}[about["better"]]
    return f"{_marked(about)}{arrow}"


def _marked(about: Mapping[str, Any]) -> str:
    return f"{about['title']}{'†' if about['optimised'] else ''}"


def _cell(about: Mapping[str, Any], figure: Mapping[str, Any] | None, interval: bool) -> str:
    if figure is None or figure["value"] is None:
        return "–"
    ends = [figure.get(end) for end in ("low", "high")]
    middle = _shown(about, figure["value"])
    return middle if not interval or None in ends else f"{middle} [{', '.join(_shown(about, end) for end in ends)}]"


def _shown(about: Mapping[str, Any], value: float | None) -> str:
    return "–" if value is None else f"{value * about['scale']:.{about['digits']}f}"


def _marks(content: Mapping[str, Any]) -> list[str]:
    told = [f"† {about['title']}: {about['optimised']}." for about in content["metrics"].values() if about["optimised"]]
    return [" ".join(["Marked figures were optimised by training and are no independent evidence.", *told])] * bool(
        told
    )


def _differences(content: Mapping[str, Any]) -> list[str]:
    if not content["comparisons"]:
        return []
    lines = [_line(["metric", "method", "against", "difference", "p, Holm"]), _line(["---"] * 5)]
    for row in content["comparisons"]:
        if not row.get("asked"):
            about = content["metrics"][row["metric"]]
            lines.append(_line([_marked(about), row["arm"], row["against"], _cell(about, row, True), _chance(row)]))
    told = "Over all prompts, paired, p corrected for {} comparisons."
    asked = sum(row.get("asked", False) for row in content["comparisons"])
    first = ["### Asked for", told.format(asked), rivals(content)] * bool(asked)
    others = ["### All others"] * bool(asked) + [told.format(len(lines) - 2), "\n".join(lines)]
    return ["## Differences", *first, *others * (len(lines) > 2)]


def rivals(content: Mapping[str, Any]) -> str:
    """The arms that were to be compared with each other, a pair a line, by primary metrics."""
    pairs: dict[tuple[str, str], dict[str, str]] = {}
    for row in content["comparisons"]:
        if row.get("asked"):
            shown = f"{_cell(content['metrics'][row['metric']], row, True)}, p {_chance(row)}"
            pairs.setdefault((row["arm"], row["against"]), {})[row["metric"]] = shown
    names = [name for name, about in content["metrics"].items() if about["primary"]]
    heads = ["method − against", *(_head(content["metrics"][name]) for name in names)]
    lines = [_line([f"{arm} − {against}", *(found.get(name, "–") for name in names)])
             for (arm, against), found in pairs.items()]  # fmt: skip
    return "\n".join([_line(heads), _line(["---"] * len(heads)), *lines])


def _chance(row: Mapping[str, Any]) -> str:
    """The corrected probability of such a difference by chance."""
    p = row["p_holm"]
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _paper(content: Mapping[str, Any]) -> list[str]:
    """The paper's tables with what was measured here, and its own figures where it has this backbone."""
    backbone = content["plan"]["backbone"]
    drawn = {(row["method"], row["steps"]): row for row in content["results"] if row["set"] == ALL}
    primary = [name for name, about in content["metrics"].items() if about["primary"]]
    parts: list[str] = []
    for title in paper.TABLES:
        known = backbone in paper.FAMILIES
        if rows := paper.rows(title, backbone, set(drawn)):
            heads = ["row", "steps", *(_head(content["metrics"][name]) for name in primary)]
            heads += [f"{figure}, paper" for figure in paper.FIGURES] * known
            lines = [_line(heads), _line(["---"] * len(heads))]
            for row in rows:
                figures = drawn.get((row.method, row.steps), {"figures": {}})["figures"]
                cells = [_cell(content["metrics"][name], figures.get(name), False) for name in primary]
                lines.append(_line([row.label, str(row.steps), *cells, *map(str, row.figures * known)]))
            parts += [f"### {title}", "\n".join(lines)]
    return ["## In the layout of Hyper-SD (arXiv:2404.13686)", *parts] if parts else []


def _teacher(plan: Mapping[str, Any]) -> str:
    guided = plan.get("teacher_guidance")
    return plan["reference"] + (f" at guidance {guided:g}" if guided is not None else "")


def _ablation(content: Mapping[str, Any]) -> list[str]:
    """What each part of the method adds, and how what is not here is made."""
    there = paper.at_hand({row["method"] for row in content["results"]})
    if len(there) < 2:
        return []
    absent = []
    for part in paper.ABLATION:
        if part.method not in there:
            how = ", ".join(f"`python -m hypersd {command}`" for command in part.how)
            absent.append(f"- {part.label} is not drawn here; it is made with {how}")
    return ["## Part by part", ablation(content)] + ["\n".join(absent)] * bool(absent)


def ablation(content: Mapping[str, Any]) -> str:
    """A table a primary metric, parts of the method in lines, step counts in columns."""
    drawn = {(row["method"], row["steps"]): row for row in content["results"] if row["set"] == ALL}
    counts = sorted({steps for method, steps in drawn if paper.at_hand({method})})
    heads = [f"{n} step{'s' * (n != 1)}" for n in counts]
    parts = []
    for name, about in ((name, about) for name, about in content["metrics"].items() if about["primary"]):
        lines = [_line([_head(about), *heads]), _line(["---"] * (1 + len(heads)))]
        for part in paper.ABLATION:
            figures = [drawn.get((part.method, n), {"figures": {}})["figures"].get(name) for n in counts]
            lines.append(_line([part.label, *(_cell(about, figure, True) for figure in figures)]))
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def beside(content: Mapping[str, Any], arm: Arm, against: Arm) -> Iterator[str]:
    """The differences between two arms that were compared, a line each."""
    for row in content["comparisons"]:
        if (row["arm"], row["against"]) == (str(arm), str(against)):
            about = content["metrics"][row["metric"]]
            yield f"{_head(about)}: {_cell(about, row, True)}"


def _left_out(content: Mapping[str, Any]) -> list[str]:
    dropped = content["ladder"]["dropped"]
    lines = [f"- {name}: it does not put pictures of known quality in order ({taus})" for name, taus in dropped.items()]
    for name, reasons in content["missing"].items():
        lines += [f"- {name} ({', '.join(sets)}): {reason}" for reason, sets in reasons.items()]
    lines += [f"- {sentence}" for sentence in content["impossible"]]
    return ["## Not measured", "\n".join(lines)] if lines else []


# -------------------------------------------------------------------------------------------------- the files


def write(folder: Path, content: Mapping[str, Any], scores: Scores, metrics: Sequence[Metric]) -> Path:
    """Write all files of the report, each whole or not at all; returns the page."""
    import pandas as pd

    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with _whole(folder / "scores.parquet") as file:
        pd.DataFrame(flat(scores, {m.name: m for m in metrics})).to_parquet(file, engine="pyarrow", index=False)
    with _whole(folder / "report.json") as file:
        file.write_text(text, encoding="utf-8")
    calls = {arm: float(nfe) for arm, nfe in scores.nfe.items()}
    with _whole(folder / "quality.png") as file:
        plot(content, calls, "network calls a picture", file)
    timed = {arm: float(np.median(taken)) for arm, taken in scores.seconds.items()}
    with _whole(folder / "seconds.json") as file:
        file.write_text(json.dumps(_timings(scores), indent=1) + "\n", encoding="utf-8")
    with _whole(folder / "seconds.png") as file:
        plot(content, timed, "seconds a picture, median", file)
    page = folder / "report.md"
    with _whole(page) as file:
        file.write_text(markdown(content), encoding="utf-8")
    return page


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A place to write a file that takes its name only when it is finished."""
    half = target.with_name(f".new-{target.name}")
    yield half
    os.replace(half, target)


def _timings(scores: Scores) -> dict[str, Any]:
    arms = {}
    for arm, taken in scores.seconds.items():
        low, middle, high = (float(q) for q in np.quantile(taken, [0.25, 0.5, 0.75]))
        arms[str(arm)] = {"median": middle, "quartiles": [low, high], "pictures": int(taken.size)}
    return {"machine": bench.machine(), "note": "as they were drawn, whatever else ran", "seconds": arms}


def plot(content: Mapping[str, Any], costs: Mapping[Arm, float], cost: str, target: Path) -> None:
    """Every primary metric against what a picture costs, one line a method, intervals as bars."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name for name, about in content["metrics"].items() if about["primary"]]
    figure = Figure(figsize=(4 * max(1, len(names)), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for place, name in enumerate(names):
        axes, about = figure.add_subplot(1, len(names), place + 1), content["metrics"][name]
        for method in dict.fromkeys(arm.method for arm in costs):
            _curve(axes, content, costs, method, name)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel=cost, title=_head(about).replace("↑", "(more)").replace("↓", "(less)"))
        axes.grid(alpha=0.3)
    if names:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(target, dpi=110, format="png", metadata={"Software": None})  # equal bytes for equal figures


def _curve(axes: Any, content: Mapping[str, Any], costs: Mapping[Arm, float], method: str, name: str) -> None:
    points = []
    for row in content["results"]:
        figure = row["figures"].get(name)
        if row["set"] == ALL and row["method"] == method and figure and figure["value"] is not None:
            low, high = (figure.get(end) for end in ("low", "high"))
            value = figure["value"]
            ends = (value - low, high - value) if low is not None and high is not None else (0.0, 0.0)
            points.append((costs[Arm(method, row["steps"])], value, *(max(0.0, end) for end in ends)))
    if points:
        x, y, below, above = (np.array(column) for column in zip(*sorted(points), strict=True))
        scale = content["metrics"][name]["scale"]
        errors = np.stack([below, above]) * scale
        axes.errorbar(x, y * scale, yerr=errors, marker="o", capsize=2, label=method)
