"""python -m hypersd: what it writes, and the one sentence that a wrong input gets."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch

from hypersd.__main__ import COMMANDS, main
from hypersd.backbone import Backbone
from hypersd.evaluate import ladder
from hypersd.methods import installed
from hypersd.pictures import read_png
from hypersd.records import InputError


def test_draws_a_picture_with_its_provenance(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.png"
    out.write_bytes(b"an older picture")
    given = f"draw --backbone {tiny_folder} --method base --steps 3 --guidance 4 --seed 1 --out {out}".split()
    assert main([*given, "--prompt", "a happy cat"]) == 0
    panel = read_png(out)
    assert (panel.prompt, panel.steps, panel.nfe, panel.guidance, panel.seed) == ("a happy cat", 3, 6, 4.0, 1)
    said = capsys.readouterr()
    assert "base, 3 steps, 6 NFE" in said.out
    assert "licence" in said.out
    assert said.err == ""


def test_a_quick_decoder_is_asked_for_and_told(tiny_folder: Path, tmp_path: Path) -> None:
    """The same latents make another picture, so its provenance has to say by what."""
    given = ["draw", "--backbone", str(tiny_folder), "--steps", "1", "--prompt", "a cat", "--out"]
    assert main([*given, str(tmp_path / "x.png")]) == 0
    quick = ["--decoder", str(tiny.build_decoder(tmp_path / "quick"))]
    assert main([*given, str(tmp_path / "y.png"), *quick]) == 0
    usual, other = read_png(tmp_path / "x.png"), read_png(tmp_path / "y.png")
    assert usual.pixels != other.pixels and usual.noise_sha256 == other.noise_sha256
    assert (usual.dtype + ", quick decoder", usual.base_sha256) == (other.dtype, other.base_sha256)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_offload_without_a_gpu_is_told(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--backbone", str(tiny_folder), "--steps", "1", "--prompt", "a cat", "--out", str(tmp_path / "x.png")]
    assert main(["draw", *given, "--offload"]) == 0
    said = "note: --offload changes nothing here: there is no GPU to make room on\n"
    assert capsys.readouterr().err.count(said) == 1


@pytest.mark.parametrize("command", ["draw", "evaluate", "evaluate --ladder", "sheet", "bench"])
def test_wherever_a_model_draws_it_is_held_as_asked(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not as it would be by itself."""
    asked: dict[str, object] = {}

    def load(*_arguments: object, **holding: object) -> None:
        asked.update(holding)
        raise InputError("enough")

    monkeypatch.setattr(Backbone, "load", load)
    monkeypatch.setattr(ladder.Yardstick, "load", lambda *_: SimpleNamespace(judge=None, real=None))
    (tmp_path / "prompts").write_text("a cat")
    own = {
        "draw": ["--prompt", "a cat"],
        "evaluate": ["--methods", "base", "--steps", "1"],
        "sheet": ["--arms", "base@1", "--prompts", str(tmp_path / "prompts")],
    }
    given = [*command.split(), *own.get(command, []), "--decoder", "quick", "--offload", "--out"]
    assert main([*given, str(tmp_path / "x.png")]) == 2
    assert (asked["decoder"], asked["offload"]) == ("quick", True)


def test_training_is_timed_without_a_decoder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--training", "--decoder", "quick"]) == 2
    assert "--training draws nothing; leave --decoder and --offload out" in capsys.readouterr().err


def test_says_which_words_were_ignored(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "cat " * 10 + "with a hat"
    given = ["--backbone", str(tiny_folder), "--steps", "1", "--out", str(tmp_path / "x.png")]
    assert main(["draw", "--prompt", prompt, *given]) == 0
    assert "this part is ignored: with a hat" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--prompt", ""], "prompt is empty"),
        (["--prompt", "cat " * 1250], "prompt has 5,000 characters"),
        (["--prompt", "cat \udcff"], "half a surrogate pair"),
        (["--steps", "0"], "steps must be a whole number from 1 to 1,000, got '0'"),
        (["--steps", "-1"], "got '-1'"),
        (["--steps", "10000"], "got '10000'"),
        (["--steps", "a"], "got 'a'"),
        (["--steps", "101"], "base was made for 1-100 steps, got 101"),
        (["--seed", "-1"], "seed must be a whole number"),
        (["--seed", "4294967296"], "seed must be a whole number"),
        (["--guidance", "lots"], "guidance must be a number from 0 to 30"),
        (["--eta", "2"], "eta must be a number from 0 to 1"),
        (["--method", "tcdd"], "method must be one of base"),
        (["--backbone", "sd99"], "backbone must be one of emoji, sd15, sdxl, sd3, flux or a model's folder"),
        (["--out", "none/x.png"], "the folder none does not exist"),
        (["--out", "x.jpg"], "pictures are saved as PNG"),
    ],
)
def test_a_wrong_input_is_one_sentence(
    given: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prompt = [] if "--prompt" in given else ["--prompt", "a cat"]
    assert main(["draw", *prompt, *given]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("hypersd: ")
    assert said.err.count("\n") == 1
    assert sentence in said.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_broken_model_is_one_sentence(
    damage: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:1000])
    out = tmp_path / "x.png"
    assert main(["draw", "--prompt", "a cat", "--backbone", str(folder), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"hypersd: model: unet/diffusion_pytorch_model.safetensors is {damage}")
    assert not out.exists()


def test_methods_as_json_is_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows == [json.loads(json.dumps(method.describe())) for method in installed().values()]


def test_methods_for_people_is_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["method", *installed()]


def test_stopping_is_not_a_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_given: object) -> None:
        raise KeyboardInterrupt(*said)

    monkeypatch.setitem(COMMANDS, "methods", COMMANDS["methods"]._replace(run=interrupted))
    for said in ([], ["stopped after 3 of 5 updates"]):
        assert main(["methods"]) == 130
        assert capsys.readouterr().err == f"hypersd: {said[0] if said else 'stopped'}\n"


def test_help_names_every_command_and_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom hypersd.__main__ import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(*(name for name in ('torch', 'PIL', 'diffusers', 'gradio') if name in sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == ""
    assert all(name in done.stdout for name in COMMANDS)


def test_runs_as_a_module(tmp_path: Path) -> None:
    given = ["draw", "--prompt", "a cat", "--steps", "a", "--out", str(tmp_path / "x.png")]
    done = subprocess.run([sys.executable, "-m", "hypersd", *given], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
