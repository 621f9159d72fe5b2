"""An index of the web becomes tars to train on: every row is kept or counted, whatever servers and signals do."""

from __future__ import annotations

import io
import json
import math
import os
import re
import socket
import subprocess
import sys
import tarfile
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fakecoder import Fake
from hypothesis import given, settings
from hypothesis import strategies as st
from listing import ROOT
from PIL import Image, ImageFilter
from torch import Tensor, nn
from web import ROWS, WANTED, Answer, Server, jpeg, laion, photo, serving

from hypersd.__main__ import COMMANDS, main
from hypersd.data import DataError, SourceError, download, open_source, prepare
from hypersd.data.download import Downloads, Lost, is_public
from hypersd.data.gather import DOWN, REASONS, Wanted, gather, look_of, repeated, table
from hypersd.data.index import clean_caption, letters, open_index
from hypersd.records import InputError
from hypersd.scores import Scorer

QUICK = Downloads(largest=50_000, seconds=0.6)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """An internet of one host, 127.0.0.1; the rest of loopback is private as ever."""
    monkeypatch.setattr(download, "is_public", lambda address: address == "127.0.0.1")
    with serving() as running:
        yield running


def gathered(place: Path, out: Path, wanted: Wanted = WANTED, scorer: Scorer | None = None) -> dict[str, Any]:
    return gather(open_index([place], ROWS), out, wanted, QUICK, scorer, threads=4)


def samples(out: Path) -> dict[int, tuple[str, ...]]:
    """Number -> captions of all that `open_source` finds."""
    source = open_source(out)
    pieces = range(len(source.stamps()))
    return {int(s.key.rpartition("/")[2]): s.captions for piece in pieces for s in source.read(piece)}


def beside(out: Path, number: int) -> dict[str, Any]:
    for tar in sorted(out.glob("*.tar")):
        with tarfile.open(tar) as archive:
            if f"{number:09d}.json" in archive.getnames():
                found = archive.extractfile(f"{number:09d}.json")
                assert found is not None
                about: dict[str, Any] = json.load(found)
                return about
    raise AssertionError(f"{number} is in no tar")


def world(server: Server) -> list[tuple[dict[str, Any], str]]:
    """Rows of an index, and what is to become of each: a reason, or "" for those that are kept."""
    put, at = server.put, server.at
    blurred = photo(3).resize((8, 8), Image.Resampling.BOX).resize((64, 64), Image.Resampling.BICUBIC)
    server.answers["/flaky"] = lambda times: (200, {}, jpeg(photo(4))) if times % 2 == 0 else (503, {}, b"")
    server.answers["/there"] = (302, {"Location": "/a"}, b"")
    server.answers["/inside"] = (302, {"Location": at("/a", "127.0.0.2")}, b"")
    server.answers["/circle"] = (301, {"Location": "/circle"}, b"")
    server.answers["/chunks"] = (200, {"Transfer-Encoding": "chunked"}, b"ea60\r\n" + b"x" * 60_000 + b"\r\n0\r\n\r\n")
    server.slow["/slow"] = 0.2
    a, b = put("/a", photo(1)), put("/b", photo(2))
    html = "A &quot;red&quot; <b>kite</b>\u200b over www.kites.com the sea &amp;amp; me@kites.com"
    return [
        ({"URL": a}, ""),
        ({"URL": b, "TEXT": html}, ""),
        ({"URL": at("/nothing")}, "gone"),
        ({"URL": "http://127.0.0.1:1/x.jpg"}, "unreachable"),
        ({"URL": put("/slow", photo(5))}, "too slow"),
        ({"URL": put("/half", jpeg(photo(6))[:700])}, "unreadable"),
        ({"URL": put("/page", b"<html>not found</html>")}, "unreadable"),
        ({"URL": put("/small", photo(7, (47, 90)))}, "turned out small"),
        ({"URL": a, "WIDTH": 47}, "too small"),
        ({"URL": a, "AESTHETIC_SCORE": 5.5}, "aesthetic"),
        ({"URL": a, "pwatermark": 0.5}, "watermark"),
        ({"URL": a, "punsafe": 0.1}, "unsafe"),
        ({"URL": a, "AESTHETIC_SCORE": None}, "not scored"),
        ({"URL": put("/blurred", blurred.filter(ImageFilter.GaussianBlur(4)))}, "blurred"),
        ({"URL": put("/copy", photo(1)), "TEXT": "another caption"}, "same picture"),
        ({"URL": put("/worse", jpeg(photo(2), quality=60))}, "nearly the same"),
        ({"URL": a, "TEXT": "IMG_1234.JPG"}, "no caption"),
        ({"URL": a, "TEXT": None}, "no caption"),
        ({"URL": "file:///etc/passwd"}, "not allowed"),
        ({"URL": at("/inside")}, "not allowed"),
        ({"URL": at("/there")}, "same picture"),
        ({"URL": at("/circle")}, "gone"),
        ({"URL": put("/large", b"x" * 60_000)}, "too large"),
        ({"URL": at("/chunks")}, "too large"),
        ({"URL": put("/noai", photo(8), {"X-Robots-Tag": "otherbot: noindex, NoAI"})}, "opted out"),
        ({"URL": at("/flaky"), "TEXT": "tried twice"}, ""),
        ({"URL": None}, "no address"),
    ]


