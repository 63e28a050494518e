"""The tree search: near the true optimum of a toy, linear in layers, and cheaper by halving."""

import numpy as np
import pytest

from dit2deploy.stages.search.pareto import Point, best_within, front, pareto_drop
from dit2deploy.stages.search.tss import OPEN, refine, search
from tests.stages.search.toys import Blocks

BUDGETS = (2.5, 2.75, 3.0, 3.25, 3.5)


def found(toy: Blocks, *, parts: int = 1, environment: int = OPEN, survivors: int = 16) -> list[Point]:
    count = len(toy.weights)
    costs = [[bits / count for bits in toy.bits]] * count

    def errors(configuration, part):
        every = toy.measure(tuple(environment if choice == OPEN else choice for choice in configuration))
        if parts == 1:
            return every
        return every[::4] if part == 0 else every[np.arange(len(every)) % 4 > 0]

    return search(errors, costs, [list(range(count))], parts=parts, survivors=survivors)


@pytest.mark.parametrize("environment", [OPEN, 1])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_is_near_the_optimum_of_a_toy(seed, environment):
    """methods.md 4.1: every ratio to the optimum of all 6,561 configurations is at most 1.15."""
    toy = Blocks(seed)
    points = found(toy, environment=environment)
    for budget, best in zip(BUDGETS, toy.best_at(BUDGETS), strict=True):
        assert best_within(points, budget).error <= 1.15 * best, budget


def test_measurements_are_linear_in_the_layers():
    asked = []
    for count in (8, 16, 32):
        toy = Blocks(0, count)
        found(toy, survivors=4)
        asked.append(toy.asked)
    assert asked[1] <= 2.2 * asked[0] and asked[2] <= 2.2 * asked[1]
    assert asked[2] <= 32 * 3 + 31 * 4**2


def test_halving_measures_less_and_finds_as_good():
    whole, halved = Blocks(3), Blocks(3)
    points, cheaper = found(whole), found(halved, parts=2)
    assert halved.asked < 2 * whole.asked  # both parts of every candidate would be twice
    for budget in BUDGETS:
        assert best_within(cheaper, budget).error <= 1.1 * best_within(points, budget).error


def test_swaps_help_or_leave_it():
    toy = Blocks(4)
    costs = [[bits / 8 for bits in toy.bits]] * 8
    start = Point(3.0, float(toy.measure((1,) * 8).mean()), (1,) * 8)
    better = refine(start, lambda what, part: toy.measure(what), costs, parts=1, budget=3.0)
    assert better.error < start.error and better.cost <= 3.0 + 1e-9
    assert better.error == pytest.approx(toy.measure(better.what).mean())


def test_blocks_are_subtrees():
    """Layers of one block are joined before any other."""
    asked = []

    def errors(configuration, part):
        asked.append(tuple(index for index, choice in enumerate(configuration) if choice != OPEN))
        return np.array([1.0 - 0.1 * sum(configuration)])

    search(errors, [[0.5, 1.0]] * 5, [[0, 1, 2], [3, 4]], parts=1, survivors=4)
    assert set(asked) == {(0,), (1,), (2,), (0, 1), (0, 1, 2), (3,), (4,), (3, 4), (0, 1, 2, 3, 4)}


def test_the_drop_keeps_both_ends_and_fills_with_the_next_fronts():
    points = [Point(cost, 10.0 - cost, cost) for cost in range(9)]
    kept = pareto_drop(points, 5)
    assert [point.what for point in kept] == [0, 2, 4, 6, 8]
    dominated = [Point(2.5, 9.5, "a"), Point(3.5, 9.4, "b")]
    assert {point.what for point in pareto_drop([*points[:3], *dominated], 4)} == {0, 1, 2, "a"}
    assert front([Point(1, 2, "x"), Point(1, 2, "y"), Point(2, 2, "z")]) == [Point(1, 2, "x")]
    with pytest.raises(ValueError, match="costs"):
        best_within(points[3:], 2.0)
