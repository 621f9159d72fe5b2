"""Measures of sets of pictures: cases worked out by hand, and properties that hold for any."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hypersd import intervals, quality
from hypersd.quality import COLOURS

LINE = torch.tensor([[0.0], [1.0], [2.0], [3.0]])  # four real pictures on a line


def cloud(n: int, d: int = 4, seed: int = 0, shift: float = 0.0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


# -------------------------------------------------------------------------------------------------- R-precision


def test_r_precision_of_perfect_pairs_is_one() -> None:
    assert quality.r_precision(torch.eye(120), torch.eye(120)).tolist() == [1.0] * 120


def test_r_precision_of_swapped_pairs_is_zero_when_all_are_candidates() -> None:
    assert quality.r_precision(torch.eye(100), torch.eye(100).roll(1, 0)).sum() == 0


def test_r_precision_is_one_value_a_picture() -> None:
    pictures = torch.eye(10)
    pictures[3] = pictures[4]
    assert quality.r_precision(pictures, torch.eye(10), candidates=10).tolist() == [1.0] * 3 + [0.0] + [1.0] * 6


def test_r_precision_of_noise_is_chance() -> None:
    pictures, texts = torch.randn(2, 1500, 8, generator=torch.Generator().manual_seed(3))
    assert float(quality.r_precision(pictures, texts, candidates=10).mean()) == pytest.approx(0.1, abs=0.025)


def test_r_precision_shares_ties() -> None:
    pictures = torch.zeros(50, 8)  # indifferent to every text
    texts = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert quality.r_precision(pictures, texts, candidates=20).tolist() == pytest.approx([1 / 20] * 50)


def test_r_precision_depends_on_the_seed_alone() -> None:
    generator = torch.Generator().manual_seed(4)
    texts = torch.randn(200, 16, generator=generator)
    pictures = texts + 2 * torch.randn(200, 16, generator=generator)
    first, again, *others = (quality.r_precision(pictures, texts, candidates=20, seed=s) for s in (1, 1, 2, 3, 4))
    assert torch.equal(first, again)
    assert any(not torch.equal(first, other) for other in others)


def test_r_precision_never_draws_the_same_text_twice_over() -> None:
    texts = torch.eye(40).repeat(3, 1)  # every text three times
    assert quality.r_precision(texts, texts, candidates=40).mean() == 1.0
    with pytest.raises(ValueError, match="41 candidates need 40 other texts, there are 39"):
        quality.r_precision(torch.eye(40), torch.eye(40), candidates=41)


def test_r_precision_draws_from_the_pool() -> None:
    pool = torch.cat([torch.eye(4), -torch.eye(4)])
    assert quality.r_precision(torch.eye(4)[:1], torch.eye(4)[:1], candidates=8, pool=pool).item() == 1.0
    assert quality.r_precision(torch.eye(4)[:1], torch.eye(4)[1:2], candidates=8, pool=pool).item() == 0.0


def test_alignment_is_the_cosine() -> None:
    found = quality.alignment(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    assert found.tolist() == pytest.approx([0.6, 0.0])


# ---------------------------------------------------------------------------------------------- kernel distance


def test_kernel_distance_equals_the_formula_written_out() -> None:
    drawn, real = cloud(10, 3).reshape(5, 2, 3), cloud(5, 3, 1)
    pairs = [float((real[i] - real[j]).norm()) for i in range(5) for j in range(i)]
    width = sorted(pairs)[(len(pairs) - 1) // 2]  # torch's median is the lower one
    assert quality.bandwidth(real) == pytest.approx(width)

    def k(a: Tensor, b: Tensor) -> float:
        return math.exp(-float(((a - b) ** 2).sum()) / (2 * width**2))

    total = 0.0
    for p in range(5):
        for q in range(5):
            if p != q:
                total += sum(k(drawn[p, s], drawn[q, t]) for s in range(2) for t in range(2)) / 4 + k(real[p], real[q])
                total -= sum(k(drawn[p, s], real[q]) + k(drawn[q, s], real[p]) for s in range(2)) / 2
    values = quality.kernel_distance(drawn, real)
    assert values.shape == (5,)
    assert float(values.mean()) == pytest.approx(total / 20, abs=1e-12)


def test_pseudo_values_are_those_of_leaving_one_prompt_out() -> None:
    # The width of the kernel is held: it belongs to the yardstick, not to the sample.
    drawn, real = cloud(12, 3).reshape(6, 2, 3), cloud(6, 3, 1)
    values = quality.kernel_distance(drawn, real)
    width = quality.bandwidth(real)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "bandwidth", lambda real: width)
        for p in range(6):
            rest = [q for q in range(6) if q != p]
            without = float(quality.kernel_distance(drawn[rest], real[rest]).mean())
            assert float(values[p]) == pytest.approx(6 * float(values.mean()) - 5 * without, abs=1e-10)


def test_kernel_distance_is_unbiased_and_grows_with_the_shift() -> None:
    none = [float(quality.kernel_distance(cloud(40, 4, s)[:, None], cloud(40, 4, 900 + s)).mean()) for s in range(60)]
    error = float(np.std(none)) / math.sqrt(len(none))
    assert abs(np.mean(none)) < 4 * error
    assert min(none) < 0  # unbiased, so not cut off at zero
    some, more = (float(quality.kernel_distance(cloud(40)[:, None] + s, cloud(40, 4, 1)).mean()) for s in (0.5, 1.5))
    assert 3 * max(none) < more and some < more


def test_kernel_distance_of_a_real_picture_of_each_prompt_is_not_pulled_down() -> None:
    """Drawings that hang on their own prompt's real picture are as far from the rest as real pictures are."""
    real = cloud(60)
    values = quality.kernel_distance(real[:, None] + 0.01 * cloud(60, 4, 2)[:, None], real)
    assert abs(float(values.mean())) < 0.01


