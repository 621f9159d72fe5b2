"""What is not on this disk yet: that people are told how far its download is, and why it failed, and that it is tried
again."""

from __future__ import annotations

import hashlib
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import checker
import pytest
from fake import Painter, address, eventually, no_loops_left, served
from modelhub import Server
from page import look
from rows import METHODS
from test_releases import published

from hypersd import methods, releases, safety, ui
from hypersd.backbone import Backbone
from hypersd.engine import Coming, Engine, Stopped, Watch
from hypersd.folders import BACKBONES
from hypersd.hub import Download, digest, fetched, heard_by, place
from hypersd.records import InputError, Panel, Request
from hypersd.releases import Release
from hypersd.ui.coming import said

__all__ = ["no_loops_left"]  # a fixture that runs by itself
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::pandas.errors.Pandas4Warning"
)
CAT = Request("a cat", 1, 4)
SD15 = BACKBONES["sd15"].source


# ------------------------------------------------------------------------------------------------ the hub is heard


@pytest.mark.parametrize(("done", "size", "told"), [
    (1_240_000_000, 4_270_000_000, "Downloading it: 1.2 of 4.3 GB"),
    (120_000_000, 1_000_000_000, "Downloading it: 0.1 of 1.0 GB"),
    (120_000_000, 269_400_000, "Downloading it: 120.0 of 269.4 MB"),
])  # fmt: skip
def test_a_download_is_told_in_one_unit(done: int, size: int, told: str) -> None:
    assert str(Download("it", done, size)) == told


