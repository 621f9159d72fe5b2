"""Each module imports only from rows above its own, and importing any of them does nothing but define names."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from listing import ROOT, sources

# The reading order. A new module gets a word in the highest row that lets it import what it needs.
ROWS = [
    "records",
    "hub",
    "pictures schedule metrics quality intervals folders network",
    "solvers single",
    "checkpoint muon adapters scores nag",
    "train data safety whole",
    "compiled roles adversary releases wardrobe",
    "backbone",
    "methods",
    "generate sweep cost",
    "distill",
    "plan bench hosting space",
    "throughput",
    "emoji",
    "evaluate",
    "study",
    "feedback",
    "engine convert",
    "pool",
    "ui",
    "__main__",
]
ROW = {name: number for number, row in enumerate(ROWS) for name in row.split()}
PEOPLE = {"study"}  # may know the nouns, never the pixels
UI_MAY_BE_IMPORTED_BY = {"app", "__main__"}


def top(path: Path) -> str:
    """`hypersd/methods/base.py` -> `methods`; `app.py` -> `app`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "hypersd" else parts[0]


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import in a file, those inside functions too."""
    package = dotted(path).split(".") if path.name == "__init__.py" else dotted(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def ours(name: str) -> str | None:
    """The row name that an import of ours reaches; None for other libraries and for the package's own version."""
    parts = name.split(".")
    if parts[0] != "hypersd":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ROW else (None if parts[1:] in ([], ["__version__"]) else name)


MODULES = [path for path in sources("hypersd") if path != ROOT / "hypersd" / "__init__.py"]


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_only_from_rows_above(path: Path) -> None:
    own = top(path)
    assert own in ROW, f"hypersd/{own} has no row: give it one in ROWS of tests/test_layers.py"
    for line, name in imports(path):
        used = ours(name)
        where = f"{path.relative_to(ROOT)}:{line}"
        if used is None or used == own:
            continue
        assert used in ROW, f"{where} imports {name}, which has no row in tests/test_layers.py"
        assert ROW[used] < ROW[own], f"{where}: {own} imports {used}, which is not above it"
        assert own not in PEOPLE or used == "records", f"{where}: {own} may import records only, not {used}"
        assert used != "ui" or own in UI_MAY_BE_IMPORTED_BY, f"{where}: only app.py and __main__.py may import ui"


def test_rows_name_each_module_once() -> None:
    assert len(ROW) == sum(len(row.split()) for row in ROWS)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_never_imports_torchvision(path: Path) -> None:
    # Its wheels and torch's come from different builds often enough that transformers then fails to import.
    assert not [name for _, name in imports(path) if name.split(".")[0] == "torchvision"]


# What may be imported without the heavy libraries: records and the people side by anything, the screens by a
# server that has to answer before the weights are there.
LIGHT = [
    ("hypersd", "torch gradio numpy PIL pandas"),
    ("hypersd.records", "torch gradio numpy PIL pandas"),
    *((dotted(path), "torch gradio diffusers transformers") for path in MODULES if top(path) in PEOPLE),
    ("hypersd.ui", "torch diffusers transformers peft"),
    ("app", "torch diffusers transformers peft"),
]


@pytest.mark.parametrize(("module", "heavy"), LIGHT, ids=[module for module, _ in LIGHT])
def test_stays_light(module: str, heavy: str) -> None:
    code = f"import sys, {module}; print(*(name for name in {heavy.split()} if name in sys.modules))"
    assert run(code).strip() == "", f"import {module} also imports these"


# Python tells an audit hook about every file, socket and process. An event is ours to answer for when, going outwards
# from it, a frame of hypersd comes before the import machinery: reading modules is what an import is for.
WATCH = """
import importlib, sys
OURS = {ours!r}

def blame():
    frame = sys._getframe(2)
    while frame:
        name = frame.f_code.co_filename
        if name.startswith("<frozen importlib"):
            return None
        if name.startswith(OURS):
            return f"{{name}}:{{frame.f_lineno}}"
        frame = frame.f_back

DISK = {{"open", "os.mkdir", "os.listdir", "os.scandir", "os.remove", "os.rename", "os.chdir", "tempfile.mkdtemp",
        "tempfile.mkstemp", "shutil.rmtree", "sqlite3.connect", "subprocess.Popen", "os.system"}}
NETWORK = {{"socket.connect", "socket.getaddrinfo", "socket.bind", "socket.sendto"}}
bad = []

def hook(event, arguments):
    if event in NETWORK:
        raise RuntimeError(f"{{event}} {{arguments[-1]}} during an import")
    if event in DISK and (line := blame()):
        bad.append(f"{{line}} {{event}} {{arguments[:1]}}")

def watched(name, function):
    def call(*arguments, **options):
        if line := blame():
            bad.append(f"{{line}} torch.{{name}}")
        return function(*arguments, **options)
    return call

import torch
for place, name in [(torch.cuda, "is_available"), (torch.cuda, "device_count"), (torch.cuda, "_lazy_init"),
                    (torch.accelerator, "is_available"), (torch.accelerator, "current_accelerator")]:
    setattr(place, name, watched(name, getattr(place, name)))
sys.addaudithook(hook)
threads = __import__("threading").active_count()
for module in {modules!r}:
    importlib.import_module(module)
assert __import__("threading").active_count() == threads, "an import started a thread"
print("\\n".join(bad))
"""


def test_importing_touches_neither_disk_nor_network_nor_gpu() -> None:
    names = sorted({dotted(path) for path in [*MODULES, ROOT / "app.py"]})
    ours = (f"{ROOT / 'hypersd'}{os.sep}", str(ROOT / "app.py"))  # not all of ROOT: .venv lies there too
    assert run(WATCH.format(ours=ours, modules=names)).strip() == ""


def test_the_watch_sees_what_it_forbids(tmp_path: Path) -> None:
    (tmp_path / "guilty.py").write_text("import torch\nopen(__file__).close()\ntorch.cuda.is_available()\n")
    told = run(WATCH.format(ours=(f"{tmp_path}{os.sep}",), modules=["guilty"]), tmp_path)
    assert [line.split()[:2] for line in told.splitlines()] == [
        [f"{tmp_path / 'guilty.py'}:2", "open"],
        [f"{tmp_path / 'guilty.py'}:3", "torch.is_available"],
    ]


def run(code: str, folder: Path = ROOT) -> str:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
