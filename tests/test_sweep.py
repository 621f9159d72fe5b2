"""Plans of grids and what they cost: pure functions, no model and no screen."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import METHODS
from samples import panel

from hypersd.records import SEED_MAX, InputError
from hypersd.sweep import CELLS_MAX, Cost, Grid, Pace, cost, plan


def grid(
    prompts: Any = "a cat", seeds: Any = 1, steps: Any = "1 2 4", names: Any = ("base", "lcm"), **more: Any
) -> Grid:
    return plan(prompts, seeds, steps, names, METHODS, **more)


def test_squares_lie_row_by_row_with_few_steps_first() -> None:
    planned = grid(steps=[4, 1, 2, 4], names=["lcm", "base"])
    assert planned.columns == (1, 2, 4)
    assert [(s.method, s.request.steps) for s in planned.squares] == [
        ("base", 1), ("base", 2), ("base", 4), ("lcm", 1), ("lcm", 2), ("lcm", 4)]  # fmt: skip


def test_names_say_what_sets_rows_apart_and_the_caption_the_rest() -> None:
    several = grid("a cat\n a dog \n\na cat", "1-2", names=["lcm"])
    assert [row.title for row in several.rows] == ["a cat", "a cat", "a dog", "a dog"]
    assert [row.detail for row in several.rows] == ["seed 1", "seed 2"] * 2
    assert several.caption == "LCM"
    methods = grid()
    assert [row.title for row in methods.rows] == ["Base model", "LCM"]
    assert methods.caption == "a cat · seed 1"
    single = grid(names=["base"])
    assert (single.rows, single.caption) == ((("", ""),), "Base model · a cat · seed 1")


def test_calls_are_counted_as_the_sampler_counts_them() -> None:
    assert [s.calls for s in grid().squares] == [2, 4, 8, 1, 2, 4]  # the base model is guided by default
    assert [s.calls for s in grid(guidance=1).squares] == [1, 2, 4, 1, 2, 4]
    assert [s.calls for s in grid(guidance=2.5).squares] == [2, 4, 8, 2, 4, 8]


def test_calls_are_those_of_a_real_drawing(tiny_backbone: Any) -> None:
    from hypersd import generate
    from hypersd.methods import METHODS as REAL

    for guidance in (None, 1, 2):
        for square in plan("a cat", 1, "1 3", ["base"], REAL, guidance=guidance).squares:
            assert generate.draw(tiny_backbone, square.request, REAL[square.method]).nfe == square.calls


def test_a_place_that_a_method_does_not_allow_says_why_and_costs_nothing() -> None:
    planned = grid(steps="1 2", names=["tcd"])
    assert planned.squares[0].problem.startswith("tcd was made for 2-8 steps, got 1")
    assert planned.squares[0].calls == 0
    assert cost(planned, Pace()) == Cost(1, 2, None, impossible=1)


@pytest.mark.parametrize(("text", "numbers"), [
    ("1, 2, 4", [1, 2, 4]), ("1 2  4", [1, 2, 4]), ("1-4", [1, 2, 3, 4]), ("1 - 3, 8", [1, 2, 3, 8]),
    ("1–3", [1, 2, 3]), (" 2;4, ", [2, 4]), ([1, 2.0, "4"], [1, 2, 4]), (8, [8]), ("25 1", [1, 25]),
], ids=str)  # fmt: skip
def test_numbers_are_read_as_people_write_them(text: Any, numbers: list[int]) -> None:
    assert list(grid(steps=text, names=["base"]).columns) == numbers


BAD = {
    "no prompt": ({"prompts": " \n "}, "prompt is empty; type a few words"),
    "prompts": ({"prompts": 7}, "prompts must be text, one a line, got int"),
    "one of them": ({"prompts": ["a cat", 7]}, "prompt must be text, got int"),
    "steps 0": ({"steps": "0"}, "steps must be a whole number from 1"),
    "steps -1": ({"steps": "-1"}, "steps must be a whole number from 1"),
    "steps word": ({"steps": "few"}, "steps must be a whole number from 1 to 1,000, got 'few'"),
    "steps none": ({"steps": ""}, "steps are missing; type whole numbers such as 1, 2, 4 or 1-4"),
    "backwards": ({"steps": "8-2"}, "steps 8-2 run backwards; type 2-8"),
    "span": ({"seeds": "0-4000000"}, f"these are 4,000,001 seeds, at most {CELLS_MAX} are allowed"),
    "seed": ({"seeds": [SEED_MAX + 1]}, "seeds must be a whole number from 0"),
    "many": ({"seeds": "1-8"}, rf"this grid has 120 pictures, at most {CELLS_MAX} are allowed; choose fewer prompts"),
    "many prompts": ({"prompts": ["a"] * 1000}, "these are 1,000 prompts"),
    "no method": ({"names": []}, "no method is chosen; tick at least one"),
    "methods": ({"names": "base"}, "methods must be a list of names from base, lcm"),
    "unknown": ({"names": ["nope"]}, "there is no method 'nope'; choose from base, lcm"),
    "guidance": ({"guidance": 99}, "guidance must be a number from 0 to 30"),
}


@pytest.mark.parametrize(("given", "sentence"), BAD.values(), ids=BAD)
def test_what_cannot_be_read_is_explained(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        grid(**{"steps": "1 2 4 8 25", "names": ["base", "lcm", "tcd"][: 3 if "seeds" in given else 1], **given})


NUMBERS = st.text(max_size=30) | st.lists(st.integers() | st.floats() | st.text(max_size=4), max_size=4)


@given(NUMBERS, st.text(max_size=40))
@settings(max_examples=100, deadline=None)
def test_whatever_comes_is_a_grid_or_a_sentence(numbers: Any, prompts: str) -> None:
    try:
        planned = grid(prompts, "1", numbers)
    except InputError as problem:
        told = str(problem)
    else:
        told = ""
        assert 0 < len(planned.squares) == len(planned.rows) * len(planned.columns) <= CELLS_MAX
    assert len(told) < 300


# What it costs


def learned(*drawn: tuple[int, float]) -> Pace:
    pace = Pace()
    for nfe, seconds in drawn:
        pace.note(panel(nfe=nfe, seconds=seconds))
    return pace


def test_the_pace_is_learned_from_pictures_of_different_lengths() -> None:
    pace = learned(*[(n, 0.1 + 0.03 * n) for n in (2, 50, 8, 2, 16)])
    assert pace.seconds(10, 100) == pytest.approx(10 * 0.1 + 100 * 0.03)


def test_one_picture_is_enough_for_a_guess_and_none_is_not() -> None:
    assert Pace().seconds(1, 2) is None
    assert learned((4, 1.0)).seconds(3, 12) == pytest.approx(3.0)
    assert learned((4, 1.0), (4, 2.0)).seconds(1, 4) == pytest.approx((0.9 * 1 + 2) / 1.9)


def test_a_slow_first_picture_does_not_make_more_calls_look_cheaper() -> None:
    pace = learned((1, 9.0), (50, 1.0))
    assert 0 <= (pace.seconds(1, 10) or -1) <= (pace.seconds(1, 50) or -1)


def test_old_pictures_are_forgotten() -> None:
    assert learned((4, 100.0), *[(4, 1.0)] * 100).seconds(1, 4) == pytest.approx(1.0, rel=0.01)


def test_the_cost_is_one_line_for_people() -> None:
    assert str(Cost(24, 96, 12.2)) == "24 pictures, 96 network calls, about 12 s"
    assert str(Cost(1, 1, 0.2)) == "1 picture, 1 network call, less than a second"
    assert str(Cost(2, 4, 400.0, kept=3)) == "2 pictures, 4 network calls, about 7 min; 3 pictures drawn before"
    assert str(Cost(2, 4, 9000.0)).endswith("about 2.5 h")
    assert "time not known before the first picture" in str(Cost(2, 4, None))
    assert str(Cost(0, 0, 0.0, kept=8)) == "nothing left to draw; 8 pictures drawn before"
    assert str(Cost(0, 0, None, impossible=1)).startswith("no picture of this grid can be drawn; 1 place empty")


def test_what_is_there_already_costs_nothing() -> None:
    found = cost(grid(), learned((1, 0.5)), lambda request, method: method == "base")
    assert found == Cost(3, 7, 3.5, kept=3)
