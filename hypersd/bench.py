"""How fast it is, in ratios: `python -m hypersd bench`. One process, all work in turn, forth and back.

The limit of a drawing is its bare network calls and one decoding: what a picture takes beyond that is ours to answer
for. The other yardstick is diffusers' own pipeline on the same weights. Timings vary between machines and minutes, so
quote the ratios: medians over rounds, with 95 % intervals over rounds.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from hypersd import folders, intervals
from hypersd.adapters import beside, found
from hypersd.backbone import Backbone, best_device, load_best
from hypersd.folders import BACKBONES
from hypersd.generate import draw
from hypersd.methods import Method, discover, find
from hypersd.records import InputError, Request, whole_number

log = logging.getLogger(__name__)
PROMPT, SEED = "a happy cat", 1
STEPS = (1, 4, 25)  # of the base model; other methods at those of these that they allow
TOGETHER = 4  # panels of a comparison, 4 steps each
SIDE = 512  # of the matrix product that says what the processor can do


class Row(NamedTuple):
    """One ratio: what takes how many times as long as what. `good` says which side of 1 is the better one."""

    name: str
    title: str
    over: Sequence[str]
    under: Sequence[str]
    good: str


def run(
    name: str, rounds: object = 15, *, start_up: bool = True, votes: Callable[[], float] | None = None, **holding: Any
) -> dict[str, Any]:
    """Everything that is measured of backbone `name`, ready for JSON. `start_up` costs three new processes; `votes`
    says how many the study takes a second; `holding` is `Backbone.load`'s decoder and offload.

    Raises:
        InputError: rounds is no whole number from 3 to 1,000, or the library that plots is not installed.
        ModelError: the backbone cannot be loaded.
    """
    need("matplotlib")
    rounds = whole_number(rounds, "rounds", 3, 1000)
    started = time.perf_counter()
    backbone = load_best(name, **holding)
    once = {"load": time.perf_counter() - started}
    started = time.perf_counter()
    draw(backbone, Request(PROMPT, SEED, STEPS[-1]), find("base"))
    once["first picture"] = time.perf_counter() - started
    if start_up:
        once["command that draws one step"] = statistics.median(_start_up(name, **holding) for _ in range(3))
    speed, memory = gigaflops(), gpu_memory(backbone)
    work, rows = _work(backbone)
    taken = in_turn(work, rounds)
    if backbone.device.type == "cuda":
        rows += _held_otherwise(backbone, rounds, taken)
    return {
        "machine": {**machine(), "gigaflops": [speed, gigaflops()]},
        "backbone": backbone.name,
        "base_sha256": backbone.sha256,
        "rounds": rounds,
        "once_seconds": once,
        "median_seconds": {label: statistics.median(values) for label, values in taken.items()},
        "ratios": {row.name: {"title": row.title, "good": row.good, **_ratio(row, taken)} for row in rows},
        "votes_per_second": votes() if votes else None,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "decoder": backbone.quick,
        "offload": _resting(backbone),
        "gpu_memory_gb": memory,
        "peak_memory_gb": _peak_bytes() / 1e9,
    }


def in_turn(work: Mapping[str, Callable[[int], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each kind of work in each round, after one round that does not count. Work is told the round."""
    for call in work.values():
        call(-1)
    taken: dict[str, list[float]] = {label: [] for label in work}
    for label in tqdm(intervals.abba(list(work), rounds), desc="bench", unit="timing"):
        number = len(taken[label])
        started = time.perf_counter()
        work[label](number)
        _finish()
        taken[label].append(time.perf_counter() - started)
    return taken


def _finish() -> None:
    """Wait for what a GPU has only been asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _ratio(row: Row, taken: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Several kinds of work on one side are added up round by round."""
    over, under = ([sum(parts) for parts in zip(*(taken[label] for label in side), strict=True)]
                   for side in (row.over, row.under))  # fmt: skip
    found = intervals.ratio(over, under)
    return {"value": found.value, "low": found.low, "high": found.high}


# ------------------------------------------------------------------------------------------------ what is timed


def _work(backbone: Backbone) -> tuple[dict[str, Callable[[int], Any]], list[Row]]:
    work, rows = _bare(backbone), []
    for method in _drawable(backbone):
        for steps in STEPS:
            if _draws(method, steps):
                label = f"{method.name}, {steps} steps"
                work[label] = _picture(backbone, method, steps)
                limit = [_bare_call(method)] * steps + ["decoding"]
                rows.append(Row(f"{method.name}-{steps}-limit", f"{label} / network + decoder", [label], limit, "1"))
    for steps in (1, 4):
        work[_new(steps)] = _picture(backbone, find("base"), steps, new=True)
    if not _resting(backbone):  # its pipelines would have to be told to move their parts, which are also ours
        rows += _beside_stock(backbone, work)
    if backbone.device.type == "cuda":
        rows += _on_gpu(backbone, work)
    plain = backbone.device.type == "cpu" and backbone.dtype == torch.float32 and backbone.denoiser == "unet"
    if importlib.util.find_spec("openvino") and plain and not backbone.quick:  # it brings its own decoder
        rows += _compiled(Backbone.load(_same(backbone), engine="openvino"), work)
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx") and plain:
        rows += _exported(backbone, work)
    return work, rows


