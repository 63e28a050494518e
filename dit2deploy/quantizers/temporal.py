"""How much each denoising step counts in the Hessian of a layer (AdaTSQ, https://arxiv.org/abs/2602.09883)."""

from collections.abc import Sequence

import numpy as np

LARGEST_RATIO = 10  # of the largest weight to the smallest
EFFECTIVE_SHARE = 0.5  # of the steps: the effective sample size that the temperature is chosen for
_BISECTIONS = 60


def step_weights(scores: Sequence[float]) -> np.ndarray:
    """The weights of T steps, float64 [T] of mean 1, from their Fisher scores [T] (any unit, not negative).

    softmax(score / tau), the paper's alpha (methods.md 5.3). [inferred] tau: by bisection, so that the effective
    sample size 1 / sum alpha^2 becomes T / 2, as scores span decades and a fixed tau collapses onto one step; then no
    weight falls below a tenth of the largest one. Mean 1 where the paper has sum 1: equal scores give ones, with which
    the Hessian is the plain one bit for bit. Raises ValueError for scores that are empty or not finite.
    """
    values = np.asarray(scores, np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError("Fisher scores must be finite numbers, one a step")
    gaps = values - values.max()
    if not gaps.any():
        return np.ones(len(values))
    low, high = 1e-6 * -gaps.min(), 1e6 * -gaps.min()  # as good as one-hot, as good as uniform
    for _ in range(_BISECTIONS):
        tau = np.sqrt(low * high)
        low, high = (low, tau) if effective_size(np.exp(gaps / tau)) > EFFECTIVE_SHARE * len(values) else (tau, high)
    weights = np.exp(gaps / high)
    weights = np.maximum(weights, weights.max() / LARGEST_RATIO)
    return weights / weights.mean()


def effective_size(weights: np.ndarray) -> float:
    """(sum w)^2 / sum w^2: the number of equally weighted steps that would average as well."""
    return float(weights.sum() ** 2 / np.square(weights).sum())