def test_every_row_is_kept_or_counted_under_its_reason(server: Server, tmp_path: Path) -> None:
    rows = world(server)
    report = gathered(laion(tmp_path / "laion/a.parquet", [row for row, _ in rows]), tmp_path / "out")
    expected: dict[str, list[int]] = {}
    for number, (_, reason) in enumerate(rows):
        expected.setdefault(reason, []).append(number)
    kept = expected.pop("")
    assert {r: (f["rows"], f["first"]) for r, f in report["rejected"].items()} == {
        reason: (len(numbers), numbers[0]) for reason, numbers in expected.items()
    }
    assert expected.keys() == REASONS.keys()  # none is left untried
    assert report["rows"] == len(rows) == report["kept"] + sum(f["rows"] for f in report["rejected"].values())
    assert json.loads((tmp_path / "out/report.json").read_text()) == report
    assert list(samples(tmp_path / "out")) == kept
    assert sum(report["shards"].values()) == len(kept) and set(report["shards"]) == {"00000.tar", "00006.tar"}
    lines = table(report).splitlines()
    assert [line.split()[-1] for line in lines if line.startswith("gone ")] == ["2"]
    assert len(lines) == len(expected) + 2 and "27" in lines[0] and lines[-1].split()[1:3] == ["3", "11.1%"]


def test_a_sample_is_a_sharp_square_with_a_clean_caption_and_its_story(server: Server, tmp_path: Path) -> None:
    rows = [row for row, _ in world(server)][:2]
    photo(1).save(lossless := io.BytesIO(), "PNG")
    server.put("/a", lossless.getvalue())
    gathered(laion(tmp_path / "a.parquet", rows), tmp_path / "out")
    assert samples(tmp_path / "out") == {0: ("a happy cat",), 1: ('A "red" kite over the sea &',)}
    (first, _) = open_source(tmp_path / "out").read(0)
    assert isinstance(first.picture, bytes)
    with tarfile.open(tmp_path / "out/00000.tar") as archive:
        assert archive.getnames() == [f"{n:09d}.{end}" for n in (0, 1) for end in ("jpg", "txt", "json")]
        found = archive.extractfile("000000000.jpg")
        assert found is not None
        pixels = np.asarray(Image.open(found), np.int16)
    centre = photo(1).crop((4, 0, 60, 56)).resize((32, 32), Image.Resampling.LANCZOS)
    assert pixels.shape == (32, 32, 3) and np.abs(pixels - np.asarray(centre, np.int16)).mean() < 6
    about = beside(tmp_path / "out", 1)
    assert (about["caption"], about["url"], about["size"]) == (rows[1]["TEXT"], server.at("/b"), [64, 56])
    assert (about["aesthetic"], about["watermark"], about["unsafe"], about["similarity"]) == (6.5, 0.1, 0.01, 0.3)
    assert about["sharpness"] >= WANTED.sharpness and about["licence"] is None