def _new(steps: int) -> str:
    return f"new prompt, {steps} steps"


def _resting(backbone: Backbone) -> bool:
    """Whether text encoders and decoder are elsewhere while they do not work."""
    return bool(backbone.text_encoder.device != backbone.device)


def _same(backbone: Backbone) -> str | Path:
    """What to load to have it again."""
    return backbone.name if backbone.name in BACKBONES else backbone.folder


def _beside_stock(backbone: Backbone, work: dict[str, Callable[[int], Any]]) -> list[Row]:
    stock, rows = _stock(backbone), []
    for steps in (1, 4):
        theirs = f"diffusers, {steps} steps"
        work[theirs] = lambda number, steps=steps: stock(number, steps, find("base").guidance)  # type: ignore[misc]
        rows.append(Row(f"stock-{steps}", f"diffusers / ours, {steps} steps, guided", [theirs], [_new(steps)], "more"))
    return rows + _side_by_side(backbone, stock, work)


def _on_gpu(backbone: Backbone, work: dict[str, Callable[[int], Any]]) -> list[Row]:
    """What only a GPU makes a question of: several calls as one."""
    x, states = backbone.noise(SEED)[0].repeat(TOGETHER, 1, 1, 1), backbone.embed([PROMPT] * TOGETHER)
    work[f"network call of {TOGETHER}"] = _call(backbone, x, states)
    return [Row("batch", f"{TOGETHER} network calls / one of {TOGETHER}", ["network call"] * TOGETHER,
                [f"network call of {TOGETHER}"], "more")]  # fmt: skip


def _held_otherwise(backbone: Backbone, rounds: int, taken: dict[str, list[float]]) -> list[Row]:
    """The model in other precision or places beside itself, one way after the other: no more than two are in the GPU's
    memory, and nothing else is timed meanwhile. A way that has no room is left out."""
    offload, rows = _resting(backbone), []
    ways = [("float32", "in float32", "more", torch.float32, offload)]
    if not offload:
        ways.append(("offload", "with encoders and decoder in main memory", "1", backbone.dtype, True))
    for name, way, good, dtype, rests in ways:
        over, under = f"{_new(4)}, {way}", f"{_new(4)}, beside {name}"
        try:
            taken[over], taken[under] = _beside(backbone, rounds, dtype, rests)
        except InputError as problem:
            log.warning("no row %s: %s", way, problem)
        else:
            rows.append(Row(name, f"4 steps {way} / as it is drawn", [over], [under], good))
    return rows


def _beside(backbone: Backbone, rounds: int, dtype: torch.dtype, offload: bool) -> tuple[list[float], list[float]]:
    """Seconds of a drawing by the model held otherwise, and as it is in between. InputError where there is no room."""
    other = Backbone.load(
        _same(backbone), device=str(backbone.device), dtype=dtype, decoder=backbone.quick, offload=offload
    )
    held = {"otherwise": other, "as it is": backbone}
    timed = in_turn({name: _picture(one, find("base"), 4, new=True) for name, one in held.items()}, rounds)
    return timed["otherwise"], timed["as it is"]


def gpu_memory(backbone: Backbone) -> dict[str, float] | None:
    """GB of a GPU that are taken at the peak of a drawing by each method, the model and its one adapter included; None
    without a GPU."""
    if backbone.device.type != "cuda":
        return None
    peaks = {}
    for method in _drawable(backbone):
        for steps in [steps for steps in STEPS if _draws(method, steps)][:1]:
            backbone.wardrobe.forget()
            picture = _picture(backbone, method, steps, new=True)
            picture(-1)  # merges
            torch.cuda.reset_peak_memory_stats()
            picture(0)
            peaks[f"{method.name}, {steps} steps"] = torch.cuda.max_memory_allocated() / 1e9
    return peaks


