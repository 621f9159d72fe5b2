"""Style, format and types are part of the tests, so the README's one test command says everything."""

from __future__ import annotations

import subprocess
import sys

import pytest
from listing import ROOT


@pytest.mark.parametrize(
    "command",
    ["ruff check --no-fix --output-format concise .", "ruff format --check --output-format concise .", "mypy"],
    ids=["style", "format", "types"],
)
def test_clean(command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"python -m {command}\n{done.stdout}{done.stderr}"