def test_gathered_tars_go_through_the_cache(server: Server, tmp_path: Path) -> None:
    rows = [{"URL": server.put(f"/{i}", photo(i)), "TEXT": f"thing number {'abcdefg'[i]}"} for i in range(7)]
    gathered(laion(tmp_path / "a.parquet", rows), tmp_path / "out")
    dataset = prepare(open_source(tmp_path / "out"), Fake(), tmp_path / "cache", batch=2)
    assert dataset.take(torch.arange(7)).captions == [row["TEXT"] for row in rows]


# ------------------------------------------------------------------------------------- what an index looks like


def test_coyo_is_read_and_its_scores_are_heeded(server: Server, tmp_path: Path) -> None:
    usual = {"text": "a happy cat", "width": 2000, "height": 1500, "image_phash": "a0", "num_faces": 0,
             "clip_similarity_vitb32": 0.31, "clip_similarity_vitl14": 0.2, "nsfw_score_opennsfw2": 0.01,
             "nsfw_score_gantman": 0.9, "watermark_score": 0.2, "aesthetic_score_laion_v2": 5.6}  # fmt: skip
    changes: tuple[dict[str, float], ...] = (
        {},
        {"aesthetic_score_laion_v2": 5.4},
        {"watermark_score": 0.9},
        {"nsfw_score_opennsfw2": 0.5},
    )
    rows = [{"id": 10 + i, "url": server.put(f"/{i}", photo(i)), **usual, **new} for i, new in enumerate(changes)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "part-00.parquet")
    report = gathered(tmp_path, tmp_path / "out")
    assert {r: f["first"] for r, f in report["rejected"].items()} == {"aesthetic": 1, "watermark": 2, "unsafe": 3}
    assert beside(tmp_path / "out", 0)["similarity"] == 0.31
    assert [server.asked[f"/{i}"] for i in range(4)] == [1, 0, 0, 0]  # nothing is fetched that the index rules out


def test_the_first_laions_words_and_licences_are_read(server: Server, tmp_path: Path) -> None:
    words = ("UNLIKELY", "UNSURE", "NSFW", None)
    rows = [{"URL": server.put(f"/{i}", photo(i)), "TEXT": "a happy cat", "NSFW": word, "LICENSE": "CC-BY-4.0"}
            for i, word in enumerate(words)]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    report = gathered(tmp_path, tmp_path / "out", Wanted(32, 48, aesthetic=None, watermark=None))
    assert {r: f["rows"] for r, f in report["rejected"].items()} == {"unsafe": 2, "not scored": 1}
    assert beside(tmp_path / "out", 0)["licence"] == "CC-BY-4.0"