def test_standardised_features_count_by_how_they_vary_among_real_pictures() -> None:
    drawn, real = cloud(40, 3)[:, None], cloud(50, 3, 1)
    units = torch.tensor([1.0, 5.0, 0.3]).double()
    plain, scaled = quality.standardised(drawn, real), quality.standardised(drawn * units + 7, real * units + 7)
    assert torch.allclose(plain[0], scaled[0]) and torch.allclose(plain[1], scaled[1])
    assert torch.allclose(plain[1].mean(0), torch.zeros(3).double(), atol=1e-12)
    assert torch.allclose(plain[1].std(0, correction=0), torch.ones(3).double())


def test_standardising_does_not_blow_up_what_hardly_varies() -> None:
    real = cloud(50, 3)
    real[:, 2] = 1e-9 * real[:, 2]
    drawn, _ = quality.standardised(real[:, None] + 0.01, real)
    assert float(drawn[..., 2].abs().max()) < 1  # though a hundredth is ten million of its deviations
    still, _ = quality.standardised(torch.zeros(3, 1, 2), torch.zeros(3, 2))
    assert torch.equal(still, torch.zeros(3, 1, 2).double())


def test_kernel_distance_needs_three_prompts() -> None:
    with pytest.raises(ValueError, match="needs 3 prompts with a real picture each, got 2 and 2"):
        quality.kernel_distance(cloud(2)[:, None], cloud(2))
    assert quality.bandwidth(torch.zeros(4, 2)) == 1.0


@pytest.mark.slow
def test_intervals_of_the_kernel_distance_cover_the_truth() -> None:
    """Pseudo-values stand in for scores. The truth of two Gaussians has a closed form, given the kernel's width."""
    d, shift, hits, studies, prompts = 8, 0.6, 0, 400, 150
    drawn_prompts = intervals.draws(prompts, 1000)
    for study in range(studies):
        real = cloud(prompts, d, study)
        drawn = cloud(2 * prompts, d, 10_000 + study, shift).reshape(prompts, 2, d)
        v = quality.bandwidth(real) ** 2
        same, apart = (v / (v + 2)) ** (d / 2), math.exp(-d * shift**2 / (2 * (v + 2)))
        found = intervals.estimate(quality.kernel_distance(drawn, real).numpy(), drawn_prompts)
        hits += found.low <= 2 * same * (1 - apart) <= found.high
    assert 0.93 <= hits / studies <= 0.97


# ---------------------------------------------------------------------------- precision, recall, density, coverage


def test_neighbourhoods_by_hand() -> None:
    # With k = 1 every real point of the line reaches 1 to either side.
    drawn = torch.tensor([[0.5], [3.5], [9.0]])
    assert quality.precision(drawn, LINE, k=1).tolist() == [1, 1, 0]
    assert quality.density(drawn, LINE, k=1).tolist() == [2, 1, 0]
    assert quality.coverage(drawn, LINE, k=1).tolist() == [1, 1, 0, 1]
    # The drawn ones reach 3, 3 and 5.5, so 0 to 3 lie within reach of the first
    assert quality.recall(drawn, LINE, k=1).tolist() == [1, 1, 1, 1]
    assert quality.recall(drawn[1:] + 5, LINE, k=1).tolist() == [0, 0, 0, 1]


