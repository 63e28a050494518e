"""AdaTSQ on a model: Fisher scores of its layers by time group, and a beam over latents of real trajectories."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dit2deploy.artefacts.calibration_set import CalibrationSet
from dit2deploy.artefacts.policy import LayerPolicy
from dit2deploy.base.errors import Misuse
from dit2deploy.base.progress import note, track
from dit2deploy.nn.simulate import Simulation
from dit2deploy.nn.timestep_groups import bounds_of, runs_of
from dit2deploy.nn.units import Unit
from dit2deploy.quantizers.fisher import fisher_scores
from dit2deploy.stages.search import adatsq, uniform
from dit2deploy.stages.search.budget import check_is_possible, rising
from dit2deploy.stages.search.journal import Journal
from dit2deploy.stages.search.pareto import Point
from dit2deploy.stages.search.task import Found, Task
from dit2deploy.stages.search.units import Layers, at_widths, prepare
from dit2deploy.stages.search.walk import Walk, check_walks, latent_error, samples_of


def sensitivities(
    network: Simulation, units: Sequence[Unit], inputs: Mapping[str, torch.Tensor], *, seed: int, probes: int
) -> list[float]:
    """The Fisher score of each unit: the sum of its layers'. The network must be in full precision."""
    weights = [network.layers[name].weight for unit in units for name in unit.layers]
    scores = iter(fisher_scores(network.module, weights, inputs, seed=seed, probes=probes))
    return [sum(next(scores) for _ in unit.layers) for unit in units]


class Trajectories:
    """A few of the calibration set's own trajectories, walked by the network as a path of the beam chooses.

    State of a path: its latents float32 [S, C, H, W]. Error: `latent_error` after the run, both having come all the
    way from the same noise.
    """

    def __init__(
        self,
        network: Simulation,
        units: Sequence[Unit],
        rule: Mapping[str, str],
        base: Mapping[str, LayerPolicy],
        calibration: CalibrationSet,
        runs: Sequence[Sequence[int]],
        journal: Journal,
        *,
        samples: Sequence[int],
    ) -> None:
        """`base` holds the policy of every layer; those of `units` get their bits from the path, and `rule`.

        `samples` are indices of the calibration set's seeds.
        """
        self._network, self._units, self._rule, self._base = network, units, rule, base
        self._runs, self._journal = runs, journal
        self._told = [list(runs), dict(rule), list(samples), [unit.layers for unit in units]]
        self._walk = Walk(network, calibration, samples=samples)
        self.start = self._walk.start
        network.choose_float()
        self._exact = []
        latents = self.start
        for run in runs:
            latents = self._walk.steps(latents, run)
            self._exact.append(latents)
        network.choose(base)

    def advance(self, before: Sequence[Sequence[int]], state: np.ndarray, bits: Sequence[int]) -> tuple[Any, float]:
        """State and error after the run that follows `before` (each unit's bits in the runs before), at these bits."""
        run = len(before)

        def measure() -> dict[str, Any]:
            for unit, width in zip(self._units, bits, strict=True):
                widths = [width] * len(self._runs)
                self._network.choose({name: at_widths(self._base[name], widths, self._rule) for name in unit.layers})
            latents = self._walk.steps(state, self._runs[run])
            error = latent_error(latents, self._exact[run])
            return {"error": error, "latents": base64.b64encode(latents.tobytes()).decode()}

        what = ["path", *self._told, [list(taken) for taken in before], list(bits)]
        found = self._journal.value(what, measure)
        latents = np.frombuffer(base64.b64decode(found["latents"]), np.float32).reshape(state.shape)
        return latents, found["error"]

    def walk_all(self, path: Sequence[Sequence[int]]) -> float:
        """The error at the end of a complete path."""
        state, error = self.start, 0.0
        for run, bits in enumerate(path):
            state, error = self.advance(path[:run], state, bits)
        return error


