"""AdaTSQ on a model: Fisher scores of its layers by time group, and a beam over latents of real trajectories."""

import base64
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from dit2deploy.artefacts.calibration_set import CalibrationSet
from dit2deploy.artefacts.policy import LayerPolicy
from dit2deploy.base.errors import Misuse
from dit2deploy.base.progress import note, track
from dit2deploy.nn.simulate import Simulation
from dit2deploy.sampling import Scheduler
from dit2deploy.stages.search import adatsq, uniform
from dit2deploy.stages.search.journal import Journal
from dit2deploy.stages.search.measure import DIGITS, LARGEST, TINY
from dit2deploy.stages.search.pareto import Point
from dit2deploy.stages.search.task import Found, Task
from dit2deploy.stages.search.units import Unit, at_widths, prepare


def runs_of(calibration: CalibrationSet, groups: int) -> list[list[int]]:
    """The steps of each time group, in the sampler's order (the noisiest first): runs of as equal length as can be.

    Raises Misuse where the calibration set has fewer steps than groups.
    """
    steps = len(calibration)
    if groups > steps:
        raise Misuse(
            f"{calibration.folder}: holds {steps} steps, too few for {groups} timestep groups.",
            f"Calibrate with more steps, or search with {steps} groups or fewer.",
        )
    return [run.tolist() for run in np.array_split(np.arange(steps), groups)]


def bounds_of(calibration: CalibrationSet, runs: Sequence[Sequence[int]], training_steps: int) -> tuple[int, ...]:
    """The timestep_bounds of a policy, rising, whose groups hold these runs: halfway between neighbouring steps."""
    timesteps = calibration.manifest.timesteps
    between = [(timesteps[earlier[-1]] + timesteps[later[0]] + 1) // 2 for earlier, later in pairwise(runs)]
    return (*reversed(between), training_steps)


def fisher_scores(
    network: Simulation, units: Sequence[Unit], inputs: Mapping[str, torch.Tensor], *, seed: int
) -> list[float]:
    """For each unit E |d(v . f(x)) / dW|^2 over the items of one call and normal v, summed over its weights.

    A Fisher score with respect to the weights, as AdaTSQ has it (methods.md 5.3); the loss is [inferred]: random
    projections of the full-precision output, the exact trace of the Gauss-Newton matrix, as the quantizers' rounding
    has no gradient and the distance to the full-precision output has none at that output itself. One v an item, so
    items add up without cross terms. Holds one gradient of every weight: the network must be in full precision.
    """
    weights = [network.layers[name].weight for unit in units for name in unit.layers]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            output = network.module(**inputs, return_dict=False)[0]
            direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed))
            gradients = torch.autograd.grad((output * direction).sum(), weights)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    squares = iter([float(gradient.double().square().sum()) / len(output) for gradient in gradients])
    return [sum(next(squares) for _ in unit.layers) for unit in units]


