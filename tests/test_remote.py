"""An index that lies on the web is read in parts: as few as are needed, none twice, and none of another file."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import numpy as np
import pyarrow.parquet as pq
import pytest
from fakecoder import content
from web import ROWS, WANTED, Answer, Server, laion, photo, serving

from hypersd.__main__ import main
from hypersd.data import DataError, SourceError, download, remote
from hypersd.data.download import Downloads
from hypersd.data.gather import SETTINGS, gather
from hypersd.data.index import Index, open_index
from hypersd.records import InputError, Problem

QUICK = Downloads(largest=50_000, seconds=2)
GROUP = 200  # rows
NOISE = 30_000  # bytes a row, so that a file's end is not all of it
COMMIT = "c" * 40


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(download, "is_public", lambda address: address == "127.0.0.1")
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))
    with serving() as running:
        yield running


def large(file: Path, *, long: bool = False) -> Path:
    """An index of ten row groups, most of it in a column that nobody reads; what it says of itself may be long."""
    rows = [{"URL": f"http://127.0.0.1:1/{n}", "noise": f"{n:04x}" * 1000} for n in range(10 * GROUP)]
    table = pq.read_table(laion(file, rows))
    pq.write_table(table, file, row_group_size=GROUP, compression="none", use_dictionary=False, write_statistics=long)
    assert file.stat().st_size > 8_000_000
    return file


def offered(server: Server, file: Path, path: str = "/index/part-0.parquet", tag: str = '"one"') -> str:
    return server.put(path, file.read_bytes(), {"ETag": tag})


def sent(server: Server) -> int:
    return sum(last - first + 1 for _, first, last in server.spans)


def groups_sent(server: Server, file: Path) -> set[int]:
    """The row groups of a file of which a byte was sent; its end, which every run looks at first, does not count."""
    about = pq.ParquetFile(file).metadata
    found = set()
    for group in range(about.num_row_groups):
        chunks = [about.row_group(group).column(n) for n in range(about.num_columns)]
        starts = [chunk.dictionary_page_offset or chunk.data_page_offset for chunk in chunks]
        first, last = starts[0], starts[-1] + chunks[-1].total_compressed_size
        if any(low < last and first <= high for _, low, high in server.spans[1:]):
            found.add(group)
    return found


def test_the_first_row_group_of_a_large_file_is_a_few_requests(server: Server, tmp_path: Path) -> None:
    file = large(tmp_path / "a.parquet")
    index = open_index([offered(server, file)], GROUP)
    assert (len(index.spans), len(server.spans)) == (10, 1), "of all that the file says of itself"
    there = open_index([file], GROUP)
    assert list(index.read(0)) == list(there.read(0))
    assert len(server.spans) <= 5 and sent(server) < 0.05 * file.stat().st_size
    assert groups_sent(server, file) == {0}
    assert [list(index.read(piece)) for piece in range(1, 10)] == [list(there.read(piece)) for piece in range(1, 10)]
    assert groups_sent(server, file) == set(range(10))
    assert sent(server) < 0.2 * file.stat().st_size, "the column that is not read was not sent"


def test_what_is_long_comes_in_parts(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = large(tmp_path / "a.parquet", long=True)
    index = open_index([offered(server, file)], GROUP)
    assert len(index.spans) == 10 and len(server.spans) == 2, "its end, and that again as long as it is"
    server.spans.clear()
    monkeypatch.setattr(remote, "PART", 1000)
    assert list(index.read(1)) == list(open_index([file], GROUP).read(1))
    assert len(server.spans) > 5 and max(last - first for _, first, last in server.spans) < 1000
    assert groups_sent(server, file) == {1}
    assert max(last for *_, last in server.spans) < file.stat().st_size - remote.END, "and not its end once more"


def pictures(server: Server, file: Path) -> Path:
    """Twelve rows in three row groups, each a piece; half of the pictures are there."""
    urls = [server.put(f"/{n}", photo(n)) if n % 2 else server.at(f"/{n}") for n in range(12)]
    noise = np.random.default_rng(0).bytes(12 * NOISE)  # in a last column that nobody reads
    rows = [{"URL": url, "noise": noise[n * NOISE : (n + 1) * NOISE]} for n, url in enumerate(urls)]
    return laion(file, rows, group=ROWS)


def gathered(index: Index, out: Path) -> dict[str, Any]:
    return gather(index, out, WANTED, QUICK, threads=2)


def test_it_ends_at_the_same_tars_as_from_the_disk(server: Server, tmp_path: Path) -> None:
    file = pictures(server, tmp_path / "a.parquet")
    here = gathered(open_index([file], ROWS), tmp_path / "here")
    assert here["kept"] == 6 == gathered(open_index([offered(server, file)], ROWS), tmp_path / "there")["kept"]
    found = [{n: c for n, c in content(tmp_path / where).items() if n != SETTINGS} for where in ("here", "there")]
    assert found[0] == found[1] and found[0].keys() >= {"00000.tar", "00002.tar", "report.json"}


def test_local_and_remote_files_are_one_index(server: Server, tmp_path: Path) -> None:
    file = pictures(server, tmp_path / "b/a.parquet")
    index = open_index([tmp_path / "b", offered(server, file)], 100)
    rows = [row for piece in range(len(index.spans)) for row in index.read(piece)]
    assert [row.number for row in rows] == list(range(24)) and rows[0].url == rows[12].url


def test_what_is_done_is_not_fetched_again(server: Server, tmp_path: Path) -> None:
    """The server fails at the second row group; the next run asks for that one and the third, and their pictures."""
    file, out = pictures(server, tmp_path / "a.parquet"), tmp_path / "out"
    url, good = offered(server, file), server.answers["/index/part-0.parquet"]
    assert not callable(good)
    list(open_index([url], ROWS).read(0))
    enough = len(server.spans)
    server.asked.clear()
    server.answers["/index/part-0.parquet"] = lambda times: good if times <= enough else (503, {}, b"")
    with pytest.raises(SourceError, match=r"part-0.parquet: its server answered 503; try again later"):
        gathered(open_index([url], ROWS), out)
    assert [piece.name for piece in (out / ".pieces").glob("*.json")] == ["00000.json"]
    assert server.asked["/index/part-0.parquet"] == enough + 3, "each request is tried three times"
    server.answers["/index/part-0.parquet"] = good
    server.spans.clear()
    assert gathered(open_index([url], ROWS), out)["kept"] == 6
    assert groups_sent(server, file) == {1, 2}
    assert [path for path, times in server.asked.items() if times > 1] == ["/index/part-0.parquet"]
    server.spans.clear()
    assert gathered(open_index([url], ROWS), out)["kept"] == 6
    assert not groups_sent(server, file), "of a finished one the end is looked at"


def test_a_file_that_has_changed_is_refused(server: Server, tmp_path: Path) -> None:
    file, out = pictures(server, tmp_path / "a.parquet"), tmp_path / "out"
    gathered(open_index([offered(server, file)], ROWS), out)
    with pytest.raises(InputError, match=r"http://127.*/part-0.parquet is not the file that it was when .*out was"):
        gathered(open_index([offered(server, file, tag='"two"')], ROWS), out)
    index = open_index([offered(server, large(file))], GROUP)
    offered(server, file, tag='"other"')
    with pytest.raises(DataError, match="has changed since it was opened; gather it anew, into another folder"):
        list(index.read(0))


def test_a_signature_is_no_part_of_what_is_remembered(server: Server, tmp_path: Path) -> None:
    file, out = pictures(server, tmp_path / "a.parquet"), tmp_path / "out"
    for signature in ("?key=secret1", "?key=secret2"):
        url = offered(server, file, f"/a.parquet{signature}")
        gathered(open_index([url], ROWS), out)
    told = json.loads((out / SETTINGS).read_text())
    assert told["index"] == [[server.at("/a.parquet"), file.stat().st_size, '"one"']]


def test_what_is_cut_off_or_late_is_asked_for_again(server: Server, tmp_path: Path) -> None:
    file = large(tmp_path / "a.parquet")
    url, good = offered(server, file), server.answers["/index/part-0.parquet"]
    assert not callable(good)
    cut = (206, {"Content-Length": "9000", "Content-Range": "bytes 0-8999/9000"}, b"short")
    answers = iter([(503, {}, b""), cut, good, good, cut])
    server.answers["/index/part-0.parquet"] = lambda _: next(answers, good)
    assert list(open_index([url], GROUP).read(3)) == list(open_index([file], GROUP).read(3))


def test_a_server_without_parts_is_not_asked_for_a_whole_file(server: Server, tmp_path: Path) -> None:
    file = large(tmp_path / "a.parquet")
    server.whole.add("/index/part-0.parquet")
    server.slow["/index/part-0.parquet"] = 0.01  # all of it would take minutes
    with pytest.raises(SourceError, match="its server sends whole files and no parts; download it and give the file"):
        open_index([offered(server, file)], GROUP)
    small = laion(tmp_path / "b.parquet", [{}] * 12, group=ROWS)
    server.whole.add("/small.parquet")
    assert len(list(open_index([offered(server, small, "/small.parquet")], ROWS).read(2))) == 4, (
        "of a small one its end is all of it"
    )


def test_a_server_that_does_not_know_spans_without_a_beginning(server: Server, tmp_path: Path) -> None:
    file, server.spelt_out = large(tmp_path / "a.parquet"), True
    server.slow["/index/part-0.parquet"] = 0.0001
    url = offered(server, file)
    index = open_index([url], GROUP)
    assert len(index.spans) == 10
    server.slow.clear()
    assert list(index.read(3)) == list(open_index([file], GROUP).read(3))
    assert sent(server) < file.stat().st_size // 20


def test_an_address_with_a_password_is_not_repeated(server: Server) -> None:
    with pytest.raises(SourceError, match="names a user, which is not supported") as problem:
        _ = open_index(["https://me:secret@127.0.0.1/a.parquet"], ROWS).spans
    assert "secret" not in str(problem.value)


@pytest.mark.parametrize(("path", "answer", "sentence"), [
    ("/none", (404, {}, b""), "its server has no such file (404); check the address"),
    ("/shut", (403, {}, b""), "its server does not let us have it (403); get an address that it opens"),
    ("/empty", (200, {}, b""), "it is empty; give the address of a parquet file"),
    ("/page", (200, {}, b"<html>" * 99), "is not a parquet file; give the address of one"),
    ("/broken", (200, {}, b"x" * 99 + b"\x09\0\0\0PAR1"), "is damaged or not a parquet file"),
    ("/circle", (302, {"Location": "/circle"}, b""), "its server answered 302"),
    ("/part-*", (404, {}, b""), "is a pattern, and web servers have no lists of their files; name each"),
])  # fmt: skip
def test_what_is_no_index_is_said(server: Server, path: str, answer: Any, sentence: str) -> None:
    server.answers[path] = answer
    with pytest.raises(SourceError, match=re.escape(sentence)) as problem:
        _ = open_index([server.at(path)], ROWS).spans
    assert path in str(problem.value)


@pytest.mark.parametrize("url", ["https://", "http://[::1", "http://a b.example/", "http://x:99999/", "http://..."])
def test_what_is_no_address_is_a_sentence(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSES", ())
    with pytest.raises(Problem, match=r"cannot be reached|is no address"):
        open_index([url], ROWS)


def test_a_server_that_is_not_there_is_a_sentence(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as shut:
        shut.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{shut.getsockname()[1]}/a.parquet"
        assert main(["gather", url, "--out", "nowhere"]) == 1
    said = capsys.readouterr().err
    assert re.search(r"a.parquet cannot be reached \(.*refused\); what was finished stays: check", said)
    assert said.count("\n") == 1 and not Path("nowhere").exists()


# ------------------------------------------------------------------------------------------------------- the hub

DATA = "hf://datasets/owner/name"
FILES = ("a/part-0.parquet", "a/part-1.parquet", "a/notes.txt", "b/part-2.parquet", "part-3.parquet")


@pytest.fixture
def hub(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A data set on the hub's stand-in, which sends readers on to another server, as the hub does."""
    for name, value in {"ENDPOINT": server.at(""), "HF_HUB_OFFLINE": False,
                        "HUGGINGFACE_CO_URL_TEMPLATE": server.at("") + "/{repo_id}/resolve/{revision}/{filename}",
                        "HF_TOKEN_PATH": str(tmp_path / "token")}.items():  # fmt: skip
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    api, entries = "/api/datasets/owner/name", list[dict[str, Any]]()
    for number, path in enumerate(FILES):
        file = laion(tmp_path / "hub" / path, [{"TEXT": path}] * 2)
        server.answers[f"/cdn/{number}"] = (200, {"ETag": f'"{number}"'}, file.read_bytes())
        moved = {"Location": server.at(f"/cdn/{number}", "localhost")}
        server.answers[f"/datasets/owner/name/resolve/{COMMIT}/{path}"] = (302, moved, b"")
        large = {"oid": f"{number}" * 64, "size": file.stat().st_size, "pointerSize": 130}
        entries.append({"type": "file", "path": path, "oid": "0" * 40, "size": large["size"], "lfs": large})
    folders = [{"type": "directory", "path": name, "oid": "0" * 40} for name in "ab"]
    for revision in ("main", "new"):
        server.answers[f"{api}/revision/{revision}"] = _json({"id": "owner/name", "sha": COMMIT})
    for folder in ("", "a"):
        below = [entry for entry in [*folders, *entries] if entry["path"].startswith(f"{folder}/" if folder else "")]
        path = f"{api}/tree/{COMMIT}{'/' * bool(folder)}{folder}?recursive=true&expand=false"
        server.answers[path] = _json(below)
    known = {str(entry["path"]): entry for entry in [*folders, *entries]}

    def named(_: int) -> Answer:
        (path,) = parse_qs(server.posted.decode())["paths"]
        return _json([known[path]] if path in known else [])

    server.answers[f"{api}/paths-info/{COMMIT}"] = named
    return server


