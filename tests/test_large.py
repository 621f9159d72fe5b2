"""True architectures: one update, one comparison. Slow; Stable Diffusion 1.5 is large, SDXL has no weights at all.

One by one they say what each takes: `python -m pytest -n 0 -m slow -s tests/test_large.py -k sd15`, or `-k sdxl`. What
SDXL would take is counted: on torch's meta device a tensor has a shape and bytes, and no values.
"""

from __future__ import annotations

import json
import re
import resource
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hypersd import adversary, cost, hosting
from hypersd.__main__ import main
from hypersd.adapters import AdapterFile, Lora
from hypersd.backbone import Backbone, StableDiffusionXL
from hypersd.cost import CONFIGS
from hypersd.distill import Distillation, preset
from hypersd.folders import BACKBONES
from hypersd.generate import StepInfo, denoise, draw
from hypersd.methods import METHODS, discover
from hypersd.muon import has_bfloat16
from hypersd.plan import MadeUp, counted
from hypersd.records import Request
from hypersd.releases import RELEASES
from hypersd.roles import Roles
from hypersd.schedule import Schedule
from hypersd.train import Recipe, Run, Step
from hypersd.wardrobe import GIGABYTE

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
TEXT = {"vocab_size": 49408, "max_position_embeddings": 77}
AUTOENCODER: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}


def sd15() -> Any:
    """The network with random weights, in bfloat16 where there are units for it; text states are random too."""
    from diffusers import UNet2DConditionModel

    dtype = torch.bfloat16 if has_bfloat16("cpu") else torch.float32
    unet = UNet2DConditionModel(**CONFIGS["sd15"]).to(dtype)
    return SimpleNamespace(
        name="sd15",
        unet=unet,
        schedule=Schedule.from_config(NOISE),
        device=torch.device("cpu"),
        dtype=dtype,
        latent_shape=(4, 64, 64),
        network_sha256="random",
        embed=lambda texts: torch.randn(len(texts), 77, 768, generator=torch.Generator().manual_seed(0)).to(dtype),
    )


@pytest.mark.slow
def test_an_update_of_sd15_at_full_size(tmp_path: Path) -> None:
    backbone = sd15()
    assert sum(p.numel() for p in backbone.unet.parameters()) == 859_520_964
    method = METHODS["tscd"]
    stage = method.stages[1]  # both distances
    objective = Distillation(backbone, MadeUp.of(backbone, 1), method, stage, preset("sd15").settings)
    run = Run(objective, Recipe(updates=1, batch=1, lr=1e-5), tmp_path)
    with counted(backbone.unet) as calls:
        entry = run.update()
    assert entry["student/norm"] > 0 and entry["adversary/norm"] > 0
    assert (calls["with gradient"], calls["without gradient"]) == (2, 3)  # the adversary looks at fake and real
    assert told("an update of one latent") < 16


def told(what: str) -> float:
    """The peak of this process's memory in GB, said aloud: the figure is what these tests are run for."""
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{what}: peak memory {peak_gb:.1f} GB")  # noqa: T201
    return peak_gb


@pytest.mark.slow
def test_four_methods_of_sd15_at_full_size(tmp_path: Path) -> None:
    """One comparison, each method in one step: the files in half precision, the arithmetic in float32, 512 pixels."""
    folder = full(tmp_path / "sd15")
    backbone = Backbone.load(folder)
    assert backbone.picture_px == 512
    files = tiny.adapters(folder, tmp_path / "lora", rank=4, only=("lcm", "tcd", "hyper"))
    table = discover(files, backbone.network_sha256)
    assert list(table) == ["base", "lcm", "tcd", "hyper"]
    seen = {}
    for method in table.values():
        panel = draw(backbone, Request("a happy cat", seed=1, steps=1), method)
        seen[method.name] = panel.pixels
        print(f"{method.name}: {panel.seconds:.0f} s, {panel.nfe} NFE")  # noqa: T201
    assert len(set(seen.values())) == 4
    assert told("four methods") < 20


def full(folder: Path) -> Path:
    """Stable Diffusion 1.5's network, text encoder and autoencoder with random weights, as its makers lay it out."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    text = CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        projection_dim=768,
        **TEXT,
    )
    vae = AutoencoderKL(sample_size=512, **AUTOENCODER)
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing", **NOISE)
    pipeline = StableDiffusionPipeline(
        vae=vae.half(), text_encoder=CLIPTextModel(text).half(), tokenizer=tiny.tokenizer(),
        unet=UNet2DConditionModel(**CONFIGS["sd15"]).half(),
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------ SDXL, without its weights


def sdxl(folder: Path, dtype: torch.dtype) -> StableDiffusionXL:
    """All of Stable Diffusion XL on the meta device."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    words = tiny.tokenizer()
    words.model_max_length = 77
    with torch.device("meta"):
        first = CLIPTextModel(CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768,
            **TEXT,
        ))  # fmt: skip
        second = CLIPTextModelWithProjection(CLIPTextConfig(
            hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280,
            hidden_act="gelu", **TEXT,
        ))  # fmt: skip
        vae = AutoencoderKL(sample_size=1024, scaling_factor=0.13025, force_upcast=True, **AUTOENCODER)
        unet = UNet2DConditionModel(**CONFIGS["sdxl"])
    models = {"text_encoder": first, "text_encoder_2": second, "vae": vae, "unet": unet}
    parts = {"tokenizer": words, "tokenizer_2": words} | {n: nn.Module.to(m, dtype) for n, m in models.items()}
    return StableDiffusionXL("sdxl", folder, "", parts, Schedule.from_config(NOISE))


def on_meta(made: Callable[..., Any]) -> Callable[..., Any]:
    def make(*arguments: Any, **options: Any) -> Any:
        with torch.device("meta"):
            return made(*arguments, **options)

    return make


