"""Six ways to write votes down, with the columns that published loaders read.

A format is one row in FORMATS: a function from votes to files, path -> bytes, which depend on nothing but the votes.
Ties are left out unless asked for; "both bad" is never a preference. Paths of pictures are relative to the export.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from hypersd.records import Item, Pair
from hypersd.study.pairs import SPLITS, Cast, Votes, pairs, split_of

Files = Iterator[tuple[str, bytes]]
Images = Mapping[str, bytes]  # PNG files by the sha256 of their pixels
ROWS_A_GROUP = 100  # of parquet with pictures inside: more cannot be looked into page by page


def pickapic(votes: Votes, images: Images, ties: bool) -> Files:
    """Pick-a-Pic v2: one row a vote, both pictures inside; labels 1, 0 or, with `ties`, 0.5."""
    often = Counter(one.prompt for one in votes.compared)
    labels = {"left": (1.0, 0.0), "right": (0.0, 1.0), "tie": (0.5, 0.5)}
    kept = [one for one in votes.compared if one.choice in (labels if ties else ("left", "right"))]
    for split, chosen in _by_split(kept):
        rows = [_pickapic_row(n, one, labels[one.choice], often[one.prompt], images) for n, one in enumerate(chosen)]
        yield f"pickapic/{split}.parquet", _parquet(rows, _pickapic_schema())


def _pickapic_row(n: int, one: Cast, label: tuple[float, float], examples: int, images: Images) -> dict[str, Any]:
    left, right = one.left, one.right
    best = {"left": left.image_sha256, "right": right.image_sha256}.get(one.choice, "tie")
    return {
        "are_different": left.image_sha256 != right.image_sha256,
        "best_image_uid": best,
        "caption": one.prompt,
        "created_at": one.at_us,
        "has_label": True,
        "image_0_uid": left.image_sha256,
        "image_0_url": _path(left),
        "image_1_uid": right.image_sha256,
        "image_1_url": _path(right),
        "jpg_0": images[left.image_sha256],
        "jpg_1": images[right.image_sha256],
        "label_0": label[0],
        "label_1": label[1],
        "model_0": left.arm,
        "model_1": right.arm,
        "ranking_id": n,
        "user_id": one.annotator,
        "num_example_per_prompt": examples,
    }


def _pickapic_schema() -> Any:
    import pyarrow as pa

    kinds = {"created_at": pa.timestamp("us"), "ranking_id": pa.int64(), "user_id": pa.int64()}
    kinds |= dict.fromkeys(("are_different", "has_label"), pa.bool_())
    kinds |= {"num_example_per_prompt": pa.int64(), "jpg_0": pa.binary(), "jpg_1": pa.binary()}
    kinds |= {"label_0": pa.float64(), "label_1": pa.float64()}
    names = """are_different best_image_uid caption created_at has_label image_0_uid image_0_url image_1_uid
        image_1_url jpg_0 jpg_1 label_0 label_1 model_0 model_1 ranking_id user_id num_example_per_prompt"""
    return pa.schema([(name, kinds.get(name, pa.string())) for name in names.split()])


def imagereward(votes: Votes, images: Images, ties: bool) -> Files:
    """ImageReward: generations and their ranking, the lower the better, equal for ties."""
    for split, chosen in _by_split(pairs(votes, ties=ties)):
        rows = [
            {
                "id": f"{split}-{n}",
                "prompt": pair.prompt,
                "generations": [_path(pair.chosen), _path(pair.rejected)],
                "ranking": [1, 2 if pair.votes_for > pair.votes_against else 1],
            }
            for n, pair in enumerate(chosen)
        ]
        yield f"imagereward/{split}.json", _json(rows)


def hpdv2(votes: Votes, images: Images, ties: bool) -> Files:
    """HPD v2: for training one preference a pair, for the test set every annotator's ranking."""
    single = [one for one in votes.compared if one.choice in ("left", "right")]
    for split, chosen in _by_split(pairs(votes, ties=ties)):
        rows = [_hpdv2_test(pair, single) if split == "test" else _hpdv2_train(pair) for pair in chosen]
        yield f"hpdv2/{split}.json", _json(rows)


def _hpdv2_train(pair: Pair) -> dict[str, Any]:
    preference = [1, 0] if pair.votes_for > pair.votes_against else [0, 0]
    return {
        "prompt": pair.prompt,
        "file_path": [_path(pair.chosen), _path(pair.rejected)],
        "human_preference": preference,
    }


def _hpdv2_test(pair: Pair, single: Iterable[Cast]) -> dict[str, Any]:
    """`rank` of each picture, 1 the best; `user_hash` is the annotator's number."""
    ends = {pair.chosen.id: [1, 2], pair.rejected.id: [2, 1]}
    raw = [
        {"rank": ends[(one.left if one.choice == "left" else one.right).id], "user_hash": str(one.annotator)}
        for one in single
        if {one.left.id, one.right.id} == set(ends)
    ]
    rank = [1, 2] if pair.votes_for > pair.votes_against else [1, 1]
    return {
        "prompt": pair.prompt,
        "image_path": [_path(pair.chosen), _path(pair.rejected)],
        "rank": rank,
        "raw_annotations": raw,
    }