def _json(told: object) -> Answer:
    return 200, {"Content-Type": "application/json"}, json.dumps(told).encode()


@pytest.mark.parametrize(("address", "found"), [
    (f"{DATA}/part-3.parquet", ["part-3.parquet"]),
    (f"{DATA}/a", ["a/part-0.parquet", "a/part-1.parquet"]),
    (f"{DATA}@new/a/part-1.parquet", ["a/part-1.parquet"]),
    (f"{DATA}/a/part-*.parquet", ["a/part-0.parquet", "a/part-1.parquet"]),
    (f"{DATA}/part-*.parquet", ["part-3.parquet"]),
    (f"{DATA}/*/part-*.parquet", ["a/part-0.parquet", "a/part-1.parquet", "b/part-2.parquet"]),
    (DATA, ["a/part-0.parquet", "a/part-1.parquet", "b/part-2.parquet", "part-3.parquet"]),
])  # fmt: skip
def test_the_hub_is_looked_through(hub: Server, address: str, found: list[str]) -> None:
    index = open_index([address], 2)
    root = address.split("/")[4].replace("name", f"{DATA}", 1)
    numbers = [FILES.index(path) for path in found]
    assert [stamp[0] for stamp in index.stamps] == [f"{root}/{path}" for path in found]
    assert [stamp[2] for stamp in index.stamps] == [f"{number}" * 64 for number in numbers], "hashes of the content"
    assert [row.caption for piece in range(len(found)) for row in index.read(piece)] == [t for t in found for _ in "ab"]
    assert {path for path, *_ in hub.spans} == {f"/cdn/{number}" for number in numbers}


