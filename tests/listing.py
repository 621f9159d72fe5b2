"""What the guard tests look at: the files git would carry, so build output and caches never count."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@cache
def files() -> tuple[str, ...]:
    """Paths relative to the root, tracked or new, not ignored, and present on disk."""
    # A container's checkout may belong to another user, hence safe.directory.
    git = ["git", "-c", "safe.directory=*", "-c", "core.quotePath=false"]
    listed = subprocess.run(
        [*git, "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    return tuple(sorted({name for name in listed if (ROOT / name).exists()}))


def sources(*tops: str) -> list[Path]:
    """Python files under the given top names, all of them when none is given."""
    return [ROOT / f for f in files() if f.endswith(".py") and (not tops or f.split("/")[0] in tops)]
