"""AdaTSQ: activation bits that change along the trajectory, found by a Pareto beam (https://arxiv.org/abs/2602.09883).

Groups of neighbouring sampler steps take the place of the paper's single steps, so that the widths change a few times
only [inferred, methods.md 5.2].
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dit2deploy.base.progress import report
from dit2deploy.stages.search.pareto import TOLERANCE, Point, pareto_drop

OFFSETS = (-0.5, 0.0, 0.5, 1.0)  # average bits of the tiered candidates, relative to the budget


class _Path(NamedTuple):
    taken: tuple[int, ...]
    state: Any


# (path before, its state, group, candidate) -> state and accumulated error after the group
Advance = Callable[[tuple[int, ...], Any, int, int], tuple[Any, float]]


def beam_search(
    advance: Advance, start: Any, costs: Sequence[Sequence[float]], *, beam: int, budget: float
) -> list[Point]:
    """The complete paths within `budget` that survive: `what` is the index of a candidate for each group, in its order.

    `costs` [G][candidates]: what a candidate adds to the average bits. A path whose cost and the least that can
    follow exceed the budget is given up. Errors are the accumulated ones of the path, end to end: at most
    beam * candidates steps a group. Raises ValueError where no path fits.
    """
    paths = [Point(0.0, 0.0, _Path((), start))]
    total = len(costs)
    for group, candidates in enumerate(costs):
        least_after = sum(min(row) for row in costs[group + 1 :])
        reached = []
        report(f"search: time group {group + 1} of {total}", 0, len(paths))
        for done, path in enumerate(paths, start=1):
            for candidate, cost in enumerate(candidates):
                if path.cost + cost + least_after > budget + TOLERANCE:
                    continue
                state, error = advance(path.what.taken, path.what.state, group, candidate)
                reached.append(Point(path.cost + cost, error, _Path((*path.what.taken, candidate), state)))
            report(f"search: time group {group + 1} of {total}", done, len(paths))
        if not reached:
            raise ValueError(f"no path fits {budget}")
        paths = pareto_drop(reached, beam)
    return [Point(path.cost, path.error, path.what.taken) for path in paths]


def candidates(
    fisher: Sequence[float], shares: Sequence[float], bits: Sequence[int], budget: float
) -> list[tuple[int, ...]]:
    """Bit-widths for each layer, one tuple a candidate of a time group: tiers by Fisher score, and uniform ones.

    The paper's example gives the top tenth of the layers 8 bits, the next tenth 4 and the rest 3, and shifts the cuts.
    Ours [inferred]: for each of OFFSETS, three neighbouring widths, the top two tiers equally wide, as wide as the
    average allows; layers rank by score over share of the cost, the gain of a bit over its price.
    """
    order = np.argsort(-np.asarray(fisher) / np.asarray(shares), kind="stable")
    found = [(width,) * len(shares) for width in bits if abs(width - budget) <= 1]
    for average in (budget + offset for offset in OFFSETS):
        if bits[0] < average < bits[-1]:
            found.append(_tiers(order, shares, bits, average))
    return list(dict.fromkeys(found))


def _tiers(order: np.ndarray, shares: Sequence[float], bits: Sequence[int], average: float) -> tuple[int, ...]:
    below = [width for width in bits if width < average]
    levels = [below[-1], *bits[len(below) :][:2]]
    low, middle, high = levels if len(levels) == 3 else (levels[0], levels[1], levels[1])
    width = (average - low) / (middle + high - 2 * low)  # share of each of the upper two tiers
    chosen, spent = [low] * len(shares), 0.0
    for layer in order:
        share = shares[layer]
        tier = high if spent + share <= width + TOLERANCE else middle if spent + share <= 2 * width + TOLERANCE else low
        chosen[layer] = tier
        spent += share
    return tuple(chosen)