def _exported(backbone: Backbone, work: dict[str, Callable[[int], Any]]) -> list[Row]:
    """The bare calls by onnxruntime, for comparison only: nothing here draws with it."""
    import onnxruntime

    from hypersd.compiled import to_onnx

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    x, states = backbone.noise(SEED)[0], backbone.embed(["", PROMPT])
    session = onnxruntime.InferenceSession(to_onnx(backbone.unet, (x, states[:1])), options)

    def call(count: int) -> Callable[[int], Any]:
        inputs = {"x": x.expand(count, -1, -1, -1).numpy(), "t": torch.tensor(500).numpy(),
                  "states": states[:count].numpy()}  # fmt: skip
        return lambda _number: session.run(None, inputs)

    work |= {"onnxruntime network call": call(1), "onnxruntime network call, guided": call(2)}
    return [Row(f"onnxruntime-{label}", f"torch / onnxruntime {label}", [label], [f"onnxruntime {label}"], "more")
            for label in ("network call", "network call, guided")]  # fmt: skip


def _compiled(quick: Backbone, work: dict[str, Callable[[int], Any]]) -> list[Row]:
    """The same bare calls and the same four methods, by the other engine."""
    bare = {f"openvino {label}": call for label, call in _bare(quick).items()}
    rows = [Row(f"openvino-{label.split()[-1]}", f"torch / {label}", [label.removeprefix("openvino ")], [label], "more")
            for label in bare]  # fmt: skip
    work |= bare
    if methods := _four(quick):
        work["openvino four methods"] = _together(quick, methods)
        rows += _together_rows("openvino ", methods)
    return rows


def _bare(backbone: Backbone) -> dict[str, Callable[[int], Any]]:
    x, _ = backbone.noise(SEED)
    one, two = backbone.embed([PROMPT]), backbone.embed(["", PROMPT])
    return {
        "network call": _call(backbone, x, one),
        "network call, guided": _call(backbone, torch.cat([x, x]), two),
        "decoding": lambda _number: backbone.decode(x),
    }


def _call(backbone: Backbone, x: torch.Tensor, states: torch.Tensor) -> Callable[[int], Any]:
    @torch.inference_mode()
    def work(_number: int) -> torch.Tensor:
        return backbone.predict(x, 500, states)

    return work


def _bare_call(method: Method) -> str:
    return "network call, guided" if method.guidance > 1 else "network call"


def _picture(backbone: Backbone, method: Method, steps: int, *, new: bool = False) -> Callable[[int], Any]:
    """One drawing; with `new` of a prompt that was never read before, else of one whose states are remembered."""
    return lambda number: draw(backbone, Request(f"{PROMPT} {number}" if new else PROMPT, SEED, steps), method)


def _draws(method: Method, steps: int) -> bool:
    """Whether it draws so many, and as large as the others."""
    try:
        method.check(Request(PROMPT, SEED, steps))
    except InputError:
        return False
    return method.smaller == 1


def _drawable(backbone: Backbone) -> list[Method]:
    """The rows that need no adapter, or have one for this backbone."""
    return list(discover(found(beside(backbone.name)[1]), backbone.network_sha256).values())


def _side_by_side(
    backbone: Backbone, stock: Callable[[int, int, float], Any], work: dict[str, Callable[[int], Any]]
) -> list[Row]:
    """Four methods at 4 steps against as many stock pipelines without any adapter; none if there are fewer."""
    methods = _four(backbone)
    if not methods:
        return []
    work["four methods"] = _together(backbone, methods)
    work["four pipelines"] = lambda number: [stock(number, 4, method.guidance) for method in methods]
    return _together_rows("", methods)


def _four(backbone: Backbone) -> list[Method]:
    """Lays the baseline beside the first few-step methods, as the app does; empty where there are too few."""
    methods = [method for method in _drawable(backbone) if _draws(method, 4)][:TOGETHER]
    return methods if len(methods) == TOGETHER else []


def _together(backbone: Backbone, methods: Sequence[Method]) -> Callable[[int], Any]:
    pictures = [_picture(backbone, method, 4, new=True) for method in methods]
    return lambda number: [picture(number) for picture in pictures]


def _together_rows(engine: str, methods: Sequence[Method]) -> list[Row]:
    drawn, limit = [f"{engine}four methods"], [f"{engine}{_bare_call(m)}" for m in methods for _ in range(4)]
    name = engine.strip() and f"{engine.strip()}-"
    return [
        Row(f"{name}together-limit", f"{drawn[0]}, 4 steps / network + decoder", drawn,
            limit + [f"{engine}decoding"] * len(methods), "1"),
        Row(f"{name}stock-together", f"four pipelines / {drawn[0]}, 4 steps", ["four pipelines"], drawn, "more"),
    ]  # fmt: skip


