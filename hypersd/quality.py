"""What drawn pictures are worth: plain torch functions on features, texts and pixels, one value a picture or a prompt.

`metrics` compares two pictures; this file compares sets of pictures, and pictures with texts. Nearly every function
answers with one value a picture or a prompt whose mean is the figure, so that one bootstrap over prompts gives all
intervals. Features are whatever an encoder makes of pictures, [n, d] or [prompts, seeds, d].

Differs from the papers: the kernel distance is Gaussian, as in CMMD (arXiv:2401.09603), and not KID's cubic polynomial
(arXiv:1801.01401), because its kernel tells any two distributions apart and is bounded, so that one odd picture cannot
decide the figure; its width is the median distance of the real pictures and not a constant, since features here have
no common scale. FID's distance is here for comparison only: it is biased by the number of pictures.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = 5  # k of precision, recall, density and coverage, as arXiv:2002.09797 recommends
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601

# ------------------------------------------------------------------------------------------ pictures and texts


def r_precision(
    pictures: Tensor, texts: Tensor, candidates: int = 100, seed: int = 0, *, pool: Tensor | None = None
) -> Tensor:
    """1 where a picture's own text beats `candidates - 1` others, else 0 (R-precision, arXiv:1711.10485).

    pictures, texts: unit vectors [n, d], row by row a pair. pool: texts to draw the others from, [m, d], `texts` if
    not given; a text equal to the picture's own is never drawn. Ties share the win. Returns float64 [n].

    Raises:
        ValueError: fewer than `candidates` - 1 other texts.
    """
    pool = texts if pool is None else pool
    generator = torch.Generator().manual_seed(seed)
    wins = torch.zeros(len(pictures), dtype=torch.float64)
    for row, (picture, own) in enumerate(zip(pictures, texts, strict=True)):
        others = pool[(pool - own).abs().amax(1) > 1e-5]
        if len(others) < candidates - 1:
            raise ValueError(f"{candidates} candidates need {candidates - 1} other texts, there are {len(others)}")
        drawn = others[torch.randperm(len(others), generator=generator)[: candidates - 1]] @ picture
        mine = own @ picture
        if bool((drawn <= mine).all()):
            wins[row] = 1 / float(1 + (drawn == mine).sum())
    return wins


def alignment(pictures: Tensor, texts: Tensor) -> Tensor:
    """Cosine between each picture and its text, float64 [n]: the CLIP score without its factor (arXiv:2104.08718)."""
    return F.cosine_similarity(pictures.double(), texts.double(), dim=-1)


# ------------------------------------------------------------------------------------- sets of pictures, compared


def kernel_distance(drawn: Tensor, real: Tensor) -> Tensor:
    """Unbiased squared maximum mean discrepancy, as one pseudo-value a prompt; their mean is the distance.

    drawn: [prompts, seeds, d]; real: [prompts, d], the real picture of each prompt. Gretton et al. 2012 (JMLR 13),
    lemma 6, equation 4: only pairs of different prompts count, so a prompt's own real picture pulls nothing down. The
    pseudo-values are those of the jackknife that leaves one prompt out. Returns float64 [prompts]; may be below zero.

    Raises:
        ValueError: fewer than 3 prompts, which no jackknife can do with.
    """
    prompts, seeds, _ = drawn.shape
    if prompts < 3 or len(real) != prompts:
        raise ValueError(f"the kernel distance needs 3 prompts with a real picture each, got {prompts} and {len(real)}")
    x, y = drawn.double().flatten(0, 1), real.double()
    width = bandwidth(y)
    xx = _gaussian(x, x, width).reshape(prompts, seeds, prompts, seeds).mean((1, 3))
    xy = _gaussian(x, y, width).reshape(prompts, seeds, prompts).mean(1)
    h = xx + _gaussian(y, y, width) - xy - xy.T  # [prompts, prompts]
    h.fill_diagonal_(0)
    total, row = h.sum(), h.sum(1)
    without = (total - 2 * row) / ((prompts - 1) * (prompts - 2))
    return total / (prompts - 1) - (prompts - 1) * without


def standardised(drawn: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Both with every feature centred and scaled as the real pictures have it, so that none outweighs the others only
    by its unit. [..., k] and [m, k], float64."""
    mean, scale = spread(real)
    return (drawn.double() - mean) / scale, (real.double() - mean) / scale


