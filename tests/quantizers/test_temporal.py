"""Weights of steps: uniform is plain GPTQ bit for bit, one-hot is best at its step, none collapses (methods.md 5.3)."""

import math

import numpy as np
import pytest
import torch

from dit2deploy.formats import INT3
from dit2deploy.quantizers.gptq import gptq, inverse_factor
from dit2deploy.quantizers.round_to_nearest import absmax_scales, dequantize
from dit2deploy.quantizers.temporal import LARGEST_RATIO, effective_size, step_weights


def test_equal_scores_are_ones():
    assert step_weights([3.0] * 7).tolist() == [1.0] * 7
    assert step_weights([0.0]).tolist() == [1.0]


@pytest.mark.parametrize("unit", [1e-12, 1.0, 1e9])
def test_the_unit_of_scores_does_not_matter(unit):
    scores = np.random.default_rng(0).random(20)
    np.testing.assert_allclose(step_weights(scores * unit), step_weights(scores))


def test_scores_that_span_decades_do_not_collapse():
    scores = 10.0 ** np.linspace(-6, 3, 20)
    weights = step_weights(scores)
    assert weights.mean() == pytest.approx(1)
    assert weights.max() / weights.min() <= LARGEST_RATIO * (1 + 1e-9)
    assert (np.diff(weights) >= 0).all() and weights[-1] > 2 * weights[0]
    assert effective_size(weights) > 8


def test_half_of_the_steps_count_where_the_cap_does_not_matter():
    scores = np.repeat([1.0, 0.9, 0.8, 0.7], 5)
    weights = step_weights(scores)
    alone = weights[weights > weights.max() / LARGEST_RATIO * (1 + 1e-6)]
    assert effective_size(weights) == pytest.approx(10, abs=2.5)
    assert len(alone) >= 10


@pytest.mark.parametrize("scores", [[], [1.0, float("nan")], [float("inf"), 1.0]])
def test_scores_that_are_not_finite_are_refused(scores):
    with pytest.raises(ValueError, match="finite"):
        step_weights(scores)


def test_a_step_is_served_best_by_weights_that_see_it_alone():
    """The toy of methods.md 5.3: 4 steps of other correlations, normal weights 64 x 128, 3 bits absmax."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    weight = normal(64, 128)
    steps = [
        normal(512, 128) @ (normal(128, 128) * torch.linspace(1, 0.05, 128)[torch.randperm(128)]) for _ in range(4)
    ]
    moments = [x.T @ x / len(x) for x in steps]
    scales = absmax_scales(weight, INT3)

    def sqnr_db(alpha) -> list[float]:
        hessian = sum(share * moment for share, moment in zip(alpha, moments, strict=True))
        solved = dequantize(gptq(weight, scales, INT3, inverse_factor(hessian)), scales)
        noise = [((x @ (weight - solved).T).square().sum() / (x @ weight.T).square().sum()).item() for x in steps]
        return [-10 * math.log10(value) for value in noise]

    alphas = [[1.0] * 4, [2.8, 0.4, 0.4, 0.4], [0.4, 0.4, 0.4, 2.8], *torch.eye(4).tolist()]
    table = [sqnr_db(alpha) for alpha in alphas]
    for step in range(4):
        assert max(range(7), key=lambda row: table[row][step]) == 3 + step
    assert table[0][0] < table[1][0] < table[3][0]  # the more weight, the better
