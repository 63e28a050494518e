"""Activation widths and clips by timestep group, chosen by the error of each layer's own outputs.

TR-DQ (https://arxiv.org/abs/2503.06564) "divides the sampling process based on time-steps and applies a rotation matrix
to smooth activations and weights dynamically", with "a dedicated hyperparameter" for each time range. In the authors'
code that is SmoothQuant's alpha of each range, then DuQuant's rotation and permutation found anew, and weights that are
quantized anew: one set of weights a range. What is rebuilt: the ranges, the rotation, and a treatment for each range at
equal mean bits, within what a model of one set of weights can hold, the run-time table of largest codes [inferred].
What is not: rotations and smoothing that change with the range (they would change the weights), a clip of each range
(it is an attribute of HadamardQuantize; a layer has one, searched here), and sharing attention between guided halves.

AdaTSQ's beam (stages/search/trajectories.py) spends the same table by the error of latents, all layers together.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dit2deploy.artefacts.calibration_set import CalibrationSet
from dit2deploy.artefacts.policy import LayerPolicy, Policy
from dit2deploy.base.errors import Misuse
from dit2deploy.base.progress import track
from dit2deploy.models.load import linears_of, load_transformer
from dit2deploy.nn.timestep_groups import bounds_of, runs_of
from dit2deploy.quantizers.linear import quantize_linear, threads_for
from dit2deploy.quantizers.output_error import output_error
from dit2deploy.stages.quantize.hessians import sample_inputs
from dit2deploy.stages.quantize.tune import least_error

BITS = (2, 3, 4, 5, 6, 8)
CLIPS = ("absmax", "gaussian")
TOKENS = 512  # of each layer, as many of each call


def search_time_widths(
    model: Path,
    policy: Policy,
    calibration: CalibrationSet,
    *,
    average: float,
    groups: int = 3,
    bits: Sequence[int] = BITS,
    seed: int = 0,
) -> Policy:
    """The policy with `groups` timestep groups, and for each block linear a clip and a width for each group: least sum
    of noise to signal ratios of the layers' outputs, at most `average` bits by weights and sampler steps.

    Layers that read one input share widths and clip. The clip is the better one at a width near the average in all
    groups; then a Lagrangian multiplier spends the bits. Other layers keep the policy's width in all groups.
    Raises Misuse for an average below the least of `bits`, for a policy that has timestep groups, and for a calibration
    set of fewer steps than groups.
    """
    if average < min(bits):
        raise Misuse(f"average {average}: no width is below {min(bits)} bits.", "Give more, or narrower widths.")
    *others, end = policy.timestep_bounds
    if others:
        raise Misuse("the policy has timestep groups already.", "Start from one that has a single group.")
    network, family = load_transformer(Path(model))
    linears = linears_of(network)
    runs = runs_of(calibration, groups)
    names = [name for name, layer in policy.layers.items() if layer.is_quantized and family.role(name) == "block"]
    inputs = sample_inputs(network, names, calibration, tokens=TOKENS, seed=seed)
    middle = min(range(len(bits)), key=lambda index: abs(bits[index] - average))
    clips: dict[str, str] = {}
    choices: dict[str, list[tuple[int | None, float, float]]] = {}
    units = _sharing(names, inputs)
    for unit in track(units, "search time widths"):
        x = inputs[unit[0]].reshape(len(calibration), -1, linears[unit[0]][1])  # as many tokens of each call
        size = sum(linears[name][0] * linears[name][1] for name in unit)
        parts = [x[run].flatten(0, 1) for run in runs]
        errors = np.zeros((len(CLIPS), groups, len(bits)))
        for name in unit:
            errors += _errors(network.get_parameter(f"{name}.weight").detach(), policy.layers[name], parts, bits, seed)
        best = int(errors[:, :, middle].sum(1).argmin())
        clips |= dict.fromkeys(unit, CLIPS[best])
        for group, run in enumerate(runs):
            rows = zip(bits, errors[best, group], strict=True)
            choices[f"{unit[0]} {group}"] = [
                (width, float(error) * len(run), (width - min(bits)) * size * len(run)) for width, error in rows
            ]
    held = sum(linears[name][0] * linears[name][1] for name in names) * len(calibration)
    chosen = least_error(choices, (average - min(bits)) * held)
    widths = {
        name: tuple(chosen[f"{unit[0]} {group}"] for group in reversed(range(groups)))
        for unit in units
        for name in unit
    }
    layers = {}
    for name, layer in policy.layers.items():
        if name in widths:
            layer = layer.model_copy(update={"activation_bits": widths[name], "clip": clips[name]})
        elif layer.is_quantized:
            layer = layer.model_copy(update={"activation_bits": layer.activation_bits * groups})
        layers[name] = layer
    bounds = bounds_of(calibration, runs, end)
    return policy.model_copy(update={"layers": layers, "timestep_bounds": bounds})


def _sharing(names: Sequence[str], inputs: dict[str, torch.Tensor]) -> list[list[str]]:
    """Neighbouring layers that were given the same input."""
    units: list[list[str]] = []
    for name in names:
        if units and torch.equal(inputs[units[-1][0]], inputs[name]):
            units[-1].append(name)
        else:
            units.append([name])
    return units


def _errors(
    weight: torch.Tensor, layer: LayerPolicy, parts: Sequence[torch.Tensor], bits: Sequence[int], seed: int
) -> np.ndarray:
    """Noise to signal ratios [clips, groups, widths] of one layer; weights round to nearest meanwhile."""
    nearest = layer.without_moments
    tensors = quantize_linear(weight.numpy(), None, nearest, seed=seed)
    with threads_for(*weight.shape):
        return np.array(
            [
                [
                    [
                        output_error(
                            x, weight, tensors, nearest.model_copy(update={"activation_bits": (width,), "clip": clip})
                        )
                        for width in bits
                    ]
                    for x in parts
                ]
                for clip in CLIPS
            ]
        )
