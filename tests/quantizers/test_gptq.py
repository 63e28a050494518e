"""Oracles of GPTQ (methods.md 6.6): correlated inputs gain, white ones do not."""

import math

import pytest
import torch

from dit2deploy.formats import INT3, INT4, TERNARY, Format
from dit2deploy.quantizers.gptq import gptq, inverse_factor
from dit2deploy.quantizers.round_to_nearest import absmax_scales, dequantize, mse_scales, round_to_nearest


def sqnr_db(reference: torch.Tensor, found: torch.Tensor) -> float:
    return 10 * math.log10(reference.square().sum() / (reference - found).square().sum())


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(rows: int, k: int, rho: float) -> torch.Tensor:
    """Rows of an AR(1) process of unit variance along K."""
    x = normal(rows, k, seed=1)
    for j in range(1, k):
        x[:, j] = rho * x[:, j - 1] + math.sqrt(1 - rho**2) * x[:, j]
    return x


def both(
    weight: torch.Tensor, x: torch.Tensor, scales: torch.Tensor, fmt: Format, unseen: torch.Tensor | None = None
) -> tuple[float, float]:
    """SQNR of the outputs, round to nearest and GPTQ, for the inputs that GPTQ saw or for others."""
    nearest = dequantize(round_to_nearest(weight, scales, fmt), scales)
    solved = dequantize(gptq(weight, scales, fmt, inverse_factor(x.T @ x)), scales)
    x = x if unseen is None else unseen
    return sqnr_db(x @ weight.T, x @ nearest.T), sqnr_db(x @ weight.T, x @ solved.T)


@pytest.mark.parametrize(("fmt", "nearest", "solved"), [(INT3, 10.97, 18.06), (INT4, 18.23, 25.45)])
def test_correlated_inputs_gain_seven_decibels(fmt, nearest, solved):
    weight, x = normal(128, 256, seed=0), correlated(4096, 256, 0.9)
    found = both(weight, x, absmax_scales(weight, fmt), fmt)
    assert found[0] == pytest.approx(nearest, abs=0.5)
    assert found[1] == pytest.approx(solved, abs=0.5)
    assert found[1] - found[0] > 6


@pytest.mark.parametrize("fmt", [TERNARY, INT3, INT4], ids=lambda fmt: fmt.name)
def test_white_inputs_gain_nothing(fmt):
    weight, x = normal(128, 256, seed=0), normal(8192, 256, seed=2)
    nearest, solved = both(weight, x, mse_scales(weight, fmt), fmt, unseen=normal(4096, 256, seed=3))
    assert solved == pytest.approx(nearest, abs=0.1)
    identity = inverse_factor(torch.eye(256))
    assert torch.equal(
        gptq(weight, mse_scales(weight, fmt), fmt, identity), round_to_nearest(weight, mse_scales(weight, fmt), fmt)
    )


def test_ternary_grid_and_groups():
    weight, x = normal(64, 256, seed=0), correlated(4096, 256, 0.9)
    for groups in (1, 4):
        nearest, solved = both(weight, x, mse_scales(weight, TERNARY, groups=groups), TERNARY)
        assert solved > nearest + 5


def test_blocks_are_lazy_updates_of_the_column_by_column_loop():
    """The textbook loop without blocks: every column's error goes to all later columns at once."""
    weight, x = normal(8, 300, seed=0), correlated(2000, 300, 0.7)
    scales = mse_scales(weight, INT4)
    factor = inverse_factor(x.T @ x)
    rest, codes = weight.clone(), torch.empty(weight.shape)
    for j in range(300):
        codes[:, j] = (rest[:, j] / scales[:, 0]).round().clamp(-7, 7)
        error = (rest[:, j] - codes[:, j] * scales[:, 0]) / factor[j, j]
        rest[:, j:] -= error.unsqueeze(1) * factor[j, j:]
    same = (gptq(weight, scales, INT4, factor) == codes).float().mean()
    assert same > 0.995  # a tie may fall the other way


def test_factor_is_that_of_the_damped_inverse():
    x = correlated(500, 32, 0.5)
    x[:, 5] = 0
    hessian = (x.T @ x).double()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(32)
    damped[5, 5] = 1
    factor = inverse_factor(hessian).double()
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(32).double(), rtol=0, atol=1e-4)


def test_inputs_that_are_not_finite_are_refused():
    hessian = torch.eye(4)
    hessian[1, 1] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        inverse_factor(hessian)
