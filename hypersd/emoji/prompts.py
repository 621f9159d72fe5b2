"""The prompts that methods are measured on, frozen in `assets/emoji-prompts.json` with their hash.

    python -m hypersd emoji prompts

All come from the frozen artwork manifest: things and styles that were trained on, known things in a known style whose
pair was never seen, things that were never seen, and colours of plain things, which no picture shows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from hypersd.emoji import artwork

FILE = artwork.MANIFEST.with_name("emoji-prompts.json")
SEEN = 200  # of the thousands of pictures that were trained on
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
THINGS = ("cat", "dog", "bird", "fish", "car", "house", "hat", "cup", "flower", "ball", "shoe", "umbrella")
SETS = {
    "seen": "things and styles it was trained on",
    "composition": "known things in a known style, the pair never seen",
    "concept": "things it never saw",
    "colour": "colours of plain things",
}


@dataclass(frozen=True)
class Prompt:
    """`text` is drawn; `own` is what the picture should be told apart by; `picture` is the id of a real drawing of it,
    "" where there is none."""

    set: str
    text: str
    own: str
    picture: str = ""


def derive(rows: Iterable[artwork.Picture]) -> list[Prompt]:
    """The prompts of all SETS, set by set, no text twice. The manifest alone decides which."""
    found: dict[str, Prompt] = {}
    by_split: dict[str, list[artwork.Picture]] = {"train": [], "composition": [], "concept": []}
    for row in rows:
        by_split.get(row.split, []).append(row)
    chosen = sorted(by_split["train"], key=lambda row: hashlib.sha256(row.id.encode()).digest())[:SEEN]
    for name, some in (("seen", chosen), ("composition", by_split["composition"]), ("concept", by_split["concept"])):
        for row in sorted(some, key=lambda row: row.id):
            text = artwork.captions(row)[0]
            found.setdefault(text, Prompt(name, text, row.label, row.id))
    for thing in THINGS:
        for colour in COLOURS:
            text = f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {thing}"
            found.setdefault(text, Prompt("colour", text, text))
    return sorted(found.values(), key=lambda prompt: list(SETS).index(prompt.set))


def sha256(prompts: Sequence[Prompt]) -> str:
    """One hash for all prompts and their order."""
    lines = (json.dumps(asdict(prompt), ensure_ascii=False, sort_keys=True) for prompt in prompts)
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()


def load(path: Path = FILE) -> list[Prompt]:
    """The frozen prompts.

    Raises:
        ArtworkError: the file is missing or was changed.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        prompts = [Prompt(**row) for row in content["prompts"]]
        recorded = content["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise artwork.ArtworkError(
            f"{path.name} cannot be read ({type(error).__name__}); make it with: python -m hypersd emoji prompts"
        ) from None
    if sha256(prompts) != recorded:
        raise artwork.ArtworkError(f"{path.name} was changed after it was frozen; get it again from the repository")
    return prompts


def make(runs: Path, *, minutes: float | None = None, manifest: Path = artwork.MANIFEST, target: Path = FILE) -> None:
    """Write the file. What is frozen already is only written anew if it is deleted first.

    Raises:
        ArtworkError: the manifest or this program would give other prompts than those that are frozen.
    """
    prompts = derive(artwork.read_manifest(manifest))
    if target.exists() and load(target) != prompts:
        raise artwork.ArtworkError(f"the prompts would change; delete {target.name} to freeze those that were made now")
    rows = ",\n".join(json.dumps(asdict(prompt), ensure_ascii=False, sort_keys=True) for prompt in prompts)
    target.write_text(f'{{"sha256": "{sha256(prompts)}",\n"prompts": [\n{rows}\n]}}\n', encoding="utf-8")
    tqdm.write(f"{target.name}: {len(prompts)} prompts, sha256 {sha256(prompts)[:8]}")
