"""The README is true: its tree, its commands, its links and its methods are those of the repository."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from listing import ROOT, files

from hypersd.__main__ import COMMANDS, main
from hypersd.adapters import found
from hypersd.emoji import measure
from hypersd.evaluate import ladder, report
from hypersd.folders import weights_sha256
from hypersd.methods import METHODS

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
PROSE = re.sub(r"^```.*?^```$|<!--.*?-->", "", README, flags=re.MULTILINE | re.DOTALL)
SHELL = [line for kind, text in BLOCKS if kind == "bash" for line in text.replace("\\\n", " ").splitlines()]
EXAMPLES = {
    line: words[words.index("hypersd") + 1 :]
    for line in SHELL
    if "hypersd" in (words := shlex.split(line, comments=True)) and "-m" in words
}
FEEDBACK = ("reward", "segmenter", "refine", "loop")
# Minutes to days, or the network; tested by themselves.
LONG = ("emoji", "evaluate", "bench", "fetch", "gather", *FEEDBACK)
LINKS = re.findall(r"!?\[[^]]*\]\(([^)\s]+)\)|src=\"([^\"]+)\"", PROSE)


def tree() -> Iterator[str]:
    """The path of each line of the printed tree: two spaces of indent a level, a name, then its clause."""
    (text,) = [text for kind, text in BLOCKS if kind == "text" and text.startswith("app.py")]
    parents: list[str] = []
    for line in text.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name, *clause = re.split(r"\s{2,}", line.strip(), maxsplit=1)
        assert clause, f"the tree says nothing about {name}"
        parents[depth:] = [name]
        yield "".join(parents)


def test_tree_is_the_real_one() -> None:
    """A folder with lines below it is listed in full; one without stands for everything in it."""
    shown = list(tree())
    opened = {folder for folder in shown if any(path.startswith(folder) and path != folder for path in shown)}
    visible = [name for name in files() if not name.startswith(".") and not name.endswith("__init__.py")]
    real = {line for name in visible for line in lines_for(name, opened)}
    assert [path for path in shown if path not in real] == [], "printed, but not there"
    assert sorted(real - set(shown)) == [], "there, but not printed"


def lines_for(name: str, opened: set[str]) -> Iterator[str]:
    """The lines of the tree that a file needs: its folders, down to the first that is not opened, then itself."""
    folders = name.split("/")[:-1]
    for depth in range(len(folders)):
        folder = "/".join(folders[: depth + 1]) + "/"
        yield folder
        if folder not in opened:
            return
    yield name


@pytest.mark.parametrize("arguments", EXAMPLES.values(), ids=" ".join)
def test_commands_parse(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert arguments[0] in COMMANDS, f"python -m hypersd has no command {arguments[0]}"
    ran: list[object] = []
    monkeypatch.setitem(COMMANDS, arguments[0], COMMANDS[arguments[0]]._replace(run=ran.append))
    assert main(arguments) == 0
    assert len(ran) == 1


def trains(words: list[str]) -> bool:
    return words[0] in LONG or (words[0] == "distill" and "--dry-run" not in words)


@pytest.mark.skipif(not (ROOT / "assets/emoji-sd").exists(), reason="the embedded model is not in assets yet")
@pytest.mark.parametrize("arguments", [words for words in EXAMPLES.values() if not trains(words)], ids=" ".join)
def test_quick_commands_run(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 0
    promised = [after for option, after in pairwise(arguments) if option == "--out"]
    assert [path.name for path in tmp_path.iterdir()] == promised


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_explained(name: str) -> None:
    row = [line for line in PROSE.splitlines() if line.startswith(f"| `{name}` |")]
    assert row, f"the README's table of methods lacks a row that starts with | `{name}` |"
    assert METHODS[name].paper in row[0], f"the row of {name} does not name {METHODS[name].paper}"


@pytest.mark.parametrize("link", sorted({first or second for first, second in LINKS}))
def test_links_lead_somewhere(link: str) -> None:
    if link.startswith("#"):
        headings = re.findall(r"^#+ (.+)$", PROSE, flags=re.MULTILINE)
        assert link[1:] in {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
    elif not link.startswith(("https://", "mailto:")):
        assert (ROOT / link.partition("#")[0]).exists()


def test_ci_runs_the_command_of_the_readme() -> None:
    last = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()[-1]
    assert "-m pytest" in last
    assert last in SHELL


def between(mark: str) -> str:
    """What the README shows between two marks."""
    found = re.search(rf"<!-- {mark} -->\n(.*?)<!-- /{mark} -->", README, flags=re.DOTALL)
    assert found is not None, f"the README has no <!-- {mark} -->"
    return found[1].strip()


def test_figures_of_the_model_are_those_that_were_measured() -> None:
    """Between the marks stands the table of emoji-measures.json, or nothing while there is no such file."""
    file = ROOT / "assets/emoji-measures.json"
    expected = measure.table(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else ""
    assert between("measures") == expected
    assert measure.COMMAND in README


@pytest.mark.parametrize("name", ["bench.json", "report.json", "ablation-report.json", "rivals-report.json"])
def test_what_was_measured_is_the_model_that_is_here(name: str) -> None:
    content = json.loads((ROOT / "assets/measured" / name).read_text(encoding="utf-8"))
    told = content if name == "bench.json" else content["plan"]
    assert told["base_sha256"] == weights_sha256(ROOT / "assets/emoji-sd", "emoji")


def test_figures_of_the_ablation_are_those_that_were_published() -> None:
    content = json.loads((ROOT / "assets/measured/ablation-report.json").read_text(encoding="utf-8"))
    assert between("ablation") == report.ablation(content)
    assert content["plan"]["prompts"] == 120 and content["plan"]["seeds"] == 2, "as the README says"
    known = {file.path.stem: file.sha256 for file in found(ROOT / "assets/emoji-lora")}
    for method in ("tcd", "hyper", "tscd"):
        for steps in (1, 2, 4, 8):
            stem = f"tscd-{steps}" if method == "tscd" else method
            assert content["adapters"][f"{method}-{steps}"] == known[stem]


@pytest.mark.parametrize("name", ["report.json", "ablation-report.json", "rivals-report.json"])
def test_nothing_is_published_that_failed_on_the_ladder(name: str) -> None:
    content = json.loads((ROOT / "assets/measured" / name).read_text(encoding="utf-8"))
    failed, _ = ladder.verdict(content["plan"]["judges"]["measure"])
    assert failed and content["ladder"]["dropped"] == failed
    assert not failed.keys() & content["metrics"].keys()


def test_differences_that_were_asked_for_are_those_that_were_published() -> None:
    content = json.loads((ROOT / "assets/measured/rivals-report.json").read_text(encoding="utf-8"))
    assert between("rivals") == report.rivals(content)
    assert content["plan"]["prompts"] == 611 and content["plan"]["seeds"] == 4, "as the README says"
    assert set(content["adapters"].values()) <= {file.sha256 for file in found(ROOT / "assets/emoji-lora")}


def test_presets_are_those_that_are_trained_with() -> None:
    from hypersd.distill import presets

    assert between("presets") == presets().strip()


def test_figures_of_the_methods_are_those_that_were_published() -> None:
    content = json.loads((ROOT / "assets/measured/report.json").read_text(encoding="utf-8"))
    assert between("evaluation") == report.readme(content)
    assert content["plan"]["prompts"] == 48 and content["plan"]["seeds"] == 2, "as the README says"
    assert set(content["adapters"].values()) <= {file.sha256 for file in found(ROOT / "assets/emoji-lora")}