def test_pictures_in_the_index_or_beside_it_need_no_network(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    photo(2).save(tmp_path / "in/b.png")
    photo(3).save(tmp_path / "outside.png")
    cells = [{"bytes": jpeg(photo(1)), "path": None}, {"bytes": None, "path": "b.png"},
             {"bytes": None, "path": "../outside.png"}, {"bytes": None, "path": str(tmp_path / "outside.png")},
             {"bytes": None, "path": "none.png"}, None]  # fmt: skip
    rows = [{"image": cell, "caption": "a happy cat"} for cell in cells]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in/a.parquet", row_group_size=1)
    wanted = Wanted(32, 48, aesthetic=None, watermark=None, unsafe=None)
    report = gathered(tmp_path / "in", tmp_path / "out", wanted)
    assert list(samples(tmp_path / "out")) == [0, 1]
    assert report["rejected"] == {"no address": {"rows": 4, "first": 2}}


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 9), st.integers(1, 5))
@settings(max_examples=20, deadline=None, database=None, derandomize=True)
def test_pieces_are_all_rows_once_in_order(tmp_path_factory: Any, groups: list[int], rows: int, cut: int) -> None:
    folder = tmp_path_factory.mktemp("index")
    schema, total = pa.schema([("URL", pa.string()), ("TEXT", pa.string())]), sum(groups)
    numbers = iter(range(total))
    for name, part in (("a", groups[:cut]), ("b", groups[cut:])):
        with pq.ParquetWriter(folder / f"{name}.parquet", schema) as writer:
            for size in part:
                some = [{"URL": str(next(numbers)), "TEXT": ""} for _ in range(size)]
                writer.write_table(pa.Table.from_pylist(some, schema))
    index = open_index([folder], rows)
    pieces = [list(index.read(piece)) for piece in range(len(index.spans))]
    assert [(e.number, e.url) for piece in pieces for e in piece] == [(n, str(n)) for n in range(total)]
    assert all(0 < len(piece) <= rows for piece in pieces)


