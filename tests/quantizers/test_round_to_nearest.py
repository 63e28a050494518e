"""Oracles of weight quantizers: SQNR in dB on normal weights (methods.md 1.2 to 1.5), and the edges."""

import math

import numpy as np
import pytest
import torch

from dit2deploy.formats import FORMATS, INT3, INT4, INT8, TERNARY
from dit2deploy.ops.hadamard_quantize import (
    GAUSSIAN_LEVELS,
    GAUSSIAN_STEPS,
    MID_RISE_STEPS,
    hadamard,
    hadamard_quantize,
)
from dit2deploy.quantizers.round_to_nearest import (
    absmax_scales,
    absmean_scales,
    dequantize,
    mse_scales,
    round_to_nearest,
    row_chunks,
)


def sqnr_db(reference: torch.Tensor, found: torch.Tensor) -> float:
    error = (reference.double() - found.double()).square().sum()
    return 10 * math.log10(reference.double().square().sum() / error)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def there_and_back(weight, scales, fmt):
    return dequantize(round_to_nearest(weight, scales, fmt), scales)


@pytest.mark.parametrize(
    ("make_scales", "fmt", "expected"),
    [
        (absmean_scales, TERNARY, 5.79),
        (mse_scales, TERNARY, 7.21),
        (mse_scales, INT3, 13.30),
        (mse_scales, INT4, 18.93),
        (absmax_scales, INT3, 9.47),
        (absmax_scales, INT4, 16.83),
        (absmax_scales, INT8, 42.00),
    ],
)
def test_rules_reach_their_sqnr_on_normal_weights(make_scales, fmt, expected):
    weight = normal(384, 1152)
    assert sqnr_db(weight, there_and_back(weight, make_scales(weight, fmt), fmt)) == pytest.approx(expected, abs=0.06)


def test_least_squares_level_at_the_absmean_threshold():
    """methods.md 1.4, third row."""
    weight = normal(384, 1152)
    codes = round_to_nearest(weight, absmean_scales(weight, TERNARY), TERNARY).float()
    level = (weight * codes).sum(1, keepdim=True) / codes.square().sum(1, keepdim=True)
    assert sqnr_db(weight, codes * level) == pytest.approx(6.71, abs=0.03)


def test_ternary_level_is_a_fixed_point():
    weight = normal(16, 1152)
    level = mse_scales(weight, TERNARY)
    kept = weight.abs() > level / 2
    mean_of_survivors = (weight.abs() * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True)
    torch.testing.assert_close(level, mean_of_survivors)
    assert (level / weight.std(1, keepdim=True)).mean() == pytest.approx(1.224, abs=0.02)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_searched_scales_are_no_worse_than_absmax_in_any_group(fmt):
    weight = normal(64, 192) / normal(64, 192, seed=1).abs().sqrt()  # heavy tails
    best, plain = (there_and_back(weight, make(weight, fmt, groups=3), fmt) for make in (mse_scales, absmax_scales))
    error = lambda found: (weight - found).reshape(64, 3, 64).square().sum(-1)  # noqa: E731
    assert (error(best) <= error(plain) * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    ("fmt", "bits", "expected"),
    [
        (TERNARY, 2, 4.63),
        (TERNARY, 3, 6.41),
        (TERNARY, 4, 6.98),
        (INT3, 3, 10.37),
        (INT3, 4, 12.28),
        (INT4, 3, 12.27),
        (INT4, 4, 15.92),
    ],
)
def test_products_of_quantized_weights_and_tokens(fmt, bits, expected):
    """methods.md 1.5: noise-to-signal ratios of weights and activations add up."""
    weight, x = normal(256, 1152), normal(512, 1152, seed=1)
    q, s = hadamard_quantize(x, torch.tensor([2.0 ** (bits - 1) - 1]), block=1, clip="gaussian")
    found = (q.float() * s) @ there_and_back(weight, mse_scales(weight, fmt), fmt).T
    assert sqnr_db(x @ weight.T, found) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize(("fmt", "weight_nsr"), [(TERNARY, 0.19017404), (INT3, 0.04685997), (INT4, 0.01288939)])
@pytest.mark.parametrize(("bits", "token_db"), [(1, 4.3964), (2, 9.2502)])
def test_products_with_tokens_on_a_mid_rise_grid(fmt, weight_nsr, bits, token_db):
    """methods.md 1.5 with Table B: NSR = 1 - (1 - NSR_w)(1 - NSR_x), e.g. 5.43 dB for ternary weights, 2-bit tokens."""
    weight, x = normal(256, 1152), normal(512, 1152, seed=1)
    q, s = hadamard_quantize(x, torch.tensor([2.0**bits - 1]), block=1, clip="gaussian", grid="mid-rise")
    found = (q.float() * s) @ there_and_back(weight, mse_scales(weight, fmt), fmt).T
    expected = 1 - (1 - weight_nsr) * (1 - 10 ** (-token_db / 10))
    assert sqnr_db(x @ weight.T, found) == pytest.approx(-10 * math.log10(expected), abs=0.1)


