"""Bits by layer and timestep group as one exact knapsack: AMPN's sensitivities, told apart by timestep.

Our own, of two papers' parts: sensitivities and knapsack of RobuQ (ampn.py), timestep groups of AdaTSQ. What a layer's
bits do to the model's output is measured step by step; what an error of the output at a step does to the final latent
(its reach) is measured once, by quantizing at that step alone: noise of the same size reaches a tenth as far. Their
product adds up over layers and steps as far as errors do, so that the knapsack over (layer, group) holds every static
policy among its answers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dit2deploy.artefacts.policy import LayerPolicy
from dit2deploy.base.progress import note, track
from dit2deploy.nn.simulate import Simulation
from dit2deploy.nn.timestep_groups import bounds_of, runs_of
from dit2deploy.stages.search import ampn, tss
from dit2deploy.stages.search.budget import check_is_possible
from dit2deploy.stages.search.measure import Measure, items_of
from dit2deploy.stages.search.pareto import Point
from dit2deploy.stages.search.task import Found, Task
from dit2deploy.stages.search.units import Choice, Widths, at_widths, prepare, widths_of
from dit2deploy.stages.search.walk import Walk, check_walks, latent_error, samples_of


def search(task: Task) -> Found:
    """Points by the knapsack, each walked along trajectories of the calibration set that it was not chosen on.

    Raises Misuse for a family without trajectories, and for fewer steps than groups.
    """
    options, calibration, seed = task.options, task.calibration, task.problem.seed
    check_walks(task.source, "time-knapsack")
    runs = runs_of(calibration, options.groups)
    bounds = bounds_of(calibration, runs, task.problem.training_steps)
    parts: list[Any] = []

    def inputs(config: Any) -> Mapping[str, Any]:
        parts.extend(items_of(calibration, task.source.family, config, options.items, seed=seed))
        return parts[0]

    layers = prepare(task, inputs, bounds)
    network, count = layers.network, len(runs)
    widths = widths_of(task, layers)
    check_is_possible(task.budget, min(widths.alike), widths.alike)
    searched, others = samples_of(calibration, options.trajectories)
    walk = Walk(network, calibration, samples=searched)
    choices = [
        [
            Choice(
                width, {name: at_widths(layers.base.layers[name], [width] * count, widths.rule) for name in unit.layers}
            )
            for width in options.bits
        ]
        for unit in layers.units
    ]
    target = int(np.argmin([abs(width - widths.average) for width in options.bits]))
    middle = {name: layer for row in choices for name, layer in row[target].layers.items()}
    reach = task.journal.value(
        ["reach", list(searched), options.bits[target], dict(widths.rule)],
        lambda: reaches(network, walk, {**layers.base.layers, **middle}),
    )
    measure = Measure(
        network,
        Choice(8, layers.base.layers),
        layers.units,
        choices,
        [row[target] for row in choices],
        parts,
        task.journal,
    )
    values, costs = _values(task, measure, runs, reach, target, choices), _costs(widths, runs, options.bits)

    judge = Walk(network, calibration, samples=others or searched)
    network.choose_float()
    exact = judge.steps(judge.start, range(len(calibration)))
    network.choose(layers.base.layers)

    def policies(what: Sequence[int]) -> dict[str, LayerPolicy]:
        bits = np.array(options.bits)[np.array(what).reshape(len(layers.units), count)]
        return {
            name: at_widths(layers.base.layers[name], row[::-1].tolist(), widths.rule)  # by rising timestep
            for unit, row in zip(layers.units, bits, strict=True)
            for name in unit.layers
        }

    def error(what: tuple[int, ...]) -> float:
        def walked() -> float:
            network.choose(policies(what))
            return latent_error(judge.steps(judge.start, range(len(calibration))), exact)

        return task.journal.value(
            ["walked", list(runs), dict(widths.rule), list(others or searched), list(what)], walked
        )

    fixed = layers.prices.fixed
    found = ampn.answers(values, error, costs, budget=task.budget.amount - fixed)
    points = [Point(fixed + point.cost, point.error, policies(point.what)) for point in found]
    alike = []
    for index, cost in enumerate(widths.alike):
        what = (index,) * len(values)
        alike.append(Point(cost, error(what), policies(what)))
    note(f"search: {task.journal.measured} measurements")
    return Found(layers.base, [*points, *alike], alike)


def reaches(network: Simulation, walk: Walk, quantized: Mapping[str, LayerPolicy]) -> list[float]:
    """For each sampler step the relative squared error of the final latents for one of the model's output there, while
    the layers are `quantized` at that step and in full precision at all others."""
    network.choose_float()
    count = len(walk.timesteps)
    outputs: dict[int, np.ndarray] = {}

    def see(step: int, output: np.ndarray) -> np.ndarray:
        outputs[step] = output
        return output

    latents = [walk.start]
    for step in range(count):
        latents.append(walk.steps(latents[-1], [step], see))
    whole, found = dict(outputs), []
    for step in track(range(count), "search: reach of each step"):
        network.choose(quantized)
        after = walk.steps(latents[step], [step], see)
        network.choose_float()
        there = latent_error(outputs[step], whole[step])
        found.append(latent_error(walk.steps(after, range(step + 1, count)), latents[-1]) / there)
    return found


def _values(
    task: Task,
    measure: Measure,
    runs: Sequence[Sequence[int]],
    reach: Sequence[float],
    target: int,
    choices: Sequence[Sequence[Choice]],
) -> list[list[float]]:
    """By unit and group (in the sampler's order) what each choice adds to the final latents' error, summed over the
    group's steps; never rising with the bits."""
    timesteps = task.calibration.manifest.timesteps
    step = np.array([timesteps.index(int(t)) for part in measure.parts for t in part["timestep"]])
    weights = [
        np.where(np.isin(step, run), np.array(reach)[step], 0.0) * len(run) / max(1, np.isin(step, run).sum())
        for run in runs
    ]
    environment = [tss.OPEN] * len(choices)

    def errors(what: Sequence[int]) -> np.ndarray:
        return np.concatenate([measure.errors(tuple(what), part) for part in range(len(measure.parts))])

    before, values = errors(environment), []
    for unit in track(range(len(choices)), "search: sensitivities"):
        added = [
            np.zeros_like(before)
            if option == target
            else errors([*environment[:unit], option, *environment[unit + 1 :]]) - before
            for option in range(len(choices[unit]))
        ]
        values += [ampn.monotone([float(weight @ row) for row in added]) for weight in weights]
    return values


def _costs(widths: Widths, runs: Sequence[Sequence[int]], bits: Sequence[int]) -> list[list[float]]:
    """By unit and group what each width costs: a step costs what its own widths cost."""
    steps = sum(len(run) for run in runs)
    return [[len(run) / steps * row[width] for width in bits] for row in widths.prices for run in runs]
