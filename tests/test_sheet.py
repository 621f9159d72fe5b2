"""A sheet of frozen prompts and methods."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
from PIL import Image

from hypersd.__main__ import main
from hypersd.evaluate.plan import Arm
from hypersd.evaluate.sheet import arms
from hypersd.records import InputError


def test_columns_are_read_as_they_are_typed() -> None:
    assert arms("base@25, hyper@1,tscd-cfg@8") == [Arm("base", 25), Arm("hyper", 1), Arm("tscd-cfg", 8)]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("hyper", "such as hyper@1, got 'hyper'"),
        ("hyper@x", "steps of hyper must be a whole number"),
        ("", "1 to 12 columns, got 0"),
        (",".join(["base@1"] * 13), "1 to 12 columns, got 13"),
    ],
)
def test_what_is_no_column_is_told(text: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        arms(text)


def test_each_row_is_one_prompt_and_one_noise(tiny_folder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    tiny.adapters(model, model / "lora", only=("lcm",))
    (tmp_path / "prompts.txt").write_text("a cat\na red dog\n")
    command = ["sheet", "--arms", "base@4,lcm@1,lcm@2", "--backbone", str(model), "--prompts"]
    assert main([*command, str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "sheet.png")]) == 0
    with Image.open(tmp_path / "sheet.png") as picture:
        told = json.loads(picture.text["hypersd"])  # type: ignore[attr-defined]
    assert told["rows"] == ["a cat", "a red dog"] and told["columns"] == ["Base model, 4", "LCM, 1", "LCM, 2"]
    first, second = told["panels"][:3], told["panels"][3:]
    assert [(p["method"], p["steps"]) for p in first] == [("base", 4), ("lcm", 1), ("lcm", 2)]
    assert len({p["noise_sha256"] for p in first}) == len({p["noise_sha256"] for p in second}) == 1
    assert first[0]["noise_sha256"] != second[0]["noise_sha256"]


def test_a_method_that_is_not_there_is_told(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    given = [
        "--backbone",
        str(tiny_folder),
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--out",
        str(tmp_path / "x.png"),
    ]
    assert main(["sheet", "--arms", "base@101", *given]) == 2
    assert "base was made for 1-100 steps, got 101" in capsys.readouterr().err
    assert main(["sheet", "--arms", "hyper@1", *given]) == 2
    assert "method must be one of base" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()