def test_the_real_pictures_themselves_are_perfect() -> None:
    real = cloud(30)
    assert quality.precision(real, real).mean() == quality.recall(real, real).mean() == 1
    assert quality.coverage(real, real).mean() == 1
    assert float(quality.density(real, real).mean()) >= 1


def test_one_outlier_among_the_real_raises_precision_but_not_density() -> None:
    real = torch.cat([cloud(50), torch.full((1, 4), 30.0, dtype=torch.float64)])
    drawn = cloud(50, shift=6.0)  # nowhere near the real ones, but near the outlier's huge neighbourhood
    assert quality.precision(drawn, real).mean() > 0.9
    assert quality.density(drawn, real).mean() <= 0.2 + 1e-9


def test_a_lost_mode_lowers_recall_and_coverage_alone() -> None:
    real = torch.cat([cloud(40), cloud(40, seed=1, shift=20.0)])
    half = cloud(80, seed=2)
    assert quality.precision(half, real).mean() > 0.9
    assert quality.recall(half, real).mean() <= 0.5
    assert quality.coverage(half, real).mean() <= 0.5


def test_neighbours_need_enough_pictures() -> None:
    with pytest.raises(ValueError, match="5 neighbours need more than 5 pictures, got 5"):
        quality.coverage(cloud(9), cloud(5))


@given(st.integers(0, 1000), st.floats(0.1, 10), st.floats(-5, 5))
@settings(max_examples=25, deadline=None)
def test_neighbourhoods_know_neither_scale_nor_place(seed: int, scale: float, shift: float) -> None:
    drawn, real = cloud(12, 3, seed), cloud(15, 3, seed + 1)
    for measure in (quality.precision, quality.recall, quality.density, quality.coverage):
        assert torch.equal(measure(drawn, real, 3), measure(drawn * scale + shift, real * scale + shift, 3))
        assert ((measure(drawn, real, 3) >= 0) & (measure(drawn, real, 3) <= 15 / 3)).all()


# ------------------------------------------------------------------------------------------- Fréchet, memorisation


def test_frechet_distance_in_one_dimension() -> None:
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [9.0]])
    # means 1 and 6, standard deviations sqrt 2 and sqrt 18: 25 + (sqrt 18 - sqrt 2)^2
    assert quality.frechet_distance(a, b) == pytest.approx(25 + 8)
    assert quality.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_rotated_axes() -> None:
    """Diagonal covariances 4, 1 and 1, 4: 2 * (2 - 1)^2."""
    root = math.sqrt(0.5)
    cross = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.float64) * math.sqrt(3) * root
    a, b = cross * torch.tensor([2.0, 1.0]), cross * torch.tensor([1.0, 2.0])
    torch.testing.assert_close(torch.cov(a.T), torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64)))
    assert quality.frechet_distance(a, b) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="at least 2"):
        quality.frechet_distance(a[:1], b)


def test_memorised_pictures_are_nearer_than_training_pictures_are_to_each_other() -> None:
    train = torch.arange(101.0)[:, None] ** 1.5  # gaps grow from 1
    assert quality.closeness(train) == pytest.approx(1.0, abs=0.4)
    drawn = torch.stack([train[50] + 0.5, (train[90] + train[91]) / 2, train[20]])
    assert quality.memorised(drawn, train).tolist() == [1, 0, 1]
    assert float(quality.memorised(train, train).mean()) == 1.0
    fresh = quality.memorised(cloud(300, 8, 1), cloud(300, 8, 2))
    assert float(fresh.mean()) < 0.05


def test_nearest_in_batches() -> None:
    points, others = cloud(20, 3), cloud(30, 3, 1)
    found = quality.nearest(points, others, batch=7)
    torch.testing.assert_close(found, torch.cdist(points, others).amin(1))
    assert float(quality.nearest(points, points, itself=False, batch=7).min()) > 0


# ---------------------------------------------------------------------------------------------- beside the teacher


