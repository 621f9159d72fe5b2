"""Methods against prompts: what is drawn, what is measured, and the report of it.

    python -m hypersd evaluate

`plan` says what is to be drawn, `gallery` draws it, `scoring` measures it with the `judges` by the table of `measures`,
`report` writes it down. `ladder` asks whether the measures can be believed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypersd import bench
from hypersd.backbone import Backbone
from hypersd.evaluate import gallery, ladder, plan, report, scoring
from hypersd.evaluate.measures import METRICS, Metric
from hypersd.evaluate.plan import Plan
from hypersd.train import processes


def run(
    wanted: Plan, backbone_name: str, folder: Path, metrics: Sequence[Metric], artwork: Path, **holding: Any
) -> Path | None:
    """Draw what is not there yet, measure all of it, write the report; returns its page. Metrics that failed on the
    ladder are named and not used. `holding` is `Backbone.load`'s engine, decoder and offload.

    Started by `accelerate launch`, several processes share the drawing; the first one measures, the others get None.

    Raises:
        InputError: the folder holds another plan's results, a picture in it is damaged, or a library is missing.
        ModelError: the backbone cannot be loaded.
    """
    bench.need("matplotlib", "pyarrow")
    backbone = Backbone.load(backbone_name, device=str(processes().device), dtype=None, **holding)
    return run_on(backbone, wanted, folder, metrics, artwork)


def run_on(backbone: Backbone, wanted: Plan, folder: Path, metrics: Sequence[Metric], artwork: Path) -> Path | None:
    """The same on a backbone that is in memory."""
    bench.need("matplotlib", "pyarrow")
    state = processes()
    wanted = gallery.possible(wanted, backbone)
    record = wanted.record(backbone)
    plan.claim(folder, record)
    gallery.fill(wanted, folder, backbone, state.process_index, state.num_processes)
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    yard = scoring.Yardstick.load(artwork, metrics)
    known = yard.record()
    failed, note = ladder.verdict(known["measure"])
    kept = [metric for metric in metrics if metric.name not in failed]
    scores = scoring.score(wanted, folder, backbone.sha256, yard, kept)
    dropped = {metric.name: failed[metric.name] for metric in metrics if metric.name in failed}
    content = report.summary(wanted, {**record, "judges": known}, scores, kept)
    return report.write(folder, {**content, "ladder": {"note": note, "dropped": dropped}}, scores, kept)


def chosen(names: object, *, quick: bool = False, published: bool = False) -> list[Metric]:
    """The metrics of these names; by default all, the `published` ones if asked for.

    A quick run leaves out the look at every training picture.

    Raises:
        InputError: an unknown name, with the nearest that is known.
    """
    if names:
        return [METRICS[name] for name in plan.names(names, METRICS, "metric")]
    left_out = {"memorised"} if quick else set()
    return [m for m in METRICS.values() if m.name not in left_out and (published or not m.published)]
