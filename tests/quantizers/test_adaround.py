"""AdaRound starts at the weight, moves a code by one at most, and comes near GPTQ where inputs are correlated."""

import pytest
import torch

from dit2deploy.formats import INT3, INT4, INT8, TERNARY
from dit2deploy.quantizers.adaround import Rounding, learn, regulariser
from dit2deploy.quantizers.gptq import gptq, inverse_factor
from dit2deploy.quantizers.round_to_nearest import absmax_scales, dequantize, mse_scales, round_to_nearest
from tests.quantizers.test_gptq import correlated, normal, sqnr_db


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("fmt", [TERNARY, INT3, INT4, INT8], ids=lambda fmt: fmt.name)
def test_it_starts_at_the_weight_and_rounds_to_nearest_if_nothing_is_learned(fmt, groups):
    weight = normal(16, 64, seed=0)
    weight[3] = 0
    scales = absmax_scales(weight, fmt, groups=groups)
    rounding = Rounding(weight, scales, fmt)
    torch.testing.assert_close(dequantize(rounding.soft(), scales).detach(), weight, rtol=0, atol=1e-4)
    same = (rounding.hard() == round_to_nearest(weight, scales, fmt)).float().mean()
    assert same > 0.999  # a tie may go the other way
    drawn = torch.stack([rounding.drawn(torch.Generator().manual_seed(seed)) for seed in range(400)])
    torch.testing.assert_close(dequantize(drawn.mean(0), scales), weight, rtol=0, atol=float(scales.max()) / 8)


@pytest.mark.parametrize(
    ("fmt", "gain", "behind"), [(TERNARY, 5, 0.5), (INT3, 5, 1.9), (INT4, 5, 1.9)], ids=["ternary", "int3", "int4"]
)
def test_correlated_inputs_gain_nearly_what_gptq_gains(fmt, gain, behind):
    """The oracle of methods.md 6.6, AR(1) of 0.9, a quarter of its rows. GPTQ makes up for earlier columns without a
    limit; AdaRound may only choose between two codes, but chooses all of them together."""
    weight, x = normal(32, 256, seed=0), correlated(4096, 256, 0.9)
    scales = mse_scales(weight, fmt) if fmt is TERNARY else absmax_scales(weight, fmt)
    nearest = round_to_nearest(weight, scales, fmt).float()
    start = (x @ (dequantize(nearest, scales) - weight).T).square().sum(1).mean()
    rounding, generator = Rounding(weight, scales, fmt), torch.Generator().manual_seed(0)

    def loss() -> torch.Tensor:
        rows = torch.randint(len(x), (256,), generator=generator)
        return (x[rows] @ (dequantize(rounding.soft(), scales) - weight).T).square().sum(1).mean() / start

    learn([rounding], loss, iterations=400)
    found = [
        sqnr_db(x @ weight.T, x @ dequantize(codes, scales).T)
        for codes in (nearest, rounding.hard(), gptq(weight, scales, fmt, inverse_factor(x.T @ x)).float())
    ]
    assert found[1] > found[0] + gain
    assert found[1] > found[2] - behind
    assert (rounding.hard() - nearest).abs().max() == 1
    assert rounding.hard().min() >= fmt.low and rounding.hard().max() <= fmt.high
    h = rounding.h().detach()
    assert ((h < 0.01) | (h > 0.99)).float().mean() > 0.98


def test_the_regulariser_wants_whole_numbers():
    assert float(regulariser(torch.tensor([0.0, 1.0]), 20)) == 0
    assert float(regulariser(torch.tensor([0.5, 0.5]), 2)) == 2
    # a high exponent lets all but the ends alone, a low one pushes from the middle on
    h = torch.tensor([0.6], requires_grad=True)
    slopes = [abs(float(torch.autograd.grad(regulariser(h, exponent), h)[0])) for exponent in (20, 2)]
    assert slopes[0] < 1e-6 < slopes[1]