def test_feature_distance_and_pixel_distance() -> None:
    assert quality.feature_distance(torch.tensor([1.0, 0.0]), torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
                                    ).tolist() == pytest.approx([0, 1, 2])  # fmt: skip
    a, b = torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.full((2, 4, 4, 3), 250, dtype=torch.uint8)
    b[1] = 10
    assert quality.pixel_distance(a, b).tolist() == quality.pixel_distance(b, a).tolist() == [250, 10]
    fine = torch.randint(0, 256, (2, 4, 6, 3), dtype=torch.uint8)
    coarse = fine.double().view(2, 2, 2, 3, 2, 3).mean((2, 4))
    assert quality.pixel_distance(fine, coarse + 7).tolist() == quality.pixel_distance(coarse + 7, fine).tolist()
    assert quality.pixel_distance(fine, coarse + 7).tolist() == [7, 7]


def test_diversity_by_hand() -> None:
    pairs = torch.tensor([[[1.0, 0.0], [0.0, 3.0]], [[1.0, 0.0], [2.0, 0.0]]])
    assert quality.diversity(pairs).tolist() == pytest.approx([1.0, 0.0])
    three = F.normalize(cloud(3, 5), dim=1)
    expected = 1 - np.mean([float(three[i] @ three[j]) for i, j in ((0, 1), (0, 2), (1, 2))])
    assert quality.diversity(three[None]).item() == pytest.approx(expected)
    with pytest.raises(ValueError, match="at least 2 drawings"):
        quality.diversity(cloud(4)[:, None])


# --------------------------------------------------------------------------------------------------------- pixels


def test_sharpness_by_hand_and_under_blur() -> None:
    flat = torch.full((1, 8, 8, 3), 77, dtype=torch.uint8)
    assert quality.sharpness(flat).item() == 0.0
    board = flat.clone()
    board[:, ::2, ::2] = board[:, 1::2, 1::2] = 177
    # Every inner pixel's Laplacian is 4 * 100 up or down, as many of each
    assert quality.sharpness(board).item() == pytest.approx(math.log10(1 + 400**2), abs=1e-4)
    noise = torch.randint(0, 256, (1, 24, 24, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    soft = F.avg_pool2d(noise.permute(0, 3, 1, 2).float(), 3, 1).permute(0, 2, 3, 1).to(torch.uint8)
    assert quality.sharpness(soft).item() < quality.sharpness(noise).item() - 0.5


PAINTS = {
    "red": (221, 46, 68), "orange": (244, 144, 12), "yellow": (255, 216, 50), "green": (60, 160, 60),
    "blue": (60, 110, 220), "purple": (150, 70, 200), "pink": (240, 120, 190), "brown": (140, 85, 50),
    "black": (25, 25, 30),
}  # fmt: skip


def disc(paint: tuple[int, int, int], outline: int = 0) -> Tensor:
    picture = torch.full((1, 32, 32, 3), 255, dtype=torch.uint8)
    picture[:, 4:28, 4:28] = torch.tensor((20, 20, 20), dtype=torch.uint8)
    picture[:, 4 + outline : 28 - outline, 4 + outline : 28 - outline] = torch.tensor(paint, dtype=torch.uint8)
    return picture


@pytest.mark.parametrize("colour", COLOURS)
def test_colours_are_recognised(colour: str) -> None:
    picture = disc(PAINTS[colour])
    share = quality.colour_shares(picture)[0]
    assert COLOURS[int(share.argmax())] == colour
    assert float(share.max()) == pytest.approx((24 / 32) ** 2)
    assert [quality.colour_right(picture, [asked]).item() for asked in COLOURS] == [float(c == colour) for c in COLOURS]


def test_outlines_do_not_count_unless_black_is_asked_for() -> None:
    thick = disc(PAINTS["red"], 5)  # more outline than red
    assert quality.colour_right(thick.repeat(2, 1, 1, 1), ["red", "black"]).tolist() == [1, 1]


def test_nothing_drawn_is_no_colour_and_no_colour_asked_is_no_answer() -> None:
    blank = torch.full((2, 8, 8, 3), 255, dtype=torch.uint8)
    right = quality.colour_right(blank, ["red", None])
    assert right[0] == 0 and right[1].isnan()


@pytest.mark.parametrize(("text", "colour"), [
    ("a red heart", "red"), ("Blue book, noto style", "blue"), ("redwood tree", None), ("red and blue ball", None),
    ("orange", "orange"), ("cat", None), ("a black cat", "black"),
])  # fmt: skip
def test_the_colour_word_of_a_text(text: str, colour: str | None) -> None:
    assert quality.colour_asked(text) == colour
