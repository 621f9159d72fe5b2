"""METHODS, the table of methods: one paper per file, one row each. The order of rows is the order of panels.

To add a method write one file with a METHOD in it and name it here; panel, command line and tests follow.
"""

from __future__ import annotations

from hypersd.methods import teacher
from hypersd.methods.base import Method, StepRange
from hypersd.records import InputError

__all__ = ["METHODS", "Method", "StepRange", "find"]

METHODS: dict[str, Method] = {m.METHOD.name: m.METHOD for m in (teacher,)}


def find(name: str) -> Method:
    """The method of that name; InputError with the names there are."""
    if name not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]
