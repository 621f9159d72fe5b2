"""A cache holds what was asked for, whole or not at all, and is read by row number."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fakecoder import Fake, content
from hypothesis import given, settings
from hypothesis import strategies as st
from listing import ROOT
from PIL import Image
from torch import Tensor

from hypersd import data
from hypersd.backbone import Backbone
from hypersd.data import Batch, DataError, Dataset, Sample, Transform, cache, files, prepare, sources, survey
from hypersd.emoji import artwork, training
from hypersd.records import InputError
from hypersd.train import Recipe, Step

COUNT = 10


def picture(number: int, size: tuple[int, int] = (20, 24)) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten pictures with a caption each; the last two share theirs."""
    (tmp_path / "pictures").mkdir()
    for i in range(COUNT):
        picture(i).save(tmp_path / "pictures" / f"{i}.png")
        (tmp_path / "pictures" / f"{i}.txt").write_text(f"thing {min(i, 8)}")
    return tmp_path / "pictures"


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE", 3)
    monkeypatch.setattr(cache, "TEXTS", 4)


def make(path: Path, encoder: Any = None, transform: Transform | None = None, **options: Any) -> Dataset:
    """A cache beside the source, two samples a batch."""
    place = path.parent / "cache"
    return prepare(data.open_source(path), encoder or Fake(), place, transform, batch=2, **options)


def every(dataset: Dataset, index: int | None = None) -> Batch:
    """All samples; with the random choices of update `index`, if one is given."""
    return dataset.take(torch.arange(len(dataset)), None if index is None else step(index, len(dataset)))


def step(index: int, count: int) -> Step:
    return Step(index, Recipe(updates=1, batch=count, lr=1.0))


# ---------------------------------------------------------------------------------------------- what is read


def test_rows_are_what_the_encoder_makes_of_pictures_and_captions(folder: Path) -> None:
    dataset, fake = make(folder), Fake()
    pixels = torch.stack([torch.from_numpy(survey.square(picture(i), 16)) for i in range(COUNT)])
    captions = [f"thing {min(i, 8)}" for i in range(COUNT)]
    rows = torch.tensor([9, 0, 4, 4, 7])
    batch = dataset.take(rows, step(0, 5))
    assert len(dataset) == COUNT and batch.captions == [captions[i] for i in rows]
    assert batch.latents is not None and batch.latents.dtype == batch.states.dtype == torch.float32
    torch.testing.assert_close(batch.latents, fake.encode(pixels)[0][rows], atol=1e-3, rtol=0)
    torch.testing.assert_close(batch.states, fake.embed(batch.captions), atol=1e-3, rtol=0)
    torch.testing.assert_close(dataset.empty, fake.embed([""]), atol=1e-3, rtol=0)
    assert not batch.latents.is_inference()  # fit for training


def test_each_picture_and_each_text_is_encoded_once(folder: Path) -> None:
    fake = Fake()
    make(folder, fake)
    assert (fake.encoded, fake.embedded) == (COUNT + 1, 10 + 1)  # one of each to learn the size; "" is a text too
    make(folder, fake)
    assert (fake.encoded, fake.embedded) == (COUNT + 1, 10 + 1)


def test_a_finished_cache_is_opened_without_writing(folder: Path) -> None:
    before = make(folder)
    inodes = {f: f.stat().st_ino for f in (folder.parent / "cache").rglob("*")}
    after = make(folder)
    assert {f: f.stat().st_ino for f in (folder.parent / "cache").rglob("*")} == inodes
    assert after.digest == before.digest
    assert torch.equal(every(after).states, every(before).states)


def test_mirrored_views_are_drawn_by_the_generator(folder: Path) -> None:
    dataset, plain = make(folder, transform=Transform(flip=True)), make(folder)
    straight, first, again = every(dataset), every(dataset, 0), every(dataset, 0)
    assert straight.latents is not None and first.latents is not None and again.latents is not None
    assert torch.equal(straight.latents, every(plain).latents)  # type: ignore[arg-type]
    assert torch.equal(first.latents, again.latents)
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(first.latents, straight.latents, strict=True)]
    unchanged = [torch.equal(a, b) for a, b in zip(first.latents, straight.latents, strict=True)]
    assert any(mirrored) and any(unchanged) and all(m or u for m, u in zip(mirrored, unchanged, strict=True))


