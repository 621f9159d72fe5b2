"""From counts of votes to ratings: Davidson's model, Bradley-Terry with ties, and an effect of the side.

With strengths theta, side effect d and tie parameter nu (Davidson 1970; order effect as in Davidson & Beaver 1977):

    P(left) ~ exp(theta_l + d/2)    P(right) ~ exp(theta_r - d/2)    P(tie) ~ nu exp((theta_l + theta_r) / 2)

which is a softmax linear in (theta, d, log nu), so the likelihood is concave and Newton's method finds its maximum.
The anchor's theta is 0, its rating 1000; 400 points are odds of ten to one. Many count tables, such as those of a
bootstrap, are fitted at once. "Both bad" is no comparison and does not occur here.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
SCALE = 400 / np.log(10)
# Precision of a normal prior on each parameter: finite ratings for arms that never lost, and under 1 % of what twenty
# votes say. log nu is centred on a tie half as likely as a win between equals.
PRIOR, LOG_NU = 0.02, float(np.log(0.5))
STEPS, STEP_MAX, CLOSE = 50, 2.0, 1e-9


class Fit(NamedTuple):
    """`theta` [..., K] with 0 for the anchor, `side` d and `log_nu` [...], `covariance` [..., K, K] of theta."""

    theta: Array
    side: Array
    log_nu: Array
    covariance: Array

    @property
    def rating(self) -> Array:
        return np.asarray(1000 + SCALE * self.theta)


def features(arms: int, left: NDArray[np.intp], right: NDArray[np.intp]) -> Array:
    """x [pairs, 3, K + 2] with logits x . (theta, d, log nu) of left, right, tie."""
    x = np.zeros((len(left), 3, arms + 2))
    rows = np.arange(len(left))
    x[rows, 0, left] = x[rows, 1, right] = 1.0
    x[rows, 2, left] = x[rows, 2, right] = 0.5
    x[:, 0, arms], x[:, 1, arms], x[:, 2, arms + 1] = 0.5, -0.5, 1.0
    return x


def softmax(logits: Array) -> Array:
    raised = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=-1, keepdims=True))


def fit(counts: Array, anchor: int) -> Fit:
    """The most likely ratings.

    Args:
        counts: [..., K, K, 3], votes with arm i on the left and arm j on the right for left, right, tie; weights do
            as well as counts.
        anchor: which arm has theta 0.
    """
    counts = np.asarray(counts, dtype=np.float64)
    *batch, arms, _, _ = counts.shape
    table = counts.reshape(-1, arms, arms, 3)
    left, right = np.nonzero(table.sum(axis=(0, 3)))
    seen = table[:, left, right]  # [batch, pairs, 3]
    free = [k for k in range(arms + 2) if k != anchor]
    x = features(arms, left, right)[:, :, free]
    mean = np.zeros(len(free))
    mean[-1] = LOG_NU
    beta, hessian = _newton(seen, x, mean)
    theta = np.insert(beta[:, :-2], anchor, 0.0, axis=1)
    covariance = np.asarray(np.linalg.inv(hessian)[:, :-2, :-2], dtype=np.float64)
    covariance = np.insert(np.insert(covariance, anchor, 0.0, axis=1), anchor, 0.0, axis=2)
    side, log_nu = beta[:, -2].reshape(batch), beta[:, -1].reshape(batch)
    return Fit(theta.reshape(*batch, arms), side, log_nu, covariance.reshape(*batch, arms, arms))


def _newton(seen: Array, x: Array, mean: Array) -> tuple[Array, Array]:
    """beta [batch, D] at the posterior mode and the Hessian [batch, D, D] there."""
    beta = np.tile(mean, (len(seen), 1))
    votes = seen.sum(axis=2)
    prior = PRIOR * np.eye(len(mean))
    flat = x.reshape(x.shape[0] * 3, len(mean))
    products = (flat[:, :, None] * flat[:, None, :]).reshape(len(flat), len(mean) ** 2)
    for _ in range(STEPS):
        expected = votes[..., None] * softmax((beta @ flat.T).reshape(seen.shape))
        gradient = (seen - expected).reshape(len(seen), len(flat)) @ flat - PRIOR * (beta - mean)
        centre = np.einsum("bpo,poi->bpi", expected, x)
        weight = 1 / np.maximum(votes, 1e-300)
        hessian = (expected.reshape(len(seen), len(flat)) @ products).reshape(-1, len(mean), len(mean))
        hessian = hessian - np.matmul((centre * weight[..., None]).swapaxes(1, 2), centre) + prior
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        longest = np.abs(step).max(axis=1, keepdims=True)
        beta = beta + step * np.minimum(1.0, STEP_MAX / np.maximum(longest, STEP_MAX))
        if longest.max(initial=0.0) < CLOSE:
            break
    return beta, hessian


def information(theta: Array, log_nu: float) -> Array:
    """What one vote tells about theta_i - theta_j [K, K]: Fisher's information, which ties and clear cases lower."""
    gap = theta[:, None] - theta[None, :]
    p = softmax(np.stack([gap / 2, -gap / 2, np.full_like(gap, log_nu)], axis=-1))
    win, loss = p[..., 0], p[..., 1]
    return np.asarray((win + loss - (win - loss) ** 2) / 4)
