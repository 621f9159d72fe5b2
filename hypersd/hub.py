"""Repositories of the Hugging Face hub on this disk: announced, gone on with after a kill, checked when they come.

The hub's client keeps what it fetched in its cache, where other programs find it too, and so do we. Before it is asked,
three things are done that it does not do: what will come, and how much of it, is said; a large file that an earlier
process left half done, in the cache as `<sha256>.incomplete`, is gone on with (the client began again); and it takes
its place only if it has the sha256 that the hub tells of it. That is the one time that gigabytes are hashed: what
other programs put into the cache, and what a disk does to it later, goes unseen.

Large files come by plain HTTP, since the other protocol of the client, Xet, cannot be gone on with by another process.

Whoever wants to tell people how far a download is wraps what may cause one in `heard_by`.
"""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from hypersd.records import InputError

if TYPE_CHECKING:
    from huggingface_hub import DryRunFileInfo

log = logging.getLogger(__name__)

# The commit of each repository that is fetched, whatever its makers change later: for the base models their own, for
# the others one that several public projects pin. Of those that are not here the newest is taken.
REVISIONS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
    "stabilityai/stable-diffusion-xl-base-1.0": "462165984030d82259a11f4367a4eed129e94a7b",
    "stabilityai/stable-diffusion-3-medium-diffusers": "ea42f8cef0f178587cf766dc8129abd379c90671",
    "black-forest-labs/FLUX.1-dev": "3de623fc3c33e44ffbe2bad470d0f45bccf2eb21",
    "madebyollin/taesd": "614f76814bbe30edbe2e627ace1c2234c81a2c0e",
    "madebyollin/taesdxl": "b20258aaef75ef61e659c1e0f14f251cf0ad153e",
    "ByteDance/Hyper-SD": "bc08d970a87c74c71209491d64e3525845698863",
    "ByteDance/SDXL-Lightning": "c9a24f48e1c025556787b0c58dd67a091ece2e44",
    "latent-consistency/lcm-lora-sdv1-5": "cf2fced511dbe7e26c8d1d397e728fbab875db4b",
    "latent-consistency/lcm-lora-sdxl": "a18548dd4956b174ec5b0d78d340c8dae0a129cd",
    "stabilityai/sdxl-turbo": "71153311d3dbb46851df1931d3ca6e939de83304",
}
SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Download:
    """`done` of `size` bytes of something are on this disk, `what` it is in people's words."""

    what: str
    done: int
    size: int

    def __str__(self) -> str:
        whole, unit = amount(self.size).split()
        part = f"{self.done / (1e9 if unit == 'GB' else 1e6):.1f}"
        return f"Downloading {self.what}: {part} of {whole} {unit}"


Hear = Callable[[Download | None], None]
_hear: ContextVar[Hear] = ContextVar("hear", default=lambda download: None)


@contextmanager
def heard_by(hear: Hear) -> Iterator[None]:
    """Within, in this thread, `hear` is told of every download: as it begins, as it grows, and None when it is over,
    however it ended."""
    before = _hear.set(hear)
    try:
        yield
    finally:
        _hear.reset(before)


def amount(size: float) -> str:
    """Bytes for people: "4.3 GB", "269.0 MB"."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


class Absent(Exception):
    """A file that its repository does not have."""


class Silent(tqdm):
    """No progress bar."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{**options, "disable": True})


class Metered(io.BufferedWriter):
    """A file to be appended to, which tells after each write how many bytes it has."""

    def __init__(self, file: Path, hear: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(file, "a"))
        self._hear = hear

    def write(self, content: Any) -> int:
        written = super().write(content)
        self._hear(self.tell())
        return written


