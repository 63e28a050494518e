"""Units of a search: layers that get their widths together, what they cost, and what they may become."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from dit2deploy.artefacts.policy import LayerPolicy, Policy
from dit2deploy.base.errors import Misuse
from dit2deploy.models.load import load_transformer
from dit2deploy.nn.simulate import Simulation, blocks_of
from dit2deploy.stages.search import uniform
from dit2deploy.stages.search.task import Task, Weighting


@dataclass(frozen=True)
class Unit:
    """Layers that share their input (q, k and v: their quantized activations are computed once), as one choice."""

    layers: tuple[str, ...]
    block: int  # place among the network's blocks, see `blocks_of`; -1: in none of them
    macs: int  # multiply-accumulates of one sample
    parameters: int

    def weight(self, weighting: Weighting) -> int:
        """What a bit of this unit counts in the average."""
        return {"macs": self.macs, "parameters": self.parameters, "layers": len(self.layers)}[weighting]


@dataclass(frozen=True)
class Choice:
    """What the layers of a unit may become: `bits` is the cost in the average, `strength` see SimulatedLinear."""

    bits: float
    layers: Mapping[str, LayerPolicy]
    strength: float = 1.0


def units_of(network: Simulation, names: Sequence[str], inputs: Mapping[str, torch.Tensor]) -> list[Unit]:
    """The units of the layers `names` in the order in which one call with `inputs` (batch on axis 0) reaches them.

    Layers that the call does not reach are left out.
    """
    reached: list[tuple[str, int, torch.Tensor]] = []
    samples = len(inputs["timestep"])

    def see(name: str, module: torch.nn.Module, arguments: tuple, keywords: Mapping) -> None:
        x = arguments[0] if arguments else keywords["x"]
        reached.append((name, x.numel() // x.shape[-1] // samples, x))

    hooks = [network.layers[name].register_forward_pre_hook(partial(see, name), with_kwargs=True) for name in names]
    try:
        network.call(inputs)
    finally:
        for handle in hooks:
            handle.remove()

    groups: list[list[tuple[str, int, torch.Tensor]]] = []
    seen: set[str] = set()
    for entry in reached:
        if entry[0] in seen:
            continue
        seen.add(entry[0])
        if groups and groups[-1][-1][2] is entry[2]:
            groups[-1].append(entry)
        else:
            groups.append([entry])
    blocks = list(blocks_of(network.module))
    return [_unit(network, group, blocks) for group in groups]


def _unit(network: Simulation, group: list[tuple[str, int, torch.Tensor]], blocks: Sequence[str]) -> Unit:
    names = tuple(name for name, _, _ in group)
    sizes = {name: network.layers[name].in_features * network.layers[name].out_features for name in names}
    return Unit(
        layers=names,
        block=next((index for index, block in enumerate(blocks) if names[0].startswith(f"{block}.")), -1),
        macs=sum(sizes[name] * rows for name, rows, _ in group),
        parameters=sum(sizes.values()),
    )


@dataclass(frozen=True)
class Layers:
    """What the searches share: the simulated network and the layers that are searched."""

    network: Simulation
    base: Policy
    units: list[Unit]
    weights: list[int]  # of the units, by the weighting

    @property
    def shares(self) -> np.ndarray:
        return np.asarray(self.weights) / sum(self.weights)


def prepare(task: Task, inputs: Callable[[Any], Mapping[str, Any]], bounds: tuple[int, ...]) -> Layers:
    """`inputs(config)` gives the arguments of one call of the network."""
    recipe = next((recipe for recipe in uniform.RECIPES if recipe.name == task.options.base), None)
    if recipe is None:
        known = ", ".join(recipe.name for recipe in uniform.RECIPES)
        raise Misuse(f"base {task.options.base!r} is no uniform recipe.", f"Use one of {known}.")
    base = recipe.search(task.problem, **task.base_overrides, timestep_bounds=bounds)
    names = [name for name, layer in base.layers.items() if task.problem.roles[name] == "block" and layer.is_quantized]
    module, family = load_transformer(task.source.folder)
    network = Simulation(module, bounds=bounds, timestep_scale=family.timestep_scale, seed=task.problem.seed)
    units = units_of(network, names, inputs(module.config))
    if not units:
        raise Misuse(f"{task.source.folder}: has no block linears to search.", "Use a uniform recipe.")
    return Layers(network, base, units, [unit.weight(task.options.weighting) for unit in units])


def at_widths(policy: LayerPolicy, bits: Sequence[int], rule: Mapping[str, str]) -> LayerPolicy:
    """The layer with these activation bits, one a timestep group, and with the clip and grid of `uniform.rule_of`."""
    return policy.model_copy(update={"activation_bits": tuple(bits), **rule})