def test_the_posterior_is_sampled_where_its_deviation_is_kept(folder: Path) -> None:
    dataset = make(folder, transform=Transform(posterior="sample"))
    mean = every(dataset).latents
    assert mean is not None
    many = [every(dataset, i).latents for i in range(200)]
    drawn = torch.stack([latents for latents in many if latents is not None])
    noise = (drawn - mean) / (0.1 + mean.abs())
    assert abs(float(noise.mean())) < 0.05 and abs(float(noise.std()) - 1) < 0.05


def test_one_of_several_captions_is_drawn(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"text": ["a", "b", "b", "b"]}\n{"text": "c"}\n')
    dataset = make(tmp_path / "prompts.jsonl")
    drawn = [dataset.take(torch.tensor([0, 1]), step(i, 2)).captions for i in range(200)]
    assert {second for _, second in drawn} == {"c"}
    assert 30 <= sum(first == "a" for first, _ in drawn) <= 70
    assert every(dataset).captions == ["a", "c"]


def test_prompts_alone_have_states_and_no_latents(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na cat\n" + "".join(f"thing {i}\n" for i in range(9)))
    dataset = make(tmp_path / "prompts.txt")
    batch = every(dataset, 0)
    assert batch.latents is None and len(dataset) == 11
    assert batch.captions[:2] == ["a cat", "a dog"]
    torch.testing.assert_close(batch.states, Fake().embed(batch.captions), atol=1e-3, rtol=0)


def test_the_training_loops_order_visits_every_row_once_an_epoch(folder: Path) -> None:
    dataset, recipe = make(folder), Recipe(updates=4, batch=5, lr=0.1)
    seen = [Step(i, recipe).rows(len(dataset)) for i in range(4)]
    assert [sorted(torch.cat(seen[i : i + 2]).tolist()) for i in (0, 2)] == [list(range(COUNT))] * 2
    assert sorted(c for rows in seen[:2] for c in dataset.take(rows).captions) == sorted(every(dataset).captions)


class TinyEncoder:
    """The tiny random model as an encoder of pictures."""

    encoders_sha256 = "0" * 64
    picture_px = 32

    def __init__(self, backbone: Backbone) -> None:
        self.backbone, self.dtype, self.embed = backbone, backbone.dtype, backbone.embed

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.backbone.vae.encode(pixels.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
        scale = self.backbone.vae.config.scaling_factor
        return posterior.mean * scale, posterior.std * scale


def test_a_real_model_decodes_what_was_cached(folder: Path, tiny_backbone: Backbone) -> None:
    encoder = TinyEncoder(tiny_backbone)
    batch = every(make(folder, encoder, Transform(smallest=20)))
    assert batch.latents is not None and batch.latents.shape[1:] == tiny_backbone.latent_shape
    pixels = torch.stack([torch.from_numpy(survey.square(picture(i), 32)) for i in range(COUNT)])
    with torch.inference_mode():
        direct = tiny_backbone.decode(encoder.encode(pixels)[0])
    assert (tiny_backbone.decode(batch.latents).int() - direct.int()).abs().max() <= 1
    torch.testing.assert_close(batch.states, tiny_backbone.embed(batch.captions).clone(), atol=2e-3, rtol=0)


# --------------------------------------------------------------------------------------------------- pictures


def test_transparency_lies_on_white_and_the_centre_is_kept() -> None:
    wide = Image.new("RGBA", (48, 16), (0, 0, 0, 0))
    wide.paste((255, 0, 0, 255), (16, 0, 24, 16))
    cut = survey.square(survey.opened(wide), 16)
    assert cut.shape == (16, 16, 3)
    assert (cut[:, :8] == (255, 0, 0)).all() and (cut[:, 8:] == 255).all()


def test_pictures_are_turned_as_the_camera_says() -> None:
    image, buffer = Image.new("RGB", (8, 8), "white"), io.BytesIO()
    image.paste("black", (0, 0, 8, 4))  # the upper half
    image.save(buffer, "PNG", exif=exif(6))  # to be turned a quarter clockwise: the upper half is then on the right
    seen = survey.square(survey.opened(buffer.getvalue()), 8)
    assert (seen[:, 4:] == 0).all() and (seen[:, :4] == 255).all()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def test_sixteen_bits_of_grey_become_eight() -> None:
    grey, buffer = Image.fromarray(np.array([[0, 257 * 100], [65535, 300]], np.uint16)), io.BytesIO()
    grey.save(buffer, "PNG")
    assert np.asarray(survey.opened(buffer.getvalue()))[..., 0].tolist() == [[0, 100], [255, 1]]


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    picture(0).save(buffer, kind, exif=exif(3)) if kind in ("PNG", "JPEG", "WEBP") else picture(0).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore")  # Pillow's, about what it reads
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"]), st.data())
@settings(max_examples=100, deadline=None, database=None, derandomize=True)
def test_damaged_pictures_are_left_out_and_never_raise(kind: str, drawn: st.DataObject) -> None:
    content = bytearray(encoded(kind))
    places = drawn.draw(st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=4))
    for place, value in places:
        content[place] = value
    content = content[: drawn.draw(st.integers(0, len(content)))]
    row = survey.look(Sample("a", ("a",), bytes(content)))
    assert row.get("reason") == "unreadable" or row["size"]


# ------------------------------------------------------------------------------------------------------ rejects


def test_what_is_left_out_is_counted_listed_and_skipped(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:-40])
    picture(2, (15, 30)).save(folder / "2.png")
    (folder / "3.txt").write_text(" \n")
    (folder / "4.txt").unlink()
    (folder / "9.png").write_bytes((folder / "8.png").read_bytes())
    dataset = make(folder, rejects=0.5)
    expected = {"1.png": "unreadable", "2.png": "too small", "3.png": "no caption", "4.png": "no caption"}
    listed = [json.loads(line) for line in (dataset.folder / "rejected.jsonl").read_text().splitlines()]
    assert {row["key"]: row["reason"] for row in listed} == {**expected, "9.png": "duplicate"}
    assert every(dataset).captions == ["thing 0", "thing 5", "thing 6", "thing 7", "thing 8"]
    told = "".join(capsys.readouterr())
    assert "5 samples ready" in told and "2 no caption such as 3.png" in told and "1 duplicate such as 9.png" in told


