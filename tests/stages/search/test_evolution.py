"""Q-DiT's evolution against all configurations of a small problem whose errors do not add up."""

from itertools import product

import numpy as np
import pytest

from dit2deploy.stages.search.evolution import evolve, repaired

GENES, CHOICES, BUDGET = 7, 4, 9.0


class Toy:
    """7 genes of 4 choices (16384 configurations): pairs of genes interact as strongly as single ones count."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.costs = np.sort(rng.uniform(0, 3, (GENES, CHOICES)), axis=1).tolist()
        self.alone = np.sort(rng.uniform(0, 1, (GENES, CHOICES)), axis=1)[:, ::-1]
        self.pairs = rng.uniform(0, 0.5, (GENES, GENES, CHOICES, CHOICES))
        self.asked: list[tuple[int, ...]] = []

    def error_of(self, genes: tuple[int, ...]) -> float:
        alone = sum(self.alone[gene, choice] for gene, choice in enumerate(genes))
        return float(alone + sum(self.pairs[i, j, genes[i], genes[j]] for i in range(GENES) for j in range(i)))

    def cost_of(self, genes: tuple[int, ...]) -> float:
        return sum(self.costs[gene][choice] for gene, choice in enumerate(genes))

    def error(self, genes: tuple[int, ...]) -> float:
        self.asked.append(genes)
        return self.error_of(genes)

    def all(self) -> dict[tuple[int, ...], float]:
        every = product(range(CHOICES), repeat=GENES)
        return {genes: self.error_of(genes) for genes in every if self.cost_of(genes) <= BUDGET}


@pytest.mark.parametrize("seed", range(4))
def test_it_finds_the_best_of_all_configurations(seed):
    """By asking for less than a third of them."""
    toy = Toy(seed)
    allowed = toy.all()
    found = evolve(toy.error, toy.costs, budget=BUDGET, seed=seed, population=40, generations=20)
    assert found[0].what == min(allowed, key=allowed.__getitem__)
    assert found[0].error == pytest.approx(min(allowed.values()))
    assert len(toy.asked) == len(set(toy.asked)) == len(found) <= 840 < len(allowed) / 3
    assert all(point.cost == pytest.approx(toy.cost_of(point.what)) for point in found)
    assert max(point.cost for point in found) <= BUDGET + 1e-9
    assert [point.error for point in found] == sorted(point.error for point in found)


def test_the_same_seed_asks_the_same(monkeypatch):
    asked = []
    for seed in (5, 5, 6):
        toy = Toy(0)
        evolve(toy.error, toy.costs, budget=BUDGET, seed=seed, population=10, generations=3)
        asked.append(toy.asked)
    assert asked[0] == asked[1] != asked[2]


def test_what_is_given_comes_first_and_small_spaces_are_tried_out():
    asked = []

    def error(genes):
        asked.append(genes)
        return float(-sum(genes))

    found = evolve(error, [[0, 1], [0, 1]], budget=1, seed=0, population=8, generations=2, first=[(0, 0)])
    assert asked[0] == (0, 0) and set(asked) == {(0, 0), (0, 1), (1, 0)} and len(asked) == 3
    assert found[0].error == -1 and found[-1].what == (0, 0)


def test_repair_takes_the_next_cheaper_choices():
    rng = np.random.default_rng(0)
    costs = [[4.0, 1.0, 2.0]] * 3
    for _ in range(20):
        genes = repaired((0, 0, 0), costs, 5.0, rng)
        assert sum(costs[0][choice] for choice in genes) <= 5.0
        assert sum(costs[0][choice] for choice in genes) >= 3.0
    assert repaired((1, 1, 2), costs, 5.0, rng) == (1, 1, 2)


def test_budgets_that_cannot_be_met():
    with pytest.raises(ValueError, match="no configuration"):
        evolve(lambda genes: 0.0, [[2.0, 1.0]], budget=0.5, seed=0, population=2, generations=1)
    with pytest.raises(ValueError, match="first configuration costs 2"):
        evolve(lambda genes: 0.0, [[2.0, 1.0]], budget=1.5, seed=0, population=2, generations=1, first=[(0,)])
