"""Points of cost and error, and which of them are kept: the dropping that TSS and the beam of AdaTSQ share."""

from collections.abc import Sequence
from typing import Any, NamedTuple

TOLERANCE = 1e-9  # of a cost in any unit: sums of the same costs in another order are equal


class Point(NamedTuple):
    """One configuration: `cost` in the unit of the budget, `error` relative to full precision, `what` it is."""

    cost: float
    error: float
    what: Any


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats: rising cost, strictly falling error. Of equal points the first stays."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (round(point.cost / TOLERANCE), point.error)):
        if not kept or point.error < kept[-1].error:
            kept.append(point)
    return kept


def pareto_drop(points: Sequence[Point], keep: int) -> list[Point]:
    """At most `keep` points by rising cost (TreeQ's Pareto drop, methods.md 4.1; the rule is inferred).

    The front, and where it holds fewer, the fronts of what remains, so that a merge has diversity. The front that
    no longer fits is thinned: both ends and points evenly spaced along it, so every range of costs stays served.
    """
    chosen: list[Point] = []
    rest = list(points)
    while rest and len(chosen) < keep:
        best = front(rest)
        taken = {id(point) for point in best}
        rest = [point for point in rest if id(point) not in taken]
        chosen += _thinned(best, keep - len(chosen))
    return sorted(chosen, key=lambda point: (point.cost, point.error))


def _thinned(points: list[Point], keep: int) -> list[Point]:
    if len(points) <= keep:
        return points
    if keep == 1:
        return points[:1]
    return [points[round(index * (len(points) - 1) / (keep - 1))] for index in range(keep)]


def best_within(points: Sequence[Point], budget: float) -> Point:
    """The least error at a cost up to `budget`; ValueError where none is that cheap."""
    affordable = [point for point in points if point.cost <= budget + TOLERANCE]
    if not affordable:
        raise ValueError(f"no point costs {budget} or less")
    return min(affordable, key=lambda point: (point.error, point.cost))
