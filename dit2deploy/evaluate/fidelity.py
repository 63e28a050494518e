"""How far an array is from the one it should be, in numpy, accumulated in float64.

One rule for what is not finite: NaN or infinity in either array gives the worst value of the measure, so that no
threshold is ever met by accident (a comparison with NaN would be false in both directions).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dit2deploy.base.errors import Misuse


def deciding(check: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a check in parity.json that was run, the value that is told: that of the final latents, else the worst."""
    return check.get("final") or min(check["values"], key=lambda value: value["sqnr_db"])


def sqnr_db(reference: np.ndarray, value: np.ndarray) -> float:
    """Signal to quantization noise ratio in dB: 10 log10(sum x^2 / sum (x - y)^2) over all elements.

    +inf where both are equal (also both zero, or empty); -inf where the reference is zero and the value is not.
    """
    pair = _finite_pair(reference, value)
    if pair is None:
        return -np.inf
    x, y = pair
    return _ratio_db(np.sum(x * x), np.sum((x - y) ** 2))


def psnr_db(reference: np.ndarray, value: np.ndarray, data_range: float) -> float:
    """Peak signal to noise ratio in dB: 10 log10(data_range^2 / mean (x - y)^2); +inf where both are equal.

    `data_range` is largest minus smallest possible value: 2 for images in -1..1.
    """
    if not data_range > 0:
        raise Misuse(f"psnr_db: data_range {data_range} is not positive.", "Give 2 for images in -1..1.")
    pair = _finite_pair(reference, value)
    if pair is None:
        return -np.inf
    x, y = pair
    return _ratio_db(data_range**2, np.mean((x - y) ** 2) if x.size else 0.0)


def max_abs(reference: np.ndarray, value: np.ndarray) -> float:
    """Largest |x - y|, in the arrays' own unit; 0 for empty arrays, +inf where something is not finite."""
    pair = _finite_pair(reference, value)
    if pair is None:
        return np.inf
    x, y = pair
    return float(np.max(np.abs(x - y), initial=0.0))


def cosine(reference: np.ndarray, value: np.ndarray) -> float:
    """Cosine of the angle between the flattened arrays, -1..1.

    1 where both are zero (or empty), 0 where one is, -1 where something is not finite.
    """
    pair = _finite_pair(reference, value)
    if pair is None:
        return -1.0
    x, y = (side.ravel() for side in pair)
    norms = np.linalg.norm(x) * np.linalg.norm(y)
    if norms == 0:
        return float(not x.any() and not y.any())
    return float(np.clip(x @ y / norms, -1.0, 1.0))


def _ratio_db(signal: float, noise: float) -> float:
    if noise == 0:
        return np.inf
    if signal == 0:
        return -np.inf
    return float(10 * np.log10(signal / noise))


def _finite_pair(reference: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Both as float64, or None where one holds NaN or infinity; Misuse where the shapes differ."""
    x, y = np.asarray(reference, dtype=np.float64), np.asarray(value, dtype=np.float64)
    if x.shape != y.shape:
        raise Misuse(f"fidelity: shapes {x.shape} and {y.shape} differ.", "Compare arrays of one shape.")
    return (x, y) if np.isfinite(x).all() and np.isfinite(y).all() else None
