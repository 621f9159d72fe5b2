"""Between a click and `generate.draw`: weights loaded once, one drawing at a time, panels kept, stop that stops.

Nothing heavy is imported before the weights are wanted, so a page can answer while torch is still loading.
"""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

from hypersd.hub import Download, amount, heard_by
from hypersd.records import InputError, Panel, Request, digest
from hypersd.safety import Filter
from hypersd.sweep import MethodRow, Pace, allowed_steps, spans

log = logging.getLogger(__name__)

BROKEN = "This picture could not be drawn because of a fault in the app. Its log says more; other settings may work."
NO_WEIGHTS = (
    "The model's weights are missing or damaged, so nothing can be drawn yet. "
    "Whoever runs this app finds the reason in its log."
)


class Stopped(Exception):
    """Somebody pressed stop or closed the page; the drawing ended at the next network call."""


@dataclass(frozen=True)
class Progress:
    """`step` of `steps` network steps are done."""

    step: int
    steps: int


@dataclass(frozen=True)
class Drawing:
    """A panel, the picture its network had in mind after each step (RGB bytes of the panel's size), and whether the
    pixels were kept from an earlier equal request. `trail` is empty unless it was asked for; `unread` is the end of
    the prompt that the model has no room for."""

    panel: Panel
    trail: tuple[bytes, ...] = ()
    kept: bool = False
    unread: str = ""

    @property
    def size(self) -> int:
        return len(self.panel.pixels) + sum(map(len, self.trail))


@dataclass(frozen=True)
class Watch:
    """How a caller follows a drawing: `progress` is called after each step, `loading` if the weights are not in
    memory yet, and again whenever what is being downloaded of them, "" if nothing is, says something else; when
    `stop()` turns true, it ends."""

    progress: Callable[[Progress], None] = lambda progress: None
    loading: Callable[[str], None] = lambda text: None
    stop: Callable[[], bool] = lambda: False
    trail: bool = False


UNWATCHED = Watch()
PAUSE = 0.1  # seconds between two methods' downloads, in which visitors take their turn


@dataclass(frozen=True)
class Coming:
    """What is not there yet, in words for a visitor: `text` is what is being downloaded and `share` how much of it has
    come, 0 to 1, None while nothing is; or, where something `failed`, why. "" while there is nothing to say."""

    text: str = ""
    share: float | None = None
    failed: bool = False


class Draw(Protocol):
    """What the screens need of an engine. Raises InputError for what a person can mend, Stopped after `stop`.

    `pace` is learned from what was drawn; `coming` is None once all is there that drawing needs; `has` says whether an
    equal picture is there already.
    """

    @property
    def pace(self) -> Pace: ...
    @property
    def coming(self) -> Coming | None: ...
    def __call__(self, request: Request, method: str, watch: Watch = UNWATCHED) -> Drawing: ...
    def has(self, request: Request, method: str) -> bool: ...


