"""Whether the metrics can be believed: `python -m hypersd evaluate --ladder`.

Pictures whose order of quality is known are put to every metric: real ones, the same through the autoencoder, the
teacher's in 50, 8, 4 and 1 steps; and real ones that are blurred, made noisy, recoloured, given each other's captions,
reduced to few kinds or replaced by copies. A metric holds if Kendall's tau between its figures and the known order is
at least 0.9 in every series that concerns it, over those pairs of rungs that the prompts tell apart, best and worst
among them. What does not hold is not quoted.

Half of the prompts' real pictures are the yardstick, the other half are judged, so nothing is compared with itself.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hypersd import intervals
from hypersd.backbone import Backbone
from hypersd.emoji import autoencoder
from hypersd.evaluate import gallery, judges, plan, scoring
from hypersd.evaluate.judges import Artwork, Judge
from hypersd.evaluate.measures import METRICS, Evidence, Metric, Texts, measured
from hypersd.evaluate.plan import Arm, Plan
from hypersd.evaluate.scoring import Yardstick
from hypersd.records import InputError
from hypersd.train import processes

FILE = "emoji-ladder.json"  # in assets: the ladder.json of the embedded model, once it was climbed
HOLDS = 0.9  # Kendall's tau
TEACHER_STEPS = (50, 8, 4, 1)
BLURS = (0.0, 0.5, 1.0, 2.0)  # standard deviations, pixels of 128
NOISES = (0.0, 10.0, 25.0, 60.0)  # standard deviations, grey levels
# Degrees that colours are turned by. Only a share of the pictures is: turning all of them further is not known to be
# worse, since yellow turned halfway is blue, which artwork is full of.
HUE_TURNED = 90.0
SHARES = (0.0, 0.25, 0.5, 1.0)  # of turned pictures, of captions of another picture, of second drawings, of copies
KINDS = (1.0, 0.75, 0.5, 0.25)  # share of the prompts that is still drawn
STEPS, BLUR, NOISE, HUE, CAPTIONS, KINDS_LEFT, COLLAPSE, COPIES = (
    "teacher's steps", "blur", "noise", "colours turned", "captions swapped", "kinds lost", "second drawings equal",
    "copies of training pictures")  # fmt: skip

# What each metric has to notice. The others of a series say nothing about it.
CONCERNS: dict[str, tuple[str, ...]] = {
    "r_precision": (STEPS, CAPTIONS),
    "image_text": (STEPS, CAPTIONS),
    "reward": (STEPS, CAPTIONS),
    "kernel_distance": (STEPS, BLUR, NOISE, HUE, KINDS_LEFT),
    "frechet": (STEPS, BLUR, NOISE, KINDS_LEFT),
    "precision": (STEPS, BLUR, NOISE),
    "density": (STEPS, BLUR, NOISE),
    "recall": (STEPS, KINDS_LEFT),
    "coverage": (STEPS, KINDS_LEFT),
    "teacher_feature": (STEPS,),
    "teacher_pixel": (STEPS,),
    "diversity": (COLLAPSE,),
    "colour": (HUE,),
    "memorised": (COPIES,),
    "sharpness": (BLUR,),
}
STAYS = {"precision": KINDS_LEFT, "density": KINDS_LEFT}  # must not fall by more than SLACK of itself
SLACK = 0.05


@dataclass(frozen=True)
class Rung:
    """Pictures of known quality, named by what was done to them."""

    name: str
    evidence: Evidence


def run(
    backbone_name: str,
    folder: Path,
    artwork: Path,
    *,
    limit: object = 60,
    seeds: object = 2,
    **holding: Any,
) -> Path | None:
    """Draw the teacher's rungs, climb, write ladder.json and ladder.md; returns the page. `holding` as in evaluate.

    Raises:
        InputError: no judge or no artwork, both of which the ladder is made of; or the folder is another plan's.
    """
    state = processes()
    yard = Yardstick.load(artwork, list(METRICS.values()))
    for thing in (yard.judge, yard.real):
        if isinstance(thing, str):
            raise InputError(f"the ladder cannot be climbed: {thing}")
    wanted = plan.make(
        sets="seen,composition,concept", methods=plan.TEACHER, steps=TEACHER_STEPS[1:],
        teacher_steps=TEACHER_STEPS[0], seeds=seeds, limit=limit,
    )  # fmt: skip
    backbone = Backbone.load(backbone_name, device=str(state.device), dtype=None, **holding)
    record = wanted.record(backbone)
    plan.claim(folder, record)
    gallery.fill(wanted, folder, backbone, state.process_index, state.num_processes)
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    content = {
        "plan": {**record, "judges": yard.record()},
        "metrics": climb(series(wanted, folder, backbone, yard)),
    }
    (folder / "ladder.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    page = folder / "ladder.md"
    page.write_text(markdown(content), encoding="utf-8")
    return page


def publish(folder: Path) -> None:
    """Make the ladder in `folder` the one whose verdict every report follows."""
    shutil.copyfile(folder / "ladder.json", judges.ASSETS / FILE)


# ---------------------------------------------------------------------------------------------------- verdicts


def climb(ladders: Mapping[str, Sequence[Rung]]) -> dict[str, Any]:
    """For every metric: its figure on each rung of each series that concerns it, tau, and whether it holds."""
    found: dict[str, Any] = {}
    for name, concerns in CONCERNS.items():
        metric, rows = METRICS[name], {}
        for title in concerns:
            found_there = _values(metric, ladders[title])
            rows[title] = {"values": _figures(found_there), **_order(metric, list(found_there.values()))}
        if name in STAYS:
            values = _figures(_values(metric, ladders[STAYS[name]]))
            rows[f"{STAYS[name]}, must stay"] = {"values": values, **_stays(list(values.values()))}
        found[name] = {"holds": all(row["holds"] for row in rows.values()), "series": rows}
    return found


def _values(metric: Metric, rungs: Sequence[Rung]) -> dict[str, Tensor]:
    """What the metric says of each rung where it can be measured: one value a prompt, or one in all."""
    found = {rung.name: measured(metric, rung.evidence) for rung in rungs}
    return {name: value for name, value in found.items() if isinstance(value, Tensor) and value.nanmean().isfinite()}


def _figures(values: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(f"{float(value.nanmean()):.6g}") for name, value in values.items()}


def _order(metric: Metric, values: Sequence[Tensor]) -> dict[str, Any]:
    """Kendall's tau over the pairs of rungs that the prompts tell apart, and whether that will do.

    Rungs come best first, so what is better where more is has to fall. Rungs may be equally good: a teacher that is
    done after 8 steps does not get better until 50. So a pair counts where the interval of its difference, paired over
    prompts, leaves out zero, and counts against the metric where it does so on the wrong side; figures without
    intervals are taken as they are. The first rung must be told from the last: who sees nothing contradicts nothing.
    """
    if len(values) < 2:
        return {"tau": None, "decided": 0, "holds": False}
    sign = metric.better or 1
    told = [sign * _apart(a, b) for i, a in enumerate(values) for b in values[i + 1 :]]
    decided = sum(map(abs, told))
    tau = sum(told) / decided if decided else 0.0
    return {
        "tau": round(tau, 3),
        "decided": decided,
        "holds": tau >= HOLDS and sign * _apart(values[0], values[-1]) > 0,
    }


def _apart(a: Tensor, b: Tensor) -> int:
    """1 where a is above b, -1 where it is below, 0 where the prompts do not tell them apart."""
    if a.ndim and a.shape == b.shape:
        found = intervals.difference(a.numpy(), b.numpy(), intervals.draws(len(a)))
        return int(found.low > 0) - int(found.high < 0)
    mine, other = float(a.nanmean()), float(b.nanmean())
    return int(mine > other) - int(mine < other)


def _stays(values: Sequence[float]) -> dict[str, Any]:
    return {"tau": None, "holds": len(values) > 1 and min(values) >= (1 - SLACK) * values[0]}


def verdict(judge_sha256: str, file: Path | None = None) -> tuple[dict[str, str], str]:
    """The metrics that did not hold on the committed ladder, each with its figures; and what that is worth here."""
    file = file or judges.ASSETS / FILE
    if not file.exists():
        return {}, "No ladder has been climbed yet, so nobody knows whether these metrics can be believed."
    content = json.loads(file.read_text(encoding="utf-8"))
    if content["plan"]["judges"]["measure"] != judge_sha256:
        return {}, "The ladder was climbed with another judge, so it says nothing about these figures."
    failed = {name: "; ".join(_taus(row)) for name, row in content["metrics"].items() if not row["holds"]}
    return failed, f"Only metrics that hold on the ladder of {content['plan']['prompts']} prompts are shown."


# ------------------------------------------------------------------------------------------------------ rungs


def series(wanted: Plan, folder: Path, backbone: Backbone, yard: Yardstick) -> dict[str, list[Rung]]:
    """All series, best rung first."""
    assert not isinstance(yard.real, str) and not isinstance(yard.judge, str)  # run() has seen to it
    half = len(wanted.prompts) // 2
    judged, yardstick = list(range(1, 2 * half, 2)), list(range(0, 2 * half, 2))
    base = _ground(wanted, yard.judge, yard.real, yard, judged, yardstick)
    real = base.pixels
    teacher = {
        steps: gallery.read(wanted, folder, Arm(plan.TEACHER, steps), backbone.sha256).pixels[judged]
        for steps in TEACHER_STEPS
    }
    best = teacher[TEACHER_STEPS[0]]
    with_teacher = replace(base, teacher_pixels=best, teacher_features=scoring.look(yard.judge, best))

    def rung(name: str, pixels: Tensor, ground: Evidence = base) -> Rung:
        features, rewarded = scoring.look(yard.judge, pixels), scoring.look(yard.reward, pixels)
        looks = scoring.looks_of(yard.judge, pixels)
        return Rung(name, replace(ground, pixels=pixels, features=features, looks=looks, rewarded=rewarded))

    copies = yard.real.train()[torch.linspace(0, len(yard.real.train()) - 1, half).long()][:, None]
    return {
        STEPS: [
            rung("real", real),
            rung("autoencoder", reconstructed(backbone, real)),
            *(rung(f"{steps} step{'s' * (steps != 1)}", pixels, with_teacher) for steps, pixels in teacher.items()),
        ],
        BLUR: [rung(f"{sigma:g} px", blurred(real, sigma)) for sigma in BLURS],
        NOISE: [rung(f"{sd:g} levels", noisy(real, sd)) for sd in NOISES],
        HUE: [rung(f"{share:.0%}", _mixed(real, turned(real, HUE_TURNED), share)) for share in SHARES],
        CAPTIONS: [Rung(f"{share:.0%}", _swapped(base, yard, share)) for share in SHARES],
        KINDS_LEFT: [rung(f"{share:.0%} left", real[_fewer(half, share)]) for share in KINDS],
        COLLAPSE: [rung(f"{share:.0%}", _collapsed(best, share)) for share in SHARES],
        COPIES: [rung(f"{share:.0%}", _mixed(best[:, :1], copies, share)) for share in SHARES],
    }


def _ground(
    wanted: Plan, judge: Judge, real: Artwork, yard: Yardstick, judged: Sequence[int], yardstick: Sequence[int]
) -> Evidence:
    prompts = [wanted.prompts[i] for i in judged]
    pixels = real.of([prompt.picture for prompt in prompts])[:, None]
    others, their_looks = scoring.real_of(yard, [wanted.prompts[i] for i in yardstick])
    return Evidence(
        prompts=prompts,
        pixels=pixels,
        features=scoring.look(judge, pixels),
        looks=scoring.looks_of(judge, pixels),
        texts=scoring.texts_of(judge, prompts),
        real=others,
        real_looks=their_looks,
        train=yard.train,
        teacher_pixels="not drawn from any noise",
        teacher_features="not drawn from any noise",
        rewarded=scoring.look(yard.reward, pixels),
        reward_texts=scoring.texts_of(yard.reward, prompts),
    )


@torch.inference_mode()
def reconstructed(backbone: Backbone, pixels: Tensor) -> Tensor:
    """Pictures through the backbone's autoencoder and back; uint8 [n, 1, h, w, 3]."""
    parts = []
    for part in pixels.flatten(0, 1).split(16):
        x = autoencoder.reconstruct(backbone.vae, autoencoder.to_float(part.numpy()).to(backbone.device))
        parts.append(((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu())
    return torch.cat(parts).unflatten(0, pixels.shape[:2])


def blurred(pixels: Tensor, sigma: float) -> Tensor:
    """A Gaussian of `sigma` pixels over uint8 [n, s, h, w, 3]."""
    if not sigma:
        return pixels
    radius = int(3 * sigma + 0.5)
    weight = torch.exp(-(torch.arange(-radius, radius + 1.0) ** 2) / (2 * sigma**2))
    weight = (weight / weight.sum()).repeat(3, 1, 1, 1)  # [3, 1, 1, size]
    x = pixels.flatten(0, 1).permute(0, 3, 1, 2).float()
    x = F.pad(x, (radius, radius, radius, radius), mode="replicate")
    x = F.conv2d(F.conv2d(x, weight, groups=3), weight.mT, groups=3)
    return x.round().to(torch.uint8).permute(0, 2, 3, 1).unflatten(0, pixels.shape[:2])


def noisy(pixels: Tensor, sd: float) -> Tensor:
    """Independent normal noise of `sd` grey levels, always the same one."""
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0)) * sd
    return (pixels.float() + noise).round().clamp(0, 255).to(torch.uint8)