class Trajectories:
    """A few of the calibration set's own trajectories, walked by the network as a path of the beam chooses.

    State of a path: its latents float32 [S, C, H, W]. Error: the geometric mean over samples (their mean SQNR in dB) of
    |x - x_float|^2 / |x_float|^2 of the latents after the run, both having come all the way from the same noise. The
    paper's mean of squares [inferred] follows whichever of a few samples turns into another picture.
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
        manifest = calibration.manifest
        self._steps, self._guidance = manifest.steps, np.float32(manifest.guidance)
        self._scheduler = Scheduler.from_config(manifest.scheduler)
        self._timesteps = manifest.timesteps
        self._told = [list(runs), dict(rule), list(samples), [unit.layers for unit in units]]
        first = calibration.call(0)
        guided, held = manifest.guidance != 1, len(manifest.seeds)
        kept = np.asarray(samples)
        self.start = first["hidden_states"][kept]
        rows = np.concatenate([kept, kept + held]) if guided else kept
        self._labels = torch.from_numpy(first["class_labels"][rows])
        network.choose_float()
        self._exact = []
        latents = self.start
        for run in runs:
            latents = self._walk(latents, run)
            self._exact.append(latents)
        network.choose(base)

    def advance(self, before: Sequence[Sequence[int]], state: np.ndarray, bits: Sequence[int]) -> tuple[Any, float]:
        """State and error after the run that follows `before` (each unit's bits in the runs before), at these bits."""
        run = len(before)

        def measure() -> dict[str, Any]:
            latents = self._walk(state, self._runs[run], bits)
            exact = self._exact[run].astype(np.float64)
            axes = tuple(range(1, exact.ndim))
            ratio = ((latents - exact) ** 2).sum(axes) / np.maximum((exact**2).sum(axes), TINY)
            error = np.exp(np.mean(np.log(np.clip(np.nan_to_num(ratio, nan=LARGEST), TINY, LARGEST))))
            return {"error": float(f"{error:.{DIGITS}g}"), "latents": base64.b64encode(latents.tobytes()).decode()}

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

    def _walk(self, latents: np.ndarray, run: Sequence[int], bits: Sequence[int] | None = None) -> np.ndarray:
        if bits is not None:
            for unit, width in zip(self._units, bits, strict=True):
                widths = [width] * len(self._runs)
                self._network.choose({name: at_widths(self._base[name], widths, self._rule) for name in unit.layers})
        for step in run:
            timestep, repeat = self._timesteps[step], len(self._labels) // len(latents)
            inputs = {
                "hidden_states": torch.from_numpy(np.concatenate([latents] * repeat)),
                "timestep": torch.full((len(self._labels),), timestep, dtype=torch.int64),
                "class_labels": self._labels,
            }
            output = self._network.call(inputs).numpy()[:, : latents.shape[1]]
            if repeat == 2:
                conditional, unconditional = np.split(output, 2)
                output = unconditional + self._guidance * (conditional - unconditional)
            latents = self._scheduler.step(output, timestep, latents, steps=self._steps)
        return latents


def beam(task: Task) -> Found:
    """The beam (adatsq.py) over the time groups in the sampler's order; the policy's run by rising timestep.

    Selection and final comparison use different samples of the calibration set: on few samples, the best of many paths
    owes part of its lead to chance. Raises Misuse for a family without trajectories, for fewer steps than groups, and
    where no candidate is as cheap as the budget.
    """
    options = task.options
    if task.source.family.conditioning != "class":
        raise Misuse(
            f"adatsq: {task.source.class_name} has no trajectories here (no text encoder is at hand).",
            "Use the recipe treeq-tss or robuq-ampn.",
        )
    runs = runs_of(task.calibration, options.groups)
    bounds = bounds_of(task.calibration, runs, task.problem.training_steps)
    calls = [_call_of(task.calibration, run[len(run) // 2]) for run in runs]  # the middle stands for its group
    layers = prepare(task, lambda config: calls[0], bounds)
    fisher = [
        task.journal.value(
            ["fisher", run], lambda call=call: fisher_scores(layers.network, layers.units, call, seed=task.problem.seed)
        )
        for run, call in zip(runs, calls, strict=True)
    ]
    tiers = [adatsq.candidates(scores, layers.shares, options.bits, options.budget) for scores in fisher]
    lengths = [len(run) / len(task.calibration) for run in runs]
    costs = [
        [length * float(layers.shares @ np.asarray(widths)) for widths in row]
        for length, row in zip(lengths, tiers, strict=True)
    ]
    # One clip and grid hold for all groups of a layer, so they cannot follow the bits of one of them.
    rule = uniform.rule_of(task.base_overrides, options.bits, options.budget)
    held = len(task.calibration.manifest.seeds)
    count = min(options.trajectories, held)
    searched = [index * held // count for index in range(count)]
    others = [index for index in range(held) if index not in searched][: 2 * count]

    def trajectories(samples: Sequence[int]) -> Trajectories:
        network, base = layers.network, layers.base.layers
        return Trajectories(network, layers.units, rule, base, task.calibration, runs, task.journal, samples=samples)

    walk = trajectories(searched)

    def advance(taken: tuple[int, ...], state: Any, group: int, candidate: int) -> tuple[Any, float]:
        before = [tiers[index][choice] for index, choice in enumerate(taken)]
        return walk.advance(before, state, tiers[group][candidate])

    try:
        found = adatsq.beam_search(advance, walk.start, costs, beam=options.beam, budget=options.budget)
    except ValueError:
        raise Misuse(
            f"adatsq: no candidate of bits {list(options.bits)} is as cheap as {options.budget} bits.",
            "Give more bits to choose from, below the budget.",
        ) from None
    # The survivors are judged by samples that they were not selected on, where the set holds such.
    judge = trajectories(others) if others else walk
    alike = [width for width in options.bits if abs(width - options.budget) <= 1]
    paths = [(point.cost, [tiers[group][choice] for group, choice in enumerate(point.what)]) for point in found]
    paths += [(float(width), [(width,) * len(layers.units)] * len(runs)) for width in alike]
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


def _call_of(calibration: CalibrationSet, index: int) -> dict[str, Any]:
    """One recorded call as tensors."""
    return {name: torch.from_numpy(value) for name, value in calibration.call(index).items()}