def fetched(repository: str, wanted: Sequence[str], instead: str, what: str = "") -> Path:
    """The folder of a repository's files, from the cache as far as they are there; with a progress bar.

    Args:
        wanted: paths in it, all of which must be there; or among them patterns with `*`, and then any may be absent.
        instead: what a person can do where it cannot be had, for the end of "check the network, or ..".
        what: what it is in people's words; the repository where none are given.

    Raises:
        InputError: it cannot be had, and what to do; or what came is not what the hub tells of it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    options: dict[str, Any] = {"revision": REVISIONS.get(repository, "main"), "allow_patterns": [*wanted]}
    failure: BaseException | None = None
    try:
        try:
            coming = snapshot_download(repository, dry_run=True, tqdm_class=Silent, **options)
            _go_on(repository, coming, what or repository)
        except DryRunError as problem:  # the hub does not answer, or refuses: what is cached may do
            failure = problem.__cause__
        folder = Path(snapshot_download(repository, local_files_only=failure is not None, **options))
        if lost := [path for path in wanted if "*" not in "".join(wanted) and not (folder / path).is_file()]:
            raise Absent(lost[0])
        return folder
    except InputError:
        raise
    except Exception as error:  # the client raises its own, httpx's and the system's errors
        asked = f"{repository}/{wanted[0]}" if len(wanted) == 1 else repository
        cause = failure or error
        raise InputError(
            f"{asked} could not be fetched from the Hugging Face hub ({type(cause).__name__}); "
            f"{remedy(repository, cause)}, or {instead}"
        ) from error
    finally:
        _hear.get()(None)


def remedy(repository: str, error: BaseException) -> str:
    """What a person can do about what the hub's client raised; `repository` as in the address of its page."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RevisionNotFoundError

    chain = list(_causes(error))
    statuses = {cause.response.status_code for cause in chain if isinstance(cause, HfHubHTTPError)}
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set: unset it"
    login = "log in with `hf auth login` or HF_TOKEN"
    if 403 in statuses or any(isinstance(cause, GatedRepoError) for cause in chain):
        return f"accept its licence at https://huggingface.co/{repository} and {login}"
    if 401 in statuses:
        return f"the hub knows no such repository, or not for you: {login}"
    if 404 in statuses or any(isinstance(cause, Absent | RevisionNotFoundError) for cause in chain):
        return "the hub does not have it (any more)"
    if any(isinstance(cause, OSError) and cause.errno == errno.ENOSPC for cause in chain):
        return f"make room on the disk of {constants.HF_HUB_CACHE}"
    return "check the network"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error:
        yield error
        error = error.__cause__


def _go_on(repository: str, files: Sequence[DryRunFileInfo], what: str) -> None:
    """Say what is about to come, then put the large files of it into the cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    coming = [file for file in files if file.will_download]
    size, done, hear = sum(file.file_size or 0 for file in coming), 0, _hear.get()

    def tell(part: int = 0) -> None:
        hear(Download(what, done + part, size))

    if size:
        log.warning("fetching %s: %s from the Hugging Face hub into %s", repository, amount(size), HF_HUB_CACHE)
        tell()
    for file in coming:
        _resumed(repository, file, tell)
        done += file.file_size or 0
        tell()


def _resumed(repository: str, file: DryRunFileInfo, hear: Callable[[int], None]) -> None:
    """One file, where the hub tells its sha256, which it does of large ones; the client is left with the others.

    The names of lock, part and whole are the client's, so neither gets in the way of another program's download.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    url = hf_hub_url(repository, file.filename, revision=file.commit_hash)
    sha256 = get_hf_file_metadata(url).etag or ""
    if not SHA256.fullmatch(sha256):
        return
    blob = place(repository) / "blobs" / sha256
    lock = Path(constants.HF_HUB_CACHE, ".locks", place(repository).name, f"{sha256}.lock")
    part = blob.with_name(f"{sha256}.incomplete")
    for folder in (lock.parent, blob.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():  # another process was quicker
            return
        with Metered(part, hear) as stream:
            if file.file_size and stream.tell() > file.file_size:
                stream.truncate(0)
            hear(stream.tell())
            http_get(
                url, stream, resume_size=stream.tell(), expected_size=file.file_size, headers=build_hf_headers(),
                displayed_filename=file.filename,
            )  # fmt: skip
        if (found := digest(part)) != sha256:
            part.unlink()
            raise InputError(
                f"{file.filename} is not what {repository} published: what came has the sha256 {found[:12]}.., not "
                f"{sha256[:12]}.., and was not kept; try again"
            )
        os.replace(part, blob)


def place(repository: str) -> Path:
    """Where all files of a repository lie in the cache."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repository, repo_type="model"))


def digest(file: Path) -> str:
    """The sha256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def told(file: Path) -> str:
    """The sha256 that the cache names a large file by, without reading it; "" of a small one, and outside the cache."""
    name = Path(os.readlink(file)).name if file.is_symlink() else ""
    return name if SHA256.fullmatch(name) else ""


def again(file: Path) -> str:
    """What to do about what is damaged in the cache: a file lies where its link points; what is gone is fetched."""
    return f"delete {file.resolve()} and try again"
