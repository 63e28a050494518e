"""The knapsack of AMPN against methods.md 3.5 and brute force; budgets by weight."""

from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from dit2deploy.stages.search.ampn import allocate, knapsack, monotone, search
from tests.stages.search.toys import Blocks

ROWS = [[9, 3, 1.2, 0.4], [20, 4, 1, 0.3], [2, 1, 0.6, 0.5], [6, 2.5, 1.5, 1]]


def averages(weights, bits) -> list[list[Fraction]]:
    """What each width of each layer adds to an average of bits."""
    return [[Fraction(w, sum(weights)) * Fraction(b).limit_denominator(100) for b in bits] for w in weights]


@pytest.mark.parametrize(
    "budget, total, bits",
    [
        (8, 8.5, (2, 3, 1, 2)),
        (9, 6.7, (3, 3, 1, 2)),
        (10, 5.7, (3, 3, 2, 2)),  # (3, 3, 1, 3) is as good: of two, the first option listed goes to the last layer
        (11, 4.7, (3, 3, 2, 3)),
        (12, 3.9, (4, 3, 2, 3)),
    ],
)
def test_the_oracle(budget, total, bits):
    chosen = knapsack(ROWS, [[1, 2, 3, 4]] * 4, budget)
    assert sum(row[option] for row, option in zip(ROWS, chosen, strict=True)) == pytest.approx(total)
    assert chosen == tuple(width - 1 for width in bits)
    assert allocate(ROWS, [[1, 2, 3, 4]] * 4, budget) == chosen


def test_weighted_costs_against_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(5):
        values, weights, bits = rng.random((5, 3)).tolist(), rng.integers(1, 9, 5).tolist(), [1.6, 3.0, 8.0]
        for budget in (1.6, 2.5, 4.0, 8.0):
            allowed = [
                sum(row[option] for row, option in zip(values, what, strict=True))
                for what in product(range(3), repeat=5)
                if np.dot(weights, np.array(bits)[list(what)]) <= budget * sum(weights) + 1e-9
            ]
            costs = averages(weights, bits)
            chosen = allocate(values, costs, budget)
            assert np.dot(weights, np.array(bits)[list(chosen)]) <= budget * sum(weights) + 1e-6
            assert sum(row[option] for row, option in zip(values, chosen, strict=True)) == pytest.approx(min(allowed))


def test_large_weights_keep_the_budget():
    weights = [10**9 + 7, 3 * 10**9 + 1, 4 * 10**9 + 9]
    chosen = allocate([[4, 2, 1]] * 3, averages(weights, [2, 3, 4]), 3.0)
    assert np.dot(weights, np.array([2, 3, 4])[list(chosen)]) <= 3.0 * sum(weights)
    assert sum(chosen) >= 2


def test_what_cannot_be_met_is_an_error():
    with pytest.raises(ValueError, match="cheapest"):
        knapsack(ROWS, [[2, 3, 4, 5]] * 4, 7)


def test_noise_buys_no_bits():
    assert monotone([3.0, 1.0, 1.2, 0.9, 1.0]) == [3.0, 1.0, 1.0, 0.9, 0.9]
    assert allocate([monotone([1.0, 1.1])], [[3, 4]], 4.0) == (0,)


def test_it_is_near_the_optimum_of_a_toy():
    toy = Blocks(0)
    points = search(
        lambda what: float(toy.measure(what).mean()), averages([1] * 8, toy.bits), environment=(1,) * 8, budget=2.75
    )
    assert toy.asked <= 8 * 3 + 15
    for budget, best in zip((2.5, 2.75, 3.25), toy.best_at((2.5, 2.75, 3.25)), strict=True):
        assert min(point.error for point in points if point.cost <= budget + 1e-9) <= 1.25 * best
