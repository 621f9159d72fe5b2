"""The folder of a Space: what lies in it, and that it runs as it lies there."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import checker
import pytest
import requests
import yaml
from gradio_client import Client
from listing import ROOT, files

from hypersd import releases
from hypersd.__main__ import main
from hypersd.safety import HELD
from hypersd.space import ATTRIBUTES, LARGE, PYTHON, lay_out

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
ALLOWED = re.compile(
    r"app\.py|README\.md|LICENSE|requirements\.txt|\.gitattributes|hypersd/[\w/]+\.(py|css|html|js|yaml)"
    r"|assets/(emoji-sd|emoji-lora|measured)/[\w/.-]+|assets/(study\.yaml|CREDITS\.md)"
)


def listed(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def head(folder: Path) -> dict[str, object]:
    found: dict[str, object] = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    return found


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("space") / "mine"
    lay_out(folder)
    return folder


def test_holds_what_the_app_needs_and_nothing_else(emoji: Path) -> None:
    found = listed(emoji)
    assert [name for name in found if not ALLOWED.fullmatch(name)] == []
    assert "FETCH" not in (emoji / "app.py").read_text().partition("NAME, ENGINE")[0], "its adapters are in assets"
    assert {name for name in files() if name.startswith("hypersd/")} <= set(found)
    assert not [name for name in found if "__pycache__" in name or name.startswith("tests/")]


def test_large_and_binary_files_go_by_lfs(emoji: Path) -> None:
    assert (emoji / ".gitattributes").read_text() == ATTRIBUTES
    endings = tuple(line.split()[0].removeprefix("*") for line in ATTRIBUTES.splitlines())
    for name in listed(emoji):
        content = (emoji / name).read_bytes()
        assert name.endswith(endings) or (len(content) < LARGE and b"\0" not in content), name


def test_git_itself_agrees(emoji: Path, tmp_path: Path) -> None:
    git = ["git", "-c", "safe.directory=*"]
    subprocess.run([*git, "init", "-q", tmp_path], check=True)
    (tmp_path / ".gitattributes").write_text(ATTRIBUTES)
    names = ["assets/emoji-sd/unet/a.safetensors", "assets/measured/b.png", "app.py"]
    told = subprocess.run(
        [*git, "check-attr", "filter", *names], cwd=tmp_path, check=True, capture_output=True, text=True
    ).stdout
    assert [line.rsplit(" ", 1)[1] for line in told.splitlines()] == ["lfs", "lfs", "unspecified"]


def test_asks_for_what_zerogpu_has(emoji: Path) -> None:
    found = head(emoji)
    assert (found["sdk"], found["app_file"], found["python_version"]) == ("gradio", "app.py", "3.12.12")
    assert len(str(found["short_description"])) <= 60
    ours = (ROOT / "requirements.txt").read_text().splitlines()
    theirs = (emoji / "requirements.txt").read_text().splitlines()
    assert [line for line in theirs if line not in ours] == ["torch>=2.8,<2.12  # what ZeroGPU knows"]
    assert len(theirs) == len(ours)


@pytest.mark.network
@pytest.mark.skipif(find_spec("uv") is None, reason="uv is not installed")
@pytest.mark.parametrize("torch", ["2.8.0", "2.11.0"])  # the oldest and the newest that ZeroGPU knows
def test_what_it_asks_for_is_to_be_had_on_zerogpu(emoji: Path, tmp_path: Path, torch: str) -> None:
    """As wheels for its Python, together with what the Space's build adds: Gradio with extras, and `spaces`."""
    added = [f"gradio[oauth,mcp]=={head(emoji)['sdk_version']}", "spaces>=0.51", "uvicorn>=0.14.0", "websockets>=10.4"]
    (tmp_path / "asked.txt").write_text("\n".join([f"torch=={torch}", *added, f"-r {emoji / 'requirements.txt'}"]))
    command = [sys.executable, "-m", "uv", "pip", "compile", str(tmp_path / "asked.txt"), "--only-binary", ":all:",
               "--python-version", PYTHON, "--python-platform", "x86_64-manylinux_2_28", "--no-annotate",
               "--no-config", "--no-python-downloads"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, done.stderr
    assert {f"torch=={torch}", f"gradio=={head(emoji)['sdk_version']}"} < set(done.stdout.splitlines())


def test_another_base_model_takes_no_weights_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mine"
    assert main(["space", "--out", str(out), "--backbone", "sd15", "--with", "tscd,hyper"]) == 0
    assert not (out / "assets").exists()
    app = (out / "app.py").read_text()
    assert '("HYPERSD_BACKBONE", "sd15")\nos.environ.setdefault("HYPERSD_FETCH", "hyper,tscd")\nNAME' in app
    compile(app, "app.py", "exec")
    models = head(out)["models"]
    assert isinstance(models, list) and set(models) == {release.repository for release in releases.of("sd15")}
    said = capsys.readouterr().out
    assert re.search(rf"{out}: \d+ files, \d+ MB", said)
    for command in re.findall(r"^  (hf [\w ]+?) YOU", said, flags=re.MULTILINE):
        hf = Path(sys.executable).with_name("hf")
        subprocess.run([hf, *command.split()[1:], "--help"], check=True, capture_output=True)
    for word in ("hf upload", "HF_TOKEN", "HYPERSD_MIRROR", "HYPERSD_SAFETY", "git-lfs", "licences"):
        assert word in said


@pytest.mark.parametrize(("given", "sentence"), [
    (["--backbone", "sd15", "--with", "lcn"], "no lcn is published for sd15; choose from hyper, tscd"),
    (["--backbone", "sd99"], "a Space gets its base model from the hub: choose from emoji, sd15"),
    (["--with", "lcm"], "--with is for published adapters"),
])  # fmt: skip
def test_a_wrong_wish_leaves_nothing_behind(
    given: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["space", "--out", str(tmp_path / "mine"), *given]) == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "secret.txt").write_text("mine")
    assert main(["space", "--out", str(tmp_path)]) == 2
    assert "is not empty; give --out a new folder" in capsys.readouterr().err
    assert listed(tmp_path) == ["secret.txt"]


