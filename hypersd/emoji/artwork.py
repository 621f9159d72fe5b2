"""Pictures and captions for the embedded model: eight permissive icon packs and the CLDR names, through npm.

    python -m hypersd emoji artwork

Fetches the packs by name, version and integrity hash, renders every kept icon at 128 px on white together with its
exact foreground mask, as two arrays under the run folder. The frozen manifest
`assets/emoji-artwork.jsonl` (captions, split and pixel hash of every picture) is committed; a rebuild that gives other
pixels is refused, naming the pictures that changed.

What is left out, and counted on screen: skin tones, gendered twins of a neutral figure, families, flags, letters,
keycaps, arrows, clock faces, and icons whose name matches no CLDR name (Streamline's own names are captions already).
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from hypersd.records import Problem

SIDE = 128  # pixels
MANIFEST = Path(__file__).resolve().parents[2] / "assets" / "emoji-artwork.jsonl"


class ArtworkError(Problem):
    """The artwork cannot be fetched, read or rendered as recorded; the message names the pack or icon and a remedy."""


@dataclass(frozen=True)
class Pack:
    name: str
    style: str  # the word that asks for this style in a caption
    version: str
    integrity: str  # npm's subresource integrity of the tarball
    licence: str
    credit: str


PACKS = (
    Pack(
        "noto",
        "noto",
        "1.2.9",
        "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        "Apache-2.0",
        "Noto Emoji by Google",
    ),
    Pack(
        "noto-v1",
        "noto classic",
        "1.2.5",
        "sha512-/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
        "Apache-2.0",
        "Noto Emoji (v1) by Google",
    ),
    Pack(
        "fluent-emoji",
        "fluent",
        "1.2.7",
        "sha512-D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
        "MIT",
        "Fluent Emoji by Microsoft",
    ),
    Pack(
        "fluent-emoji-flat",
        "fluent flat",
        "1.2.6",
        "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        "MIT",
        "Fluent Emoji Flat by Microsoft",
    ),
    Pack(
        "twemoji",
        "twemoji",
        "1.2.5",
        "sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        "CC-BY-4.0",
        "Twemoji by Twitter and contributors",
    ),
    Pack(
        "emojione",
        "emojione",
        "1.2.3",
        "sha512-T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        "CC-BY-4.0",
        "EmojiOne (Emojitwo) by EmojiOne and contributors",
    ),
    Pack(
        "fxemoji",
        "firefox",
        "1.2.2",
        "sha512-UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
        "Apache-2.0",
        "Firefox OS Emoji by Mozilla",
    ),
    Pack(
        "streamline-emojis",
        "streamline",
        "1.2.4",
        "sha512-iNr9T9XuZVTyQPJO8ZlLxBzPkpi7qMl+z1l0C31vpEMqhPMelth3n7CeWQYtixdetDPdI81yeG4ROqjWpYJE6A==",
        "CC-BY-4.0",
        "Streamline Emojis by Streamline",
    ),
)
NAMES = (
    "emojibase-data",
    "17.0.0",
    "sha512-Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
)  # MIT; CLDR labels, tags and groups


@dataclass(frozen=True)
class Picture:
    """One row of the manifest. `captions[0]` is the label alone; styles and tags follow."""

    id: str  # pack/icon
    concept: str  # slug shared by all drawings of one thing
    style: str
    label: str
    tags: tuple[str, ...]
    group: str
    split: str  # train | composition (concept and style known, pair never seen) | concept (never seen) | twin
    sha256: str  # of the RGBA pixels


def captions(picture: Picture) -> list[str]:
    """All captions of one picture, most specific first; a trainer draws from them, weighted towards the first."""
    label, style, tags = picture.label, picture.style, picture.tags
    extra = [f"{a}, {b}" for a, b in pairwise(tags)][:4] or list(tags[:1])
    return [f"{label}, {style} style", label, *(f"{label}, {t}" for t in tags[:3]), *extra]


# ---------------------------------------------------------------------------------------------------- fetch


def fetch(name: str, version: str, integrity: str, folder: Path) -> dict[str, bytes]:
    """The files of one npm package as {path inside: bytes}, from `folder` if its tarball is there and intact.

    Raises:
        ArtworkError: npm is missing, the registry does not answer, or the tarball is not the pinned one.
    """
    tarball = folder / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
    if not (tarball.exists() and _integrity(tarball) == integrity):
        folder.mkdir(parents=True, exist_ok=True)
        _npm_pack(f"{name}@{version}", folder)
        if (came := _integrity(tarball)) != integrity:
            tarball.unlink()
            raise ArtworkError(
                f"{name}@{version} is not the pinned package: expected {integrity}, got {came}; "
                "the registry serves something else, check its settings with: npm config get registry"
            )
    with tarfile.open(tarball) as archive:
        return {
            m.name.removeprefix("package/"): archive.extractfile(m).read()  # type: ignore[union-attr]
            for m in archive.getmembers()
            if m.isfile()
        }


def _npm_pack(spec: str, folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise ArtworkError("npm is not installed and the icon packs come through it; install Node.js (apt install npm)")
    run = subprocess.run(
        [npm, "pack", "--silent", "--pack-destination", str(folder), spec], capture_output=True, text=True, timeout=600
    )
    if run.returncode != 0:
        raise ArtworkError(f"npm could not fetch {spec}: {run.stderr.strip()[-300:] or 'no message'}")


def _integrity(path: Path) -> str:
    if not path.exists():
        raise ArtworkError(f"npm said it fetched {path.name} but the file is not there")
    return "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


# ------------------------------------------------------------------------------------------ names and choice


@dataclass(frozen=True)
class Name:
    """What CLDR knows of one emoji."""

    label: str
    tags: tuple[str, ...]
    group: str
    subgroup: str
    neutral: bool  # no gender, no skin tone


DROPPED_GROUPS = {"components", "flags"}
DROPPED_SUBGROUPS = {
    "arrows",
    "keypad characters",
    "alphanumeric symbols",
    "audio & video symbols",
    "gender signs",
    "family",
    "people symbols",
    "hair styles",
    "skin tones",
    "transport signs",
    "punctuation",
}
CLOCK_FACE = re.compile(r"(o’clock|-thirty)$")
TONE = re.compile(r"(^|[-\s])(light|medium|dark|tone\d?)(-(light|medium|dark))?(-skin-tone)?$")


def cldr_names(files: dict[str, bytes]) -> dict[str, Name]:
    """Every emoji by its code points, upper-case hex without variation selectors, e.g. "1F600"."""
    messages = json.loads(files["en/messages.json"])
    groups = {g["order"]: g["message"] for g in messages["groups"]}
    subgroups = {g["order"]: g["message"] for g in messages["subgroups"]}
    found: dict[str, Name] = {}
    for entry in json.loads(files["en/data.json"]):
        toned = [(skin, False) for skin in entry.get("skins", ())]
        for emoji, plain in [(entry, True), *toned]:
            found[_code(emoji["hexcode"])] = Name(
                emoji["label"],
                tuple(entry.get("tags", ())),
                groups.get(entry.get("group"), "components"),
                subgroups.get(entry.get("subgroup"), ""),
                plain and "gender" not in entry,
            )
    return found


def _code(hexcode: str) -> str:
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F").lstrip("0")


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def choose(pack: Pack, files: dict[str, bytes], names: dict[str, Name]) -> tuple[dict[str, Name], Counter[str]]:
    """The icons of a pack that are kept, each with its name, and how many were left out for which reason."""
    icons = json.loads(files["icons.json"])["icons"]
    by_slug = {slug(n.label): n for n in names.values()}
    by_letters = {s.replace("-", ""): n for s, n in by_slug.items()}
    by_icon = {
        icon: names[_code(code)] for code, icon in json.loads(files["chars.json"]).items() if _code(code) in names
    }
    kept: dict[str, Name] = {}
    left_out: Counter[str] = Counter()
    for icon, body in icons.items():
        name = by_icon.get(icon) or by_slug.get(icon) or by_letters.get(icon.replace("-", ""))
        if name is None and pack.name == "streamline-emojis":
            name = _own_name(icon, files)
        if reason := _reason(icon, body, name, {n.label for n in kept.values()}):
            left_out[reason] += 1
        elif name is not None:
            kept[icon] = name
    return kept, left_out


def _reason(icon: str, body: dict[str, Any], name: Name | None, taken: set[str]) -> str | None:
    if body.get("hidden"):
        return "withdrawn by its pack"
    if TONE.search(icon) or (name and "skin tone" in name.label):
        return "skin tone"
    if name is None:
        return "no CLDR name"
    if not name.neutral:
        return "gendered twin"
    if name.group in DROPPED_GROUPS or name.subgroup in DROPPED_SUBGROUPS:
        return name.subgroup or name.group
    if CLOCK_FACE.search(name.label):
        return "clock face"
    return "second drawing of the same name" if name.label in taken else None


def _own_name(icon: str, files: dict[str, bytes]) -> Name | None:
    """Streamline names its drawings in plain English ("amazed-face"); of numbered variants the first is kept."""
    stem, _, number = icon.rpartition("-")
    words = stem if number.isdigit() else icon
    if (number.isdigit() and number != "1") or words.isdigit():
        return None
    categories = json.loads(files["metadata.json"])["categories"]
    group = next((c for c, members in categories.items() if icon in members), "Objects")
    if group == "Flags" or any(len(w) == 1 for w in words.split("-")):
        return None
    return Name(words.replace("-", " "), (), group.lower(), "", True)


# --------------------------------------------------------------------------------------------------- render


def svg_of(pack: dict[str, Any], icon: str) -> str:
    """One icon of a pack's icons.json as a whole SVG, its view box fitted into 128 x 128 px."""
    body = pack["icons"][icon]
    left, top = body.get("left", 0), body.get("top", 0)
    width, height = body.get("width", pack.get("width", 16)), body.get("height", pack.get("height", 16))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{SIDE}" '
        f'height="{SIDE}" viewBox="{left} {top} {width} {height}">{body["body"]}</svg>'
    )


