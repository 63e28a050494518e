"""RobuQ's AMPN: one sensitivity a layer and bit-width, then an exact knapsack (https://arxiv.org/abs/2509.23582)."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from math import gcd

import numpy as np

from dit2deploy.stages.search.pareto import TOLERANCE, Point

MOST_CELLS = 20_000  # capacity of the knapsack; finer costs are rounded up to this many steps
BUDGETS = 13  # points of the front: average bits evenly spaced between the least and the most

Errors = Callable[[tuple[int, ...]], float]


def monotone(sensitivities: Sequence[float]) -> list[float]:
    """Sensitivities by rising bits as non-increasing ones: the running minimum from the low end.

    A width that measures worse than a lower one takes the lower one's value, so noise buys no bits: what more bits
    do not improve costs the same error with fewer. [inferred; methods.md 3.5 asks for it "from high bits", which
    would let one lucky high width make all lower ones look as good.]
    """
    return np.minimum.accumulate(np.asarray(sensitivities, np.float64)).tolist()


def knapsack(values: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], capacity: int) -> tuple[int, ...]:
    """One option a layer: the choice of least total value whose total cost is at most `capacity`.

    The dynamic program of methods.md 3.5: F_l(c) = min over b of F_(l-1)(c - cost) + value. Of equally good choices
    the first option listed wins. Raises ValueError where even the cheapest options do not fit.
    """
    best = np.full(capacity + 1, np.inf)
    best[0] = 0.0
    choices = []
    for layer_values, layer_costs in zip(values, costs, strict=True):
        following = np.full(capacity + 1, np.inf)
        choice = np.zeros(capacity + 1, np.int16)
        for option, (value, cost) in enumerate(zip(layer_values, layer_costs, strict=True)):
            if cost > capacity:
                continue
            reached = best[: capacity + 1 - cost] + value
            better = reached < following[cost:]
            following[cost:][better] = reached[better]
            choice[cost:][better] = option
        best = following
        choices.append(choice)
    at = int(np.argmin(best))
    if not np.isfinite(best[at]):
        raise ValueError(f"the cheapest options cost more than {capacity}")
    picked = []
    for layer_costs, choice in zip(reversed(costs), reversed(choices), strict=True):
        picked.append(int(choice[at]))
        at -= layer_costs[picked[-1]]
    return tuple(reversed(picked))


def allocate(
    values: Sequence[Sequence[float]], weights: Sequence[int], bits: Sequence[float], budget: float
) -> tuple[int, ...]:
    """For each layer the index of its bit-width: least sum of `values` [L][B], weighted average of bits <= `budget`.

    `weights` [L] are MACs, parameters or ones; `bits` rise. Costs are exact integers where MOST_CELLS suffice (RobuQ:
    DiT-XL/2's MACs are 3:1:4:4), otherwise rounded up, so that the budget holds. Raises ValueError where it cannot.
    """
    exact = [Fraction(value).limit_denominator(100) for value in bits]
    scale = int(np.lcm.reduce([value.denominator for value in exact]))
    costs = [[int(weight * value * scale) for value in exact] for weight in weights]
    unit = gcd(*(cost for row in costs for cost in row))
    total = sum(weights) * scale * (Fraction(budget).limit_denominator(10**6) + Fraction(TOLERANCE))
    unit = max(unit, -(-int(total) // MOST_CELLS))
    return knapsack(values, [[-(-cost // unit) for cost in row] for row in costs], int(total / unit))


def search(
    errors: Errors, weights: Sequence[int], bits: Sequence[float], *, environment: Sequence[int], budget: float
) -> list[Point]:
    """Points whose `what` is an index of `bits` for each layer: the knapsack's answers, with their measured errors.

    `errors(configuration)` measures one; sensitivities are its increase when a single layer leaves `environment`
    (RobuQ measures after a short training, which repairs some layers; we measure after rounding: inferred). That is
    layers * widths measurements and BUDGETS + 1 more: errors add up only roughly, so each answer is measured itself.
    """
    base = tuple(environment)
    before = errors(base)
    values = []
    for layer in range(len(weights)):
        changed = [(*base[:layer], option, *base[layer + 1 :]) for option in range(len(bits))]
        values.append(monotone([errors(configuration) - before for configuration in changed]))
    share = np.asarray(weights) / sum(weights)
    points = []
    for average in sorted({*np.linspace(bits[0], bits[-1], BUDGETS).tolist(), budget}):
        chosen = allocate(values, weights, bits, average)
        points.append(Point(float(share @ np.asarray(bits)[list(chosen)]), errors(chosen), chosen))
    return points
