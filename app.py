"""The app: `python app.py` serves it at http://127.0.0.1:7860. Weights come and load while the page is there."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from functools import partial
from typing import Any

from hypersd import folders, hosting, pool, safety, ui
from hypersd.engine import Engine
from hypersd.methods import bring, installed
from hypersd.records import InputError

NAME, ENGINE = os.environ.get("HYPERSD_BACKBONE", "emoji"), os.environ.get("HYPERSD_ENGINE", "torch")


def load() -> Any:
    """The backbone as the environment wants it. Raises InputError as `Backbone.load` does, and for a wrong setting."""
    from hypersd.backbone import Backbone

    decoder, offload = os.environ.get("HYPERSD_DECODER", ""), os.environ.get("HYPERSD_OFFLOAD", "")
    if offload not in ("", "0", "1"):
        raise InputError(f"HYPERSD_OFFLOAD must be 1 or 0, got {offload[:40]!r}")
    if offload == "1" and device() == "cpu":
        logging.getLogger(__name__).warning("HYPERSD_OFFLOAD=1 changes nothing here: there is no GPU to make room on")
    if NAME == "emoji" and ENGINE == "torch" and device() == "cpu":
        leave_a_core()
    return Backbone.load(NAME, device=device(), dtype=None, engine=ENGINE, decoder=decoder, offload=offload == "1")


def leave_a_core() -> None:
    """Let torch have one core less than there are: the page needs one, often in a browser on the same machine. A
    network this small gains little by the last core, and loses much where threads wait for one that had to give way.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), cores() - 1)))


def cores() -> int:
    """Those that this process may use, where the system says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device() -> str:
    from hypersd.backbone import best_device

    return best_device()


if __name__ == "__main__":
    wanted = [name.strip() for name in os.environ.get("HYPERSD_FETCH", "").split(",") if name.strip()]
    try:
        folders.check_accepted(NAME)
        methods = installed(NAME, wanted)
    except InputError as problem:
        sys.exit(f"hypersd: {problem}")
    on_gpu = hosting.gpu_draw(methods)  # None but on Hugging Face's lent GPUs
    filter = safety.of(NAME, (lambda: "cpu") if on_gpu else device)  # lent for drawing only
    engine = Engine(load, methods, on_gpu, filter=filter, bring=partial(bring, methods))
    if on_gpu:  # there the page has to wait
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
