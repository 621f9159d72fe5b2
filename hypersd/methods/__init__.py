"""METHODS, the table of methods: one paper per file, one row each. The order of rows is the order of panels.

To add a method write one file with a METHOD in it and name it here; panel, command line and tests follow.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from hypersd.adapters import AdapterFile, beside, found, network_sha256
from hypersd.methods import lcm, tcd, teacher, tscd
from hypersd.methods.base import Method, Stage, StepRange
from hypersd.records import InputError

__all__ = ["METHODS", "Method", "Stage", "StepRange", "discover", "find", "installed"]

METHODS: dict[str, Method] = {m.METHOD.name: m.METHOD for m in (teacher, lcm, tcd, tscd)}


def find(name: str, table: dict[str, Method] = METHODS) -> Method:
    """The row of that name; InputError with the names there are."""
    if name not in table:
        raise InputError(f"method must be one of {', '.join(table)}, got {name!r}")
    return table[name]


def installed(backbone: str = "emoji") -> dict[str, Method]:
    """The table of what can draw on a backbone with the adapters that lie beside it."""
    model, folder = beside(backbone)
    return discover(found(folder), network_sha256(model))


def discover(files: Sequence[AdapterFile], base_sha256: str) -> dict[str, Method]:
    """The table of what can draw on the base whose network has this hash: METHODS without training, and a row for
    each name that the adapters give themselves, in the order of METHODS.

    An adapter of another base, or of a method that is not known here, is told of in the log and left out.
    """
    rows = {name: row for name, row in METHODS.items() if row.losses is None}
    for method in METHODS.values():
        for file in files:
            card = file.card
            if card.method != method.name:
                continue
            if card.base_sha256 != base_sha256:
                logging.getLogger(__name__).warning(
                    "%s was trained on another base and is left out; train it again with: python -m hypersd distill %s",
                    file.path.name, card.method,
                )  # fmt: skip
                continue
            row = rows.get(card.name) or replace(method, name=card.name, guidance=card.guidance, eta=card.eta)
            rows[card.name] = replace(row, adapters=(*row.adapters, file))
    return rows
