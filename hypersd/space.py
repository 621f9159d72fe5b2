"""The folder of a Hugging Face Space: what the app needs there, and nothing else.

    python -m hypersd space --out my-space                                  the embedded model
    python -m hypersd space --out my-space --backbone sd15 --with hyper,lcm the weights come from the hub at the start

A Space is a git repository that Hugging Face runs; its README's head says with which Python and Gradio. ZeroGPU, which
lends GPUs, knows few versions: Python 3.12.12 and torch 2.8 to 2.11 were the newest in its documentation when this was
written, so these are asked for on every Space.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from hypersd import releases
from hypersd.folders import BACKBONES
from hypersd.records import InputError

ROOT = Path(__file__).parent.parent
PYTHON, TORCH = "3.12.12", ">=2.8,<2.12"
SOURCES = (".py", ".css", ".html", ".js", ".yaml")
EMBEDDED = ("emoji-sd", "emoji-lora", "measured", "study.yaml", "CREDITS.md")  # of assets
LARGE = 10_000_000  # bytes; above that the hub takes a file by LFS only
ATTRIBUTES = "".join(f"*.{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in ("safetensors", "png"))
PLACE = "NAME, ENGINE = "  # the line of app.py before which the settings go


class Space(NamedTuple):
    """A folder that was laid out: how many files, how many bytes, and what is left to do, in lines."""

    files: int
    size: int
    next_steps: str


def lay_out(folder: Path, backbone: str = "emoji", methods: str | None = None) -> Space:
    """Fill a folder that is empty or not there.

    Args:
        backbone: emoji, or a base model that has published adapters.
        methods: whose published adapters, with commas; None for all.

    Raises:
        InputError: the folder has something in it, or there is no such backbone or method.
    """
    fetched = _fetched(backbone, methods)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not empty; give --out a new folder, so that nothing of yours is uploaded")
    for name in [*_sources(), *_assets(backbone)]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    (folder / "app.py").write_text(_app(backbone, fetched), encoding="utf-8")
    (folder / "README.md").write_text(_readme(backbone), encoding="utf-8")
    (folder / "requirements.txt").write_text(_requirements(), encoding="utf-8")
    (folder / ".gitattributes").write_text(ATTRIBUTES, encoding="utf-8")
    files = [file for file in folder.rglob("*") if file.is_file()]
    if plain := [f.name for f in files if f.stat().st_size > LARGE and f.suffix not in (".safetensors", ".png")]:
        raise RuntimeError(f"{plain[0]} is too large for git and not in .gitattributes")
    size = sum(file.stat().st_size for file in files)
    return Space(len(files), size, next_steps(folder, backbone))


def next_steps(folder: Path, backbone: str = "emoji") -> str:
    """What is left to do, for whoever laid the folder out."""
    steps = f"""\
Try it here:  cd {folder} && python app.py

Upload it (YOU is your name on huggingface.co; `hf auth login` first):
  hf repos create YOU/hypersd --type space --space-sdk gradio
  hf upload YOU/hypersd {folder} . --type space
or by git, with git-lfs installed: clone the Space, copy the folder's files into it, `git add -A`, commit, push.
Then choose the hardware in the Space's settings: a CPU for emoji, ZeroGPU or a GPU of its own for other models.

Variables and secrets, in the Space's settings:
  HYPERSD_MIRROR  hf://datasets/YOU/votes, a private data set; without it votes are lost at every restart
  HF_TOKEN        secret: a token that may write to that data set, and to nothing else
  HYPERSD_STUDY   another study's definition than assets/study.yaml
"""
    if backbone != "emoji":
        steps += """\
  HYPERSD_SAFETY  off shows pictures unfiltered; left alone, prompts and pictures are filtered on every Space

The Space gets its weights from the hub whenever it starts, some GB; read their licences, which bind what you publish.
"""
    return steps


def _fetched(backbone: str, methods: str | None) -> list[str]:
    """The methods, or single releases, that the Space fetches when it starts."""
    if backbone == "emoji":
        if methods is not None:
            raise InputError("--with is for published adapters; those of emoji lie in assets and all come along")
        return []
    if backbone not in BACKBONES:
        raise InputError(f"a Space gets its base model from the hub: choose from {', '.join(BACKBONES)}")
    if not BACKBONES[backbone].commercial:
        raise InputError(f"{backbone} is not for commerce ({BACKBONES[backbone].licence}); choose another --backbone")
    names = [name.strip() for name in methods.split(",")] if methods is not None else None
    there = releases.of(backbone) if names is None else releases.chosen(backbone, names)
    closed = [release for release in there if not release.commercial]
    if names and closed:
        raise InputError(f"{closed[0].method} is {closed[0].licence}; leave it out, or put it into the Space yourself")
    whole = [release for release in there if release.kind != "lora"]
    if names and whole:
        raise InputError(
            f"{whole[0].method} is a network of {whole[0].megabytes} MB, to be read anew for each picture; leave it out"
        )
    if names is None:
        there = [release for release in there if release.commercial and release.kind == "lora"]
    return list(dict.fromkeys(r.method if names is None or r.method in names else r.name for r in there))


def _sources() -> Iterator[str]:
    yield "LICENSE"
    for file in sorted((ROOT / "hypersd").rglob("*")):
        if file.suffix in SOURCES:
            yield file.relative_to(ROOT).as_posix()


def _assets(backbone: str) -> Iterator[str]:
    for name in EMBEDDED if backbone == "emoji" else ():
        place = ROOT / "assets" / name
        for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if file.is_file() and not file.name.startswith("."):
                yield file.relative_to(ROOT).as_posix()


def _app(backbone: str, fetched: list[str]) -> str:
    """Our app.py, with this Space's settings as defaults: a Space's files cannot set variables otherwise."""
    text = (ROOT / "app.py").read_text(encoding="utf-8")
    before, found, after = text.partition(PLACE)
    settings = {"HYPERSD_BACKBONE": backbone, "HYPERSD_FETCH": ",".join(fetched)}
    lines = "".join(f'os.environ.setdefault("{name}", "{value}")\n' for name, value in settings.items() if value)
    if not found:
        raise RuntimeError(f"app.py has no line that begins with {PLACE!r}")
    return before + lines + found + after


def _readme(backbone: str) -> str:
    """The head of our README with the Space's Python, and a few words."""
    _, head, _ = (ROOT / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    lines = [
        f'python_version: "{PYTHON}"' if line.startswith("python_version:") else line for line in head.splitlines()
    ]
    if backbone != "emoji":
        lines += ["models:", *(f"  - {name}" for name in dict.fromkeys(r.repository for r in releases.of(backbone)))]
    about = "Few-step diffusion methods side by side, on the same prompt and noise, and a blind study of them."
    return "---\n" + "\n".join(lines) + f"\n---\n\n{about} Laid out by `python -m hypersd space`.\n"


def _requirements() -> str:
    """Ours, with ZeroGPU's torch. It brings its own package `spaces`."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    own = f"torch{TORCH}  # what ZeroGPU knows"
    return "\n".join(own if line.startswith("torch>") else line for line in lines) + "\n"