def test_too_many_left_out_are_refused_with_what_to_do(folder: Path) -> None:
    for i in range(3):
        (folder / f"{i}.txt").unlink()
    with pytest.raises(DataError, match=r"3 of 10 samples .*3 no caption such as 0.png.* at most 20% .*put a .txt"):
        make(folder)
    assert len(make(folder, rejects=0.3)) == 7


def test_nothing_of_use_is_refused(folder: Path) -> None:
    for file in folder.glob("*.txt"):
        file.unlink()
    with pytest.raises(DataError, match="10 of 10 samples cannot be used"):
        make(folder, rejects=1.0)
    (folder.parent / "none.txt").write_text("\n")
    with pytest.raises(DataError, match="holds no samples"):
        make(folder.parent / "none.txt")


def test_small_pictures_are_enlarged_where_that_is_asked_for(folder: Path) -> None:
    for i in range(COUNT):
        picture(i, (8, 8)).save(folder / f"{i}.png")
    with pytest.raises(DataError, match=r"10 too small .*set `smallest`"):
        make(folder)
    assert len(make(folder, transform=Transform(smallest=8))) == COUNT


@pytest.mark.parametrize("bad", [{"posterior": "mode"}, {"smallest": 0}, {"smallest": "big"}])
def test_a_wrong_transform_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="must be"):
        Transform(**bad)


