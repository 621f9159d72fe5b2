"""METHODS, the table of methods: one paper per file, one row each. The order of rows is the order of panels.

To add a method write one file with a METHOD in it and name it here; panel, command line and tests follow.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hypersd import releases
from hypersd.adapters import AdapterFile, beside, found
from hypersd.folders import cached, network_sha256
from hypersd.methods import (
    dmd,
    dmd2,
    flash,
    hyper,
    hyper_unet,
    lcm,
    lightning,
    lightning_unet,
    pcm,
    pcm_cfg,
    perflow,
    tcd,
    teacher,
    tscd,
    tscd_cfg,
    turbo,
)
from hypersd.methods.base import Method, Stage, StepRange
from hypersd.records import Adapter, InputError
from hypersd.single import laid_out

if TYPE_CHECKING:
    from hypersd.backbone import Backbone

__all__ = ["METHODS", "Method", "Stage", "StepRange", "as_made", "bring", "discover", "find", "installed"]

_FILES = (
    *(teacher, lcm, tcd, pcm, pcm_cfg, perflow, turbo, lightning, lightning_unet, flash, dmd2),
    *(tscd, tscd_cfg, dmd, hyper, hyper_unet),
)
METHODS: dict[str, Method] = {file.METHOD.name: file.METHOD for file in _FILES}


def find(name: str, table: dict[str, Method] = METHODS) -> Method:
    """The row of that name; InputError with the names there are."""
    if name not in table:
        raise InputError(f"method must be one of {', '.join(table)}, got {name!r}")
    return table[name]


def installed(backbone: str = "emoji", wanted: Sequence[str] = ()) -> dict[str, Method]:
    """The table of what can draw on a backbone with the adapters that lie beside it, and with published ones that are
    `wanted`, methods or names of releases: those that are not there yet are `lacking`, and `bring` gets them.

    Raises:
        InputError: what is wanted is not published, or not for commerce.
    """
    model, folder = beside(backbone)
    if not model.is_dir():
        model = cached(backbone) or model
    files, base = found(folder), network_sha256(model)
    there = {file.path.stem for file in files if base in ("", file.card.base_sha256)}
    absent = {
        AdapterFile(folder / f"{release.name}.safetensors", "", release.card(base, rank=0)): release
        for release in _open_to_all(backbone, wanted)
        if release.name not in there
    }
    table = discover(sorted([*files, *absent], key=lambda file: file.path), base)
    for name, row in table.items():
        table[name] = replace(row, lacking=tuple(absent[file] for file in row.adapters if file in absent))
    return table


def _open_to_all(backbone: str, wanted: Sequence[str]) -> list[releases.Release]:
    chosen = releases.chosen(str(laid_out(backbone)), wanted) if wanted else []
    if closed := [release for release in chosen if not release.commercial]:
        raise InputError(
            f"{closed[0].method} is {closed[0].licence}; if that suits you, leave it out of HYPERSD_FETCH and type: "
            f"python -m hypersd fetch {backbone} {closed[0].method} --accept-licence"
        )
    return chosen


def bring(table: dict[str, Method], backbone: Backbone, name: str) -> None:
    """Download what the row of that name lacks. Each file is in the table once it is on the disk.

    Raises:
        InputError: one cannot be had or kept, as `releases.fetch` says.
    """
    shapes = {key: tuple(weight.shape) for key, weight in backbone.unet.state_dict().items()}
    while lacking := table[name].lacking:
        row, release = table[name], lacking[0]
        place = next(file.path for file in row.adapters if file.path.stem == release.name)
        kept = releases.fetch(release, backbone.network_sha256, place.parent, shapes=shapes)
        adapters = tuple(kept if file.path == place else file for file in row.adapters)
        table[name] = replace(row, adapters=adapters, lacking=lacking[1:])


def discover(files: Sequence[AdapterFile], base_sha256: str) -> dict[str, Method]:
    """The table of what can draw on the base whose network has this hash, "" where it is not known: METHODS without an
    adapter, and a row for each name that the adapters give themselves, in the order of METHODS.

    An adapter that cannot be used, or is not needed beside one before it, is told of in the log and left out.
    """
    usable: dict[str, list[AdapterFile]] = {}
    for file in files:
        beside_it = usable.setdefault(file.card.name, [])
        if problem := _misfit(file.card, base_sha256, beside_it):
            logging.getLogger(__name__).warning("%s is left out: %s", file.path.name, problem)
        else:
            beside_it.append(file)
    rows: dict[str, Method] = {}
    for method in METHODS.values():
        if not method.adapted:
            rows[method.name] = method
        for name, found_files in usable.items():
            if found_files and found_files[0].card.method == method.name:
                rows[name] = _row(method, name, found_files)
    return rows


def _misfit(card: Adapter, base_sha256: str, others: Sequence[AdapterFile]) -> str:
    """Why an adapter cannot stand in the table beside those that give the same name; "" if it can."""
    adapted = [name for name, row in METHODS.items() if row.adapted]
    if card.method not in adapted:
        return f"its method must be one of {', '.join(adapted)}, it says {card.method!r}"
    if base_sha256 not in ("", card.base_sha256):
        return f"it was trained on another base; {METHODS[card.method].remedy('it')}"
    if card.name != card.method and (card.name in METHODS or (others and others[0].card.method != card.method)):
        return f"it is of method {card.method}, but {card.name!r} is another method's name; choose another --name"
    if same := [o.path.name for o in others if o.card.segments == card.segments]:
        return f"{same[0]} is for the same number of segments and has the same name {card.name!r}"
    return ""


def _row(method: Method, name: str, files: Sequence[AdapterFile]) -> Method:
    title = method.title if name == method.name else f"{method.title}: {name}"  # two rows of a method are told apart
    drawn = as_made(method, files[0].card)
    fewest = min(file.card.segments for file in files)
    steps = method.steps
    if 1 < fewest < steps.low:  # a release for fewer steps than are trained here
        steps = StepRange(fewest, steps.high, (fewest, *steps.suggested))
    return replace(drawn, name=name, title=title, steps=steps, adapters=tuple(files))


def as_made(method: Method, card: Adapter) -> Method:
    """The method as it is drawn with an adapter: as a release's makers say, or ours."""
    licence, spacing = str(card.recipe.get("licence", method.licence)), str(card.recipe.get("spacing", method.spacing))
    return replace(method, guidance=card.guidance, eta=card.eta, spacing=spacing, licence=licence)