def hpdv3(votes: Votes, images: Images, ties: bool) -> Files:
    """HPD v3: the preferred picture first, how many chose each, and the share that chose the first."""
    for split, chosen in _by_split(pairs(votes, ties=ties)):
        decided = [pair for pair in chosen if pair.votes_for]
        rows = [
            {
                "prompt": pair.prompt,
                "path1": _path(pair.chosen),
                "path2": _path(pair.rejected),
                "choice_dist": [pair.votes_for, pair.votes_against],
                "confidence": pair.votes_for / (pair.votes_for + pair.votes_against),
                "model1": pair.chosen.arm,
                "model2": pair.rejected.arm,
            }
            for pair in decided
        ]
        yield f"hpdv3/{split}.json", _json(rows)


def imagefolder(votes: Votes, images: Images, ties: bool) -> Files:
    """A folder of pictures with a metadata.jsonl for each split, as `load_dataset("imagefolder")` reads it."""
    for split, chosen in _by_split(pairs(votes, ties=ties)):
        rows = []
        for pair in chosen:
            ends = {"chosen": pair.chosen, "rejected": pair.rejected}
            names = {f"{end}_file_name": f"{item.image_sha256}.png" for end, item in ends.items()}
            made = {
                f"{end}_{name}": getattr(item, name) for end, item in ends.items() for name in ("arm", "steps", "nfe")
            }
            rows.append({**names, "prompt": pair.prompt, **made, "margin": pair.margin, "n_votes": pair.n_votes})
        shown = {item.image_sha256 for pair in chosen for item in (pair.chosen, pair.rejected)}
        if rows:  # an empty split has no pictures, and a folder without any cannot be read
            yield from ((f"imagefolder/{split}/{sha}.png", images[sha]) for sha in sorted(shown))
            yield f"imagefolder/{split}/metadata.jsonl", "".join(map(_line, rows)).encode()


def preference(votes: Votes, images: Images, ties: bool) -> Files:
    """Plain preferences in parquet: prompt, chosen and rejected picture, margin, number of votes."""
    import pyarrow as pa

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # how `datasets` keeps a picture
    kinds = {"prompt": pa.string(), "chosen": image, "rejected": image, "margin": pa.float64(), "n_votes": pa.int64()}
    kinds |= dict.fromkeys(("chosen_arm", "rejected_arm"), pa.string())
    features = {name: {"_type": "Image"} if kind is image else _feature(kind) for name, kind in kinds.items()}
    told = {"huggingface": json.dumps({"info": {"features": features}})}
    for split, chosen in _by_split(pairs(votes, ties=ties)):
        rows = [
            {
                "prompt": pair.prompt,
                "chosen": {"bytes": images[pair.chosen.image_sha256], "path": f"{pair.chosen.image_sha256}.png"},
                "rejected": {"bytes": images[pair.rejected.image_sha256], "path": f"{pair.rejected.image_sha256}.png"},
                "margin": pair.margin,
                "n_votes": pair.n_votes,
                "chosen_arm": pair.chosen.arm,
                "rejected_arm": pair.rejected.arm,
            }
            for pair in chosen
        ]
        yield f"preference/{split}.parquet", _parquet(rows, pa.schema(list(kinds.items()), metadata=told))


def _feature(kind: Any) -> dict[str, str]:
    return {"dtype": {"double": "float64"}.get(str(kind), str(kind)), "_type": "Value"}


FORMATS: dict[str, Callable[[Votes, Images, bool], Files]] = {
    "pickapic": pickapic,
    "imagereward": imagereward,
    "hpdv2": hpdv2,
    "hpdv3": hpdv3,
    "imagefolder": imagefolder,
    "preference": preference,
}
WITH_PATHS = {"imagereward", "hpdv2", "hpdv3"}  # these name pictures that lie in images/


def raw_votes(votes: Votes) -> bytes:
    """Every vote as CSV, also those that the filter leaves out, so that another filter can be tried."""
    text = io.StringIO(newline="")
    names = ("prompt", "split", "left_image", "right_image", "left_arm", "right_arm", "choice", "attributes")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, "annotator", "dwell_ms", "at_us", "propensity", "used", "repeat", "gold"])
    for one in votes.cast:
        pictures = (one.left.image_sha256, one.right.image_sha256, one.left.arm, one.right.arm)
        texts = (one.prompt, split_of(one.prompt), *pictures, one.choice, one.attributes)
        flags = (int(one.used), int(one.repeat), int(one.gold))
        writer.writerow([*map(inert, texts), one.annotator, one.dwell_ms, one.at_us, repr(one.propensity), *flags])
    return text.getvalue().encode()


def inert(cell: str) -> str:
    """A cell that no spreadsheet takes for a formula."""
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else cell


def _path(item: Item) -> str:
    return f"images/{item.image_sha256}.png"


def _by_split(rows: list[Any]) -> Iterator[tuple[str, list[Any]]]:
    for split, _ in SPLITS:
        yield split, [row for row in rows if split_of(row.prompt) == split]


def _json(rows: list[dict[str, Any]]) -> bytes:
    return (json.dumps(rows, ensure_ascii=False, indent=1) + "\n").encode()


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _parquet(rows: list[dict[str, Any]], schema: Any) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink, row_group_size=ROWS_A_GROUP, compression="zstd")
    return bytes(sink.getvalue())
