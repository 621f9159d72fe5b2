"""Distances between pictures against answers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hypersd.metrics import LUMA, Pixels, mae, psnr, ssim


def flat(value: int, side: int = 16) -> Pixels:
    return np.full((side, side, 3), value, np.uint8)


def noise(seed: int, side: int = 24) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def test_equal_pictures() -> None:
    assert (mae(noise(1), noise(1)), psnr(noise(1), noise(1))) == (0.0, math.inf)
    assert ssim(noise(1), noise(1)) == pytest.approx(1.0, abs=1e-12)


def test_black_and_white() -> None:
    assert (mae(flat(0), flat(255)), psnr(flat(0), flat(255))) == (255.0, 0.0)


def test_constant_difference() -> None:
    # 200 - 190 and 190 - 200 must not wrap around in uint8.
    assert mae(flat(200), flat(190)) == mae(flat(190), flat(200)) == 10.0
    assert psnr(flat(200), flat(190)) == pytest.approx(20 * math.log10(25.5))


@pytest.mark.parametrize(("a", "b"), [(0, 255), (100, 120), (7, 7)])
def test_ssim_of_flat_pictures_is_its_luminance_term(a: int, b: int) -> None:
    c1 = 2.55**2
    assert ssim(flat(a), flat(b)) == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), abs=1e-9)


def test_ssim_of_one_window_equals_the_formula_written_out() -> None:
    a, b = noise(2, 11), noise(3, 11)
    weight = np.array([[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / 4.5) for j in range(11)] for i in range(11)])
    weight /= weight.sum()
    x, y = a @ LUMA, b @ LUMA
    mx, my = (weight * x).sum(), (weight * y).sum()
    vx, vy, cov = ((weight * p).sum() for p in ((x - mx) ** 2, (y - my) ** 2, (x - mx) * (y - my)))
    c1, c2 = 2.55**2, 7.65**2
    expected = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert ssim(a, b) == pytest.approx(expected, abs=1e-12)


def test_ssim_of_a_negative_is_negative() -> None:
    assert ssim(noise(4), 255 - noise(4)) < -0.5


def test_ssim_is_symmetric_and_falls_with_noise() -> None:
    clean = np.repeat(np.repeat(noise(5, 4), 8, 0), 8, 1)
    little, much = (np.clip(clean + np.random.default_rng(6).normal(0, s, clean.shape), 0, 255).astype(np.uint8)
                    for s in (5, 50))  # fmt: skip
    assert ssim(clean, little) == pytest.approx(ssim(little, clean))
    assert 1 > ssim(clean, little) > ssim(clean, much)


@pytest.mark.parametrize("measure", [mae, psnr, ssim])
def test_sizes_must_agree(measure: object) -> None:
    with pytest.raises(ValueError, match="one size"):
        measure(flat(0, 16), flat(0, 17))  # type: ignore[operator]


def test_ssim_needs_a_whole_window() -> None:
    with pytest.raises(ValueError, match="at least 11 x 11 px, got 8 x 8"):
        ssim(flat(0, 8), flat(0, 8))
