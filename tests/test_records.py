"""Requests accept what people and sliders send, and explain what they refuse."""

from __future__ import annotations

import hashlib
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import panel

from hypersd.records import PROMPT_CHARACTERS, SEED_MAX, InputError, Item, Pair, Request, clean_prompt, digest


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"prompt": ""}, "prompt is empty; type a few words"),
        ({"prompt": " \n\t"}, "prompt is empty"),
        ({"prompt": "cat " * 1250}, "prompt has 5,000 characters, at most 500 are allowed; shorten it"),
        ({"prompt": None}, "prompt must be text, got NoneType"),
        ({"prompt": b"cat"}, "prompt must be text, got bytes"),
        ({"prompt": "cat \udcff"}, "prompt holds half a surrogate pair"),
        ({"negative_prompt": 3}, "negative prompt must be text, got int"),
        ({"steps": 0}, "steps must be a whole number from 1 to 1,000, got 0"),
        ({"steps": -1}, "got -1"),
        ({"steps": 10000}, "got 10000"),
        ({"steps": "a"}, "steps must be a whole number from 1 to 1,000, got 'a'"),
        ({"steps": 2.5}, "got 2.5"),
        ({"steps": True}, "got True"),
        ({"steps": float("inf")}, "got inf"),
        ({"seed": -1}, "seed must be a whole number from 0 to 4,294,967,295, got -1"),
        ({"seed": SEED_MAX + 1}, "got 4294967296"),
        ({"guidance": float("nan")}, "guidance must be a number from 0 to 30, got nan"),
        ({"guidance": "x" * 100}, "..."),
        ({"eta": 1.1}, "eta must be a number from 0 to 1, got 1.1"),
    ],
)
def test_refuses_with_a_sentence(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        Request(**{"prompt": "a cat", **fields})
    assert sentence in str(caught.value)


@pytest.mark.parametrize("steps", [4, 4.0, "4", " 4 "])
def test_numbers_as_sliders_and_shells_send_them(steps: object) -> None:
    request = Request("a cat", steps=steps)  # type: ignore[arg-type]
    assert request.steps == 4
    assert type(request.steps) is int


def test_requests_are_frozen_and_compare_by_value() -> None:
    request = Request("  a\n cat ", seed=1)
    assert request == Request("a cat", seed=1)
    with pytest.raises(FrozenInstanceError):
        request.seed = 2  # type: ignore[misc]


def test_composed_and_decomposed_letters_are_one_prompt() -> None:
    assert Request("cafe\u0301").prompt == Request("caf\u00e9").prompt


@given(st.text(max_size=PROMPT_CHARACTERS // 4))
def test_cleaning_twice_changes_nothing(text: str) -> None:
    once = clean_prompt(text, empty=True) if not any("\ud800" <= c <= "\udfff" for c in text) else ""
    assert clean_prompt(once, empty=True) == once
    assert "\n" not in once
    assert "  " not in once


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=4),
    st.lists(st.integers()),
)
FIELDS = ("prompt", "seed", "steps", "guidance", "eta", "negative_prompt")


@given(st.fixed_dictionaries(dict.fromkeys(FIELDS, JUNK)))
def test_anything_is_a_request_or_an_input_error(fields: dict[str, Any]) -> None:
    try:
        request = Request(**fields)
    except InputError:
        return
    assert 1 <= request.steps <= 1000
    assert 0 <= request.seed <= SEED_MAX


def test_digest_tells_requests_apart() -> None:
    request = Request("a cat", seed=1)
    assert digest(request) == digest(Request(" a  cat", seed=1))
    others = [replace(request, seed=2), replace(request, steps=4), replace(request, eta=0.0)]
    assert len({digest(r) for r in [request, *others]}) == 4


def test_a_panel_names_its_pixels_by_their_hash() -> None:
    drawn = panel()
    provenance = drawn.provenance()
    assert "pixels" not in provenance
    assert provenance["pixels_sha256"] == hashlib.sha256(drawn.pixels).hexdigest()
    assert len(repr(drawn)) < 200


def test_an_item_is_its_panel_without_the_pixels() -> None:
    item = Item.of(panel(method="tcd", steps=4))
    assert (item.arm, item.image_sha256, item.seed) == ("tcd@4", panel().pixels_sha256, 1)
    assert item == Item.of(panel(method="tcd", steps=4, pixels=bytearray(panel().pixels)))


def test_items_are_told_apart_by_everything_but_their_seconds() -> None:
    item = Item.of(panel())
    assert item.id == Item.of(panel(seconds=99.0, guidance=4)).id
    changes: dict[str, Any] = {
        "eta": 1.0,
        "seed": 2,
        "adapter_sha256": "2" * 64,
        "version": "9",
        "negative_prompt": "x",
    }
    assert len({item.id, *(Item.of(panel(**{name: value})).id for name, value in changes.items())}) == 6


def test_the_margin_of_a_pair_counts_ties_for_neither() -> None:
    item = Item.of(panel())
    pair = Pair("a cat", item, item, votes_for=5, votes_against=2, ties=3, split="train")
    assert (pair.n_votes, pair.margin) == (10, 0.3)
