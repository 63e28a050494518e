"""Twin-Log levels against the best levels there are (Lloyd and Max), the best even ones, and a plain loop."""

import numpy as np
import pytest
import torch

from dit2deploy.formats import INT4, INT8
from dit2deploy.quantizers.round_to_nearest import dequantize, mse_scales, round_to_nearest
from dit2deploy.quantizers.twin_log import ETAS, PERCENTILES, twin_log


def noise(weight: torch.Tensor, back: torch.Tensor) -> float:
    return float((back - weight).square().sum() / weight.square().sum())


def lloyd_max(levels: int, samples: np.ndarray) -> float:
    """The noise of the best scalar quantizer of so many levels, by Lloyd's iteration on sorted samples."""
    centres = np.quantile(samples, (np.arange(levels) + 0.5) / levels)
    for _ in range(300):
        cell = np.searchsorted((centres[1:] + centres[:-1]) / 2, samples)
        centres = np.bincount(cell, samples, levels) / np.bincount(cell, minlength=levels)
    return float(((centres[cell] - samples) ** 2).mean() / (samples**2).mean())


@pytest.mark.parametrize("bits", [3, 4])
def test_long_tails_gain_and_no_levels_beat_the_best(bits):
    """Student's t with 5 degrees of freedom; Lloyd-Max of 2^bits + 1 levels (0 is one here) bounds from below."""
    rng = np.random.default_rng(0)
    samples = rng.standard_t(5, (16, 4096)).astype(np.float32)
    weight = torch.from_numpy(samples)
    found = noise(weight, dequantize(*twin_log(weight, INT8, bits=bits)))
    bound = np.mean([lloyd_max(2**bits + 1, np.sort(row.astype(np.float64))) for row in samples])
    assert bound < found
    if bits == 4:
        scales = mse_scales(weight, INT4)
        even = noise(weight, dequantize(round_to_nearest(weight, scales, INT4), scales))
        assert found < 0.85 * even


def test_codes_are_few_and_denser_around_zero():
    weight = torch.from_numpy(np.random.default_rng(1).standard_t(5, (3, 2048)).astype(np.float32))
    codes, scales = twin_log(weight, INT8, bits=4)
    assert codes.dtype == torch.int8 and scales.shape == (3, 1)
    for row in codes:
        for sign in (1, -1):
            levels = torch.unique(sign * row[sign * row > 0].int())
            assert len(levels) <= 8
            gaps = levels.diff()
            assert gaps[-1] > 2 * gaps[0] and bool((gaps[1:] >= gaps[:-1] - 1).all())  # but for rounding
        assert row.int().abs().max() == 127


def test_it_is_the_grid_search_that_it_says():
    """One row by loops in float64: the same error to float32's precision, but for rounding to codes."""
    row = np.random.default_rng(2).laplace(size=300)
    unit = row / np.sqrt((row**2).mean())
    least = np.inf
    for eta in ETAS:
        total = 0.0
        for side in (unit[unit > 0], -unit[unit < 0]):
            rising = np.sort(side)
            errors = []
            for percentile in PERCENTILES:
                high = np.log2(rising[round((len(side) - 1) * percentile)] + eta)
                levels = 2 ** np.linspace(np.log2(rising[0] + eta), high, 4) - eta
                nearest = np.abs(np.log2(side + eta)[:, None] - np.log2(levels + eta)).argmin(1)
                errors.append(((levels[nearest] - side) ** 2).sum())
            total += min(errors)
        least = min(least, total)
    weight = torch.from_numpy(row[None].astype(np.float32))
    found = noise(weight, dequantize(*twin_log(weight, INT8, bits=3)))
    assert found == pytest.approx(least / (unit**2).sum(), rel=0.02)


def test_groups_zeros_and_one_sign():
    weight = torch.zeros(4, 64)
    weight[1] = torch.linspace(0.1, 3.0, 64)
    weight[2, 5] = -2.0
    weight[3] = torch.linspace(-1.0, 1.0, 64)
    codes, scales = twin_log(weight, INT8, bits=4, groups=2)
    back = dequantize(codes, scales)
    assert scales.shape == (4, 2) and torch.isfinite(back).all()
    assert not back[0].any() and torch.equal(back[2], weight[2])
    assert (back[1] > 0).all() and noise(weight[1:2], back[1:2]) < 0.01
    whole, _ = twin_log(weight[:, 32:].contiguous(), INT8, bits=4)
    assert torch.equal(whole, codes[:, 32:])


def test_a_format_that_is_too_narrow():
    with pytest.raises(ValueError, match="int4 does not hold 4-bit log levels"):
        twin_log(torch.ones(1, 8), INT4, bits=4)
    assert twin_log(torch.randn(2, 64), INT4, bits=3)[0].abs().max() == 7