def render(task: tuple[str, str]) -> np.ndarray:
    """(picture id, svg) -> uint8 [128, 128, 4] RGBA. Raises ArtworkError naming the icon if nothing can be drawn."""
    import resvg_py  # only whoever rebuilds the artwork needs it

    name, svg = task
    try:
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE, skip_system_fonts=True))
        rgba = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))
    except Exception as error:  # resvg raises bare ValueError, Pillow its own: both mean the same to the reader
        raise ArtworkError(f"{name} is a broken SVG: {error}") from error
    if rgba.shape != (SIDE, SIDE, 4) or not rgba[..., 3].any():
        raise ArtworkError(f"{name} renders to nothing ({rgba.shape}); the icon or the resvg-py release changed")
    return rgba


def on_white(rgba: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """RGBA -> (RGB on white, mask), uint8 [.., 128, 128, 3] and [.., 128, 128]; the mask is the coverage 0..255."""
    alpha = rgba[..., 3:].astype(np.uint16)
    rgb = (rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255
    return rgb.astype(np.uint8), rgba[..., 3]


# --------------------------------------------------------------------------------------------------- splits


def _share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def split_of(concept: str, style: str, styles: Iterable[str]) -> str:
    """3 % of concepts are never seen; every tenth of the others is seen in all styles but one."""
    if _share(f"concept {concept}") < 0.03:
        return "concept"
    options = sorted(styles)
    if len(options) >= 4 and _share(f"composition {concept}") < 0.10:
        held_out = options[int(_share(f"style {concept}") * len(options))]
        if style == held_out:
            return "composition"
    return "train"


def twins(pictures: np.ndarray, held_out: np.ndarray, closer_than: float = 6.0) -> np.ndarray:
    """Training pictures that nearly equal a held-out one: bool [n].

    Nearly equal: root mean square difference of the 16 x 16 thumbnails below `closer_than` grey levels of 255.
    """
    thumbs = pictures.reshape(len(pictures), 16, 8, 16, 8, 3).mean(axis=(2, 4)).reshape(len(pictures), -1)
    squares = (thumbs**2).sum(axis=1)
    near = np.zeros(len(pictures), dtype=bool)
    for i in np.flatnonzero(held_out):
        distance = np.sqrt(np.maximum(squares + squares[i] - 2 * thumbs @ thumbs[i], 0) / thumbs.shape[1])
        near |= distance < closer_than
    return near & ~held_out


# ---------------------------------------------------------------------------------------------------- build


def gather(folder: Path) -> tuple[list[tuple[str, str]], list[Picture]]:
    """Fetch all packs; (id, svg) and an unfinished manifest row for every kept icon, in a fixed order."""
    names = cldr_names(fetch(*NAMES, folder))
    tasks, rows = [], []
    for pack in PACKS:
        files = fetch(f"@iconify-json/{pack.name}", pack.version, pack.integrity, folder)
        spdx = json.loads(files["info.json"])["license"]["spdx"]
        if spdx != pack.licence:
            raise ArtworkError(f"{pack.name} {pack.version} says licence {spdx}, expected {pack.licence}")
        kept, left_out = choose(pack, files, names)
        icons = json.loads(files["icons.json"])
        reasons = ", ".join(f"{n} {why}" for why, n in left_out.most_common())
        tqdm.write(f"{pack.name}: {len(kept)} kept; left out: {reasons or 'none'}")
        for icon in sorted(kept):
            name, key = kept[icon], f"{pack.name}/{icon}"
            tasks.append((key, svg_of(icons, icon)))
            label = name.label.replace("’", "'")
            tags = tuple(t for t in name.tags if t.lower() != label.lower())
            rows.append(Picture(key, slug(label), pack.style, label, tags, name.group, "", ""))
    return tasks, rows


def make(runs: Path, *, minutes: float | None = None, manifest: Path = MANIFEST) -> None:
    """Fetch, render, split and verify: `artwork/pictures.npy` [n, 128, 128, 3] and `artwork/masks.npy` [n, 128, 128].

    The same packs give the same bytes on every machine. With a committed manifest the result is compared with it;
    without one it is written.
    """
    out = runs / "artwork"
    out.mkdir(parents=True, exist_ok=True)
    tasks, rows = gather(runs / "packs")
    with ProcessPoolExecutor() as pool:
        drawn = list(tqdm(pool.map(render, tasks, chunksize=16), total=len(tasks), desc="render", unit="picture"))
    rgba = np.stack(drawn)
    pictures, masks = on_white(rgba)
    rows = finish(rows, rgba, pictures)
    text = "".join(json.dumps(asdict(r), ensure_ascii=False, sort_keys=True) + "\n" for r in rows)
    if manifest.exists():
        _compare(manifest.read_text(encoding="utf-8"), text)
    else:
        manifest.write_text(text, encoding="utf-8")
    np.save(out / "pictures.npy", pictures)
    np.save(out / "masks.npy", masks)
    (out / "manifest.jsonl").write_text(text, encoding="utf-8")
    counts = Counter(r.split for r in rows)
    tqdm.write(
        f"{len(rows)} pictures of {len({r.concept for r in rows})} concepts: "
        + ", ".join(f"{n} {split}" for split, n in counts.most_common())
    )


def finish(rows: list[Picture], rgba: np.ndarray, pictures: np.ndarray) -> list[Picture]:
    """Manifest rows with split and pixel hash filled in."""
    styles = defaultdict(set)
    for r in rows:
        styles[r.concept].add(r.style)
    splits = [split_of(r.concept, r.style, styles[r.concept]) for r in rows]
    near = twins(pictures, np.array([s != "train" for s in splits]))
    hashes = [hashlib.sha256(np.ascontiguousarray(p).tobytes()).hexdigest() for p in rgba]
    return [
        Picture(**{**asdict(r), "split": "twin" if twin else split, "sha256": sha})
        for r, split, twin, sha in zip(rows, splits, near, hashes, strict=True)
    ]


def _compare(recorded: str, made: str) -> None:
    if recorded == made:
        return
    old = {row["id"]: row for row in map(json.loads, recorded.splitlines())}
    new = {row["id"]: row for row in map(json.loads, made.splitlines())}
    changed = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    raise ArtworkError(
        f"the artwork differs from the frozen manifest in {len(changed)} pictures, first "
        f"{', '.join(changed[:5])}; use the pinned resvg-py (pip install -e '.[emoji]'), or delete "
        f"{MANIFEST.name} to freeze what was made now"
    )


def load(folder: Path) -> tuple[np.ndarray, np.ndarray, list[Picture]]:
    """(pictures uint8 [n, 128, 128, 3], masks uint8 [n, 128, 128], rows), memory-mapped."""
    if not (folder / "manifest.jsonl").exists():
        raise ArtworkError(f"no artwork in {folder}; make it with: python -m hypersd emoji artwork")
    rows = list(read_manifest(folder / "manifest.jsonl"))
    return np.load(folder / "pictures.npy", mmap_mode="r"), np.load(folder / "masks.npy", mmap_mode="r"), rows


def read_manifest(path: Path = MANIFEST) -> Iterator[Picture]:
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield Picture(**{**row, "tags": tuple(row["tags"])})
