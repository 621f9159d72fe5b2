"""The app: `python app.py` serves it at http://127.0.0.1:7860. Weights load while the page is already there."""

from __future__ import annotations

from typing import Any

from hypersd import ui
from hypersd.engine import Engine
from hypersd.methods import METHODS


def load() -> Any:
    from hypersd.backbone import Backbone

    return Backbone.load("emoji")


if __name__ == "__main__":
    engine = Engine(load, METHODS)
    demo = ui.build(engine, METHODS)
    ui.serve(demo, prevent_thread_lock=True)
    engine.warm_up()
    demo.block_thread()
