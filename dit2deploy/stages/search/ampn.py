"""RobuQ's AMPN: one sensitivity a layer and bit-width, then an exact knapsack (https://arxiv.org/abs/2509.23582)."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from math import gcd, lcm

import numpy as np

from dit2deploy.stages.search.pareto import TOLERANCE, Point

MOST_CELLS = 20_000  # capacity of the knapsack; finer costs are rounded up to this many steps
BUDGETS = 13  # points of the front: costs evenly spaced between the least and the most

Errors = Callable[[tuple[int, ...]], float]


def monotone(sensitivities: Sequence[float], costs: Sequence[float] | None = None) -> list[float]:
    """Sensitivities as ones that do not increase with `costs` (default: rising as listed): the running minimum.

    A width that measures worse than a cheaper one takes that one's value, so noise buys no bits: what more bits
    do not improve costs the same error with fewer. [inferred; methods.md 3.5 asks for it "from high bits", which
    would let one lucky high width make all lower ones look as good.]
    """
    values = np.asarray(sensitivities, np.float64)
    order = np.argsort(range(len(values)) if costs is None else costs, kind="stable")
    values[order] = np.minimum.accumulate(values[order])
    return values.tolist()


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
    values: Sequence[Sequence[float]], costs: Sequence[Sequence[float | Fraction]], budget: float
) -> tuple[int, ...]:
    """For each layer the index of its choice: least sum of `values` [L][B], sum of `costs` [L][B] <= `budget`.

    Costs are exact where MOST_CELLS suffice (RobuQ: DiT-XL/2's MACs are 3:1:4:4, given as fractions of an average),
    otherwise rounded up, so that the budget holds. Raises ValueError where it cannot.
    """
    exact = [[Fraction(cost) for cost in row] for row in costs]
    scale = lcm(*(cost.denominator for row in exact for cost in row))
    # Counted from each layer's cheapest choice, which then always fits, however costs are rounded.
    whole = [[int((cost - min(row)) * scale) for cost in row] for row in exact]
    total = int(scale * (Fraction(budget) + Fraction(TOLERANCE) - sum(min(row) for row in exact)))
    if total < 0:
        raise ValueError(f"the cheapest choices cost more than {budget}")
    total = min(total, sum(max(row) for row in whole))
    unit = max(1, gcd(*(cost for row in whole for cost in row)), -(-total // MOST_CELLS))
    return knapsack(values, [[-(-cost // unit) for cost in row] for row in whole], total // unit)


def search(
    errors: Errors, costs: Sequence[Sequence[float | Fraction]], *, environment: Sequence[int], budget: float
) -> list[Point]:
    """Points whose `what` is an index of a choice for each layer: the knapsack's answers, with their measured errors.

    `costs` [L][B]: what a choice adds, in the unit of `budget`. `errors(configuration)` measures one; sensitivities are
    its increase when a single layer leaves `environment` (RobuQ measures after a short training, which repairs some
    layers; we measure after rounding: inferred). That is layers * choices measurements and BUDGETS + 1 more: errors add
    up only roughly, so each answer is measured itself.
    """
    base = tuple(environment)
    before = errors(base)
    values = []
    for layer, row in enumerate(costs):
        changed = [(*base[:layer], option, *base[layer + 1 :]) for option in range(len(row))]
        values.append(monotone([errors(configuration) - before for configuration in changed], [float(c) for c in row]))
    return answers(values, errors, costs, budget=budget)


def answers(
    values: Sequence[Sequence[float]], errors: Errors, costs: Sequence[Sequence[float | Fraction]], *, budget: float
) -> list[Point]:
    """The knapsack's answers at BUDGETS budgets and at `budget`, with measured errors; values and costs [L][B]."""
    points = []
    least, most = (float(sum(extreme(row) for row in costs)) for extreme in (min, max))
    for most_spent in sorted({*np.linspace(least, most, BUDGETS).tolist(), budget}):
        chosen = allocate(values, costs, most_spent)
        spent = sum((Fraction(row[option]) for row, option in zip(costs, chosen, strict=True)), Fraction(0))
        points.append(Point(float(spent), errors(chosen), chosen))
    return points
