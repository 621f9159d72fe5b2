"""One thing that writes, for a program that is to be killed in the middle: python one_write.py WHAT FOLDER.

Appends to FOLDER/acked, past any buffer, what was acknowledged.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from voting import ANN

from hypersd.study import mirror
from hypersd.study.definition import Study, parse
from hypersd.study.export import export as write
from hypersd.study.votes import Store


def main(what: str, folder: Path) -> None:
    acked = os.open(folder / "acked", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    store = Store(folder / "study.db")
    asked = (folder / "ballots").read_text().split() if (folder / "ballots").exists() else []
    if what == "vote":
        os.write(acked, f"{store.vote(asked[0], ANN, 'left').kind}\n".encode())
    elif what == "votes":  # the first is to fail and to be tried again, as an annotator would
        for ballot in (asked[0], asked[0], asked[1]):
            os.write(acked, f"{store.vote(ballot, ANN, 'left').kind}\n".encode())
    elif what == "withdraw":
        store.withdraw(ANN)
        os.write(acked, b"erased\n")
    elif what == "flush":
        mirror.flush(store, mirror.Folder(folder / "mirror"))
        os.write(acked, b"sent\n")
    elif what == "export":
        write(store, exported(folder), folder / "pool", folder / "out", ["preference"])
        os.write(acked, b"exported\n")
    else:
        os.write(acked, b"migrated\n")


def exported(folder: Path) -> Study:
    """The study whose votes lie in the folder, as `test_export.simulated` wrote it down."""
    return parse(json.loads((folder / "definition").read_text()))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
