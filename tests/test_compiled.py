"""The OpenVINO engine draws what torch draws, with every adapter, and tells nobody that it did."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from hypersd import compiled
from hypersd.__main__ import main
from hypersd.adapters import AdapterFile
from hypersd.backbone import Backbone
from hypersd.generate import draw
from hypersd.methods import discover
from hypersd.pictures import read_png_provenance
from hypersd.records import InputError, Panel, Request

pytest.importorskip("openvino", reason="needs the openvino extra")


@pytest.fixture(scope="module")
def quick(tiny_folder: Path) -> Backbone:
    return Backbone.load(tiny_folder, engine="openvino")


def pixels(panel: Panel) -> np.ndarray:
    return np.frombuffer(panel.pixels, np.uint8).astype(int)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_the_network_and_the_decoder_answer_as_torch_does(rows: int, quick: Backbone, tiny_backbone: Backbone) -> None:
    x = torch.randn(rows, *quick.latent_shape, generator=torch.Generator().manual_seed(3))
    states = quick.embed(["a cat"] * rows)
    with torch.inference_mode():
        for t in (0, 37, 999):
            theirs = tiny_backbone.predict(x, t, states)
            assert torch.allclose(quick.predict(x, t, states), theirs, rtol=1e-4, atol=1e-5)
        assert (quick.decode(x).int() - tiny_backbone.decode(x).int()).abs().max() <= 1


def test_every_adapter_draws_the_same_picture_and_no_two_the_same(
    quick: Backbone, tiny_backbone: Backbone, tiny_adapters: Sequence[AdapterFile]
) -> None:
    drawn = []
    for method in discover(tiny_adapters, tiny_backbone.network_sha256).values():
        request = Request("a happy cat", 5, 4 if 4 in method.steps else method.steps.low)
        ours, theirs = draw(quick, request, method), draw(tiny_backbone, request, method)
        assert abs(pixels(ours) - pixels(theirs)).max() <= 1, method.name
        assert ours.dtype == ("float32, openvino" if method.smaller == 1 else "float32") and theirs.dtype == "float32"
        assert ours.pixels == draw(quick, request, method).pixels
        drawn.append(ours.pixels)
    assert len(set(drawn)) == len(drawn) > 3


def test_an_answer_is_not_written_over_by_the_next(quick: Backbone) -> None:
    x, states = quick.noise(1)[0], quick.embed(["a cat"])
    first = quick.predict(x, 500, states)
    kept = first.clone()
    quick.predict(2 * x, 10, states)
    assert torch.equal(first, kept)


def test_a_timestep_for_each_row_is_left_to_torch(quick: Backbone, tiny_backbone: Backbone) -> None:
    x = torch.cat([quick.noise(seed)[0] for seed in (1, 2)])
    t, states = torch.tensor([20, 900]), quick.embed(["a cat", "a dog"])
    assert torch.equal(quick.predict(x, t, states), tiny_backbone.predict(x, t, states))


def test_a_smaller_picture_is_left_to_torch(quick: Backbone, tiny_backbone: Backbone) -> None:
    x, states = quick.noise(1, smaller=2)[0], quick.embed(["a cat"])
    assert x.shape[-1] == quick.latent_shape[-1] // 2
    assert torch.equal(quick.predict(x, 20, states), tiny_backbone.predict(x, 20, states))
    assert torch.equal(quick.decode(x), tiny_backbone.decode(x))


def test_an_adapter_is_compiled_on_the_bare_base_whatever_torch_wears(
    tiny_folder: Path, tiny_backbone: Backbone, tiny_adapters: Sequence[AdapterFile]
) -> None:
    backbone = Backbone.load(tiny_folder, engine="openvino")
    backbone.wardrobe.free = lambda _: 0  # no room for a copy: the base itself is changed
    one, other = tiny_adapters[:2]
    states = backbone.embed(["a cat"])
    backbone.predict(backbone.noise(1, smaller=2)[0], 500, states, one)
    x = backbone.noise(1)[0]
    torch.testing.assert_close(
        backbone.predict(x, 500, states, other), tiny_backbone.predict(x, 500, states, other), rtol=1e-3, atol=1e-3
    )


def test_weights_without_a_place_in_the_trace_are_an_error(quick: Backbone) -> None:
    assert quick._compiled
    with pytest.raises(RuntimeError, match=r"no constant for nowhere\.weight"):
        compiled._exchange(quick._compiled._traced.clone(), {"nowhere.weight": torch.nn.Parameter(torch.ones(1))})


def test_compiling_opens_no_connection(tiny_folder: Path) -> None:
    """OpenVINO's own `convert_model` reports to its makers."""
    code = f"""
import sys
seen = []
sys.addaudithook(lambda event, args: seen.append((event, args[-1])) if event.startswith("socket.") else None)
import threading
from hypersd.backbone import Backbone
Backbone.load({str(tiny_folder)!r}, engine="openvino")
print([name for name, _ in seen if name in ("socket.connect", "socket.getaddrinfo", "socket.sendto")])
print([thread.name for thread in threading.enumerate() if "telemetry" in thread.name.lower()])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-2:] == ["[]", "[]"], done.stderr


def test_the_command_line_says_which_engine_drew(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    command = ["draw", "--backbone", str(tiny_folder), "--prompt", "a cat", "--steps", "1", "--out", str(out)]
    assert main([*command, "--engine", "openvino"]) == 0
    assert read_png_provenance(out)["dtype"] == "float32, openvino"


def test_wrong_engines_are_told(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="must be one of torch, openvino, got 'onnx'"):
        Backbone.load(tiny_folder, engine="onnx")
    with pytest.raises(InputError, match=r"float32 on the CPU, got torch\.bfloat16"):
        Backbone.load(tiny_folder, engine="openvino", dtype=torch.bfloat16)
    monkeypatch.setattr("hypersd.compiled.importlib.util.find_spec", lambda name: None)
    out = tmp_path / "x.png"
    command = ["draw", "--backbone", str(tiny_folder), "--prompt", "a cat", "--engine", "openvino", "--out", str(out)]
    assert main(command) == 2
    assert "install it with: pip install -e '.[openvino]'" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("rows", [1, 2])
def test_an_onnx_model_answers_as_torch_does(rows: int, tiny_backbone: Backbone) -> None:
    """What bench compares with computes the same."""
    runtime = pytest.importorskip("onnxruntime", reason="needs the onnx extra")
    x = torch.randn(rows, *tiny_backbone.latent_shape, generator=torch.Generator().manual_seed(3))
    states = tiny_backbone.embed(["a cat"] * rows)
    session = runtime.InferenceSession(compiled.to_onnx(tiny_backbone.unet, (x[:1], states[:1])))
    given = {"x": x.numpy(), "t": torch.tensor(37).numpy(), "states": states.numpy()}
    with torch.inference_mode():
        wanted = tiny_backbone.predict(x, 37, states)
    torch.testing.assert_close(torch.from_numpy(session.run(None, given)[0]), wanted, rtol=1e-3, atol=1e-4)