# ------------------------------------------------------------------------------------------------------ the cache


def test_another_configuration_lies_beside(folder: Path) -> None:
    first = make(folder)
    before = content(first.folder)
    other, bf16 = Fake(), Fake()
    other.encoders_sha256, bf16.dtype = "e" * 64, torch.bfloat16
    caches = [make(folder, other), make(folder, bf16), make(folder, transform=Transform(flip=True))]
    (folder / "0.txt").write_text("another thing")
    caches.append(make(folder))
    assert len({made.digest for made in [first, *caches]}) == 5
    assert content(first.folder) == before
    assert every(caches[-1]).captions[0] == "another thing"


def test_killed_at_any_moment_or_shared_by_two_it_ends_at_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    """tests/fakecoder.py kills processes in each write, flush and rename, twice in a row, and compares every byte."""
    command = [sys.executable, "tests/fakecoder.py", str(folder), str(tmp_path / "caches")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > 30  # moments


def test_a_rank_whose_fellow_never_comes_does_all_the_work(folder: Path) -> None:
    alone = make(folder)
    before = content(folder.parent / "cache")
    (folder.parent / "cache").rename(folder.parent / "old")
    assert make(folder, rank=1, world=3).digest == alone.digest
    assert content(folder.parent / "cache") == before


def test_processes_that_are_launched_together_begin_with_files_of_their_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data of `distill` and `refine`, as each of four processes opens it: were all to begin with the same file,
    they would make every file four times over."""
    written: list[str] = []
    publish = cache.publish

    def noted(path: Path, write: Any) -> None:
        written.append(path.name)
        publish(path, write)

    monkeypatch.setattr(cache, "publish", noted)
    first = []
    for rank in range(4):
        here = SimpleNamespace(process_index=rank, num_processes=4)
        monkeypatch.setattr(training, "processes", lambda here=here: here)
        written.clear()
        training.opener(str(folder), folder.parent / f"alone-{rank}")(Fake())
        first.append(next(name for name in written if name.startswith("latents")))
    assert first == [f"latents-{rank:05d}.safetensors" for rank in range(4)]


def test_a_cut_off_file_is_named_and_made_anew(folder: Path) -> None:
    dataset, fake = make(folder), Fake()
    before = content(dataset.folder)
    file = dataset.folder / "latents-00001.safetensors"
    file.write_bytes(before[file.name][:-5])
    with pytest.raises(DataError, match=r"latents-00001.safetensors is cut off \(.*only what is damaged is made anew"):
        Dataset(dataset.folder)
    make(folder, fake)
    assert content(dataset.folder) == before
    assert fake.encoded == 3 + 1


def test_an_unfinished_cache_is_not_opened(folder: Path) -> None:
    dataset = make(folder)
    (dataset.folder / "manifest.json").unlink()
    with pytest.raises(DataError, match="is not a finished cache"):
        Dataset(dataset.folder)


def test_a_full_disk_while_writing_leaves_what_was_finished(folder: Path) -> None:
    dataset = make(folder)
    before = content(dataset.folder)
    for name in ("latents-00002.safetensors", "manifest.json"):
        (dataset.folder / name).unlink()
    most, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, hard))  # no file may grow beyond 50 bytes
    try:
        with pytest.raises(DataError, match=r"latents-00002.safetensors cannot be written .*make room on the disk"):
            make(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    assert content(dataset.folder).items() < before.items()
    make(folder)
    assert content(dataset.folder) == before


def test_a_disk_that_is_too_small_is_refused_before_the_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    need = 2 * (COUNT * 3 * 2 * 2 + 10 * 2 * 4)  # bytes of ten latents and ten texts
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9, need - 1))
    fake = Fake()
    with pytest.raises(DataError, match=r"needs 0.00 GB more .*make room"):
        make(folder, fake)
    assert fake.encoded == 1
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9, need))
    assert len(make(folder)) == COUNT


def test_a_place_where_no_cache_can_be_is_refused(folder: Path) -> None:
    (folder.parent / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"cannot be made .*choose another folder for the cache"):
        make(folder)


class Overflowing(Fake):
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = super().encode(pixels)
        return mean * 1e6, std

    def embed(self, prompts: Sequence[str]) -> Tensor:
        return super().embed(prompts) * 1e6


def test_what_half_precision_cannot_hold_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the latents of '\d.png' are not finite in float16"):
        make(folder, Overflowing())
    (tmp_path / "a.txt").write_text("a cat\n")
    with pytest.raises(DataError, match=r"the states of '.*' are not finite in float16"):
        make(tmp_path / "a.txt", Overflowing())


class Restless:
    """Another picture at every look."""

    pictures = True

    def __init__(self) -> None:
        self.looks = 0

    def stamps(self) -> list[str]:
        return ["one"]

    def read(self, piece: int) -> Iterator[Sample]:
        self.looks += 1
        yield Sample("a.png", ("a",), picture(self.looks))


def test_a_picture_that_changes_under_way_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a.png changed while the cache was being made"):
        prepare(Restless(), Fake(), tmp_path)


def test_staging_of_the_dead_is_swept_and_of_the_living_is_not(tmp_path: Path) -> None:
    host = os.uname().nodename
    dead, living, other = (tmp_path / f".a.{who}.tmp" for who in (f"{host}.4194305", f"{host}.1", "elsewhere.4194305"))
    for file in (dead, living, other):
        file.write_bytes(b"half")
    files.sweep(tmp_path)
    assert [file.exists() for file in (dead, living, other)] == [False, True, True]


# ------------------------------------------------------------------------------------------------------- artwork


class Emoji(Fake):
    picture_px = 128

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        assert pixels.shape[1:] == (128, 128, 3)
        return pixels[:, :2, :2].permute(0, 3, 1, 2) / 255, torch.zeros(len(pixels), 3, 2, 2)


def test_the_artwork_is_training_data_as_it_lies(tmp_path: Path) -> None:
    (tmp_path / "artwork").mkdir()
    pixels = np.stack([np.full((128, 128, 3), 10 * i, np.uint8) for i in range(6)])
    splits = ["train", "composition", "train", "concept", "train", "twin"]
    rows = [
        artwork.Picture(f"p/{i}", f"thing-{i}", "noto", f"thing {i}", ("round", "odd"), "objects", split, f"{i}" * 64)
        for i, split in enumerate(splits)
    ]
    np.save(tmp_path / "artwork" / "pictures.npy", pixels)
    np.save(tmp_path / "artwork" / "masks.npy", pixels[..., 0])
    (tmp_path / "artwork" / "manifest.jsonl").write_text("".join(json.dumps(r.__dict__) + "\n" for r in rows))
    dataset = training.dataset(tmp_path, Emoji())
    batch = every(dataset.cached)
    assert dataset.pixels(torch.tensor([1, 2])).unique().tolist() == pytest.approx([20 / 127.5 - 1, 40 / 127.5 - 1])
    assert dataset.masks(torch.tensor([1, 2])).unique().tolist() == pytest.approx([20 / 255, 40 / 255])
    assert batch.latents is not None and batch.captions == [f"thing {i}, noto style" for i in (0, 2, 4)]
    torch.testing.assert_close(batch.latents[:, 0, 0, 0] * 255, torch.tensor([0.0, 20, 40]), atol=0.1, rtol=0)
    drawn = [dataset.take(torch.tensor([1]), step(i, 1)).captions[0] for i in range(200)]
    assert set(drawn) == set(artwork.captions(rows[2]))
    assert 70 <= drawn.count("thing 2, noto style") <= 130


def test_without_artwork_the_command_that_makes_it_is_named(tmp_path: Path) -> None:
    with pytest.raises(artwork.ArtworkError, match="python -m hypersd emoji artwork"):
        training.dataset(tmp_path, Emoji())
