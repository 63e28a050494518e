"""Q-DiT's evolutionary search: configurations bred from the best found so far (https://arxiv.org/abs/2406.17343)."""

from collections.abc import Callable, Sequence

import numpy as np

from dit2deploy.base.progress import report
from dit2deploy.stages.search.pareto import TOLERANCE, Point

PARENTS = 10  # of the best found so far, from which the next generation comes
MUTATION = 0.1  # share of the genes that a mutation draws anew
TRIES = 10  # for each child wanted; what is then missing is drawn at random

Genes = tuple[int, ...]


def evolve(
    error: Callable[[Genes], float],
    costs: Sequence[Sequence[float]],
    *,
    budget: float,
    seed: int,
    population: int,
    generations: int,
    first: Sequence[Genes] = (),
) -> list[Point]:
    """All configurations measured, the best first: `what` is the index of a choice for each gene.

    `costs` [genes][choices] add up, and no configuration above `budget` is measured. The first generation is `first`
    and random ones; each of the `generations` after it is half crossover (each gene from one of two parents) and half
    mutation of the PARENTS best of all so far (methods.md 6.5). PARENTS, MUTATION and TRIES are those of Q-DiT's code,
    which also draws a fifth of each generation at random. Nothing is measured twice: at most population *
    (generations + 1) measurements. [inferred] A configuration that costs too much is repaired, a random gene a choice
    cheaper at a time, where Q-DiT throws it away: a tight budget holds a small share of the space.
    Raises ValueError where the cheapest choices exceed the budget, and for a configuration of `first` that does.
    """
    if sum(min(row) for row in costs) > budget + TOLERANCE:
        raise ValueError(f"no configuration costs {budget} or less")
    rng = np.random.default_rng(seed)
    found: dict[Genes, Point] = {}

    def measure(genes: Genes) -> None:
        cost = _cost(genes, costs)
        if cost > budget + TOLERANCE:
            raise ValueError(f"a first configuration costs {cost}, more than {budget}")
        found[genes] = Point(cost, error(genes), genes)
        report("search: evolution", min(len(found), most), most)

    def fill(wanted: int, child: Callable[[], Genes]) -> None:
        for _ in range(TRIES * population):
            if len(found) >= wanted:
                return
            genes = repaired(child(), costs, budget, rng)
            if genes not in found:
                measure(genes)

    def drawn() -> Genes:
        return tuple(int(rng.integers(len(row))) for row in costs)

    def crossed() -> Genes:
        one, other = (parents[int(rng.integers(len(parents)))] for _ in range(2))
        return tuple(a if rng.random() < 0.5 else b for a, b in zip(one, other, strict=True))

    def mutated() -> Genes:
        parent, other = parents[int(rng.integers(len(parents)))], drawn()
        return tuple(b if rng.random() < MUTATION else a for a, b in zip(parent, other, strict=True))

    most = population * (generations + 1)
    report("search: evolution", 0, most)
    for genes in dict.fromkeys(first):
        measure(genes)
    fill(population, drawn)
    for _ in range(generations):
        parents = [point.what for point in _best(found)[:PARENTS]]
        before = len(found)
        fill(before + population // 2, crossed)
        fill(before + population, mutated)
        fill(before + population, drawn)
    report("search: evolution", most, most)
    return _best(found)


def repaired(genes: Genes, costs: Sequence[Sequence[float]], budget: float, rng: np.random.Generator) -> Genes:
    """The configuration, or one within `budget`: random genes become the next cheaper choice until it fits."""
    changed = list(genes)
    while _cost(changed, costs) > budget + TOLERANCE:
        open_to = [gene for gene, choice in enumerate(changed) if costs[gene][choice] > min(costs[gene])]
        gene = open_to[int(rng.integers(len(open_to)))]
        row, now = costs[gene], costs[gene][changed[gene]]
        changed[gene] = max((choice for choice in range(len(row)) if row[choice] < now), key=row.__getitem__)
    return tuple(changed)


def _cost(genes: Sequence[int], costs: Sequence[Sequence[float]]) -> float:
    return float(sum(row[choice] for row, choice in zip(costs, genes, strict=True)))


def _best(found: dict[Genes, Point]) -> list[Point]:
    return sorted(found.values(), key=lambda point: (point.error, point.cost, point.what))