def turned(pixels: Tensor, degrees: float) -> Tensor:
    """All colours turned around the grey axis, which leaves white and black where they are."""
    angle = torch.deg2rad(torch.tensor(degrees))
    cos, sin = torch.cos(angle), torch.sin(angle)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / 3**0.5
    matrix = cos * torch.eye(3) + (1 - cos) / 3 + sin * cross  # Rodrigues' rotation about (1, 1, 1)
    return (pixels.float() @ matrix.T).round().clamp(0, 255).to(torch.uint8)


def _chosen(count: int, share: float) -> Tensor:
    """bool [count]: the first `share` of a fixed shuffle, so that a larger share holds every smaller one."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return torch.zeros(count, dtype=torch.bool).index_fill(0, order[: round(share * count)], True)


def _swapped(base: Evidence, yard: Yardstick, share: float) -> Evidence:
    """The chosen pictures get the captions of the next chosen one."""

    def texts(known: Texts | str) -> Texts | str:
        if isinstance(known, str):
            return known
        rows = torch.arange(len(base.prompts))
        places = rows[_chosen(len(rows), share)]
        rows[places] = places.roll(1)
        return Texts(known.asked[rows], known.own[rows], known.pool)

    return replace(base, texts=texts(base.texts), reward_texts=texts(base.reward_texts))


def _fewer(count: int, share: float) -> Tensor:
    """Rows in which the prompts that are lost are replaced by those that are kept, in turn."""
    kept = torch.arange(count)[_chosen(count, share)] if share < 1 else torch.arange(count)
    rows = torch.arange(count)
    lost = torch.ones(count, dtype=torch.bool).index_fill(0, kept, False)
    rows[lost] = kept.repeat(-(-count // len(kept)))[: int(lost.sum())]
    return rows


def _collapsed(pixels: Tensor, share: float) -> Tensor:
    """All drawings of the chosen prompts become their first one."""
    chosen = _chosen(len(pixels), share)
    return torch.where(chosen[:, None, None, None, None], pixels[:, :1], pixels)


def _mixed(pixels: Tensor, others: Tensor, share: float) -> Tensor:
    """The chosen pictures are replaced, at the size that they have."""
    x = others.flatten(0, 1).permute(0, 3, 1, 2).float()
    x = F.interpolate(x, pixels.shape[2:4], mode="area").round().to(torch.uint8).permute(0, 2, 3, 1)
    chosen = _chosen(len(pixels), share)
    return torch.where(chosen[:, None, None, None, None], x[:, None], pixels)


# ------------------------------------------------------------------------------------------------- for people


def markdown(content: Mapping[str, Any]) -> str:
    """The verdict on each metric, and its figures rung by rung."""
    made = content["plan"]
    head = [
        "# Which metrics hold",
        f"{made['backbone']} (weights {made['base_sha256'][:12]}), {made['prompts']} prompts "
        f"({made['prompts_sha256'][:12]}), judge {made['judges']['measure']}. "
        f"Rungs from best to worst; a metric holds if Kendall's tau is at least {HOLDS} in every series, over the "
        "pairs that the prompts tell apart (how many stands behind it), and the best rung is told from the worst.",
    ]
    table = ["| metric | holds | series: tau (pairs) |", "|---|---|---|"]
    table += [f"| {METRICS[name].title} | {'yes' if row['holds'] else '**no**'} | {'; '.join(_taus(row))} |"
              for name, row in content["metrics"].items()]  # fmt: skip
    details = [line for name, row in content["metrics"].items() for line in _details(name, row)]
    return "\n\n".join([*head, "\n".join(table), *details]) + "\n"


def _taus(row: Mapping[str, Any]) -> Iterator[str]:
    for title, found in row["series"].items():
        tau = "" if found["tau"] is None else f"{found['tau']:.2f} ({found['decided']})"
        yield f"{title}: {tau or ('yes' if found['holds'] else 'no')}"


def _details(name: str, row: Mapping[str, Any]) -> Iterator[str]:
    scale, digits = METRICS[name].scale, METRICS[name].digits
    yield f"## {METRICS[name].title}"
    lines = []
    for title, found in row["series"].items():
        values = " > ".join(f"{rung} {value * scale:.{digits}f}" for rung, value in found["values"].items())
        lines.append(f"- {title}: {values or 'nothing could be measured'}")
    yield "\n".join(lines)
