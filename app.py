"""The app: `python app.py` serves it at http://127.0.0.1:7860. Weights load while the page is already there."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import Any

from hypersd import folders, hosting, pool, safety, ui
from hypersd.__main__ import main
from hypersd.engine import Engine
from hypersd.methods import installed
from hypersd.records import InputError

NAME, ENGINE = os.environ.get("HYPERSD_BACKBONE", "emoji"), os.environ.get("HYPERSD_ENGINE", "torch")


def load() -> Any:
    from hypersd.backbone import Backbone

    decoder, offload = os.environ.get("HYPERSD_DECODER", ""), os.environ.get("HYPERSD_OFFLOAD", "") == "1"
    return Backbone.load(NAME, device=device(), dtype=None, engine=ENGINE, decoder=decoder, offload=offload)


def device() -> str:
    from hypersd.backbone import best_device

    return best_device()


if __name__ == "__main__":
    if wanted := os.environ.get("HYPERSD_FETCH"):  # a Space begins with an empty disk
        main(["fetch", NAME, *wanted.split(",")])
    try:
        folders.check_accepted(NAME)
        methods = installed(NAME)
    except InputError as problem:
        sys.exit(f"hypersd: {problem}")
    on_gpu = hosting.gpu_draw(methods)  # None but on Hugging Face's lent GPUs
    filter = safety.of(NAME, (lambda: "cpu") if on_gpu else device)  # lent for drawing only
    engine = Engine(load, methods, on_gpu, filter=filter)
    if on_gpu:
        engine.load_now()
    front = pool.Shared(engine)
    study = pool.prepare(front, methods)
    demo = ui.build(front, methods, pool=study, backbone=NAME)
    print(study.where)
    ui.serve(demo, prevent_thread_lock=True)
    if not on_gpu:  # lent to visitors only
        engine.warm_up()
        study.fill()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a Space ends the app so: as Ctrl-C does
    with contextlib.suppress(KeyboardInterrupt):  # a second one, while the page is being closed
        demo.block_thread()
    study.close()
    os._exit(0)  # all is saved; a drawing that is still in torch would abort Python's own way out
