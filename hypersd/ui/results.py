"""The results' screen: what the votes say of the arms, and how far to trust it. Drawn as plain HTML and SVG."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from math import isnan, log10
from typing import Any

import gradio as gr
import numpy as np

from hypersd.pool import Missing, Pool
from hypersd.records import Problem
from hypersd.study.quality import FILTER_VERSION
from hypersd.study.report import Cost, Report, Reports
from hypersd.study.statistics import Difference, Rating, Result

QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
EMPTY = (
    "<section><h2>No votes yet</h2><p>Ratings appear here with the first votes. Open <b>Study</b> and give some, or "
    "send the address of this page with <code>?study</code> at its end to people who might.</p>"
    "<p class='hs-aside'>To rehearse, <code>python -m hypersd study simulate</code> fills a database of its own with "
    "simulated votes and says how to look at them.</p></section>"
)
WIDTH, ROW, LABEL, SIDE = 620, 34, 150, 22  # of plots, in their own units
UNKNOWN = "not known yet"
FEW = 5  # annotators
MANY = 6  # differences
DWELL = (0.0, 1.0, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0, 34.0, 60.0)  # seconds, edges of the histogram


def build(tab: gr.Tab, pool: Pool | Missing) -> None:
    """Lay the screen out inside its tab; it is worked out when the tab is opened."""
    shown = gr.HTML("", elem_id="hs-results", apply_default_css=False)  # what the arms are worth
    with gr.Row(elem_id="hs-contrast-row", visible=False) as row:
        contrast = gr.Dropdown([], label="How many votes are still needed for", elem_id="hs-contrast", scale=1)
        needed = gr.HTML("", elem_id="hs-needed", apply_default_css=False)
    trust = gr.HTML("", elem_id="hs-trust", apply_default_css=False)  # and how far to believe that
    latest = reporter(pool)
    tab.select(opened(latest), None, [shown, row, contrast, needed, trust], **QUIET)
    contrast.input(asked(latest), contrast, needed, **QUIET)


Latest = Callable[[], Report | str]


def reporter(pool: Pool | Missing) -> Latest:
    """A function that gives the latest report, or the HTML of why there is none."""
    if isinstance(pool, Missing):
        why = f"<section><h2>No study</h2><p>{escape(_sentence(pool.problem))}</p></section>"
        return lambda: why
    reports = Reports(pool.store, pool.study)

    def latest() -> Report | str:
        try:
            found = reports.latest()
        except Problem as problem:
            return f"<section><h2>The votes cannot be read</h2><p>{escape(_sentence(str(problem)))}</p></section>"
        return found if found.votes else EMPTY

    return latest


def opened(latest: Latest) -> Callable[[], list[Any]]:
    def show() -> list[Any]:
        found = latest()
        if isinstance(found, str):
            return [page(found), gr.Row(visible=False), gr.skip(), "", ""]
        gaps = found.results[0].differences if found.results else ()
        names = [contrast_name(gap) for gap in gaps]
        first = names[0] if names else None
        choice = gr.Dropdown(choices=names, value=first)
        needed = asked(lambda: found)(first)
        return [page(*worth(found)), gr.Row(visible=bool(gaps)), choice, needed, page(trust(found))]

    return show


def asked(latest: Latest) -> Callable[[Any], str]:
    """The sentence below the list of contrasts."""

    def tell(name: Any) -> str:
        found = latest()
        gaps = found.results[0].differences if isinstance(found, Report) and found.results else ()
        chosen = next((gap for gap in gaps if contrast_name(gap) == name), None)
        return page(f"<p>{escape(need(chosen))}</p>") if chosen else ""

    return tell


def contrast_name(gap: Difference) -> str:
    return f"{gap.arm} against {gap.other}"


def need(gap: Difference) -> str:
    """What is known of a difference, and how many votes would show it."""
    said = f"{gap.arm} is {gap.gap:.0f} points above {gap.other}, 95 % interval {gap.low:.0f} to {gap.high:.0f}. "
    if not gap.votes_needed:
        return said + "There are enough votes to show a difference of this size, with four chances in five."
    return said + (
        f"About {gap.votes_needed:,} more votes like these, by new annotators on more prompts as well, would show a "
        "difference of this size with four chances in five."
    )


def page(*parts: str) -> str:
    return f"<div class='hs-results'>{''.join(parts)}</div>"


def worth(found: Report) -> Iterable[str]:
    """What the arms are worth, and what they cost."""
    yield _lead(found)
    for result in found.results:
        yield _ratings(result)
    if found.results:
        pooled = found.results[0]
        yield _section("Quality against cost", _costs(pooled, found.costs))
        yield _section("Who won how often", _wins(pooled, found.study.drawn_arms()))
        yield _section("Differences", _differences(pooled.differences))


def trust(found: Report) -> str:
    return _section("How far to trust this", _diagnostics(found), _dwell(found), _flagged(found))


def _lead(found: Report) -> str:
    people = len(found.judged)
    words = f"{found.votes:,} vote{'s' * (found.votes != 1)} by {people:,} annotator{'s' * (people != 1)}, "
    words += f"{found.used:,} used by version {FILTER_VERSION} of the filter."
    if not found.results:
        words += " None of them compares two arms yet."
    elif people < FEW:
        words += f" Intervals mean little with fewer than {FEW} annotators."
    return f"<p class='hs-lead'>{escape(found.study.name)}: {words}</p>"


# Ratings


def _ratings(result: Result) -> str:
    title = "Ratings of all arms" if result.name == "all" else f"Ratings at {result.name}"
    about = (
        f"<p class='hs-aside'>{result.votes:,} votes. The anchor has 1000; 400 points are odds of ten to one. "
        "Lines are 95 % intervals, from resampling annotators and prompts.</p>"
    )
    head = ("Arm", "Rating", "95 % interval", "Votes", "Both bad")
    rows = [(r.arm, f"{r.rating:.0f}", f"{r.low:.0f} to {r.high:.0f}", f"{r.votes:,}", f"{r.both_bad:.1%}")
            for r in result.ratings]  # fmt: skip
    return _section(title, about, f"<div class='hs-two'>{forest(result.ratings)}{_table(head, rows)}</div>")


def forest(rows: Sequence[Rating]) -> str:
    """A line for each arm: its rating and interval."""
    low, high = min(r.low for r in rows), max(r.high for r in rows)
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    height = ROW * len(rows) + 26

    def x(value: float) -> float:
        return LABEL + (WIDTH - LABEL - SIDE) * (value - low) / max(high - low, 1e-9)

    parts = []
    for tick in ticks:
        parts.append(_line("hs-mark" if tick == 1000 else "hs-axis", x(tick), 0, x(tick), height - 22))
        parts.append(_label(x(tick), height - 6, f"{tick:.0f}"))
    for n, r in enumerate(rows):
        y = ROW * n + ROW / 2
        parts.append(_label(0, y + 4, r.arm, "start", "hs-name"))
        parts.append(_line("hs-whisker", x(r.low), y, x(r.high), y) + _dot(x(r.rating), y))
    said = "; ".join(f"{r.arm} {r.rating:.0f}, {r.low:.0f} to {r.high:.0f}" for r in rows)
    return _svg(WIDTH, height, f"Ratings with intervals: {said}", parts)


def _costs(result: Result, costs: dict[str, Cost]) -> str:
    nfe = scatter(result.ratings, {arm: cost.nfe for arm, cost in costs.items()}, "network calls a picture (NFE)")
    seconds = scatter(result.ratings, {arm: cost.seconds for arm, cost in costs.items()}, "seconds a picture, median")
    return f"<div class='hs-two'>{nfe}{seconds}</div>"


def scatter(rows: Sequence[Rating], cost: dict[str, float], what: str) -> str:
    """Ratings over a cost on a logarithmic scale, arms of one method joined."""
    shown = sorted((r for r in rows if cost.get(r.arm, 0) > 0), key=lambda r: cost[r.arm])
    if not shown:
        return ""
    left, top, bottom, height = 46, 12, 34, 300
    low, high = min(r.low for r in shown), max(r.high for r in shown)
    at = [log10(cost[r.arm]) for r in shown]
    first, last = min(at) - 0.1, max(at) + 0.16

    def x(value: float) -> float:
        return left + (WIDTH - left - SIDE) * (log10(value) - first) / (last - first)

    def y(value: float) -> float:
        return top + (height - top - bottom) * (high - value) / max(high - low, 1e-9)

    parts = [_line("hs-axis", left, y(t), WIDTH - SIDE, y(t)) + _label(left - 8, y(t) + 4, f"{t:.0f}", "end")
             for t in _ticks(low, high) if low <= t <= high]  # fmt: skip
    told = [n for n, r in enumerate(shown) if not n or x(cost[r.arm]) - x(cost[shown[n - 1].arm]) > 30]
    parts += [_label(x(cost[shown[n].arm]), height - 14, f"{cost[shown[n].arm]:.3g}") for n in told]
    for method in dict.fromkeys(r.arm.rpartition("@")[0] for r in shown):
        own = [r for r in shown if r.arm.rpartition("@")[0] == method]
        points = " ".join(f"{x(cost[r.arm]):.1f},{y(r.rating):.1f}" for r in own)
        parts.append(f"<polyline class='hs-line' points='{points}'/>")
    for r in shown:
        here = x(cost[r.arm])
        parts.append(_line("hs-whisker", here, y(r.low), here, y(r.high)) + _dot(here, y(r.rating)))
        parts.append(_label(here + 9, y(r.rating) + 4, r.arm, "start", "hs-name"))
    return _figure(WIDTH, height, f"Rating over {what}", parts)


def _wins(result: Result, arms: Sequence[str]) -> str:
    """Rows against columns, in the order of the ratings; the tint says how far from even. `arms` in their own order."""
    names = [rating.arm for rating in result.ratings]
    order = sorted(range(len(names)), key=lambda n: arms.index(names[n]))
    place = {names[n]: row for row, n in enumerate(order)}  # of an arm in the matrices
    rows = []
    for name in names:
        met = [(place[name], place[other]) for other in names]
        cells = "".join(_win(float(result.wins[at]), int(result.met[at])) for at in met)
        rows.append(f"<tr><th scope='row'>{escape(name)}</th>{cells}</tr>")
    head = "".join(f"<th scope='col'>{escape(name)}</th>" for name in names)
    about = "Share of their meetings that the arm of the row won against that of the column, ties half."
    table = f"<table class='hs-wins'><thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f"<p class='hs-aside'>{about}</p><div class='hs-wide'>{table}</div>"


def _win(share: float, met: int) -> str:
    if isnan(share):
        return "<td></td>"
    tint = f"color-mix(in srgb, var(--accent) {max(share - 0.5, 0) * 70:.0f}%, transparent)"
    return f"<td style='background: {tint}'>{share:.0%}<small>of {met:,}</small></td>"


def _differences(gaps: Sequence[Difference]) -> str:
    head = ("Better", "Worse", "Points", "95 % interval", "p (Holm)", "Votes still needed")
    rows = [(g.arm, g.other, f"{g.gap:.0f}", f"{g.low:.0f} to {g.high:.0f}", f"{g.p_holm:.3f}",
             f"{g.votes_needed:,}") for g in gaps]  # fmt: skip
    hidden = f"<details><summary>All {len(rows)} differences</summary>{_table(head, rows)}</details>"
    return _table(head, rows) if len(rows) <= MANY else hidden


# Trust


def _diagnostics(found: Report) -> str:
    same, asked_twice = found.repeats
    ceiling, judged = found.ceiling
    circles, triples = found.cycles
    rows = {
        "Left side": _side(found),
        "Repeated pairs answered alike": f"{_share(same)} of {asked_twice:,}" if asked_twice else UNKNOWN,
        "Agreement, Krippendorff's alpha": UNKNOWN
        if found.alpha is None
        else f"{found.alpha:.2f}; 1 is full agreement, 0 chance",
        "Agreement with the majority": f"{_share(ceiling)} of {judged:,} votes; a reward model can hardly do better"
        if judged
        else UNKNOWN,
        "Circles": f"{circles:,} of {triples:,} triples of arms, each beating the next",
        "First place": _first_place(*found.fragile),
        "Time on a pair": f"median {np.median(found.dwell_ms) / 1000:.1f} s" if len(found.dwell_ms) else UNKNOWN,
    }
    told = "".join(f"<dt>{escape(name)}</dt><dd>{escape(words)}</dd>" for name, words in rows.items())
    return f"<dl>{told}</dl>"


def _side(found: Report) -> str:
    if not found.results:
        return UNKNOWN
    odds, low, high = found.results[0].left
    if high > 100 * low:
        return "too few votes to tell"
    verdict = "no bias is shown" if low <= 1 <= high else "a bias, which the ratings allow for"
    return f"odds times {odds:.2f}, 95 % interval {low:.2f} to {high:.2f}: {verdict}"


def _first_place(dropped: int, share: float) -> str:
    if not dropped:
        return "does not change hands, whichever votes are left out"
    return f"changes hands without {dropped:,} vote{'s' * (dropped != 1)} ({share:.1%})"


def _dwell(found: Report) -> str:
    """How long people looked, as a histogram."""
    if not len(found.dwell_ms):
        return ""
    counts, _ = np.histogram(np.minimum(found.dwell_ms / 1000, DWELL[-1]), [*DWELL[:-1], np.inf])
    width, height = WIDTH / len(counts), 120
    parts = []
    for n, count in enumerate(counts):
        tall = (height - 30) * count / max(counts.max(), 1)
        place = f"x='{n * width + 2:.1f}' y='{height - 18 - tall:.1f}' width='{width - 4:.1f}' height='{tall:.1f}'"
        parts.append(f"<rect class='hs-column' {place} rx='2'/>")
        name = f"{DWELL[n]:.0f}–{DWELL[n + 1]:.0f}" if n + 2 < len(DWELL) else f"{DWELL[n]:.0f} on"
        parts.append(_label((n + 0.5) * width, height - 3, name))
    return _figure(WIDTH, height, "Votes by the seconds that were spent on the pair", parts)


def _flagged(found: Report) -> str:
    if not found.flagged:
        return "<p class='hs-aside'>The filter leaves nobody out.</p>"
    head = ("Annotator", "Votes", "Left", "Known answers right", "Median time", "Left out because")
    rows = [
        (f"number {one.number}", f"{one.votes:,}", _share(one.left), _share(one.gold),
         f"{one.median_ms / 1000:.1f} s", ", ".join(one.reasons))
        for one in found.flagged
    ]  # fmt: skip
    return f"<h3>Left out by the filter, never deleted</h3>{_table(head, rows)}"


# Pieces of HTML and SVG


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns that hold figures are set right; minus signs are real ones."""
    figures = [all(row[n].lstrip("-")[:1].isdigit() for row in rows) for n in range(len(head))]

    def cell(tag: str, n: int, words: str) -> str:
        shown = escape(f"\N{MINUS SIGN}{words[1:]}" if words[:1] == "-" else words)
        return f"<{tag}{' class=hs-num' if figures[n] else ''}>{shown}</{tag.split()[0]}>"

    body = "".join(f"<tr>{''.join(cell('td', n, words) for n, words in enumerate(row))}</tr>" for row in rows)
    top = "".join(cell("th scope=col", n, words) for n, words in enumerate(head))
    return f"<div class='hs-wide'><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def _svg(width: float, height: float, said: str, parts: Iterable[str]) -> str:
    return f"<svg viewBox='0 0 {width} {height}' role='img' aria-label='{escape(said)}'>{''.join(parts)}</svg>"


def _figure(width: float, height: float, said: str, parts: Iterable[str]) -> str:
    return f"<figure>{_svg(width, height, said, parts)}<figcaption>{escape(said)}</figcaption></figure>"


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f"<line class='{kind}' x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}'/>"


def _dot(x: float, y: float) -> str:
    return f"<circle class='hs-dot' cx='{x:.1f}' cy='{y:.1f}' r='5.5'/>"


def _label(x: float, y: float, words: str, anchor: str = "middle", kind: str = "") -> str:
    return f"<text class='{kind}' x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}'>{escape(words)}</text>"


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers that lie around an interval, about five."""
    rough = max(high - low, 1.0) / 5
    power = 10.0 ** np.floor(log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    return [float(t) for t in np.arange(np.floor(low / step), np.ceil(high / step) + 1) * step]


def _share(value: float | None) -> str:
    return "not known" if value is None else f"{value:.0%}"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."
