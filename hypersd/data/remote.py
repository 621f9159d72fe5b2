"""Files of an index where they lie on the web, read by range requests: a gigabyte need not be on this disk.

    https://example.org/index/part-0001.parquet
    hf://datasets/owner/name/part-0001.parquet      of the Hugging Face hub, also name@branch
    hf://datasets/owner/name/part-*.parquet         those of a pattern, or of a folder

A parquet file says at its end what lies where in it. That end is asked for once and kept, and then no more than the
columns that are read, one row group after the other. Size and ETag, or the hub's hash of the content, say whether a
file is the one that it was. Of a repository on the hub the commit is looked up once and kept to.
"""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from http.client import HTTPException
from pathlib import PurePosixPath
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, Request, build_opener

from hypersd import __version__
from hypersd.data.download import LATER
from hypersd.data.files import DataError
from hypersd.data.sources import SourceError
from hypersd.data.survey import ahead
from hypersd.hub import remedy

SCHEMES = ("https://", "http://", "hf://")
SECONDS = 30.0  # without a byte
PAUSES = (1.0, 4.0)  # seconds before another try
END = 1 << 16  # bytes of a file that are asked for first; what it says of itself is as a rule shorter
PART = 1 << 25  # bytes of a request at most, so that one that is cut off is asked for again in a moment
LENGTH = 8  # bytes at a parquet file's very end: the length of what it says of itself, and a mark
MARK = b"PAR1"
ON_THE_HUB = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+?)(?:@(refs/(?:convert|pr)/[\w.-]+|[\w.-]+))?(?:/(.*))?")


@dataclass(frozen=True)
class Remote:
    """A parquet file at an address.

    `name` is what it is called and known by: the address without what is behind a question mark, which may be a
    signature that changes. `tag` changes with the content; "" where the server tells none. `secret` are headers for
    that server and no other. `end` is the last part of the content, as much as the file needs to say what is in it.
    """

    name: str
    url: str
    secret: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    size: int = 0
    tag: str = ""
    end: bytes = field(default=b"", repr=False, compare=False)

    def open(self) -> io.RawIOBase:
        """For pyarrow, which reads from here and there."""
        return _Opened(self)

    def read(self, first: int, count: int) -> bytes:
        """That many bytes, from the one numbered `first`, which counts from 0; fewer where the file ends.

        Raises:
            SourceError: the server does not give them (any more), or only the whole file.
            DataError: it cannot be reached, or the file has changed.
        """
        last, kept = min(first + count, self.size), self.size - len(self.end)
        if first >= kept:
            return self.end[first - kept : last - kept]
        return b"".join(self._part(at, min(at + PART, last)) for at in range(first, last, PART))

    def _part(self, first: int, last: int) -> bytes:
        content, size, tag = _asked(self.name, self.url, self.secret, f"{first}-{last - 1}")
        other = tag and self.tag and tag != self.tag
        if size != self.size or (other and not self.name.startswith("hf:")):  # which tells hashes, and keeps a commit
            raise DataError(f"{self.name} has changed since it was opened; gather it anew, into another folder")
        if len(content) != last - first:
            raise DataError(f"{self.name} came in other parts than were asked for; download it and give the file")
        return content


class _Opened(io.RawIOBase):
    """A place in a remote file."""

    def __init__(self, file: Remote) -> None:
        self.file, self.name, self.place = file, file.name, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self.place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.file.size}[whence]
        return self.place

    def read(self, size: int = -1, /) -> bytes:
        content = self.file.read(self.place, self.file.size - self.place if size < 0 else size)
        self.place += len(content)
        return content


def is_remote(place: object) -> bool:
    return str(place).startswith(SCHEMES)


def find(address: str) -> list[Remote]:
    """The file at an address, or those of a folder or pattern on the hub, in the order of their names.

    Raises:
        SourceError: there is none, or it is not to be had by range requests; says which, and what to do.
        DataError: a server cannot be reached.
    """
    if address.startswith("hf://"):
        return list(ahead(_opened, _listed(address), threads=8))
    try:
        parts = urlsplit(address)
    except ValueError as error:
        raise SourceError(f"{address} is no address ({error}); check it") from None
    if "*" in parts.path:
        raise SourceError(
            f"{address} is a pattern, and web servers have no lists of their files; name each, as bash does with "
            "part-{0000..0127}.parquet"
        )
    if parts.username is not None:
        raise SourceError(f"the address at {parts.hostname} names a user, which is not supported; download the file")
    name = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    return [_opened(Remote(name, quote(address, safe="%/:=&?~#+!$,;'@()*[]")))]


def _opened(file: Remote) -> Remote:
    """The same with its size, tag and end, by one request, or two where the end is long."""
    end, size, tag = _asked(file.name, file.url, file.secret, f"-{END}")
    need = int.from_bytes(end[-LENGTH : -len(MARK)], "little") + LENGTH
    made = Remote(file.name, file.url, file.secret, size, file.tag or tag, end)
    if not end.endswith(MARK):
        raise SourceError(f"{file.name} is not a parquet file; give the address of one")
    if len(end) < need <= size:
        made = Remote(file.name, file.url, file.secret, size, made.tag, made.read(size - need, need))
    return made


# ------------------------------------------------------------------------------------------------------- the hub