class Engine:
    """The one holder of a backbone; safe to call from many threads.

    Args:
        load: returns the backbone; called at the first picture or by `warm_up`, again only after it failed.
        methods: the table of methods by name; rows may be replaced.
        draw: (backbone, request, method, on_step=) -> Panel, as `generate.draw`, which is the default.
        keep_bytes: how much memory finished panels may take.
        filter: has to see every picture before anybody else does; None where the app is not public.
        bring: (backbone, name) -> None, downloads what the row of that name lacks, and replaces it in `methods`.
    """

    def __init__(
        self,
        load: Callable[[], Any],
        methods: Mapping[str, MethodRow],
        draw: Callable[..., Panel] | None = None,
        keep_bytes: int = 64 << 20,
        filter: Filter | None = None,
        bring: Callable[[Any, str], None] | None = None,
    ) -> None:
        self.methods = methods
        self.pace = Pace()
        self._load, self._draw, self._filter, self._bring = load, draw, filter, bring
        self._backbone: Any = None
        self._hand = ThreadPoolExecutor(1, "drawing")
        self._turn = threading.Lock()  # held while drawing: visitors queue instead of sharing cores
        self._preparing = threading.Lock()  # held while loading and downloading; what is there can be drawn with
        self._download: Download | None = None
        self._fetching = ""  # the method whose files are being downloaded, "" while they are everybody's
        self._failed: dict[str, str] = {}  # why, by the same name
        self._background: threading.Thread | None = None  # prepares what nobody has asked for yet
        self._shelf: Shelf[Drawing] = Shelf(keep_bytes)

    @property
    def ready(self) -> bool:
        return self._backbone is not None

    @property
    def coming(self) -> Coming | None:
        """What is being downloaded, or why something could not be; None once everything is in place."""
        download, fetching = self._download, self._fetching
        # of what a method lacks the first is the one that is being downloaded
        left = [n for row in self.methods.values() for n in row.lacks[int(bool(download) and row.name == fetching) :]]
        files = f"{len(left)} more file{'s' * (len(left) != 1)}"
        if download:
            then = f", then {files}, {amount(1e6 * sum(left))}" if left else ""
            return Coming(f"{download}{then}", download.done / max(download.size, 1))
        if self._failed:
            name, problem = next(iter(self._failed.items()))
            by = f" with {self.methods[name].title}" if name else ""
            return Coming(f"{problem.rstrip('.')}. The next drawing{by} tries again", failed=True)
        if left:
            return Coming(f"{files} to come, {amount(1e6 * sum(left))}")
        return None if self._at_hand() else Coming()

    def load_now(self) -> None:
        """Load everything in this thread, before the app is served; a failure is told of in the log and tried again.

        Lent GPUs want it: their stand-in for CUDA is there for the main thread alone, and takes the files of the
        weights away when the app opens, so they are hashed here.
        """
        self._prepare_all()
        if self.ready:
            log.info("%s %s", self._backbone.sha256, self._backbone.network_sha256)

    def warm_up(self, request: Request | None = None) -> threading.Thread:
        """Start a thread that loads the weights, draws once and downloads what the methods lack, so that clicks find
        everything in place."""
        first = request or Request("a happy cat", steps=1)

        def work() -> None:
            try:
                self(first, next(iter(self.methods)))
            except InputError as problem:
                log.warning("warm-up: %s", problem)
            except Exception:  # what is to come can be drawn with all the same
                log.exception("warm-up")
            if "" not in self._failed:
                self._prepare_all()

        self._background = threading.Thread(target=work, name="warm-up", daemon=True)
        self._background.start()
        return self._background

    def __call__(self, request: Request, method: str, watch: Watch = UNWATCHED) -> Drawing:
        """Draw, or hand out the panel of an equal earlier request.

        Raises:
            InputError: an unknown method, a request it does not allow, weights that cannot be read, or a picture that
                is not to be shown.
            Stopped: `watch.stop()` was true while waiting or at a step.
        """
        row = self._row(method)
        row.check(request)
        if self._filter:
            self._filter.check(request.prompt)
        if self.ready and (found := self._found(request, row, watch)):
            return found
        if not self._prepared(row):
            tell = self._teller(watch)
            with _Turn(self._preparing, watch.stop, tell):
                self._prepare(method, tell)
            self._go_on()
            if watch.stop():
                raise Stopped
            row = self._row(method)
        with _Turn(self._turn, watch.stop):
            if found := self._found(request, row, watch):  # drawn by somebody else while we waited
                return found
            drawing = self._drawn(request, row, watch)
            self.pace.note(drawing.panel)
            self._shelf.put(self._key(request, row), drawing)
            return drawing

    def has(self, request: Request, method: str) -> bool:
        """Whether this picture would be handed out without drawing."""
        row = self.methods.get(method)
        return self.ready and row is not None and self._shelf.get(self._key(request, row)) is not None

    def _key(self, request: Request, row: MethodRow) -> str:
        return hashlib.sha256(f"{digest(request)} {row!r} {self._backbone.sha256}".encode()).hexdigest()

    def _found(self, request: Request, row: MethodRow, watch: Watch) -> Drawing | None:
        found = self._shelf.get(self._key(request, row))
        return replace(found, kept=True) if found and (found.trail or not watch.trail) else None

    def _row(self, method: str) -> MethodRow:
        if method not in self.methods:
            raise InputError(f"there is no method {str(method)[:40]!r}; choose from {', '.join(self.methods)}")
        return self.methods[method]

    def _prepared(self, row: MethodRow) -> bool:
        return self._at_hand() and not row.lacks

    def _at_hand(self) -> bool:
        """Whether all is in memory that every drawing needs."""
        return self.ready and (self._filter is None or self._filter.ready)

    def _teller(self, watch: Watch) -> Callable[[], None]:
        """A function that tells the watcher what is being downloaded, wherever that is something new."""
        said: list[str] = []

        def tell() -> None:
            coming = self.coming
            text = coming.text if coming and coming.share is not None else ""
            if said[-1:] != [text]:
                said.append(text)
                watch.loading(text)

        return tell

    def _prepare(self, method: str, tell: Callable[[], None] = lambda: None) -> None:
        """Load and download whatever a method needs; `tell` is called when `coming` has changed.

        Raises:
            InputError: it cannot be had. What was downloaded so far is gone on with the next time.
        """

        def hear(download: Download | None) -> None:
            self._download = download and replace(download, what=self._title() or download.what)
            tell()

        for name in ("", method):
            self._failed.pop(name, None)
        tell()
        try:
            with heard_by(hear):
                if not self.ready:
                    self._backbone = self._loaded()
                if self._filter:
                    self._filter.prepare()  # before the work, which would be lost without it
                if self._bring and self.methods[method].lacks:
                    self._fetching = method
                    self._bring(self._backbone, method)
        except InputError as problem:
            self._failed[self._fetching] = str(problem)
            raise
        finally:
            self._fetching = ""

    def _title(self) -> str:
        return self.methods[self._fetching].title if self._fetching else ""

    def _prepare_all(self) -> None:
        """The same for all methods, or none where the base cannot be had; failures are told of in the log.

        What failed before is left to whoever draws with it.
        """
        for name in [name for name in self.methods if name not in self._failed]:
            fetched = self.methods[name].lacks
            try:
                with self._preparing:
                    self._prepare(name)
            except InputError as problem:
                log.warning("%s: %s", "the weights" if "" in self._failed else name, problem)
            except Exception:
                log.exception("%s could not be prepared", name)
            if "" in self._failed or not self.ready:
                return
            if fetched:
                time.sleep(PAUSE)  # locks are not fair: a visitor who waits for this one gets it now

    def _go_on(self) -> None:
        """Download in a thread what other methods lack, if a failure had ended that."""
        running = self._background and self._background.is_alive()
        if not running and any(row.lacks for name, row in self.methods.items() if name not in self._failed):
            self._background = threading.Thread(target=self._prepare_all, name="downloads", daemon=True)
            self._background.start()

    def _loaded(self) -> Any:
        try:
            return self._load()
        except InputError:
            raise  # says which file and what to do
        except (OSError, ValueError, RuntimeError, ImportError) as problem:
            log.exception("the weights could not be loaded")
            raise InputError(NO_WEIGHTS) from problem

    def _drawn(self, request: Request, row: MethodRow, watch: Watch) -> Drawing:
        steps: list[Any] = []  # decoded after the drawing, so that `seconds` stays the method's own

        def on_step(info: Any) -> None:
            if watch.stop():
                raise Stopped
            if watch.trail:
                steps.append(info)
            watch.progress(Progress(info.index + 1, info.total))

        def work() -> Drawing:
            panel = self._painter()(self._backbone, request, row, on_step=on_step)
            trail = tuple(_decoded(steps, watch))
            if self._filter:
                self._filter.look([panel.pixels, *trail], panel.width, panel.height)
            return Drawing(panel, trail, unread=self._backbone.truncated(request.prompt))

        # Always the same thread: each that computes has OpenMP threads of its own, and where there are more of these
        # than cores they sleep between two operations, which doubled the time of a picture on two cores.
        return self._hand.submit(contextvars.copy_context().run, work).result()

    def _painter(self) -> Callable[..., Panel]:
        if self._draw is None:
            from hypersd import generate

            self._draw = generate.draw
        return self._draw