def size(tensors: Iterable[Tensor]) -> float:
    """In GB, what two share counted once."""
    each = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(each.values()) / 1e9


@pytest.mark.slow
def test_four_methods_of_sdxl_walk_their_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One comparison of 1024 pixels, each method in two steps, with LoRAs of the published ranks and shapes."""
    backbone = sdxl(tmp_path, torch.float16)
    held = hosting._gigabytes(backbone)
    assert held == pytest.approx(float(re.findall(r"(\d+) GB", BACKBONES["sdxl"].summary)[0]), rel=0.03)

    adapter = on_meta(Roles(cost.read("sdxl").unet).add)("any", rank=64).adapter()
    published = [r for r in RELEASES if r.backbone == "sdxl" and r.name in ("lcm", "tcd", "tscd-2")]
    for release in published:
        width = 4 if release.name == "tscd-2" else 2  # bytes a number, in their makers' files
        assert width * sum(t.numel() for t in adapter.values()) / 1e6 == pytest.approx(release.megabytes, rel=0.01)
    monkeypatch.setattr(Backbone, "_read", lambda *_: Lora(adapter))
    backbone.wardrobe.free = lambda _: 80 * GIGABYTE
    files = [AdapterFile(Path(f"{r.name}.safetensors"), r.name, r.card("sdxl", 64)) for r in published]
    table = discover(files, "sdxl")
    assert list(table) == ["base", "lcm", "tcd", "tscd"]

    for name, method in table.items():
        seen: list[StepInfo] = []
        with torch.inference_mode(), counted(backbone.unet) as calls:  # copies of the network count too
            found = denoise(backbone, Request("a happy cat", seed=1, steps=2), method, on_step=seen.append)
        assert [(step.timestep, step.x0.shape) for step in seen] == [(999, (1, 4, 128, 128)), (499, (1, 4, 128, 128))]
        assert (calls["without gradient"], calls["samples"], found.nfe) == ((2, 4, 4) if name == "base" else (2, 2, 2))
        assert found.x.is_meta and found.x.shape == (1, 4, 128, 128)
        assert backbone.picture(found.x).shape == (1, 3, 1024, 1024)

    copies = backbone.wardrobe._copies.values()
    whole = size(p for network in (backbone.unet, *copies) for p in network.parameters())
    touched = sum(
        backbone.unet.get_parameter(f"{n.removesuffix('.lora_A')}.weight").numel() for n in adapter if "_A" in n
    )
    bare = size(backbone.unet.parameters())
    assert len(copies) == 3 and whole - bare == pytest.approx(3 * 2 * touched / 1e9)
    print(f"four methods of SDXL: {held:.1f} GB of weights, {(whole - bare) / 3:.1f} GB a merged copy")  # noqa: T201


class Attention(cost._Attention):
    """What a fused kernel keeps and gives; on meta torch would hold the matrix of all pairs."""

    @staticmethod
    def backward(context: Any, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in context.saved_tensors[:3])


class Fused(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return Attention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
def test_an_update_of_sdxl_takes_what_the_plan_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """TSCD's stage with both distances, one latent, forward and backward, and AdamW's step."""
    for owner, name in ((Roles, "add"), (adversary, "Adversary")):
        monkeypatch.setattr(owner, name, on_meta(getattr(owner, name)))
    monkeypatch.setattr(Distillation, "_arithmetic", lambda _: nullcontext())  # there is no autocast for meta
    backbone, method = sdxl(tmp_path, torch.bfloat16), METHODS["tscd"]
    text = torch.zeros(1, 78, 2048)
    data, settings = MadeUp(torch.zeros(1, *backbone.latent_shape), text, text), preset("sdxl").settings
    objective = Distillation(backbone, data, method, method.stages[1], settings)
    learners = objective.modules()
    own = {p.untyped_storage()._cdata for m in (backbone.unet, *learners.values()) for p in m.parameters()}
    kept: dict[str, dict[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept[turn][tensor.untyped_storage()._cdata] = tensor
        return tensor

    losses = objective.losses(Step(0, Recipe(updates=1, batch=1, lr=1e-5)))
    with counted(backbone.unet) as calls:
        for turn in ("student", "adversary"):
            kept[turn] = {}
            with Fused(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                name, loss = next(losses)
            assert name == turn and loss.is_meta and loss.shape == ()
            loss.backward()
    assert next(losses, None) is None
    assert (calls["with gradient"], calls["without gradient"], calls["samples"]) == (2, 3, 6)

    held: list[Tensor] = [*backbone.unet.parameters(), *objective.roles["ema"].parameters()]
    for module in learners.values():
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5)
        optimizer.step()
        moments = [m for state in optimizer.state.values() for m in (state["exp_avg"], state["exp_avg_sq"])]
        learned = list(module.parameters())
        assert all(p.grad is not None and p.grad.shape == p.shape for p in learned)
        held += [*learned, *(p.grad for p in learned if p.grad is not None), *moments]
    activations = size(kept["student"].values())

    assert main(["plan", "--backbone", "sdxl", "--batch", "8"]) == 0  # eight times one latent
    said = capsys.readouterr().out
    told_of = re.search(r"activations without checkpointing: ([\d.]+) GB, with the above ([\d.]+) GB", said)
    assert told_of and "1 latent(s) at a time" in said
    assert activations == pytest.approx(float(told_of[1]), rel=0.05)
    assert size(held) + activations == pytest.approx(float(told_of[2]), rel=0.03)
    assert size(kept["adversary"].values()) < 0.01 * activations
    with capsys.disabled():
        print(f"an update of SDXL: {size(held):.1f} GB held, {activations:.1f} GB of activations")  # noqa: T201
