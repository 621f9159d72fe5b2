"""A denoiser and a decoder compiled by OpenVINO: what torch computes, to rounding, sooner on a CPU (see `bench`).

Optional: `pip install -e '.[openvino]'`, then `HYPERSD_ENGINE=openvino python app.py`. The network is traced once; an
adapter is merged by exchanging the constants that it changes and compiling again (1 s for 17 M parameters), so nothing
is traced twice. Arithmetic is float32 on every processor: where it has bfloat16 units OpenVINO would take those by
itself, and the pictures would be others than torch's.
"""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hypersd.network import call
from hypersd.records import InputError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel

MISSING = "the openvino engine is not installed; install it with: pip install -e '.[openvino]'"


class Compiled:
    """The two networks of one base. float32 in, float32 out, on the CPU; not for training."""

    def __init__(self, unet: UNet2DConditionModel, vae: AutoencoderKL, example: tuple[Tensor, Tensor]) -> None:
        """`example` is (latents [1, c, h, w], states [1, tokens, width]); any batch can be asked for afterwards.

        Raises:
            InputError: OpenVINO is not installed, or the networks are not float32 on the CPU.
        """
        if importlib.util.find_spec("openvino") is None:
            raise InputError(MISSING)
        if unet.device.type != "cpu" or unet.dtype != torch.float32:
            raise InputError(f"the openvino engine computes float32 on the CPU, got {unet.dtype} on {unet.device}")
        x, states = example
        self.unet = unet
        self._traced = _trace(_Network(unet), (x, torch.tensor(0), states))
        self._decoder = _Programs(_trace(_Decoder(vae), (x,)))

    def network(self, worn: UNet2DConditionModel) -> CompiledNetwork:
        """Compile the base itself, or `worn`: a copy of it with other weights (`adapters.dressed`)."""
        model = self._traced.clone()
        _exchange(model, {name: p for name, p in worn.named_parameters() if p is not self.unet.get_parameter(name)})
        return CompiledNetwork(_Programs(model))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents as the autoencoder has them [n, c, h, w] -> pictures [n, 3, height, width] around -1..1."""
        return self._decoder(latents)


class CompiledNetwork:
    """x_t [n, c, h, w], a timestep, states [n, tokens, width] -> the network's output [n, c, h, w]."""

    def __init__(self, programs: _Programs) -> None:
        self._programs = programs

    def __call__(self, x_t: Tensor, t: int, states: Tensor) -> Tensor:
        return self._programs(x_t, torch.tensor(t), states)


class _Programs:
    """One model, compiled when a size of batch is first asked for: 1 and 2 for themselves, the rest together."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._compiled: dict[int, Any] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        size = len(inputs[0]) if len(inputs[0]) <= 2 else -1
        if size not in self._compiled:
            model = self._model.clone()
            model.reshape({i: _shape(x, size) for i, x in enumerate(inputs)})
            self._compiled[size] = _compile(model)
        output = self._compiled[size]([x.detach().numpy() for x in inputs])[0]
        return torch.from_numpy(output.copy())  # the engine writes over its own buffer next time


class _Network(nn.Module):
    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.inner = unet

    def forward(self, x: Tensor, t: Tensor, states: Tensor) -> Tensor:
        return call(self.inner, x, t, states)


class _Decoder(nn.Module):
    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.inner = vae

    def forward(self, latents: Tensor) -> Tensor:
        return self.inner.decode(latents, return_dict=False)[0]


@torch.inference_mode(False)
@torch.no_grad()
def to_onnx(unet: UNet2DConditionModel, example: tuple[Tensor, Tensor]) -> bytes:
    """The network as an ONNX model with inputs x, t, states and any batch; needs the package `onnx`."""
    x, states = (part.clone() for part in example)
    batch = {0: "n"}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as below, and because this exporter is the one that asks for less
        torch.onnx.export(
            _Network(unet).eval(), (x, torch.tensor(0), states), f"{folder}/model.onnx", dynamo=False, opset_version=17,
            input_names=["x", "t", "states"], output_names=["output"], dynamic_axes={"x": batch, "states": batch},
        )  # fmt: skip
        return Path(folder, "model.onnx").read_bytes()


@torch.inference_mode(False)
@torch.no_grad()
def _trace(module: nn.Module, example: tuple[Tensor, ...]) -> Any:
    """torch -> OpenVINO's model, by its frontend; `openvino.convert_model` would tell its makers of it."""
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    example = tuple(x.clone() for x in example)  # inference tensors cannot be traced with
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer calls every check of a shape in Python a danger
        decoder = TorchScriptPythonDecoder(module.eval(), example_input=example)
        frontend = FrontEndManager().load_by_framework("pytorch")
        model = frontend.convert(frontend.load(decoder))
    for given, x in zip(model.inputs, example, strict=True):
        given.get_node().set_element_type(_element_type(x))
        given.get_node().set_partial_shape(_shape(x, -1))
    model.validate_nodes_and_infer_types()
    return model


def _element_type(x: Tensor) -> Any:
    import openvino

    return openvino.Type.i64 if x.dtype == torch.int64 else openvino.Type.f32


def _shape(x: Tensor, size: int) -> Any:
    """That of `x`, a scalar or a batch, for batches of `size`; of any size, if it is -1."""
    import openvino

    return openvino.PartialShape([size, *x.shape[1:]] if x.ndim else [])


def _exchange(model: Any, weights: dict[str, nn.Parameter]) -> None:
    """Put other numbers in the place of those constants of a traced `_Network` that carry these parameters' names."""
    from openvino import opset13

    left = dict(weights)
    for node in model.get_ordered_ops():
        name = node.get_friendly_name().removeprefix("self.inner.")
        if node.get_type_name() == "Constant" and name in left:
            node.output(0).replace(opset13.constant(left.pop(name).detach().numpy()).output(0))
    if left:
        raise RuntimeError(f"the traced network has no constant for {next(iter(left))}")


def _compile(model: Any) -> Any:
    import openvino

    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
        "ENABLE_CPU_PINNING": "NO",  # the cores are shared with torch and with other programs
    }
    return openvino.Core().compile_model(model, "CPU", options)
