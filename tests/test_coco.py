"""COCO's layout becomes captioned pictures with masks; outlines are where COCO's own tools say they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakecoder import Fake
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from hypersd.data import SourceError, prepare
from hypersd.data.coco import Outlined, inside, mask_of, open_coco, unpacked
from hypersd.emoji import training
from hypersd.feedback.structure import wrongness

# Written by pycocotools 2.0: what is in the mask below, and runs of more than five bits that also go down.
SMALL = {"size": [3, 4], "counts": "321O30"}
LARGE = {"size": [100, 80], "counts": "lo0b1b1000^b5cNo^J0Rh0"}


def test_runs_go_down_the_columns() -> None:
    expected = [[0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]]
    assert mask_of({"size": [3, 4], "counts": [3, 2, 1, 1, 4, 1]}, 3, 4).astype(int).tolist() == expected
    assert unpacked("321O30") == [3, 2, 1, 1, 4, 1]
    assert mask_of(SMALL, 3, 4).astype(int).tolist() == expected


def test_polygons_hold_the_pixels_whose_middle_they_hold() -> None:
    square = [2.0, 2.0, 6.0, 2.0, 6.0, 6.0, 2.0, 6.0]
    expected = np.zeros((10, 12), bool)
    expected[2:6, 2:6] = True
    assert (mask_of([square], 10, 12) == expected).all()
    expected[7:9, 10:12] = True  # a second part, which goes beyond the picture
    assert (mask_of([square, [9.6, 7.4, 20, 7.4, 20, 9.4, 9.6, 9.4]], 10, 12) == expected).all()
    assert not mask_of([], 10, 12).any()


@given(st.lists(st.tuples(st.floats(-5, 25), st.floats(-5, 25)), min_size=3, max_size=3))
@settings(max_examples=100, deadline=None, database=None, derandomize=True)
def test_a_triangle_is_where_its_three_sides_agree(corners: list[tuple[float, float]]) -> None:
    x, y = np.meshgrid(np.arange(20) + 0.5, np.arange(16) + 0.5)
    a, b, c = corners
    sides = [(q[0] - p[0]) * (y - p[1]) - (q[1] - p[1]) * (x - p[0]) for p, q in ((a, b), (b, c), (c, a))]
    clear = np.minimum.reduce([np.abs(side) for side in sides]) > 1e-6  # a middle on a side may fall either way
    expected = np.logical_or(np.all([s > 0 for s in sides], 0), np.all([s < 0 for s in sides], 0))
    assert (inside(np.array(corners), 16, 20) == expected)[clear].all()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures, black but for their objects, which are white; the third has no object."""
    images, captions, instances = [], [], []
    outlines: list[list[Any]] = [
        [[[8, 4, 24, 4, 24, 20, 8, 20]], [[30, 0, 36, 0, 36, 6, 30, 6]]],
        [{"size": [24, 40], "counts": [24 * 10, 24 * 8, 24 * 22]}],
        [],
    ]
    (tmp_path / "coco/val2017").mkdir(parents=True)
    (tmp_path / "coco/annotations").mkdir()
    for number, found in enumerate(outlines):
        name, identity = f"{number:012d}.png", 100 - number  # ids need not be in the order of the names
        picture = Image.new("RGB", (40, 24), (number, 0, 0))
        for outline in found:
            if isinstance(outline, list):
                x, y = outline[0][:2]
                ImageDraw.Draw(picture).rectangle((x, y, outline[0][2] - 1, outline[0][5] - 1), "white")
            else:
                picture.paste("white", (10, 0, 18, 24))
            instances.append({"image_id": identity, "segmentation": outline, "category_id": 3, "iscrowd": 0})
        picture.save(tmp_path / "coco/val2017" / name)
        images.append({"id": identity, "file_name": name, "width": 40, "height": 24, "license": 1})
        captions += [{"image_id": identity, "caption": f"thing {number},\n seen {time}"} for time in ("once", "twice")]
    for kind, rows in (("captions", captions), ("instances", instances)):
        content = {"images": images, "annotations": rows, "categories": [{"id": 3}, {"id": 1}]}
        (tmp_path / f"coco/annotations/{kind}_val2017.json").write_text(json.dumps(content))
    return tmp_path / "coco"