@pytest.fixture
def small(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """With two large files and a small one, which come a thousand bytes at a time."""
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    for name, size in {"a.safetensors": 3000, "b.safetensors": 2500, "c.json": 10}.items():
        server.files[f"maker/repo/{name}"] = bytes(size)
    server.files["maker/repo/b.safetensors"] = b"b" * 2500
    return server


def heard(**more: Any) -> list[Download | None]:
    told: list[Download | None] = []
    with heard_by(told.append):
        fetched("maker/repo", ["*"], "do without", **more)
    return told


def test_whoever_listens_hears_a_download_grow_and_end(small: Server) -> None:
    *grown, last = heard(what="a model")
    assert last is None
    assert {(one.what, one.size) for one in grown if one} == {("a model", 5510)}
    sizes = [one.done for one in grown if one]
    assert sizes == sorted(sizes) and (sizes[0], sizes[-1]) == (0, 5510)
    assert {1000, 2000} < set(sizes)
    assert heard() == [None], "what is cached does not come again"


def test_what_an_earlier_process_left_counts_at_once(small: Server) -> None:
    content = small.files["maker/repo/a.safetensors"]
    part = place("maker/repo") / "blobs" / f"{hashlib.sha256(content).hexdigest()}.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(content[:2000])
    sizes = [one.done for one in heard() if one]
    assert (sizes[0], sizes[-1]) == (0, 5510)
    assert max(after - before for before, after in pairwise(sizes)) == 2000, "all others come by the thousand"
    assert sorted(small.ranges) == [0, 2000]


def test_nobody_hears_after_a_failure_that_it_goes_on(small: Server) -> None:
    small.told["maker/repo/b.safetensors"] = "cd" * 32
    told: list[Download | None] = []
    with heard_by(told.append), pytest.raises(InputError, match="is not what maker/repo published"):
        fetched("maker/repo", ["*"], "do without")
    assert told[0] and told[-1] is None


# ------------------------------------------------------------------------------------- methods that are to come


@pytest.fixture
def sd15(
    server: Server, cache: Path, tiny_folder: Path, tiny_backbone: Backbone, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Server]:  # fmt: skip
    """The hub with a tiny model in the place of Stable Diffusion 1.5 and LoRAs for it; an empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    server.offer(SD15, tiny_folder)
    table = [
        Release("lcm", "sd15", "maker/lcm", "x.safetensors", 1, "free", 135, spacing="original"),
        *(Release("tscd", "sd15", "maker/tscd", f"{k}.safetensors", k, "theirs", 269) for k in (8, 4)),
        Release("flash", "sd15", "maker/flash", "x.safetensors", 2, "not for commerce", 135, commercial=False),
    ]
    for number, release in enumerate(table):
        file = published(tiny_backbone, tmp_path, kohya=True, alpha=1.0 + number)
        server.files[f"{release.repository}/{release.file}"] = file.read_bytes()
    monkeypatch.setattr(releases, "RELEASES", tuple(table))
    yield server
    for thread in threading.enumerate():
        if thread.name in ("warm-up", "downloads"):
            thread.join(60)  # it would go on at the real hub, and close the connections of the next test


def test_what_is_wanted_stands_in_the_table_before_it_is_there(sd15: Server) -> None:
    table = methods.installed("sd15", ["tscd", "lcm"])
    assert {name: row.lacks for name, row in table.items()} == {"base": (), "lcm": (135,), "tscd": (269, 269)}
    table["tscd"].check(CAT)
    with pytest.raises(InputError, match="tscd was made for"):
        table["tscd"].check(Request("a cat", steps=40))
    assert (table["lcm"].spacing, table["tscd"].licence) == ("original", "theirs")
    assert not sd15.sent, "the table says what will come, and fetches nothing"


def test_what_came_is_what_fetch_would_have_left(sd15: Server, tmp_path: Path) -> None:
    from hypersd.__main__ import main

    table = methods.installed("sd15", ["tscd"])
    backbone = Backbone.load("sd15")
    methods.bring(table, backbone, "tscd")
    assert main(["fetch", "sd15", "tscd", "--out", str(tmp_path / "other")]) == 0
    for file in table["tscd"].adapters:
        assert file.path.read_bytes() == (tmp_path / "other" / file.path.name).read_bytes()
    assert table == methods.installed("sd15") == methods.installed("sd15", ["tscd"]), "nothing is lacking now"


def test_one_of_a_methods_files_that_came_is_kept(sd15: Server) -> None:
    table = methods.installed("sd15", ["tscd"])
    backbone = Backbone.load("sd15")
    sd15.closed_off.add("maker/tscd/8.safetensors")
    with pytest.raises(InputError, match=r"maker/tscd/8\.safetensors could not be fetched"):
        methods.bring(table, backbone, "tscd")
    assert len(table["tscd"].lacks) == 1
    sd15.closed_off.clear()
    methods.bring(table, backbone, "tscd")
    assert len(table["tscd"].lacks) == 0 and sd15.sent.count("maker/tscd/4.safetensors") == 1


@pytest.mark.parametrize(("wanted", "sentence"), [
    (["lcn"], "no lcn is published for sd15; choose from lcm, tscd"),
    (["lcm", "flash"], "flash is not for commerce; if that suits you, leave it out of HYPERSD_FETCH and type: "
                       "python -m hypersd fetch sd15 flash --accept-licence"),
])  # fmt: skip
def test_what_cannot_be_wanted_is_told(sd15: Server, wanted: list[str], sentence: str) -> None:
    with pytest.raises(InputError) as told:
        methods.installed("sd15", wanted)
    assert str(told.value).startswith(sentence)


def test_a_model_of_ones_own_gets_what_is_published_for_its_kind(
    sd15: Server, tiny_folder: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_folder, tmp_path / "mine")
    table = methods.installed(str(model), ["lcm"])
    assert table["lcm"].lacks == (135,)
    methods.bring(table, Backbone.load(model), "lcm")
    assert [file.path for file in table["lcm"].adapters] == [model / "lora/lcm.safetensors"]


def test_an_adapter_is_believed_while_its_base_is_not_there(sd15: Server) -> None:
    """The base tells when it has come whether the adapter is one of its own."""
    table = methods.installed("sd15", ["lcm"])
    methods.bring(table, Backbone.load("sd15"), "lcm")
    for link in place(SD15).rglob("model_index.json"):
        link.unlink()
    assert methods.installed("sd15") == table


# ------------------------------------------------------------------------------------------- the engine tells of it


def engine(*wanted: str) -> Engine:
    table = methods.installed("sd15", wanted)
    return Engine(lambda: Backbone.load("sd15"), table, bring=partial(methods.bring, table))


def test_a_visitor_is_told_what_is_downloaded_and_what_will_be(sd15: Server) -> None:
    draw, told = engine("lcm", "tscd"), list[str]()
    draw(CAT, "tscd", Watch(loading=told.append))
    size = sum(len(content) for name, content in sd15.files.items() if name.startswith(SD15)) / 1e6
    assert told[0] == ""
    assert told[1] == f"Downloading Stable Diffusion 1.5: 0.0 of {size:.1f} MB, then 3 more files, 673.0 MB"
    title = methods.METHODS["tscd"].title
    sizes = [line.split(", then ")[1] for line in told if line.startswith(f"Downloading {title}: 0.0 of ")]
    assert sizes[0] == "2 more files, 404.0 MB" and sizes[-1] == "1 more file, 135.0 MB"
    eventually(lambda: draw.coming is None)  # what nobody has asked for yet comes by itself
    sent = list(sd15.sent)
    assert draw(CAT, "lcm").panel.method == "lcm" and sd15.sent == sent


@pytest.mark.parametrize("start", [lambda draw: draw.warm_up().join(120), Engine.load_now], ids=["usual", "lent GPUs"])
def test_a_start_brings_everything(start: Callable[[Engine], None], sd15: Server) -> None:
    draw = engine("lcm", "tscd")
    start(draw)
    assert draw.coming is None
    sent = list(sd15.sent)
    assert draw(CAT, "tscd").panel.method == "tscd" and sd15.sent == sent


def test_a_refusal_is_a_sentence_and_the_next_drawing_tries_again(sd15: Server) -> None:
    sd15.refusal = (403, "GatedRepo")
    draw = engine("lcm")
    draw.warm_up().join(120)
    assert draw.coming and draw.coming.failed
    assert f"accept its licence at https://huggingface.co/{SD15} and log in" in draw.coming.text
    assert draw.coming.text.endswith("give the folder of a copy. The next drawing tries again")
    with pytest.raises(InputError, match="accept its licence"):
        draw(CAT, "base")
    sd15.refusal = None
    assert draw(CAT, "base").panel.method == "base"
    eventually(lambda: draw.coming is None)


def test_one_method_that_cannot_come_leaves_the_others_alone(sd15: Server) -> None:
    sd15.closed_off.add("maker/lcm/x.safetensors")
    draw = engine("lcm", "tscd")
    draw.warm_up().join(120)
    assert draw.coming and draw.coming.failed and "maker/lcm/x.safetensors could not be fetched" in draw.coming.text
    assert draw.coming.text.endswith(f"The next drawing with {methods.METHODS['lcm'].title} tries again")
    assert draw(CAT, "tscd").panel.method == "tscd"
    with pytest.raises(InputError, match=r"accept its licence at https://huggingface\.co/maker/lcm"):
        draw(CAT, "lcm")
    sd15.closed_off.clear()
    assert draw(CAT, "lcm").panel.method == "lcm"
    assert draw.coming is None


def test_what_is_there_is_drawn_while_the_rest_comes(sd15: Server) -> None:
    held = sd15.held["maker/tscd/4.safetensors"] = threading.Event()
    draw = engine("tscd")
    warm = draw.warm_up()
    title = methods.METHODS["tscd"].title
    eventually(lambda: draw.coming and draw.coming.text.startswith(f"Downloading {title}"), 60)
    assert draw(CAT, "base").panel.method == "base"
    told: list[str] = []
    visitor = threading.Thread(target=draw, args=(CAT, "tscd", Watch(loading=told.append)))
    visitor.start()
    eventually(lambda: told)
    assert told[0].startswith(f"Downloading {title}")
    held.set()
    visitor.join(60)
    warm.join(60)
    assert draw.coming is None


def test_who_waits_for_a_method_does_not_wait_for_all(sd15: Server) -> None:
    """The visitor's method comes first in the table and is missed by a moment; two large ones come after it."""
    files = ("maker/lcm/x.safetensors", "maker/tscd/8.safetensors")
    held = [sd15.held.setdefault(file, threading.Event()) for file in files]
    draw = engine("lcm", "tscd")
    warm = draw.warm_up()
    eventually(lambda: draw.coming and draw.coming.text.startswith("Downloading LCM"), 60)
    drawn: list[str] = []
    visitor = threading.Thread(target=lambda: drawn.append(draw(CAT, "lcm").panel.method))
    visitor.start()
    held[0].set()
    eventually(lambda: drawn == ["lcm"], 60)
    assert warm.is_alive(), "the other method is still on its way"
    held[1].set()
    visitor.join(60)
    warm.join(60)


def test_stop_during_a_download_draws_nothing(sd15: Server) -> None:
    draw, stopped = engine("lcm"), list[bool]()
    with pytest.raises(Stopped):
        draw(CAT, "base", Watch(loading=lambda text: stopped.append(True), stop=lambda: bool(stopped)))
    assert not draw.has(CAT, "base")


def test_a_fault_in_the_first_drawing_ends_no_download(sd15: Server, caplog: pytest.LogCaptureFixture) -> None:
    def draw_badly(*_: object, **__: object) -> Panel:
        raise RuntimeError("no kernel image")

    table = methods.installed("sd15", ["lcm"])
    draw = Engine(lambda: Backbone.load("sd15"), table, draw_badly, bring=partial(methods.bring, table))
    draw.warm_up().join(120)
    assert not table["lcm"].lacks and "no kernel image" in caplog.text


def test_nothing_is_in_place_before_the_safety_checker_is() -> None:
    seen: list[Coming | None] = []

    def load() -> Any:
        seen.append(draw.coming)
        raise OSError("no disk")

    draw = Engine(object, methods.installed("emoji"), filter=safety.Filter(load))
    with pytest.raises(InputError, match=re.escape(safety.MISSING)):
        draw(CAT, "base")
    assert draw.ready and seen == [Coming()], "while it loads, pages go on asking"
    assert draw.coming and draw.coming.failed


def test_the_safety_checker_is_a_download_too(sd15: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checker.folder(tmp_path / "checker")
    (folder / "model.safetensors").rename(folder / safety.WEIGHTS)
    monkeypatch.setattr(safety, "SHA256", digest(folder / safety.WEIGHTS))
    sd15.offer(f"{SD15}/safety_checker", folder)
    table, told = methods.installed("sd15"), list[str]()
    draw = Engine(lambda: Backbone.load("sd15"), table, filter=safety.Filter(safety.load))
    draw(CAT, "base", Watch(loading=told.append))
    assert any(line.startswith("Downloading the safety checker: 0.0 of ") for line in told)
    assert draw.coming is None


# ----------------------------------------------------------------------------------------------------- the page


def test_the_line_is_plain_html() -> None:
    assert said(Coming()) == ""
    assert said(Coming("Downloading <it>: 1.2 of 4.3 GB", 0.28)) == (
        "<p>Downloading &lt;it&gt;: 1.2 of 4.3 GB.<progress value='0.280'></progress></p>"
    )
    assert said(Coming("it could not be fetched", failed=True)) == (
        "<p class='hs-failed' role='status'>It could not be fetched.</p>"
    )


def test_a_page_asks_until_everything_is_there() -> None:
    painter = Painter(coming=Coming("Downloading it: 1.2 of 4.3 GB", 0.28))
    with served(ui.build(painter, METHODS)) as app:
        line, asks = look(address(app))
        assert "Downloading it: 1.2 of 4.3 GB." in line and asks
        painter.coming = Coming()
        assert look(address(app)) == ("", True)
        painter.coming = None
        assert look(address(app)) == ("", False)
