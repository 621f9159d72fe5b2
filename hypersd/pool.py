"""The study's pictures: drawn beforehand, while no visitor waits for a drawing, so that no annotator ever waits.

A picture is a PNG file named by the sha256 of its pixels, without anything else inside, and a row that says how it was
drawn. The desk opens once every arm that can draw has all its pictures.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

from hypersd import pictures
from hypersd.engine import BROKEN, UNWATCHED, Coming, Draw, Drawing, Stopped, Watch
from hypersd.records import InputError, Item, Panel, Problem, Request
from hypersd.safety import Held
from hypersd.study.ballots import Desk, items_of
from hypersd.study.command import FOLDER
from hypersd.study.definition import FILE, Study, load, steps_of
from hypersd.study.export import read_picture
from hypersd.study.mirror import Mirror, place_of
from hypersd.study.votes import Store
from hypersd.sweep import MethodRow, Pace

log = logging.getLogger(__name__)
QUIET = 2.0  # seconds without a visitor's drawing before the pool draws
Place = tuple[str, str, int]  # arm, prompt, seed


class Shared:
    """A Draw for visitors that knows whether one of them is being served, and another for idle moments."""

    def __init__(self, draw: Draw, quiet: float = QUIET) -> None:
        self._draw, self._quiet = draw, quiet
        self._visitors, self._left, self._lock = 0, -quiet, threading.Lock()

    @property
    def pace(self) -> Pace:
        return self._draw.pace

    @property
    def coming(self) -> Coming | None:
        return self._draw.coming

    def has(self, request: Request, method: str) -> bool:
        return self._draw.has(request, method)

    def __call__(self, request: Request, method: str, watch: Watch = UNWATCHED) -> Drawing:
        self._count(1)
        try:
            return self._draw(request, method, watch)
        finally:
            self._count(-1)

    def in_idle(self, request: Request, method: str) -> Panel:
        """Draw while nobody else does; given up at the next network step for whoever comes, and begun again."""
        while True:
            while self._visitors or time.monotonic() < self._left + self._quiet:
                time.sleep(0.1)
            try:
                return self._draw(request, method, Watch(stop=lambda: self._visitors > 0)).panel
            except Stopped:
                continue

    def _count(self, more: int) -> None:
        with self._lock:
            self._visitors += more
            self._left = time.monotonic()


class Pool:
    """A study with the pictures that it has here. `desk` is None until all are there; `problem` says why none comes.

    Args:
        folder: of the pictures, and of `current.json`, which says what drew each arm the last time somebody looked.
        draw: paints one panel, when there is time for it.
        mirror: keeps a second copy of every row elsewhere.
    """

    def __init__(
        self,
        study: Study,
        store: Store,
        folder: Path,
        draw: Callable[[Request, str], Panel],
        methods: Mapping[str, MethodRow],
        mirror: Mirror | None = None,
    ) -> None:
        self.study, self.store, self.folder, self.draw, self.mirror = study, store, folder, draw, mirror
        self.arms = [arm for arm in study.drawn_arms() if _can(methods, arm)]
        self.desk: Desk | None = None
        self.problem = ""
        self.read = lru_cache(256)(lambda sha256: read_picture(folder, sha256))  # bytes of a picture's PNG
        self._made_by = _noted(folder)
        if len(set(self.arms) & set(study.arms)) < 2:
            unable = ", ".join(arm for arm in study.arms if arm not in self.arms)
            self.problem = (
                f"the study needs two arms that can draw, and {unable} cannot: "
                f"name others under arms in assets/{FILE.name}, or train these methods first"
            )
        elif not store.paused:
            self._open()

    @property
    def where(self) -> str:
        """Where the votes are, for whoever starts the app."""
        return (
            f"Votes are kept in {self.store.url.render_as_string(hide_password=True)}; set DATABASE_URL to change that."
        )

    @property
    def notice(self) -> str:
        """What the owner and the annotators should know of how safe the votes are; "" if there is nothing to say."""
        if self.mirror:
            return self.mirror.banner()
        if os.environ.get("SPACE_ID") and not os.environ.get("DATABASE_URL"):
            return "Votes are lost when this Space restarts. Its owner can keep them: set HYPERSD_MIRROR (README)."
        return ""

    def close(self) -> None:
        """Send what the mirror lacks; for the end of the program."""
        if self.mirror and not self.mirror.stop():
            log.warning("not all rows reached the mirror; those that did not wait in the database")

    @property
    def size(self) -> int:
        """How many pictures the study needs here."""
        return len(self.arms) * len(self.study.prompts) * len(self.study.seeds)

    def lacking(self) -> list[Place]:
        """What has to be drawn, all arms of a picture's noise one after the other."""
        files = {path.stem for path in self.folder.glob("*.png")}
        known = items_of(self.store).values()
        there = {(o.arm, o.prompt, o.seed) for o in known if o.image_sha256 in files and self._is_current(o)}
        named = [(a, text, seed) for seed in self.study.seeds for text in self.study.prompts for a in self.arms]
        return [place for place in named if place not in there]

    def fill(self) -> threading.Thread:
        """Start a thread that draws what is lacking, then opens the desk. It ends, and `problem` says why, if it
        cannot."""
        thread = threading.Thread(target=self._fill, name="pool", daemon=True)
        thread.start()
        return thread

    def _fill(self) -> None:
        if self.problem or self.store.paused:
            return
        try:
            if self._look():
                self.desk = None  # its pictures are of other weights
            for place in self.lacking():
                self._keep(place)
            if self.desk is None:
                self._open()
        except Problem as problem:
            log.warning("the study's pictures: %s", problem)
            self.problem = str(problem)
        except Exception:
            log.exception("the study's pictures could not be drawn")
            self.problem = BROKEN.rstrip(".")

    def _look(self) -> bool:
        """Draw one picture of each arm to see which weights draw today; True if these are not the noted ones."""
        self.folder.mkdir(parents=True, exist_ok=True)
        first = (self.study.prompts[0], self.study.seeds[0])
        made_by = {arm: _maker(self._keep((arm, *first))) for arm in self.arms}
        if made_by == self._made_by:
            return False
        self._made_by = made_by
        _write(self.folder / "current.json", json.dumps(made_by, indent=1).encode())
        return True

    def _keep(self, place: Place) -> Item:
        arm, prompt, seed = place
        try:
            panel = self.draw(Request(prompt, seed, steps_of(arm)), arm.rpartition("@")[0])
        except Held as problem:
            raise Held(f"{arm}, {prompt!r}, seed {seed}: {problem}") from problem
        item, file = Item.of(panel), self.folder / f"{panel.pixels_sha256}.png"
        if not file.exists():
            unfinished = file.with_suffix(".partial")
            pictures.save_png(panel, unfinished, metadata=False)
            os.replace(unfinished, file)
        self.store.add_items([item])
        return item

    def _open(self) -> None:
        if not self.lacking():
            files = {path.stem for path in self.folder.glob("*.png")}
            usable = {one.id for one in items_of(self.store).values() if one.image_sha256 in files}
            self.desk = Desk(self.store, self.study, usable=lambda one: one.id in usable and self._is_current(one))

    def _is_current(self, one: Item) -> bool:
        return one.arm in self.arms and self._made_by.get(one.arm, _maker(one)) == _maker(one)