def spread(real: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every feature of real pictures [m, k], float64 [k] each.

    One that hardly varies, less than a tenth as much as the median feature, is told to vary so much, or it would drown
    the others wherever a drawn picture has it.
    """
    mean, deviation = real.double().mean(0), real.double().std(0, correction=0)
    return mean, deviation.clamp_min(0.1 * float(deviation.median())).clamp_min(1e-9)


def bandwidth(real: Tensor) -> float:
    """The median distance between two real pictures; 1 where all are equal."""
    distances = torch.pdist(real.double())
    return float(distances.median()) or 1.0


def _gaussian(a: Tensor, b: Tensor, width: float) -> Tensor:
    return torch.exp(-(_distances(a, b) ** 2) / (2 * width**2))


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # By differences, not by |a|^2 + |b|^2 - 2ab, which leaves equal pictures a little apart.
    return torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist")


def precision(drawn: Tensor, real: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """1 for each drawn picture nearer to some real one than that one's k-th real neighbour; arXiv:1904.06991, eq. 1.

    drawn: [n, d]; real: [m, d]. Returns float64 [n]. Raises ValueError for k or fewer real pictures.
    """
    return (_distances(drawn, real) <= _radii(real, k)).any(1).double()


def density(drawn: Tensor, real: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """How many of the real pictures' neighbourhoods hold each drawn one, over k; arXiv:2002.09797, eq. 4. [n]"""
    return (_distances(drawn, real) <= _radii(real, k)).double().sum(1) / k


def recall(drawn: Tensor, real: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """1 for each real picture within reach of some drawn one's k-th drawn neighbour; arXiv:1904.06991, eq. 1. [m]"""
    return precision(real, drawn, k)


def coverage(drawn: Tensor, real: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """1 for each real picture that has a drawn one in its neighbourhood; arXiv:2002.09797, eq. 5. [m]"""
    return (_distances(real, drawn) <= _radii(real, k)[:, None]).any(1).double()


def _radii(points: Tensor, k: int) -> Tensor:
    """Distance of each point to its k-th neighbour, itself left out."""
    if len(points) <= k:
        raise ValueError(f"{k} neighbours need more than {k} pictures, got {len(points)}")
    apart = _distances(points, points)
    apart.fill_diagonal_(float("inf"))
    return apart.kthvalue(k, dim=1).values


def frechet_distance(drawn: Tensor, real: Tensor) -> float:
    """|mu - mu'|^2 + tr(C + C' - 2 (C C')^1/2) of features [n, d] and [m, d] (FID, arXiv:1706.08500, eq. 6).

    Biased upwards by few pictures, so only figures of equally many can be compared.
    """
    (mean_a, cov_a), (mean_b, cov_b) = _moments(drawn), _moments(real)
    # tr (AB)^1/2 = tr (A^1/2 B A^1/2)^1/2, which is symmetric, so its roots are real
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    mixed = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float(((mean_a - mean_b) ** 2).sum() + cov_a.trace() + cov_b.trace() - 2 * mixed)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    if len(x) < 2:
        raise ValueError(f"a covariance needs at least 2 pictures, got {len(x)}")
    width = x.shape[1]
    return x.double().mean(0), torch.cov(x.double().T).reshape(width, width)


def memorised(drawn: Tensor, train: Tensor, share: float = 0.01) -> Tensor:
    """1 for each drawn picture nearer to a training picture than all but `share` of training pictures are to another.

    drawn: [n, d]; train: [m, d], m >= 2. Returns float64 [n].
    """
    return (nearest(drawn, train) < closeness(train, share)).double()


def closeness(train: Tensor, share: float = 0.01) -> float:
    """The distance below which only `share` of the training pictures have a neighbour."""
    return float(torch.quantile(nearest(train, train, itself=False), share))


def nearest(points: Tensor, others: Tensor, *, itself: bool = True, batch: int = 512) -> Tensor:
    """Distance of each point to the nearest of the others, float64 [n]; `itself` False leaves out the equal row."""
    found = []
    for first in range(0, len(points), batch):
        apart = torch.cdist(points[first : first + batch].double(), others.double())  # large sets: fast, 1e-7 is enough
        if not itself:
            rows = torch.arange(len(apart))
            apart[rows, first + rows] = float("inf")
        found.append(apart.amin(1))
    return torch.cat(found)


# ----------------------------------------------------------------------------------- one method beside its teacher


def feature_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cosine of features [..., d], float64 [...]."""
    return (1 - F.cosine_similarity(a.double(), b.double(), dim=-1)).clamp(min=0)  # equal ones: not -1e-16


def _reduced(picture: Tensor, other: Tensor) -> Tensor:
    """[..., h, w, 3] in float64, averaged down to the size of the other where it is larger."""
    times = max(1, picture.shape[-2] // other.shape[-2])
    return picture.double().unflatten(-2, (-1, times)).unflatten(-4, (-1, times)).mean((-2, -4))


def pixel_distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference in grey levels, 0 to 255; uint8 [..., h, w, 3] -> float64 [...].

    Where one side is a multiple of the other the larger picture is averaged down to the smaller.
    """
    a, b = _reduced(a, b), _reduced(b, a)
    return (a - b).abs().mean((-3, -2, -1))


def diversity(drawn: Tensor) -> Tensor:
    """Mean feature distance between two drawings of one prompt; [prompts, seeds, d] -> float64 [prompts].

    Raises:
        ValueError: one drawing a prompt, which is not a pair.
    """
    seeds = drawn.shape[1]
    if seeds < 2:
        raise ValueError("diversity needs at least 2 drawings of each prompt")
    unit = F.normalize(drawn.double(), dim=-1)
    cosines = unit @ unit.mT
    return 1 - (cosines.sum((1, 2)) - seeds) / (seeds * (seeds - 1))


# ----------------------------------------------------------------------------------------------------- pixels


def sharpness(pixels: Tensor) -> Tensor:
    """log10 of 1 + the variance of the luma's Laplacian (in grey levels); uint8 [n, h, w, 3] -> float64 [n].

    Noise raises it too, so it describes pictures and does not rank them.
    """
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=torch.float64)
    luma = pixels.double() @ torch.tensor(LUMA, dtype=torch.float64)
    edges = F.conv2d(luma[:, None], kernel[None, None])
    return torch.log10(1 + edges.flatten(1).var(1, correction=0))


# Where each hue begins, in degrees, chosen on the real artwork; brown is dark orange, pink is light or purplish red.
HUES = {"red": 0, "orange": 14, "yellow": 39, "green": 64, "blue": 170, "purple": 250, "pink": 300, "reddish": 338}
COLOURS = (*list(HUES)[:-1], "brown", "black")  # white and grey are not asked for: the ground is white
_NAMES = (*HUES, "brown", "black", "none")


def colour_asked(text: str) -> str | None:
    """The one colour word in a text; None for none or for several."""
    named = set(re.findall(rf"\b({'|'.join(COLOURS)})\b", text.lower()))
    return named.pop() if len(named) == 1 else None


def colour_shares(pixels: Tensor) -> Tensor:
    """How much of the picture each of COLOURS takes; uint8 [n, h, w, 3] -> float64 [n, colours]."""
    names = _colour_numbers(pixels.double().flatten(1, 2) / 255)
    shares = F.one_hot(names, len(_NAMES)).double().mean(1)
    shares[:, 0] += shares[:, _NAMES.index("reddish")]
    return shares[:, [_NAMES.index(colour) for colour in COLOURS]]


def _colour_numbers(x: Tensor) -> Tensor:
    """Index into _NAMES of each colour, [..., 3] in 0..1 -> int64 [...]."""
    high, chroma = x.amax(-1), x.amax(-1) - x.amin(-1)
    r, g, b = x.unbind(-1)
    safe = chroma.clamp(min=1e-9)
    sector = torch.where(
        high == r, ((g - b) / safe) % 6, torch.where(high == g, (b - r) / safe + 2, (r - g) / safe + 4)
    )
    hue, saturation = sector * 60, chroma / high.clamp(min=1e-9)
    named = torch.bucketize(hue, torch.tensor(list(HUES.values()), dtype=x.dtype), right=True) - 1
    brown = (hue > 5) & (hue < 42) & (high < 0.8) & (saturation < 0.85)
    pink = ((named == 0) | (named == _NAMES.index("reddish"))) & (high > 0.8) & (saturation < 0.6) & (hue % 350 < 12)
    named = torch.where(brown, _NAMES.index("brown"), torch.where(pink, _NAMES.index("pink"), named))
    named = torch.where(chroma < 0.12, _NAMES.index("none"), named)
    return torch.where((high < 0.34) & (chroma < 0.2), _NAMES.index("black"), named)


def colour_right(pixels: Tensor, colours: Sequence[str | None]) -> Tensor:
    """1 where no other colour takes more of the picture than the asked one, else 0; NaN where none is asked for.

    uint8 [n, h, w, 3] -> float64 [n]. Outlines are often black, so black counts only where it is asked for.
    """
    shares = colour_shares(pixels)
    hues = torch.where(torch.arange(len(COLOURS)) == COLOURS.index("black"), 0.0, shares)
    right = []
    for row, colour in enumerate(colours):
        if colour is None:
            right.append(float("nan"))
            continue
        among = shares[row] if colour == "black" else hues[row]
        right.append(float(float(among.sum()) > 0 and int(among.argmax()) == COLOURS.index(colour)))
    return torch.tensor(right, dtype=torch.float64)