def _stock(backbone: Backbone) -> Callable[[int, int, float], Any]:
    """diffusers' pipeline on the same weights, precision, decoder and steps, as its documentation calls it."""
    import diffusers

    kind = folders.read_json(backbone.folder, backbone.name, "model_index.json")["_class_name"]
    given: dict[str, Any] = {"subfolder": "scheduler"}
    if backbone.denoiser == "unet":
        given |= {"timestep_spacing": "trailing", "clip_sample": False}
    scheduler = diffusers.DDIMScheduler if backbone.denoiser == "unet" else diffusers.FlowMatchEulerDiscreteScheduler
    own: dict[str, Any] = {"add_watermarker": False} if kind == "StableDiffusionXLPipeline" else {}
    if kind == "StableDiffusionPipeline":
        own = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    parts = {**backbone.components, "vae": backbone.decoder}
    pipeline = getattr(diffusers, kind)(**parts, scheduler=scheduler.from_pretrained(backbone.folder, **given), **own)
    pipeline.set_progress_bar_config(disable=True)

    def call(number: int, steps: int, guidance: float) -> Any:
        generator = torch.Generator().manual_seed(SEED)
        return pipeline(
            f"{PROMPT} {number}", num_inference_steps=steps, guidance_scale=guidance, generator=generator,
            height=backbone.picture_px, width=backbone.picture_px,
        ).images[0]  # fmt: skip

    return call


def _start_up(name: str, decoder: str = "", offload: bool = False) -> float:
    """Seconds from an empty shell to one picture on disk."""
    command = [sys.executable, "-m", "hypersd", "draw", "--prompt", PROMPT, "--steps", "1", "--backbone", name]
    command += ["--decoder", decoder] * bool(decoder) + ["--offload"] * offload
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        done = subprocess.run([*command, "--out", f"{folder}/x.png"], capture_output=True, text=True, check=False)
        taken = time.perf_counter() - started
    if done.returncode:
        raise InputError(f"the command that draws one picture failed: {done.stderr.strip()[-200:]}")
    return taken


# -------------------------------------------------------------------------------------------------- the machine


def machine() -> dict[str, Any]:
    """What the timings were taken on."""
    return {
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def gigaflops(repeats: int = 20) -> float:
    """What a product of two matrices reaches here, in GFLOP/s: whether the machine was the same before and after."""
    a, b = torch.ones(2, SIDE, SIDE, device=best_device())
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        torch.mm(a, b)
        _finish()
        taken.append(time.perf_counter() - started)
    return 2 * SIDE**3 / statistics.median(taken) / 1e9


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux, bytes on macOS


# -------------------------------------------------------------------------------------------------- for people


def need(*libraries: str) -> None:
    """InputError now and not at the end of a long run, if a library that writes the results is not installed."""
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            raise InputError(f"{library} is not installed; install it with: pip install -e '.[evaluate]'")


def table(content: Mapping[str, Any]) -> str:
    """The ratios and seconds as lines of text."""
    lines = [f"{row['title']:<48} {row['value']:6.2f}  [{row['low']:.2f}, {row['high']:.2f}]"
             for row in content["ratios"].values()]  # fmt: skip
    seconds = {**content["once_seconds"], **content["median_seconds"]}
    lines += [f"{label:<48} {value:8.3f} s" for label, value in seconds.items()]
    if content.get("votes_per_second"):
        lines.append(f"{'votes that the study takes':<48} {content['votes_per_second']:6.0f}   a second")
    peaks = {f"the GPU's memory, {label}": peak for label, peak in (content.get("gpu_memory_gb") or {}).items()}
    peaks["memory at its peak"] = content["peak_memory_gb"]
    return "\n".join([*lines, *(f"{label:<48} {peak:8.3f} GB" for label, peak in peaks.items())])


def publish(folder: Path, backbone: str, *names: str, prefix: str = "") -> None:
    """Copy files of a results folder to where README and app show them, with `prefix` before their names."""
    place = folders.measured(backbone)
    place.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(folder / name, place / f"{prefix}{name}")


def write(folder: Path, content: Mapping[str, Any]) -> None:
    """bench.json and bench.png in `folder`. Raises InputError if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "bench.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}); choose another folder with --out") from None
    plot(content, folder / "bench.png")


def plot(content: Mapping[str, Any], target: Path) -> None:
    """Each ratio with its interval, beside the line where both sides are equal."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = list(content["ratios"].values())[::-1]
    figure = Figure(figsize=(8, 1 + 0.4 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    values, places = [row["value"] for row in rows], range(len(rows))
    below = [row["value"] - row["low"] for row in rows]
    above = [row["high"] - row["value"] for row in rows]
    colours = ["tab:green" if row["good"] == "more" else "tab:blue" for row in rows]
    axes.barh(places, values, color=colours)
    axes.errorbar(values, places, xerr=[below, above], fmt="none", ecolor="black", capsize=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.set(yticks=places, yticklabels=[row["title"] for row in rows], xlabel="times as long")
    axes.set_title(content["machine"]["gpu"] or content["machine"]["processor"], fontsize="small")
    figure.savefig(target, dpi=110, format="png")
