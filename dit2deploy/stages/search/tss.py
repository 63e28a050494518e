"""TreeQ's TSS: layers merged pairwise up a tree, each node keeping a short front (https://arxiv.org/abs/2512.06353)."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from dit2deploy.base.progress import report
from dit2deploy.stages.search.pareto import TOLERANCE, Point, front, pareto_drop

OPEN = -1  # in a configuration: a layer outside of the node, which stays as the environment has it
MARGIN = 2.0  # standard errors of a paired difference that let a candidate go after the first part

Configuration = tuple[int, ...]
# Errors of a configuration on one part of the items, float64 [items of the part].
Errors = Callable[[Configuration, int], np.ndarray]


def search(
    errors: Errors, costs: Sequence[Sequence[float]], blocks: Sequence[Sequence[int]], *, parts: int, survivors: int
) -> list[Point]:
    """The root's front: points whose `what` is the index of a choice for each layer.

    `costs` [L][choices]: what a choice adds to the average bits; `blocks`: the layers of each block, in network order
    (a subtree each, because errors interact along the residual stream). `errors` measures the whole network's output
    with the node's layers set and the others OPEN: "multi-layer end-to-end" of the paper's figure, MSE inferred. With
    2 `parts` of items (a quarter and the rest, say), candidates that lose by MARGIN on the first are not measured on
    the second. Measurements: the leaves' and at most survivors ** 2 for each of the L - 1 merges: linear in L.
    """
    count = len(costs)
    steps = _Steps(2 * count - 1)
    levels = []
    for block in blocks:
        leaves = []
        for layer in block:
            single = [_with(count, layer, choice) for choice in range(len(costs[layer]))]
            leaves.append(_measured(errors, costs, single, parts))
            steps.done()
        levels.append(leaves)
    roots = [_merge_all(nodes, errors, costs, parts, survivors, steps) for nodes in levels if nodes]
    return front(_merge_all(roots, errors, costs, parts, survivors, steps))


class _Steps:
    def __init__(self, total: int) -> None:
        self.count, self.total = 0, total
        report("search: tree", 0, total)

    def done(self) -> None:
        self.count += 1
        report("search: tree", self.count, self.total)


def _merge_all(
    nodes: list[list[Point]],
    errors: Errors,
    costs: Sequence[Sequence[float]],
    parts: int,
    survivors: int,
    steps: _Steps,
) -> list[Point]:
    """Neighbours are merged level by level until one node is left; it keeps all its points: nothing builds on it."""
    while len(nodes) > 1:
        merged = []
        for left, right in zip(nodes[::2], nodes[1::2], strict=False):
            joint = [
                tuple(max(a, b) for a, b in zip(p.what, q.what, strict=True))  # one of both is OPEN
                for p in pareto_drop(left, survivors)
                for q in pareto_drop(right, survivors)
            ]
            merged.append(_measured(errors, costs, joint, parts))
            steps.done()
        nodes = merged + nodes[len(nodes) - len(nodes) % 2 :]
    return nodes[0]


def _with(count: int, layer: int, choice: int) -> Configuration:
    return tuple(choice if index == layer else OPEN for index in range(count))


def cost_of(configuration: Configuration, costs: Sequence[Sequence[float]]) -> float:
    return float(sum(row[choice] for row, choice in zip(costs, configuration, strict=True) if choice != OPEN))


def _measured(
    errors: Errors, costs: Sequence[Sequence[float]], configurations: Sequence[Configuration], parts: int
) -> list[Point]:
    found = {what: [errors(what, 0)] for what in configurations}
    for part in range(1, parts):
        found = {
            what: [*found[what], errors(what, part)]
            for what in _in_the_running({what: np.concatenate(values) for what, values in found.items()}, costs)
        }
    return [Point(cost_of(what, costs), float(np.concatenate(values).mean()), what) for what, values in found.items()]


def _in_the_running(
    found: dict[Configuration, np.ndarray], costs: Sequence[Sequence[float]]
) -> Iterator[Configuration]:
    """Those that no candidate of the front beats at their cost by MARGIN standard errors of the paired difference."""
    leaders = front([Point(cost_of(what, costs), float(values.mean()), what) for what, values in found.items()])
    for what, values in found.items():
        cost = cost_of(what, costs)
        for leader in leaders:
            if leader.cost > cost + TOLERANCE:
                yield what
                break
            lost = values - found[leader.what]
            if lost.mean() > MARGIN * lost.std(ddof=1) / np.sqrt(len(lost)):
                break
        else:
            yield what


def refine(point: Point, errors: Errors, costs: Sequence[Sequence[float]], *, parts: int, budget: float) -> Point:
    """The point after swaps of width: one layer a choice down, another a choice up, kept where the error falls.

    Every pair is tried, in two rounds at most [inferred]; the cost stays within `budget`. O(L^2) measurements.
    """
    for _ in range(2):
        before = point
        for down in range(len(costs)):
            for up in range(len(costs)):
                changed = list(point.what)
                changed[down] -= 1
                changed[up] += 1
                if down == up or changed[down] < 0 or changed[up] >= len(costs[up]):
                    continue
                what = tuple(changed)
                cost = cost_of(what, costs)
                if cost > budget + TOLERANCE:
                    continue
                error = float(np.concatenate([errors(what, part) for part in range(parts)]).mean())
                if error < point.error:
                    point = Point(cost, error, what)
        if point is before:
            break
    return point