def _decoded(steps: Sequence[Any], watch: Watch) -> Iterator[bytes]:
    for info in steps:
        if watch.stop():
            raise Stopped
        yield info.pixels()[0].numpy().tobytes()


class _Turn:
    """A lock that can be waited for and given up: `with _Turn(lock, stop)` raises Stopped once `stop()` is true. While
    one waits, `wait` is called."""

    def __init__(self, lock: threading.Lock, stop: Callable[[], bool], wait: Callable[[], None] = lambda: None) -> None:
        self.lock, self.stop, self.wait = lock, stop, wait

    def __enter__(self) -> None:
        while not self.lock.acquire(timeout=0.05):
            if self.stop():
                raise Stopped
            self.wait()

    def __exit__(self, *_: object) -> None:
        self.lock.release()


class Sized(Protocol):
    """Something that knows how many bytes it takes."""

    @property
    def size(self) -> int: ...


T = TypeVar("T", bound=Sized)


class Shelf(Generic[T]):
    """Finished things by key, the least recently used thrown out when they take more than `room` bytes."""

    def __init__(self, room: int) -> None:
        self.room = room
        self._kept: OrderedDict[str, T] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        return sum(item.size for item in self._kept.values())

    def get(self, key: str) -> T | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: str, item: T) -> None:
        with self._lock:
            self._kept[key] = item
            self._kept.move_to_end(key)
            while self._kept and self.size > self.room:
                self._kept.popitem(last=False)