class Missing:
    """In place of a pool where there is no study; `problem` says why."""

    desk = store = study = None

    def __init__(self, problem: str) -> None:
        self.problem = self.where = problem

    def fill(self) -> None:
        pass

    def close(self) -> None:
        pass


def prepare(
    draw: Shared, methods: Mapping[str, MethodRow], file: Path | None = None, folder: Path = FOLDER
) -> Pool | Missing:
    """The study of a file, of HYPERSD_STUDY or ours where none is given; its votes where DATABASE_URL says or in
    `folder`, its pictures in `folder`.

    With HYPERSD_MIRROR the rows that are kept there are brought back first, and new ones are sent there.
    """
    try:
        study = load(file or os.environ.get("HYPERSD_STUDY") or FILE)
        store = Store(os.environ.get("DATABASE_URL") or folder / "study.db")
    except InputError as problem:
        return Missing(str(problem))
    mirror = None
    if (where := os.environ.get("HYPERSD_MIRROR")) and not store.paused:
        mirror = Mirror(store, place_of(where))
        mirror.start()
    return Pool(study, store, folder / "images", draw.in_idle, methods, mirror)


def _can(methods: Mapping[str, MethodRow], arm: str) -> bool:
    name = arm.rpartition("@")[0]
    try:
        if name in methods:
            methods[name].check(Request("a cat", 0, steps_of(arm)))
    except InputError:
        return False
    # A picture of another size has another noise, and everybody would see which method it is of.
    return name in methods and methods[name].smaller == 1


def _maker(one: Item) -> list[str | None]:
    """What drew an item: equal for all pictures of an arm, until weights, sampler or program change."""
    return [one.base_sha256, one.adapter_sha256, one.sampler, one.config_sha256]


def _noted(folder: Path) -> dict[str, list[str | None]]:
    try:
        found = json.loads((folder / "current.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, content: bytes) -> None:
    unfinished = path.with_suffix(".partial")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)