@pytest.fixture(scope="module")
def running(emoji: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The app as a Space runs it: by its own files, from its own folder; public, with a filter that finds no harm."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "TMPDIR", "OMP_NUM_THREADS")}
    harmless = checker.folder(tmp_path_factory.mktemp("checker"))
    environment = {**kept, "GRADIO_SERVER_PORT": str(port), "HYPERSD_STUDY": "none.yaml", "HF_HUB_OFFLINE": "1",
                   "HYPERSD_SAFETY": str(harmless), "PYTHONDONTWRITEBYTECODE": "1"}  # fmt: skip
    log = tmp_path_factory.mktemp("log") / "log.txt"
    with log.open("w") as told:
        app = subprocess.Popen([sys.executable, "app.py"], cwd=emoji, env=environment, stdout=told, stderr=told)
    try:
        end = time.monotonic() + 120
        while not _answers(f"http://127.0.0.1:{port}/config"):
            assert app.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/"
    finally:
        app.terminate()
        app.wait(30)
    assert "the safety filter is on, by" in log.read_text()


def _answers(address: str) -> bool:
    try:
        return requests.get(address, timeout=5).ok
    except requests.ConnectionError:
        return False


def test_draws_from_its_own_folder(running: str) -> None:
    client = Client(running, verbose=False)
    (panel,) = client.predict("a happy cat", steps=1, methods=["hyper"], api_name="/compare")
    assert panel["png"].startswith("data:image/png;base64,") and panel["problem"] == ""
    assert (panel["provenance"]["backbone"], panel["provenance"]["steps"]) == ("emoji", 1)
    (refused,) = client.predict("a nude cat", steps=1, methods=["hyper"], api_name="/compare")
    assert refused["png"] == "" and refused["problem"] not in ("", HELD)
    client.close()


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [(["--backbone", str(ROOT / "assets/emoji-sd")], "a Space gets its base model from the hub: choose from emoji"),
     (["--backbone", "sdxl", "--with", "lightning-unet"], "lightning-unet is a network of 5140 MB")],
)  # fmt: skip
def test_what_a_space_could_not_start_or_draw_with_is_refused(
    asked: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["space", "--out", str(tmp_path / "a"), *asked]) == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "a").exists()


def test_what_is_not_for_commerce_is_not_laid_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["space", "--out", str(tmp_path / "a"), "--backbone", "sdxl", "--with", "hyper,dmd2"]) == 2
    assert "dmd2 is CC BY-NC 4.0" in capsys.readouterr().err and not (tmp_path / "a").exists()
    assert main(["space", "--out", str(tmp_path / "a"), "--backbone", "flux"]) == 2
    assert "flux is not for commerce (FLUX.1 [dev] Non-Commercial" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    lay_out(tmp_path / "b", "sdxl")
    line = next(line for line in (tmp_path / "b/app.py").read_text().splitlines() if "HYPERSD_FETCH" in line)
    assert "lightning" in line and not any(name in line for name in ("dmd2", "flash", "turbo", "hyper-unet", "perflow"))
