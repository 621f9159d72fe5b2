"""How far two pictures are apart: plain functions on uint8 arrays, numpy only."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
PEAK = 255.0
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, the grey that Wang et al. measured on


def mae(a: Pixels, b: Pixels) -> float:
    """Mean absolute difference over all values, in grey levels 0 to 255; 0 for equal pictures.

    Raises:
        ValueError: the shapes differ.
    """
    _same_shape(a, b)
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).mean())


def psnr(a: Pixels, b: Pixels) -> float:
    """Peak signal-to-noise ratio in dB, 10 log10(255^2 / MSE); infinite for equal pictures.

    Raises:
        ValueError: the shapes differ.
    """
    _same_shape(a, b)
    mse = float(((a.astype(np.float64) - b.astype(np.float64)) ** 2).mean())
    return float("inf") if mse == 0 else float(10 * np.log10(PEAK**2 / mse))


def ssim(a: Pixels, b: Pixels, *, sigma: float = 1.5, size: int = 11) -> float:
    """Mean structural similarity, 1 for equal pictures; Wang et al. 2004, "Image quality assessment", eq. 13.

    Colour pictures [h, w, 3] are measured on their luma, as in the paper; [h, w] is taken as it is. Window and
    constants are the paper's (11 x 11 Gaussian of 1.5 px, K1 0.01, K2 0.03), only full windows count, and nothing
    is scaled down first, so figures for large pictures are those at full size.

    Raises:
        ValueError: the shapes differ, or a side is shorter than the window.
    """
    _same_shape(a, b)
    if min(a.shape[:2]) < size:
        raise ValueError(f"ssim needs pictures of at least {size} x {size} px, got {a.shape[1]} x {a.shape[0]}")
    x, y = _luma(a), _luma(b)
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    mu_x, mu_y = _blur(x, sigma, size), _blur(y, sigma, size)
    var_x = _blur(x * x, sigma, size) - mu_x**2
    var_y = _blur(y * y, sigma, size) - mu_y**2
    cov = _blur(x * y, sigma, size) - mu_x * mu_y
    similarity = (2 * mu_x * mu_y + c1) * (2 * cov + c2) / ((mu_x**2 + mu_y**2 + c1) * (var_x + var_y + c2))
    return float(similarity.mean())


def _same_shape(a: Pixels, b: Pixels) -> None:
    if a.shape != b.shape:
        raise ValueError(f"only pictures of one size can be compared, got {a.shape} and {b.shape}")


def _luma(a: Pixels) -> NDArray[np.float64]:
    return a.astype(np.float64) @ LUMA if a.ndim == 3 else a.astype(np.float64)


def _blur(x: NDArray[np.float64], sigma: float, size: int) -> NDArray[np.float64]:
    """Gaussian weighted mean of every full window; the two axes one after the other, since the window separates."""
    offset = np.arange(size) - (size - 1) / 2
    weight = np.exp(-(offset**2) / (2 * sigma**2))
    weight /= weight.sum()
    rows = sliding_window_view(x, size, axis=0) @ weight  # [h - size + 1, w]
    return sliding_window_view(rows, size, axis=1) @ weight  # [h - size + 1, w - size + 1]
