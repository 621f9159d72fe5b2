"""Tables 2 to 5 of Hyper-SD (arXiv:2404.13686): which row is which method here, and the paper's own figures; and the
ablation of this project, part by part.

The paper's figures are of 5,000 COCO prompts with its own weights: CLIP score (ViT-B/32), LAION aesthetic score,
ImageReward, PickScore. It gives no intervals, and it trained on the second and third of them.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

FIGURES = ("CLIP", "aesthetic†", "ImageReward†", "PickScore")
FAMILIES = {"sd15": "SD15", "sdxl": "SDXL"}  # backbone -> how the paper calls it


@dataclass(frozen=True)
class Row:
    """`method` and `steps` name the arm here; `family` is the base that the paper's `figures` are of."""

    label: str
    method: str
    steps: int
    family: str
    figures: tuple[float, float, float, float]


def _rows(family: str, *rows: tuple[str, str, int, float, float, float, float]) -> Iterator[Row]:
    for label, method, steps, *figures in rows:
        clip, aesthetic, reward, pick = figures
        yield Row(label, method, steps, family, (clip, aesthetic, reward, pick))


# The names of methods are those of METHODS and of ABLATION; others have no row here yet and show the paper alone. What
# was published for 2, 4 and 8 steps is `tscd` here, and has learned from feedback already.
TABLES: dict[str, tuple[Row, ...]] = {
    "Table 2, main results": (
        *_rows("SD15",
               ("base", "base", 25, 31.88, 5.26, 0.18, 0.217),
               ("LCM LoRA", "lcm", 4, 30.36, 5.66, -0.37, 0.212),
               ("TCD LoRA", "tcd", 4, 30.62, 5.45, -0.15, 0.214),
               ("PeRFlow", "perflow", 4, 30.77, 5.64, -0.35, 0.208),
               ("Hyper-SD LoRA", "hyper", 1, 30.87, 5.79, 0.29, 0.215)),
        *_rows("SDXL",
               ("base", "base", 25, 33.16, 5.54, 0.87, 0.229),
               ("LCM LoRA", "lcm", 4, 32.43, 5.42, 0.48, 0.224),
               ("TCD LoRA", "tcd", 4, 32.45, 5.42, 0.67, 0.226),
               ("Lightning LoRA", "lightning", 4, 32.40, 5.63, 0.72, 0.229),
               ("Hyper-SD LoRA", "hyper", 4, 32.56, 5.74, 0.93, 0.232),
               ("Turbo UNet", "turbo", 1, 32.33, 5.33, 0.78, 0.228),
               ("Lightning UNet", "lightning-unet", 1, 32.17, 5.34, 0.54, 0.223),
               ("Hyper-SD UNet", "hyper-unet", 1, 32.85, 5.85, 1.19, 0.231)),
    ),
    "Table 3, without and with feedback": tuple(_rows(
        "SDXL",
        ("TCD", "tcd", 2, 32.36, 5.62, 0.29, 0.217),
        ("TSCD", "tscd", 2, 32.49, 5.58, 0.64, 0.222),
        ("TCD", "tcd", 4, 32.45, 5.42, 0.67, 0.226),
        ("TSCD", "tscd", 4, 32.53, 5.66, 0.78, 0.229),
        ("TCD", "tcd", 8, 32.47, 5.78, 0.76, 0.229),
        ("TSCD", "tscd", 8, 32.46, 5.85, 0.77, 0.229),
        ("DMD with feedback", "dmd-feedback", 1, 32.70, 5.58, 0.82, 0.223),
        ("TSCD with feedback", "tscd-feedback", 1, 32.59, 5.69, 1.06, 0.226),
        ("TSCD with feedback", "tscd-feedback", 2, 32.61, 5.84, 1.04, 0.232),
        ("TSCD with feedback", "tscd-feedback", 4, 32.56, 5.74, 0.93, 0.232),
        ("TSCD with feedback", "tscd-feedback", 8, 32.56, 5.89, 0.93, 0.232))),
    "Table 4, one LoRA at several step counts": (
        *_rows("SD15",
               ("unified LoRA", "hyper", 8, 30.73, 5.47, 0.53, 0.224),
               ("unified LoRA", "hyper", 4, 31.07, 5.55, 0.53, 0.224),
               ("unified LoRA", "hyper", 2, 31.21, 5.93, 0.45, 0.222),
               ("unified LoRA", "hyper", 1, 30.87, 5.79, 0.29, 0.215)),
        *_rows("SDXL",
               ("unified LoRA", "hyper", 8, 32.54, 5.83, 1.14, 0.233),
               ("unified LoRA", "hyper", 4, 32.51, 5.52, 1.15, 0.234),
               ("unified LoRA", "hyper", 2, 32.59, 5.71, 1.15, 0.234),
               ("unified LoRA", "hyper", 1, 32.59, 5.69, 1.06, 0.226)),
    ),
    "Table 5, parts of the method": tuple(_rows(
        "SDXL",
        ("DMD", "dmd", 1, 32.35, 5.81, 0.35, 0.217),
        ("TCD + DMD", "tcd-dmd", 1, 32.50, 5.67, 0.31, 0.215),
        ("TSCD + DMD", "tscd-dmd", 1, 32.58, 5.69, 0.85, 0.222),
        ("TCD", "tcd", 2, 32.36, 5.62, 0.29, 0.217),
        ("TSCD", "tscd", 2, 32.49, 5.58, 0.64, 0.222),
        ("TCD + feedback", "tcd-feedback", 2, 32.38, 5.63, 0.59, 0.221),
        ("TSCD + feedback", "tscd-feedback", 2, 32.61, 5.84, 1.04, 0.232),
        ("TCD", "tcd", 4, 32.45, 5.42, 0.67, 0.226),
        ("TSCD", "tscd", 4, 32.53, 5.66, 0.78, 0.229),
        ("TCD + feedback", "tcd-feedback", 4, 32.50, 5.62, 0.85, 0.229),
        ("TSCD + feedback", "tscd-feedback", 4, 32.56, 5.74, 0.93, 0.232))),
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A line of the ablation: `method` is the row of the app that has these parts, `how` the commands that make it."""

    label: str
    method: str
    how: tuple[str, ...]


REFINED = "hyper"  # the row that is the last part if it was refined twice
_LIKED = "--reward assets/emoji-scorer-a --picker assets/emoji-reward"
_ALIKE = "--steps 4 --mode rollout --likeness"
ABLATION = (  # what table 5 asks, of adapters that all begin with the same ones and are drawn in 1 to 8 steps
    Part("TCD", "tcd", ("distill tcd",)),
    Part("TSCD", "tscd", ("distill tscd",)),
    Part("TSCD + feedback", "tscd-feedback",
         tuple(f"refine tscd-{segments} --name tscd-feedback {_LIKED}" for segments in (8, 4, 2, 1))),
    Part("DMD", "dmd", ("distill dmd",)),
    Part("TSCD, then DMD", "tscd-dmd", ("distill dmd --begin tscd-1 --name tscd-dmd",)),
    Part("TSCD + DMD", "hyper-distilled", ("distill hyper --name hyper-distilled",)),
    Part("TSCD + DMD + feedback", "hyper-feedback",
         (f"refine hyper-distilled --steps 4 --name hyper-feedback {_LIKED}",)),
    Part("all, and likeness", "hyper",
         (f"refine hyper-feedback --name hyper-alike {_ALIKE} 1 --pictures 8 --lr 3e-4 --updates 500 {_LIKED}",
          f"refine hyper-alike --name hyper-nearer {_ALIKE} 4 --pictures 16 --lr 2e-4 --updates 250 {_LIKED}",
          f"refine hyper-nearer --name hyper-nearest {_ALIKE} 10 --pictures 16 --lr 1e-4 --updates 200 {_LIKED}",
          "convert hyper-nearest --scale 1.07 --name hyper --out assets/emoji-lora/hyper.safetensors")),
)  # fmt: skip


def learned(refinements: Iterable[Mapping[str, Any]]) -> str:
    """The row that a `hyper` belongs in, by what its card says of the last refinement."""
    asked = [recipe["asked"] for recipe in refinements if "asked" in recipe]
    liked = any(told.get("likeness") for told in asked)
    return REFINED if liked else f"{REFINED}-{'feedback' if asked else 'distilled'}"


def at_hand(names: Container[str]) -> list[str]:
    """The rows of the ablation among these."""
    return [part.method for part in ABLATION if part.method in names]


def rows(table: str, backbone: str, drawn: set[tuple[str, int]]) -> list[Row]:
    """The rows of a table worth showing: all of the backbone's own where the paper has it, else those drawn here.

    A backbone that the paper does not know borrows the layout of the base that has more of its arms, no figure.
    """
    family = FAMILIES.get(backbone)
    if family:
        return [row for row in TABLES[table] if row.family == family]
    found = [row for row in TABLES[table] if (row.method, row.steps) in drawn]
    counts = {name: sum(row.family == name for row in found) for name in FAMILIES.values()}
    best = max(counts, key=lambda name: counts[name])
    return [row for row in found if row.family == best]
