"""A PostgreSQL of Debian's for one test session, in a folder of its own, reachable through a socket there only."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None, key=lambda path: int(path.parent.name))


@contextmanager
def running(folder: Path) -> Iterator[str]:
    """The URL of a fresh, empty database in a running server; `folder` must be empty and is left to be deleted."""
    assert PROGRAMS is not None
    folder.mkdir(mode=0o700)
    as_root = os.geteuid() == 0
    if as_root:  # PostgreSQL refuses to run as root; Debian made it a user of its own
        subprocess.run(["chown", "postgres", folder], check=True)
    user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if as_root else []

    def call(program: str, *arguments: str) -> None:
        subprocess.run([*user, str(PROGRAMS / program), *arguments], check=True, capture_output=True, cwd=folder)

    call("initdb", "-D", f"{folder}/data", "-A", "trust", "-U", "study", "--no-sync", "-E", "UTF8", "--locale=C.UTF-8")
    settings = f"-c listen_addresses= -c unix_socket_directories={folder} -c max_connections=200"
    call("pg_ctl", "-D", f"{folder}/data", "-w", "-o", settings, "-l", f"{folder}/log", "start")
    try:
        yield f"postgresql+psycopg://study@/postgres?host={folder}"
    finally:
        call("pg_ctl", "-D", f"{folder}/data", "-m", "immediate", "stop")