def beam(task: Task) -> Found:
    """The beam (adatsq.py) over the time groups in the sampler's order; the policy's run by rising timestep.

    Selection and final comparison use different samples of the calibration set, see `samples_of`. Raises Misuse
    for a family without trajectories, for fewer steps than groups, and where no candidate is as cheap as the budget.
    """
    options = task.options
    check_walks(task.source, "adatsq")
    widest = uniform.rule_of(task.base_overrides, options.bits, options.bits[-1])  # refuses bits before work begins
    runs = runs_of(task.calibration, options.groups)
    bounds = bounds_of(task.calibration, runs, task.problem.training_steps)
    calls = [_call_of(task.calibration, run[len(run) // 2]) for run in runs]  # the middle stands for its group
    layers = prepare(task, lambda config: calls[0], bounds)
    fisher = [
        task.journal.value(
            ["fisher", run, options.probes],
            lambda call=call: sensitivities(
                layers.network, layers.units, call, seed=task.problem.seed, probes=options.probes
            ),
        )
        for run, call in zip(runs, calls, strict=True)
    ]
    fixed = layers.prices.fixed
    # Candidates are tiers of bits around the average that the budget buys where all layers are alike.
    average = task.budget.amount
    if task.budget.unit != "bits":
        wide = _prices(layers, options.bits, widest)
        uniform_costs = [fixed + sum(row[width] for row in wide) for width in options.bits]
        average = float(np.interp(task.budget.amount, uniform_costs, options.bits))
    # One clip and grid hold for all groups of a layer, so they cannot follow the bits of one of them.
    rule = uniform.rule_of(task.base_overrides, options.bits, average)
    prices = _prices(layers, options.bits, rule)
    alike = [fixed + sum(row[width] for row in prices) for width in options.bits]
    check_is_possible(task.budget, min(alike), alike)
    tiers = [adatsq.candidates(scores, layers.shares, options.bits, average) for scores in fisher]
    lengths = [len(run) / len(task.calibration) for run in runs]
    costs = [
        [length * sum(row[width] for row, width in zip(prices, widths, strict=True)) for widths in row_of_tiers]
        for length, row_of_tiers in zip(lengths, tiers, strict=True)
    ]
    searched, others = samples_of(task.calibration, options.trajectories)

    def trajectories(samples: Sequence[int]) -> Trajectories:
        network, base = layers.network, layers.base.layers
        return Trajectories(network, layers.units, rule, base, task.calibration, runs, task.journal, samples=samples)

    walk = trajectories(searched)

    def advance(taken: tuple[int, ...], state: Any, group: int, candidate: int) -> tuple[Any, float]:
        before = [tiers[index][choice] for index, choice in enumerate(taken)]
        return walk.advance(before, state, tiers[group][candidate])

    try:
        left = task.budget.amount - fixed
        found = adatsq.beam_search(advance, walk.start, costs, beam=options.beam, budget=left)
    except ValueError:
        raise Misuse(
            f"adatsq: no candidate of bits {list(options.bits)} is as cheap as {task.budget}.",
            "Give more bits to choose from, below the budget.",
        ) from None
    # The survivors are judged by samples that they were not selected on, where the set holds such.
    judge = trajectories(others) if others else walk
    paths = [(fixed + point.cost, [tiers[group][choice] for group, choice in enumerate(point.what)]) for point in found]
    paths += [
        (cost, [(width,) * len(layers.units)] * len(runs))
        for cost, width in zip(alike, options.bits, strict=True)
        if abs(width - average) <= 1
    ]
    judged = [Point(cost, judge.walk_all(path), path) for cost, path in track(paths, "search: survivors")]
    note(f"search: {task.journal.measured} measurements")

    def policies(path: Sequence[Sequence[int]]) -> dict[str, LayerPolicy]:
        return {
            name: at_widths(layers.base.layers[name], [widths[index] for widths in reversed(path)], rule)
            for index, unit in enumerate(layers.units)
            for name in unit.layers
        }

    named = [Point(point.cost, point.error, policies(point.what)) for point in judged]
    return Found(layers.base, named, named[len(found) :])


def _prices(layers: Layers, bits: Sequence[int], rule: Mapping[str, str]) -> list[dict[int, float]]:
    """For each unit, what each width costs if it holds in all time groups, with the clip and grid of `rule`.

    Groups add up by their lengths: a step costs what its own widths cost. That holds in milliseconds for kernels that
    take a layer's width at run time; a GEMM that is built for the widest of its layer takes that one's time throughout.
    """
    found = []
    for index, unit in enumerate(layers.units):
        costs = [
            layers.cost(
                index, {name: at_widths(layers.base.layers[name], [width], rule) for name in unit.layers}, width
            )
            for width in bits
        ]
        found.append(dict(zip(bits, rising(costs), strict=True)))
    return found


def _call_of(calibration: CalibrationSet, index: int) -> dict[str, Any]:
    """One recorded call as tensors."""
    return {name: torch.from_numpy(value) for name, value in calibration.call(index).items()}