def _listed(address: str) -> list[Remote]:
    """Files of the hub, not opened yet."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    found = ON_THE_HUB.fullmatch(address)
    if not found:
        raise SourceError(f"{address} is no address of a data set; give one such as hf://datasets/owner/name/a.parquet")
    repository, revision, path = found[1], found[2] or "", (found[3] or "").strip("/")
    try:
        commit, files = _tree(repository, revision or "main", path)
    except Exception as error:  # the client raises its own, its HTTP library's and the system's errors
        raise SourceError(
            f"{address} could not be looked up on the Hugging Face hub ({type(error).__name__}); "
            f"{remedy(f'datasets/{repository}', error)}, or download it and give the file"
        ) from error
    if not files:
        raise SourceError(f"{address}: there is no such parquet file on the Hugging Face hub; check the address")
    secret = {name: value for name, value in build_hf_headers().items() if name.lower() == "authorization"}
    root = f"hf://datasets/{repository}{f'@{revision}' if revision else ''}"
    urls = {file: hf_hub_url(repository, file, repo_type="dataset", revision=commit) for file in files}
    return [Remote(f"{root}/{file}", urls[file], secret, tag=tag) for file, tag in sorted(files.items())]


def _tree(repository: str, revision: str, path: str) -> tuple[str, dict[str, str]]:
    """The commit of a revision, and in it {parquet file: hash of its content} at a path, below it or by a pattern."""
    from huggingface_hub import HfApi

    api = HfApi()
    commit = str(api.dataset_info(repository, revision=revision).sha)
    told: dict[str, Any] = {"repo_type": "dataset", "revision": commit}
    if path and "*" not in path:
        there = api.get_paths_info(repository, [path], **told)
        if not there or hasattr(there[0], "blob_id"):  # none, or a file
            return commit, {file.path: _hash(file) for file in there}
    before = PurePosixPath(path.partition("*")[0] + "x").parent if "*" in path else PurePosixPath(path)
    folder = "" if before == PurePosixPath() else str(before)
    files = api.list_repo_tree(repository, folder or None, recursive=True, **told)
    wanted = [file for file in files if hasattr(file, "blob_id") and file.path.endswith(".parquet")]
    return commit, {file.path: _hash(file) for file in wanted if "*" not in path or _fits(file.path, path)}


def _fits(path: str, pattern: str) -> bool:
    """Whether a path is of a pattern, in which a star stands for no slash."""
    parts, wanted = PurePosixPath(path).parts, PurePosixPath(pattern).parts
    return len(parts) == len(wanted) and PurePosixPath(path).match(pattern)


def _hash(file: Any) -> str:
    return str(file.lfs.sha256 if file.lfs else file.blob_id)


# ------------------------------------------------------------------------------------------------------- requests


def _asked(name: str, url: str, secret: Mapping[str, str], span: str) -> tuple[bytes, int, str]:
    """A span of a file's bytes, the size of the whole and its tag; asked for again where that may help.

    Raises as `Remote.read` does.
    """
    for pause in (*PAUSES, None):
        try:
            return _once(name, url, secret, span)
        except SourceError:
            raise
        except HTTPError as error:
            with error:
                if pause is None or error.code not in LATER:
                    raise SourceError(f"{name}: {_refusal(name, error)}") from None
        except (OSError, HTTPException) as error:
            if pause is None:
                reason = str(getattr(error, "reason", error)).splitlines()[0][:120] or type(error).__name__
                raise DataError(
                    f"{name} cannot be reached ({reason}); what was finished stays: check the address and the network "
                    "and run the same command again"
                ) from None
        except ValueError as error:  # no address at all
            raise SourceError(f"{name} is no address ({error}); check it") from None
        time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _once(name: str, url: str, secret: Mapping[str, str], span: str) -> tuple[bytes, int, str]:
    request = Request(url, headers={"Range": f"bytes={span}", "User-Agent": f"hypersd/{__version__}"})
    for header, value in secret.items():
        request.add_unredirected_header(header, value)
    with _opener().open(request, timeout=SECONDS) as answer:
        tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
        whole = (answer.length or 0) if span == f"-{END}" and answer.status == 200 else 0
        if 0 < whole <= END:  # its end is all of it
            return (content := answer.read()), len(content), tag
        told = re.fullmatch(r"bytes \d+-\d+/(\d+)", answer.headers.get("Content-Range") or "")
        if answer.status == 206 and told:
            return answer.read(), int(told[1]), tag
        if not whole:  # and of the whole file nothing is read
            raise SourceError(f"{name}: its server sends whole files and no parts; download it and give the file")
    return _once(name, url, secret, f"{whole - END}-{whole - 1}")  # some servers do not know spans without a beginning


@cache
def _opener() -> OpenerDirector:
    return build_opener(_Renamed)


class _Renamed(HTTPRedirectHandler):
    """Takes a secret along to another address of the same server, as the hub has for repositories that were renamed."""

    def redirect_request(self, request: Request, *told: Any) -> Request | None:
        made = super().redirect_request(request, *told)
        secret = request.unredirected_hdrs.get("Authorization")
        if made and secret and (made.type, made.host) == (request.type, request.host):
            made.add_unredirected_header("Authorization", secret)
        return made


def _refusal(name: str, error: HTTPError) -> str:
    """What a server's refusal means, and what to do."""
    gated = error.headers.get("X-Error-Code") == "GatedRepo"
    if name.startswith("hf:") and (gated or error.code in (401, 403)):
        repository = "/".join(name.removeprefix("hf://").partition("@")[0].split("/")[:3])
        return (
            f"the Hugging Face hub keeps it for those who ask ({error.code}); accept its terms at "
            f"https://huggingface.co/{repository} and log in with `hf auth login` or HF_TOKEN"
        )
    if error.code in (401, 403):
        return f"its server does not let us have it ({error.code}); get an address that it opens, or download it"
    if error.code in (404, 410):
        return f"its server has no such file ({error.code}); check the address"
    if error.code == 416:
        return "it is empty; give the address of a parquet file"
    return f"its server answered {error.code}; try again later, or download it and give the file"