@pytest.mark.parametrize(
    ("bits", "expected"), [(1, 4.40), (2, 9.25), (3, 14.28), (4, 19.39), (5, 24.58), (6, 29.84), (7, 35.19)]
)
def test_tokens_on_a_mid_rise_grid_reach_their_sqnr(bits, expected):
    """methods.md 1.3, column mid-rise (1 bit: Table B)."""
    x = normal(2000, 1152)
    q, s = hadamard_quantize(x, torch.tensor([2.0**bits - 1]), block=1, clip="gaussian", grid="mid-rise")
    assert sqnr_db(x, q * s) == pytest.approx(expected, abs=0.1)
    assert len(q.unique()) == 2**bits and (q % 2 == 1).all()


def normal_error(levels: np.ndarray) -> float:
    """methods.md 1.1: squared error of a unit normal that is rounded to the nearest of rising levels; closed form."""
    inner = (levels[1:] + levels[:-1]) / 2
    density = np.concatenate([[0.0], np.exp(-inner * inner / 2) / math.sqrt(2 * math.pi), [0.0]])
    below = np.array([0.0, *(0.5 * math.erfc(-t / math.sqrt(2)) for t in inner), 1.0])
    weighted = np.concatenate([[0.0], inner, [0.0]]) * density
    mass, first = np.diff(below), -np.diff(density)
    return float((mass - np.diff(weighted) - 2 * levels * first + levels**2 * mass).sum())


@pytest.mark.parametrize("bits", range(1, 8))
def test_steps_of_the_mid_rise_grid_minimise_the_error_of_a_unit_normal(bits):
    """Table B re-derived: half steps to its last digit, and its SQNR."""
    odd = np.arange(1.0 - 2**bits, 2**bits, 2)
    step = MID_RISE_STEPS[bits - 1]
    low, high = 0.8 * step, 1.2 * step
    for _ in range(80):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, b) if normal_error(a * odd) < normal_error(b * odd) else (a, high)
    assert low == pytest.approx(step, abs=1e-6)
    table = (4.3964, 9.2502, 14.2667, 19.3769, 24.5653, 29.8295, 35.1665)
    assert -10 * math.log10(normal_error(step * odd)) == pytest.approx(table[bits - 1], abs=1e-4)


@pytest.mark.parametrize(("qmax", "step"), zip(GAUSSIAN_LEVELS, GAUSSIAN_STEPS, strict=True))
def test_gaussian_steps_minimise_the_error_of_a_unit_normal(qmax, step):
    """Table A re-derived by integration over a fine grid of the normal density."""
    x = np.linspace(-9, 9, 400_001)
    density = np.exp(-x * x / 2)
    density /= density.sum()

    def error(width):
        return (density * (x - width * np.clip(np.round(x / width), -qmax, qmax)) ** 2).sum()

    low, high = 0.8 * step, 1.2 * step
    for _ in range(60):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, b) if error(a) < error(b) else (a, high)
    assert low == pytest.approx(step, abs=1e-4 * max(1, step))


def test_rotation_rescues_tokens_with_outlier_channels():
    """methods.md 2: normal tokens of 1024 with channel 7 times 50 and channel 100 times 30, absmax, 4 bits."""
    x = normal(2000, 1024)
    x[:, 7] *= 50
    x[:, 100] *= 30
    found = {}
    for block in (1, 1024):
        q, s = hadamard_quantize(x, torch.tensor([7.0]), block=block, clip="absmax")
        found[block] = sqnr_db(x, hadamard(q.float() * s, block=block))
    assert found[1] == pytest.approx(7.05, abs=0.3)
    assert found[1024] == pytest.approx(19.72, abs=0.3)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_rows_of_zeros_stay_zero(fmt):
    weight = normal(4, 64)
    weight[2] = 0
    scales = mse_scales(weight, fmt)
    codes = round_to_nearest(weight, scales, fmt)
    assert not codes[2].any() and torch.isfinite(scales).all()
    assert codes.min() >= fmt.low and codes.max() <= fmt.high


def test_groups_are_quantized_each_for_itself():
    weight = normal(8, 128)
    weight[:, 64:] *= 100
    scales = mse_scales(weight, INT4, groups=2)
    assert scales.shape == (8, 2)
    alone = mse_scales(weight[:, :64].contiguous(), INT4)
    torch.testing.assert_close(scales[:, :1], alone)


def test_chunks_of_rows_change_nothing(monkeypatch):
    weight = normal(50, 96)
    whole = mse_scales(weight, INT3)
    codes = round_to_nearest(weight, whole, INT3)
    monkeypatch.setattr("dit2deploy.quantizers.round_to_nearest.CHUNK", 96 * 7)
    assert [chunk.stop - chunk.start for chunk in row_chunks(50, 96)] == [7] * 7 + [1]
    torch.testing.assert_close(mse_scales(weight, INT3), whole)
    assert torch.equal(round_to_nearest(weight, whole, INT3), codes)


def test_groups_that_do_not_divide_k_are_refused():
    with pytest.raises(ValueError, match="do not divide"):
        absmax_scales(normal(4, 10), INT4, groups=3)


def test_absmean_is_for_ternary_weights():
    with pytest.raises(ValueError, match="ternary"):
        absmean_scales(normal(4, 10), INT4)