def test_masks_lie_on_the_objects_of_the_pictures_that_were_cached(folder: Path) -> None:
    coco = open_coco(folder, "val2017")
    data = Outlined(prepare(coco, Fake(), folder.parent / "cache"), coco, 16)
    rows = torch.tensor([2, 0, 1])
    assert data.cached.keys == [f"{n:012d}.png" for n in (2, 1, 0)]  # by id
    masks, latents = data.masks(rows), data.take(rows).latents
    assert masks.shape == (3, 16, 16) and masks.dtype == torch.float32 and latents is not None
    assert 0.3 < float(masks[0].mean()) < 0.7 and float(masks[1].max()) == 0
    blocks = torch.nn.functional.avg_pool2d(masks, 8)  # as Fake makes latents: means of the picture's quarters
    torch.testing.assert_close(latents[:, 1], blocks * 2 - 1, atol=0.02, rtol=0)
    assert set(data.take(rows[:1]).captions) <= {"thing 0, seen once", "thing 0, seen twice"}
    assert float(wrongness((masks - 0.5) * 40, masks).max()) < float(wrongness((0.5 - masks) * 40, masks).min())


def test_objects_are_told_one_by_one_with_their_classes(folder: Path) -> None:
    """Without those that the cut left nothing of, and without crowds; classes are counted, COCO's ids have gaps."""
    file = folder / "annotations/instances_val2017.json"
    content = json.loads(file.read_text())
    content["annotations"][1]["segmentation"] = [[36, 0, 40, 0, 40, 6, 36, 6]]  # at the edge, which is cut off
    content["annotations"][2]["iscrowd"] = 1
    content["annotations"] += [{**content["annotations"][0], "category_id": 1}]
    file.write_text(json.dumps(content))
    coco = open_coco(folder, "val2017")
    data = Outlined(prepare(coco, Fake(), folder.parent / "cache"), coco, 16)
    (none, _), (crowd, _), (masks, classes) = data.instances(torch.arange(3))
    assert len(none) == len(crowd) == 0 and masks.dtype == torch.bool and classes.tolist() == [1, 0]
    assert torch.equal(masks[0], data.masks(torch.tensor([2]))[0] > 0.5) and torch.equal(*masks)
    file.write_text(json.dumps(content | {"categories": []}))
    with pytest.raises(SourceError, match="of no category of COCO's"):
        Outlined(data.cached, open_coco(folder, "val2017"), 16).instances(torch.tensor([2]))


def test_refine_finds_masks_in_a_folder_of_coco(folder: Path, tmp_path: Path) -> None:
    for file in (*folder.glob("annotations/*"), folder / "val2017"):
        file.rename(file.with_name(file.name.replace("val", "train")))
    data = training.opener(str(folder), tmp_path / "runs")(Fake())
    assert training.tells(str(folder)) == ("masks", "instances") and training.tells(str(tmp_path)) == ()
    assert isinstance(data, Outlined) and len(data) == 3 and data.digest == data.cached.digest
    assert data.masks(torch.tensor([0])).shape == (1, 16, 16) and data.empty.shape == (1, 2, 4)


def test_what_is_not_coco_is_refused(folder: Path) -> None:
    with pytest.raises(SourceError, match=r"instances_test2017.json is not there; unpack COCO's annotations below"):
        open_coco(folder, "test2017")
    file = folder / "annotations/captions_val2017.json"
    for text, sentence in (("{", "is not JSON"), ("[]", "lists no images and annotations")):
        file.write_text(text)
        with pytest.raises(SourceError, match=sentence):
            open_coco(folder, "val2017")
    with pytest.raises(SourceError, match="a mask has runs of 3 pixels in a picture of 2 x 2"):
        mask_of({"size": [2, 2], "counts": [1, 2]}, 2, 2)


def test_long_runs_are_unpacked() -> None:
    expected = np.zeros((100, 80), bool)
    expected[20:70, 10:13] = expected[30:35, 70:72] = True
    assert (mask_of(LARGE, 100, 80) == expected).all()
