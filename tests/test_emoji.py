"""The parts that made the embedded model: each resumes to the bit after kill -9, and does what its formulas say."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from parts import PARTS, UPDATES, synthetic
from test_text import TEXTS, bag_of_words
from torch import Tensor

from hypersd import checkpoint
from hypersd.emoji import artwork, assemble, autoencoder, decoder, measure, restore, teacher, text
from hypersd.records import InputError


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    synthetic(folder)
    return folder


def train(part: str, runs: Path, folder: Path) -> subprocess.Popen[bytes]:
    program = [sys.executable, str(Path(__file__).with_name("parts.py")), part, str(runs), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said.decode()[-2000:]


@pytest.mark.parametrize("part", PARTS)
def test_a_killed_part_resumes_to_the_same_bytes(part: str, runs: Path, tmp_path: Path) -> None:
    unbroken = train(part, runs, tmp_path / "unbroken")
    finish(unbroken)
    killed = train(part, runs, tmp_path / "killed")
    deadline = time.monotonic() + 200
    while not list((tmp_path / "killed").glob("checkpoints/step-*")):
        assert killed.poll() is None and time.monotonic() < deadline, "ended or hung before its first checkpoint"
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    at = checkpoint.latest(tmp_path / "killed" / "checkpoints")
    assert at is not None and 0 < at.step <= UPDATES
    finish(train(part, runs, tmp_path / "killed"))
    ends = [
        checkpoint.sha256(tmp_path / run / "checkpoints" / f"step-{UPDATES:08d}" / "tensors.safetensors")
        for run in ("unbroken", "killed")
    ]
    assert ends[0] == ends[1]


def test_normalising_is_exact_and_gives_unit_latents(runs: Path) -> None:
    torch.manual_seed(1)
    vae = autoencoder.network().eval()
    pictures = artwork.load(runs / "artwork")[0]
    x = autoencoder.to_float(pictures)
    with torch.inference_mode():
        before = autoencoder.reconstruct(vae, x)
    autoencoder.normalise(vae, autoencoder.encode_all(vae, pictures))
    latents = autoencoder.encode_all(vae, pictures)
    with torch.inference_mode():
        torch.testing.assert_close(autoencoder.reconstruct(vae, x), before, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(8), rtol=0, atol=1e-3)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(8), rtol=1e-3, atol=1e-3)


def test_psnr_of_a_known_error() -> None:
    x = torch.zeros(2, 3, 8, 8)
    assert autoencoder.psnr_db(x, x + 0.2) == pytest.approx(20.0, abs=1e-4)  # an error of 0.1 of the full range


def test_decoder_stage_leaves_the_encoder_alone(runs: Path) -> None:
    objective, _ = PARTS["decoder"](runs)
    assert isinstance(objective, decoder.Decoding)
    frozen = [n for n, p in objective.vae.named_parameters() if not p.requires_grad]
    assert frozen and all(n.startswith(("encoder.", "quant_conv.")) for n in frozen)
    assert not any(
        n.startswith(("encoder.", "quant_conv.")) for n, p in objective.vae.named_parameters() if p.requires_grad
    )


def test_captions_are_dropped_and_styled_as_often_as_said(runs: Path) -> None:
    objective, _ = PARTS["teacher"](runs)
    assert isinstance(objective, teacher.Denoising)
    data, generator = objective.data, torch.Generator().manual_seed(0)
    rows = data.train.repeat(400)
    states = objective.states(rows, generator)
    empty = torch.tensor(data.states[data.empty]).float()
    styled = torch.stack([torch.tensor(data.states[data.captions[r][0]]).float() for r in rows])

    def share(texts: Tensor) -> float:
        return float((states == texts).flatten(1).all(1).float().mean())

    assert share(empty) == pytest.approx(teacher.EMPTY, abs=0.03)
    assert share(styled) == pytest.approx((1 - teacher.EMPTY) * teacher.STYLED, abs=0.03)


def test_training_takes_noise_levels_by_the_logit_normal_law() -> None:
    schedule = teacher.Schedule.from_config(teacher.scheduler().config)
    below = teacher.noise_levels(schedule)
    assert below.diff().min() > 0 and below[-1] == 1
    logit = (1 / schedule.alphas_cumprod.double() - 1).log() / 2  # of sigma / (alpha + sigma): half the log of 1 / SNR
    t = torch.searchsorted(below, torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64))
    assert logit[t].mean().item() == pytest.approx(teacher.NOISE[0], abs=0.02)
    assert logit[t].std().item() == pytest.approx(teacher.NOISE[1], abs=0.05)


def test_sampling_with_a_network_that_knows_the_answer_returns_it() -> None:
    """A v-network built around one clean latent leads every noise to it, whatever the guidance."""
    schedule = teacher.Schedule.from_config(teacher.scheduler().config)
    answer = torch.randn(8, 16, 16, generator=torch.Generator().manual_seed(0))

    class Oracle(torch.nn.Module):
        def forward(self, x_t: Tensor, t: int, states: Tensor, return_dict: bool = True) -> tuple[Tensor]:
            alpha, sigma = schedule.level(t)
            return ((alpha * x_t - answer) / sigma,)

    z = teacher.sample(Oracle(), schedule, torch.zeros(3, 32, 256), torch.zeros(1, 32, 256), torch.Generator())
    alpha, sigma = schedule.level(-1)
    assert float((z - alpha * answer).abs().max()) < 6 * float(sigma)  # the last step stops at alphas_cumprod[0]


def test_assembling_names_the_part_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(artwork.ArtworkError, match="python -m hypersd emoji autoencoder"):
        assemble.make(tmp_path, assets=tmp_path)


def test_restored_weights_are_where_the_denoiser_begins(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """assets -> restore -> the objective starts from those weights, and says so in what decides the result."""
    folder, assets = tmp_path / "runs", tmp_path / "assets"
    synthetic(folder)
    shutil.rmtree(folder / "autoencoder")
    (assets / "emoji-sd" / "vae").mkdir(parents=True)
    torch.manual_seed(4)
    tokenizer = text.tokenizer_for(TEXTS, 600)
    tower = text.Tower(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
    text.export(tower, tokenizer, assets / "emoji-sd")
    (assets / "emoji-sd" / "head.safetensors").unlink()
    rows = artwork.load(folder / "artwork")[2]
    monkeypatch.setattr(artwork, "read_manifest", lambda *_: rows)
    torch.manual_seed(5)
    unet = teacher.network()
    unet.save_pretrained(assets / "emoji-sd" / "unet")
    restore.make(folder, assets=assets, teach=bag_of_words)
    assert text.load(folder / "text" / "export")[0].head.weight.isfinite().all()
    objective = teacher.Denoising(folder)
    torch.testing.assert_close(objective.unet.conv_in.weight, unet.conv_in.weight)
    assert "start" in objective.describe() and "start" not in teacher.Denoising(runs).describe()
    with pytest.raises(InputError, match="already there and would be lost"):
        restore.make(folder, assets=assets)


def test_evenly_takes_at_most_so_many_in_order() -> None:
    assert measure.evenly(list(range(10)), 4) == [0, 3, 6, 9]
    assert measure.evenly([5, 7], 4) == [5, 7]


def test_artwork_is_asked_what_drawings_of_other_words_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two cats the judge takes one for a dog; the Dog, whose label is written large, it knows."""
    monkeypatch.setattr(measure.words, "MEANT", {"kitty": r"\bcat\b", "pooch": "dog"})
    monkeypatch.setattr(measure.scorer, "embed_pictures", lambda judge, shown: torch.eye(2)[shown[:, 0, 0, 0].tolist()])
    labels, named = ["cat", "Dog"], ["cat", "cat", "Dog"]
    rows = [artwork.Picture(f"p/{i}", n, "noto", n, (), "animals", "train", "0") for i, n in enumerate(named)]
    pictures = np.zeros((3, 4, 4, 3), np.uint8)
    pictures[1:] = 1
    judge = cast(Any, None)  # asked of nothing, since its answer is the colour
    assert measure.synonyms_of_real(judge, torch.eye(2), labels, pictures, rows) == (0.5 + 1) / 2


def test_a_head_is_found_again_from_what_it_was_distilled_to(tmp_path: Path) -> None:
    """A tower whose head makes its states the teacher: the head that is fitted gives the same embeddings."""
    torch.manual_seed(0)
    tokenizer = text.tokenizer_for(TEXTS, 600)
    tower = text.Tower(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id).eval()
    text.export(tower, tokenizer, tmp_path)
    exported, _ = text.load(tmp_path)
    many = [f"{a} {b}" for a in TEXTS for b in TEXTS]
    ids = text.tokens(tokenizer, many)
    known = exported.embed(ids).numpy()
    text.fit_head(tmp_path, many, lambda _texts: known)
    fitted, _ = text.load(tmp_path)
    assert float((fitted.embed(ids) * torch.from_numpy(known)).sum(1).min()) > 0.99