# One comparison: several cells, drawn one after the other, told as they come


@dataclass(frozen=True)
class Cell:
    """One panel of a comparison before it is drawn. `problem` says why this method cannot draw this request; then
    `allowed` are the step counts it was made for, such as "2-8", and `nearest` is the closest of them, 0 for none."""

    request: Request
    method: str
    title: str
    reference: bool = False
    problem: str = ""
    allowed: str = ""
    nearest: int = 0


@dataclass(frozen=True)
class News:
    """Something happened to cell number `cell`: it waits for the weights, of which `loading` says what is being
    downloaded, "" if nothing is; a step was made, it is finished, or it cannot be."""

    cell: int
    loading: str | None = None
    progress: Progress | None = None
    drawing: Drawing | None = None
    problem: str = ""


def plan(
    request: Request, names: Sequence[str], methods: Mapping[str, MethodRow], reference: tuple[str, int] | None = None
) -> list[Cell]:
    """The cells of a comparison, in the table's order, the reference (method, steps) last and never twice.

    Raises:
        InputError: no method is chosen, or one that is not in the table.
    """
    unknown = [str(name)[:40] for name in names if name not in methods]
    if unknown:
        raise InputError(f"there is no method {unknown[0]!r}; choose from {', '.join(methods)}")
    cells = [cell(request, methods[name]) for name in methods if name in names]
    if reference:
        others = [one for one in cells if (one.method, one.request.steps) != reference]
        again = cell(replace(request, steps=reference[1], eta=None), methods[reference[0]])
        cells = [*others, replace(again, reference=True)]
    if not cells:
        raise InputError("no method is chosen; tick at least one")
    return cells


def cell(request: Request, row: MethodRow) -> Cell:
    try:
        row.check(request)
    except InputError as problem:
        counts = allowed_steps(row)
        nearest = min(counts, key=lambda n: abs(n - request.steps), default=0)
        return Cell(request, row.name, row.title, problem=str(problem), allowed=spans(counts), nearest=nearest)
    return Cell(request, row.name, row.title)


async def stream(
    cells: Sequence[Cell], draw: Draw, *, trail: bool = False, beat: float = 0.2
) -> AsyncGenerator[list[News], None]:
    """Draw the cells in order and tell the news, gathered for `beat` seconds; an empty list after a quiet second.

    The drawing happens in a thread of its own, the waiting here costs none. Closing or cancelling this iterator, for
    whatever reason, ends the drawing at its next step.
    """
    loop = asyncio.get_running_loop()
    post: asyncio.Queue[News | None] = asyncio.Queue()
    stop = threading.Event()

    def tell(item: News | None) -> None:
        try:
            loop.call_soon_threadsafe(post.put_nowait, item)
        except RuntimeError:  # the server is gone, so nobody listens
            stop.set()

    run = contextvars.copy_context().run  # where GPUs are lent, the context says to whom
    threading.Thread(target=run, args=(_work, cells, draw, trail, tell, stop), name="drawing", daemon=True).start()
    over = False
    try:
        while not over:
            news, over = await _collect(post, beat)
            yield news
    finally:
        stop.set()


async def _collect(post: asyncio.Queue[News | None], beat: float) -> tuple[list[News], bool]:
    """The news of one beat, cut short by a finished picture, which nobody should wait for; and whether that was all."""
    news: list[News] = []
    try:
        async with asyncio.timeout(1) as patience:
            while item := await post.get():
                news.append(item)
                if item.drawing or item.problem:
                    return news, False
                if len(news) == 1:
                    patience.reschedule(asyncio.get_running_loop().time() + beat)
            return news, True
    except TimeoutError:
        return news, False


def _work(
    cells: Sequence[Cell], draw: Draw, trail: bool, tell: Callable[[News | None], None], stop: threading.Event
) -> None:
    try:
        for number, cell in enumerate(cells):
            if not cell.problem and not stop.is_set():
                tell(_draw_one(number, cell, draw, trail, tell, stop))
    except Stopped:
        pass
    finally:
        tell(None)


def _draw_one(
    number: int, cell: Cell, draw: Draw, trail: bool, tell: Callable[[News | None], None], stop: threading.Event
) -> News:
    def progress(made: Progress) -> None:
        tell(News(number, progress=made))

    watch = Watch(progress, lambda text: tell(News(number, loading=text)), stop.is_set, trail)
    try:
        return News(number, drawing=draw(cell.request, cell.method, watch))
    except InputError as problem:
        return News(number, problem=str(problem))
    except Stopped:
        raise
    except Exception:
        log.exception("%s failed", cell.method)
        return News(number, problem=BROKEN)