def test_the_hubs_secret_is_for_the_hub(hub: Server) -> None:
    list(open_index([f"{DATA}/a/part-0.parquet"], 2).read(0))
    assert {value for _, value in hub.knocked} == {"Bearer hf_secret"}
    asked = {path for path, _ in hub.knocked}
    assert f"/datasets/owner/name/resolve/{COMMIT}/a/part-0.parquet" in asked and "/cdn/0" not in asked
    assert hub.asked["/cdn/0"] >= 1


def test_and_goes_along_where_the_hub_says_that_a_repository_was_renamed(hub: Server) -> None:
    was, now = (f"/datasets/{name}/resolve/{COMMIT}/a/part-0.parquet" for name in ("owner/name", "owner/new"))
    hub.answers[now] = hub.answers[was]
    hub.answers[was] = (307, {"Location": now}, b"")
    list(open_index([f"{DATA}/a/part-0.parquet"], 2).read(0))
    asked = {path for path, secret in hub.knocked if secret == "Bearer hf_secret"}
    assert {was, now} <= asked and "/cdn/0" not in asked
    assert hub.asked["/cdn/0"] >= 1


@pytest.mark.parametrize(("at", "status", "code", "sentence"), [
    ("/api/datasets/owner/name/revision/main", 401, "RepoNotFound", "no such repository, or not for you: log in with"),
    ("/api/datasets/owner/name/revision/main", 404, "RevisionNotFound", "the hub does not have it"),
    ("/api/datasets/owner/name/revision/main", 403, "", "accept its licence at https://huggingface.co/datasets/owner/"),
    (f"/datasets/owner/name/resolve/{COMMIT}/a/part-0.parquet", 401, "GatedRepo",
     "accept its terms at https://huggingface.co/datasets/owner/name and log in with `hf auth login` or HF_TOKEN"),
    (f"/datasets/owner/name/resolve/{COMMIT}/a/part-0.parquet", 404, "EntryNotFound", "has no such file (404)"),
])  # fmt: skip
def test_a_refusal_of_the_hub_says_what_to_do(hub: Server, at: str, status: int, code: str, sentence: str) -> None:
    hub.answers[at] = (status, {"X-Error-Code": code}, b"")
    with pytest.raises(SourceError, match=re.escape(sentence)) as problem:
        open_index([f"{DATA}/a/part-0.parquet"], 2)
    assert str(problem.value).startswith(f"{DATA}/a/part-0.parquet")


@pytest.mark.parametrize(("address", "sentence"), [
    (f"{DATA}/none.parquet", "there is no such parquet file on the Hugging Face hub; check the address"),
    (f"{DATA}/none-*.parquet", "there is no such parquet file"),
    ("hf://owner/name/a.parquet", "no address of a data set; give one such as hf://datasets/owner/name/a.parquet"),
    ("hf://datasets/owner", "no address of a data set"),
])  # fmt: skip
def test_what_the_hub_does_not_have_is_said(hub: Server, address: str, sentence: str) -> None:
    with pytest.raises(SourceError, match=re.escape(sentence)):
        open_index([address], 2)


def test_offline_the_hub_is_not_asked(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="HF_HUB_OFFLINE is set: unset it, or download it and give the file"):
        open_index([DATA], 2)
    assert not hub.asked
