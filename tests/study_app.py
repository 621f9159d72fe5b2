"""The study behind a real server, to be killed: study_app.py FOLDER PORT [DATABASE]."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from booth import small
from fake import Painter, served
from rows import METHODS

from hypersd import ui

if __name__ == "__main__":
    pool = small(Path(sys.argv[1]), database=sys.argv[3] if sys.argv[3:] else None, ballots=20)
    with served(ui.build(Painter(), METHODS, credits="", pool=pool), server_port=int(sys.argv[2])):
        threading.Event().wait()