@pytest.mark.parametrize(
    ("column", "sentence"),
    [
        ("AESTHETIC_SCORE", r"a.parquet has no column for aesthetic; give --score .*--aesthetic off"),
        ("pwatermark", r"no column for watermark; give --watermark off"),
        ("punsafe", r"no column for unsafe; give --unsafe off"),
        ("TEXT", "a.parquet has no caption column"),
        ("URL", "a.parquet has no image column"),
    ],
)
def test_a_missing_column_is_named_with_what_to_type(column: str, sentence: str, tmp_path: Path) -> None:
    laion(tmp_path / "a.parquet", [{}])
    pq.write_table(pq.read_table(tmp_path / "a.parquet").drop([column]), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=sentence):
        gathered(tmp_path / "a.parquet", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_index_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(SourceError, match=r"a.parquet is damaged"):
        gathered(tmp_path / "a.parquet", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "none"):
        with pytest.raises(SourceError, match="neither a parquet file nor a folder of them"):
            open_index([place], ROWS)


class Bright(Scorer):
    """Ten times the mean of a picture's red."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        assert prompts == ["a happy cat"] and pixels.shape == (1, 3, 32, 32)
        return 10 * self.weight * (pixels[:, 0] / 2 + 0.5).mean((1, 2))


def test_pictures_without_an_aesthetic_score_are_given_one(server: Server, tmp_path: Path) -> None:
    pictures = [Image.merge("RGB", [photo(i).split()[0].point(tone), *photo(i).split()[1:]]) for i, tone in
                enumerate((lambda v: v // 4, lambda v: 255 - v // 4, lambda v: v // 4))]  # fmt: skip
    said = (None, None, 6.0)  # the index is believed where it says something
    rows = [{"URL": server.put(f"/{i}", p), "AESTHETIC_SCORE": said[i]} for i, p in enumerate(pictures)]
    report = gathered(laion(tmp_path / "a.parquet", rows), tmp_path / "out", scorer=Bright())
    assert report["rejected"] == {"aesthetic": {"rows": 1, "first": 0}}
    assert beside(tmp_path / "out", 1)["aesthetic"] > 7.5 and beside(tmp_path / "out", 2)["aesthetic"] == 6.0


# ------------------------------------------------------------------------------------------ stopped and shared


def duplicated(server: Server, folder: Path) -> Path:
    """Three pieces: the second has a copy of a picture of the first, the third has nothing else."""
    numbers = [1, 2, None, 3, 4, 1, 5, None, 2, 3]
    rows = [{"URL": server.put(f"/{i}", photo(n)) if n else server.at(f"/no{i}")} for i, n in enumerate(numbers)]
    return laion(folder / "a.parquet", rows, group=5)


@pytest.mark.parametrize("every", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_moment_or_shared_by_two_it_ends_at_the_same_bytes(every: int, ram: Path) -> None:
    """tests/web.py kills processes in downloads, writes, flushes and renames, and compares every byte."""
    with serving() as server:
        place = duplicated(server, ram)
        server.slow = {f"/{i}": 0.01 for i in range(10)}  # for long enough that two meet

        def asked(_: int) -> Answer:
            server.slow.clear()
            return (200, {}, json.dumps(server.asked).encode())

        server.answers["/asked"] = asked
        command = [sys.executable, "tests/web.py", str(place), str(ram / "out"), server.at(""), str(every)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > 50  # moments
    assert {p.name for p in (ram / "out/calm").glob("*.tar")} == {"00000.tar", "00001.tar"}


def test_a_finished_folder_asks_nobody_and_writes_nothing(server: Server, tmp_path: Path) -> None:
    place = duplicated(server, tmp_path)
    first = gathered(place, tmp_path / "out")
    server.asked.clear()
    inodes = {file: file.stat().st_ino for file in (tmp_path / "out").rglob("*")}
    assert gathered(place, tmp_path / "out") == first
    assert {file: file.stat().st_ino for file in (tmp_path / "out").rglob("*")} == inodes
    assert not server.asked
    with pytest.raises(InputError, match="was begun with another smallest, aesthetic; choose another folder"):
        gathered(place, tmp_path / "out", Wanted(32, 50, aesthetic=6.0))
    (tmp_path / "out/00000.tar").unlink()
    with pytest.raises(DataError, match=r"00000.tar is gone; to have it made again remove .*00000.json"):
        gathered(place, tmp_path / "out")


def test_a_dead_network_is_no_verdict_on_the_index(server: Server, tmp_path: Path) -> None:
    dead = [{"URL": f"http://127.0.0.1:1/{i}"} for i in range(DOWN + 10)]
    alive = {"URL": server.put("/a", photo(1))}
    index = open_index([laion(tmp_path / "dead.parquet", [alive, *dead])], 1000)
    with pytest.raises(DataError, match=f"none of {DOWN} addresses in a row answered; check the network"):
        gather(index, tmp_path / "out", WANTED, QUICK, threads=8)
    assert not list((tmp_path / "out").rglob("*.json")) or not (tmp_path / "out/report.json").exists()
    half = [*dead[: DOWN - 1], alive, *dead[: DOWN - 1]]
    index = open_index([laion(tmp_path / "half.parquet", half)], 1000)
    assert gather(index, tmp_path / "half", WANTED, QUICK, threads=8)["kept"] == 1


# ---------------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("address", "public"),
    [("8.8.8.8", True), ("127.0.0.1", False), ("10.1.2.3", False), ("172.16.0.1", False), ("192.168.1.1", False),
     ("169.254.169.254", False), ("100.64.0.1", False), ("0.0.0.0", False), ("224.0.0.1", False),
     ("255.255.255.255", False), ("2606:4700::1111", True), ("::1", False), ("fe80::1%eth0", False),
     ("fd00::1", False), ("::ffff:127.0.0.1", False), ("::ffff:8.8.8.8", True), ("2002:7f00:1::", False),
     ("64:ff9b::a00:1", False), ("64:ff9b::808:808", True), ("::", False)],
)  # fmt: skip
def test_private_addresses_are_known_in_every_disguise(address: str, public: bool) -> None:
    assert is_public(address) is public


def lost(url: str, terms: Downloads = QUICK) -> str:
    with pytest.raises(Lost) as caught:
        terms(url)
    return caught.value.reason


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1/", "http://localhost/", "http://127.1/", "http://2130706433/", "http://[::1]/", "ftp://x/a",
     "http://[::ffff:127.0.0.1]/", "http://169.254.169.254/latest/meta-data", "file:///etc/passwd", "/etc/passwd",
     "data:image/png;base64,AAAA", "http://user@127.0.0.1/"],
)  # fmt: skip
def test_an_index_cannot_name_what_is_private(url: str) -> None:
    assert lost(url) == "not allowed"


def test_a_host_with_one_private_address_is_private(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    port = server.server_address[1]
    places = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)) for host in ("127.0.0.1", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: places)
    assert lost(f"http://two-faced.example:{port}/a") == "not allowed"
    assert not server.asked


@pytest.mark.parametrize("url", ["http://", "http://[::1", "http://a b/", "http://x:99999/", "http://x\r\nX: y/", ""])
def test_what_is_no_address_is_a_reason_and_no_accident(url: str) -> None:
    assert lost(url) in ("not allowed", "unreachable")


def test_each_address_is_tried_twice_at_most(server: Server) -> None:
    server.answers["/busy"] = (503, {}, b"")
    server.answers["/cut"] = (200, {"Content-Length": "900"}, b"short")
    server.slow["/drip"] = 0.15
    server.put("/drip", b"x" * 2000)
    for path, reason, times in (("/busy", "gone", 2), ("/none", "gone", 1), ("/cut", "unreachable", 2),
                                ("/drip", "too slow", 2)):  # fmt: skip
        assert (lost(server.at(path)), server.asked[path]) == (reason, times)


def test_addresses_are_sent_escaped_once(server: Server) -> None:
    server.put("/a%20b/caf%C3%A9.jpg?x=1&y=%20z%C3%A9", b"here")
    assert QUICK(server.at("/a b/café.jpg?x=1&y= zé")) == b"here"
    assert QUICK(server.at("/a%20b/caf%C3%A9.jpg?x=1&y=%20z%C3%A9")) == b"here"


# --------------------------------------------------------------------------------------------- captions and looks


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("  A cat\n on\ta mat ", "A cat on a mat"),
        ("Tom &amp; Jerry&#39;s &lt;b&gt;house&lt;/b&gt;", "Tom & Jerry's house"),
        ("<a href='x'>A boat</a><!-- ad --> at sea", "A boat at sea"),
        ("A dog | https://shop.example/p?id=1", "A dog"),
        ("Stock photo of a fox - dreamstime.com", "Stock photo of a fox"),
        ("Write to john.doe+x@mail.example.org for prints", "Write to for prints"),
        ("A red\x00 \u200bcar\ufeff (www.cars.net)", "A red car"),
        ("I <3 you", "I <3 you"),
        ("Mr. Bean vs. St. Nicholas, 5.5 m", "Mr. Bean vs. St. Nicholas, 5.5 m"),
        ("Cafe\u0301 au lait", "Café au lait"),
        ("👩\u200d🚀 in space", "👩\u200d🚀 in space"),
        ("&amp;amp;amp;lt;i&amp;gt;deep", "deep"),
        ("https://only.a.link/x", ""),
    ],
)
def test_captions_are_cleaned(text: str, clean: str) -> None:
    assert clean_caption(text) == clean


@given(st.text(st.sampled_from("ab &;<>/-#x12.@w\n\x00\u200b\u0301é)(")) | st.text())
@settings(max_examples=100, deadline=None, database=None, derandomize=True)
def test_a_clean_caption_stays_as_it_is(text: str) -> None:
    clean = clean_caption(text)
    assert clean_caption(clean) == clean
    assert not any(unicodedata.category(c) in ("Cc", "Cs", "Co", "Cn") for c in clean)
    assert clean == " ".join(clean.split())


def test_letters_of_every_script_count() -> None:
    assert letters("猫が好き") == letters("हिन्दी") == letters("a cat") == 1.0
    assert letters("a1 b2") == 0.5 and letters("") == letters("  ") == 0.0


def landscape(seed: int) -> Image.Image:
    """Noise with the spectrum of photographs, amplitudes falling as 1 / frequency."""
    frequency = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.fftfreq(256))
    frequency[0, 0] = 1
    noise = np.random.default_rng(seed).normal(size=(3, 256, 256))
    found = np.fft.ifft2(np.fft.fft2(noise) / frequency).real
    found = 128 + 50 * (found - found.mean()) / found.std()
    return Image.fromarray(found.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def test_a_look_survives_what_the_web_does_to_pictures_and_tells_others_apart() -> None:
    big = [landscape(seed) for seed in range(16)]
    looks = [int(look_of(np.asarray(image)), 16) for image in big]
    for image, look in zip(big, looks, strict=True):
        with Image.open(io.BytesIO(jpeg(image.resize((180, 180)), quality=50))) as worse:
            changed = np.clip(np.asarray(worse, np.float64) * 0.9 + 8, 0, 255).astype(np.uint8)
        assert (look ^ int(look_of(changed), 16)).bit_count() <= Wanted().near
    apart = [(a ^ b).bit_count() for i, a in enumerate(looks) for b in looks[:i]]
    assert min(apart) > 2 * Wanted().near


@given(st.integers(0, 16), st.lists(st.tuples(st.integers(0, 3), st.sets(st.integers(0, 63), max_size=9)), max_size=25))
@settings(max_examples=80, deadline=None, database=None, derandomize=True)
def test_repeats_are_those_that_comparing_all_pairs_finds(near: int, drawn: Sequence[tuple[int, set[int]]]) -> None:
    base = int("0123456789abcdef", 16)
    rows = [(n, f"file {name}", f"{base ^ sum(1 << b for b in bits):016x}") for n, (name, bits) in enumerate(drawn)]
    kept: list[tuple[int, str, str]] = []
    expected = {}
    for number, sha256, look in rows:
        if any(sha256 == other for _, other, _ in kept):
            expected[number] = "same picture"
        elif any((int(look, 16) ^ int(other, 16)).bit_count() <= near for *_, other in kept):
            expected[number] = "nearly the same"
        else:
            kept.append((number, sha256, look))
    assert repeated(rows, near) == expected


# --------------------------------------------------------------------------------------------------- the command


def test_the_command_gathers_and_prints_what_became_of_all_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving() as server:
        rows = [{"URL": server.put("/a", photo(1))}, {"URL": server.at("/none")}, {"URL": server.at("/none")}]
        given = ["gather", str(laion(tmp_path / "a.parquet", rows)), "--side", "32", "--smallest", "48", "--out"]
        assert main([*given, str(tmp_path / "shut")]) == 0
        assert not server.asked  # loopback is private
        assert main([*given, str(tmp_path / "open"), "--allow-private"]) == 0
    shut, opened, _ = capsys.readouterr().out.split("kept ")
    assert re.search(r"not allowed +3 +100\.0% .* such as row 0", shut)
    assert re.search(r"gone +2 +66\.7% .* such as row 1", opened)
    assert list(samples(tmp_path / "open")) == [0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--side", "2048"], "smallest is 1024 pixels and side 2048: .*choose --smallest 2048 or more"),
        (["--aesthetic", "lots"], "aesthetic must be a number from 0 to 10, got 'lots'"),
        (["--near", "17"], "near must be a whole number from 0 to 16"),
        (["--rows", "0"], "rows must be a whole number"),
        ([], "nowhere.parquet is neither a parquet file nor a folder"),
    ],
)
def test_a_wrong_option_is_one_sentence(
    options: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gather", "nowhere.parquet", "--out", str(tmp_path / "out"), *options]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.search(sentence, said)
    assert not (tmp_path / "out").exists()


def test_the_command_asks_for_what_the_paper_asks_for() -> None:
    import argparse

    parser = argparse.ArgumentParser()
    COMMANDS["gather"].add_arguments(parser)
    found = vars(parser.parse_args(["a.parquet", "--out", "b"]))
    paper = Wanted()
    assert {name: found[name] for name in vars(paper)} == vars(paper)
    assert (paper.smallest, paper.aesthetic) == (1024, 5.5)
    assert math.isclose(paper.sharpness, math.log10(100), abs_tol=0.01)
    assert found["megabytes"] * 1_000_000 == Downloads().largest and found["seconds"] == Downloads().seconds
