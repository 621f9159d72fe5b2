"""Files that are there whole or not at all, whatever happens to the process that writes them."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from hypersd.checkpoint import flush
from hypersd.records import Problem


class DataError(Problem):
    """Training data or its cache cannot be used or written. The message says what was kept and what to do."""


def make_folder(folder: Path) -> None:
    """Make it with all above it, where it is not there. DataError if that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder} cannot be made ({error.strerror}); choose another folder for the cache") from None


def publish(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a staging file and rename it to `path`, flushed.

    Raises:
        DataError: the disk is full or read-only; files published before stay.
    """
    staging = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        write(staging)
        flush(staging)
        os.replace(staging, path)
        flush(path.parent)
    except (OSError, SafetensorError) as error:
        staging.unlink(missing_ok=True)
        raise DataError(
            f"{path} cannot be written ({error}); what was finished before stays: "
            "make room on the disk and run the same command again"
        ) from error


def publish_text(path: Path, text: str) -> None:
    """The same for a text; a file that holds it already is left alone, so that a finished cache can be read-only."""
    content = text.encode()
    if not path.is_file() or path.read_bytes() != content:
        publish(path, lambda staging: staging.write_bytes(content))


def sweep(folder: Path) -> None:
    """Remove what processes of this machine left half written when they were killed."""
    for staging in folder.glob(f".*.{socket.gethostname()}.*.tmp"):
        try:
            os.kill(int(staging.name.split(".")[-2]), 0)
        except ProcessLookupError:
            staging.unlink(missing_ok=True)
        except PermissionError:  # it lives, and is another user's
            continue


def whole(file: Path) -> bool:
    """Whether a file is there and, for tensors, as long as its header says: a copy may have been cut off."""
    if not file.is_file() or file.suffix != ".safetensors":
        return file.is_file()
    try:
        load_file(file)  # compares header and length, and maps the rest without reading it
    except (OSError, SafetensorError):
        return False
    return True


def lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def digest(value: object) -> str:
    """16 hexadecimal digits that stand for a value made of JSON's types."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
