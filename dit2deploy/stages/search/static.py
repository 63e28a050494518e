"""AMPN and TSS on a model: bits that hold for all timesteps."""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from dit2deploy.artefacts.policy import LayerPolicy, Policy, Weight
from dit2deploy.base.progress import note, report
from dit2deploy.formats import FORMATS
from dit2deploy.nn.units import Unit
from dit2deploy.stages.search import ampn, tss, uniform
from dit2deploy.stages.search.budget import check_is_possible, rising
from dit2deploy.stages.search.measure import Measure, items_of
from dit2deploy.stages.search.pareto import Point, best_within
from dit2deploy.stages.search.task import Found, Options, Task
from dit2deploy.stages.search.units import Choice, Layers, at_widths, prepare


def knapsack(task: Task) -> Found:
    """AMPN (ampn.py)."""
    return static(task, _knapsack)


def tree(task: Task) -> Found:
    """TSS (tss.py); the environment's strength is ENG's knob [inferred, methods.md 4.2]."""
    return static(task, _tree, strength=task.options.lam)


def static(task: Task, search: Callable[..., list[Point]], *, strength: float = 1.0) -> Found:
    """A search whose choices hold for all timesteps; `search(task, layers, measure, costs, target)`; the environment
    is the choice `target`, the nearest to the budget, at `strength`."""
    options, seed = task.options, task.problem.seed
    parts: list[Any] = []

    def inputs(config: Any) -> Mapping[str, Any]:
        parts.extend(items_of(task.calibration, task.source.family, config, options.items, seed=seed))
        return parts[0]

    layers = prepare(task, inputs, (task.problem.training_steps,))
    choices = [choices_of(unit, layers.base, options, task.base_overrides) for unit in layers.units]
    costs = _costs(layers, choices, options)
    budget, fixed = task.budget, layers.prices.fixed
    alike = [fixed + float(sum(row[index] for row in costs)) for index in range(len(choices[0]))]
    check_is_possible(budget, fixed + float(sum(min(row) for row in costs)), alike)
    target = min(range(len(alike)), key=lambda index: round(abs(alike[index] - budget.amount), 9))
    environment = [Choice(row[target].bits, row[target].layers, strength) for row in choices]
    measure = Measure(
        layers.network, Choice(8, layers.base.layers), layers.units, choices, environment, parts, task.journal
    )
    found = search(task, layers, measure, costs, target)
    found = [Point(fixed + point.cost, point.error, point.what) for point in found]
    every = [(index,) * len(choices) for index in range(len(choices[0]))]
    found += [Point(cost, measure.mean(what), what) for cost, what in zip(alike, every, strict=True)]
    note(f"search: {task.journal.measured} measurements")

    def policies(what: tuple[int, ...]) -> dict[str, LayerPolicy]:
        return {
            name: layer for row, index in zip(choices, what, strict=True) for name, layer in row[index].layers.items()
        }

    points = [Point(point.cost, point.error, policies(point.what)) for point in found]
    return Found(layers.base, points, points[-len(every) :])


Costs = Sequence[Sequence[float | Fraction]]  # of each unit's choices, in the unit of the budget


def _costs(layers: Layers, choices: Sequence[Sequence[Choice]], options: Options) -> Costs:
    """Bits as exact fractions of the average, so that sums and budgets compare exactly."""
    if layers.prices.unit == "bits":
        total = sum(layers.weights)
        bits = [Fraction(choice.bits).limit_denominator(100) for choice in choices[0]]
        return [[Fraction(weight, total) * width for width in bits] for weight in layers.weights]
    costs = [[layers.cost(index, choice.layers, choice.bits) for choice in row] for index, row in enumerate(choices)]
    return costs if options.allocate == "weights" else [rising(row) for row in costs]


def choices_of(unit: Unit, base: Policy, options: Options, overrides: Mapping[str, Any]) -> list[Choice]:
    """By rising bits: activation widths for the base's weights, or weight formats for the base's activations."""
    if options.allocate == "weights":
        return [Choice(fmt.bits, _in_format(unit, base, fmt.name, overrides)) for fmt in FORMATS]
    rules = [uniform.rule_of(overrides, [width], width) for width in options.bits]
    return [
        Choice(width, {name: at_widths(base.layers[name], [width], rule) for name in unit.layers})
        for width, rule in zip(options.bits, rules, strict=True)
    ]


def _in_format(unit: Unit, base: Policy, weight: Weight, overrides: Mapping[str, Any]) -> dict[str, LayerPolicy]:
    rounding = overrides.get("rounding") or uniform.default_rounding(weight)
    return {name: base.layers[name].model_copy(update={"weight": weight, "rounding": rounding}) for name in unit.layers}


def _knapsack(task: Task, layers: Layers, measure: Measure, costs: Costs, target: int) -> list[Point]:
    expected = len(costs) * (len(costs[0]) - 1) + 1 + ampn.BUDGETS
    done = 0

    def errors(what: tuple[int, ...]) -> float:
        nonlocal done
        error = measure.mean(tuple(tss.OPEN if index == target else index for index in what))
        done = min(done + 1, expected - 1)
        report("search: sensitivities", done, expected)
        return error

    report("search: sensitivities", 0, expected)
    left = task.budget.amount - layers.prices.fixed
    found = ampn.search(errors, costs, environment=(target,) * len(costs), budget=left)
    report("search: sensitivities", expected, expected)
    return found


def _tree(task: Task, layers: Layers, measure: Measure, costs: Costs, target: int) -> list[Point]:
    plain = [[float(cost) for cost in row] for row in costs]
    blocks: dict[int, list[int]] = {}
    for index, unit in enumerate(layers.units):
        blocks.setdefault(unit.block, []).append(index)
    parts, left = len(measure.parts), task.budget.amount - layers.prices.fixed
    found = tss.search(measure.errors, plain, list(blocks.values()), parts=parts, survivors=task.options.survivors)
    if task.options.refine:
        start = best_within(found, left)
        found = [*found, tss.refine(start, measure.errors, plain, parts=parts, budget=left)]
    return found
