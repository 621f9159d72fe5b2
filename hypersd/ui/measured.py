"""What `evaluate --publish` and `bench --publish` left in assets/measured: plots, and the tables underneath."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def page(folder: Path) -> str:
    """HTML of everything in the folder, "" if nothing is there; a file that cannot be read is told of in the log."""
    parts: list[str] = []
    for file, tell in (("report.json", _quality), ("bench.json", _speed)):
        try:
            if (folder / file).is_file():
                parts += list(
                    tell(json.loads((folder / file).read_text(encoding="utf-8")), folder)
                )  # all of it or nothing
        except (OSError, ValueError, KeyError, TypeError) as problem:
            log.warning("%s is not shown: %s: %s", file, type(problem).__name__, problem)
    return f"<div class='hs-results'>{''.join(parts)}</div>" if parts else ""


def _quality(content: Mapping[str, Any], folder: Path) -> Iterator[str]:
    plan = content["plan"]
    yield "<section><h2>Quality against network calls</h2>"
    yield from _plot(folder / "quality.png", "Each metric against network calls a picture, one line a method")
    yield (
        f"<p>Means over {plan['prompts']} prompts, {plan['seeds']} drawings of each, one noise for all; bars are "
        f"95 % intervals over prompts. The teacher is {escape(str(plan['reference']))}.</p>"
    )
    shown = {name: about for name, about in content["metrics"].items() if about["primary"]}
    heads = ["method", "steps", "NFE", *(_head(about) for about in shown.values())]
    rows = []
    for row in content["results"]:
        if row["set"] == "all":
            figures = [_cell(about, row["figures"].get(name)) for name, about in shown.items()]
            rows.append([row["method"], str(row["steps"]), str(row["nfe"]), *figures])
    yield _table(heads, rows) + "</section>"


def _speed(content: Mapping[str, Any], folder: Path) -> Iterator[str]:
    yield "<section><h2>Seconds, in ratios</h2>"
    yield from _plot(folder / "bench.png", "Ratios of timings with their intervals")
    machine = content["machine"]
    where = machine.get("gpu") or f"{machine['processor']}, {machine['threads']} threads"
    yield f"<p>{escape(str(where))}, {content['rounds']} rounds.</p>"
    rows = [
        [row["title"], f"{row['value']:.2f}", f"{row['low']:.2f} to {row['high']:.2f}"]
        for row in content["ratios"].values()
    ]
    yield _table(["what", "times as long", "95 % interval"], rows) + "</section>"


def _plot(file: Path, alt: str) -> Iterator[str]:
    if file.is_file():  # inside the page: no address of a file is ever given out
        data = base64.b64encode(file.read_bytes()).decode()
        wide = "width:100%;min-width:900px;max-width:1320px;border-radius:8px"  # a phone scrolls rather than squints
        image = f"<img src='data:image/png;base64,{data}' alt='{escape(alt)}' style='{wide}'>"
        yield f"<div style='overflow-x:auto'>{image}</div>"


def _head(about: Mapping[str, Any]) -> str:
    return f"{about['title']}{'†' if about['optimised'] else ''}{ {1: ' ↑', -1: ' ↓', 0: ''}[about['better']] }"


def _cell(about: Mapping[str, Any], figure: Mapping[str, Any] | None) -> str:
    value = figure["value"] if figure else None
    return "–" if value is None else f"{value * about['scale']:.{about['digits']}f}"


def _table(heads: list[str], rows: list[list[str]]) -> str:
    top = "".join(f"<th>{escape(head)}</th>" for head in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<div style='overflow-x:auto'><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
