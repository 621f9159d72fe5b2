"""The frozen prompts: what the manifest says today, no text twice, none that was trained on in a held-out set."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hypersd.emoji import artwork, prompts

ROWS = list(artwork.read_manifest())
FROZEN = prompts.load()


def test_the_frozen_prompts_are_those_of_the_frozen_manifest() -> None:
    assert prompts.derive(ROWS) == FROZEN
    assert prompts.derive(reversed(ROWS)) == FROZEN  # the order of rows decides nothing


def test_no_text_comes_twice_and_every_set_is_there() -> None:
    texts = [prompt.text for prompt in FROZEN]
    assert len(texts) == len(set(texts))
    assert {prompt.set for prompt in FROZEN} == set(prompts.SETS)
    assert sum(prompt.set == "seen" for prompt in FROZEN) == prompts.SEEN


def test_held_out_means_held_out() -> None:
    trained = {caption for row in ROWS if row.split in ("train", "twin") for caption in artwork.captions(row)}
    for prompt in FROZEN:
        if prompt.set != "seen":
            assert prompt.text not in trained, prompt
    concepts = {row.concept for row in ROWS if row.split == "train"}
    by_id = {row.id: row for row in ROWS}
    for prompt in FROZEN:
        if prompt.picture:
            row = by_id[prompt.picture]
            assert (row.label, row.split == "train") == (prompt.own, prompt.set == "seen")
            assert (row.concept in concepts) == (prompt.set != "concept")


def test_a_changed_or_missing_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "emoji-prompts.json"
    with pytest.raises(artwork.ArtworkError, match="python -m hypersd emoji prompts"):
        prompts.load(file)
    shutil.copy(prompts.FILE, file)
    assert prompts.load(file) == FROZEN
    content = json.loads(file.read_text(encoding="utf-8"))
    content["prompts"][3]["text"] += "!"
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(artwork.ArtworkError, match="was changed after it was frozen"):
        prompts.load(file)


def test_freezing_again_writes_the_same_bytes_and_never_others(tmp_path: Path) -> None:
    file, manifest = tmp_path / "emoji-prompts.json", tmp_path / "artwork.jsonl"
    prompts.make(tmp_path, target=file)
    assert file.read_bytes() == prompts.FILE.read_bytes()
    lines = artwork.MANIFEST.read_text(encoding="utf-8").splitlines(keepends=True)
    manifest.write_text("".join(line for line in lines if '"split": "concept"' not in line), encoding="utf-8")
    with pytest.raises(artwork.ArtworkError, match=r"delete emoji-prompts\.json to freeze"):
        prompts.make(tmp_path, manifest=manifest, target=file)
    assert file.read_bytes() == prompts.FILE.read_bytes()
