"""Units of a search: layers that get their widths together, what they cost, and what they may become."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dit2deploy.artefacts.policy import LayerPolicy, Policy
from dit2deploy.base.errors import Misuse
from dit2deploy.evaluate.size import stored_bytes
from dit2deploy.models.load import load_transformer
from dit2deploy.nn.simulate import Simulation
from dit2deploy.nn.units import Unit, units_of
from dit2deploy.stages.search import uniform
from dit2deploy.stages.search.budget import Prices
from dit2deploy.stages.search.task import Task


@dataclass(frozen=True)
class Choice:
    """What the layers of a unit may become: `bits` is the cost in the average, `strength` see SimulatedLinear."""

    bits: float
    layers: Mapping[str, LayerPolicy]
    strength: float = 1.0


@dataclass(frozen=True)
class Layers:
    """What the searches share: the simulated network, the layers that are searched, and what they cost."""

    network: Simulation
    base: Policy
    units: list[Unit]
    weights: list[int]  # of the units in an average of bits, by the weighting
    prices: Prices

    @property
    def shares(self) -> np.ndarray:
        return np.asarray(self.weights) / sum(self.weights)

    def cost(self, index: int, layers: Mapping[str, LayerPolicy], bits: float, *, group: int = 0) -> float:
        """What these policies of the layers of unit `index` cost, see Prices.of."""
        share = self.weights[index] / sum(self.weights)
        return self.prices.of(layers, rows=self.units[index].rows, bits=bits, share=share, group=group)


def prepare(task: Task, inputs: Callable[[Any], Mapping[str, Any]], bounds: tuple[int, ...]) -> Layers:
    """`inputs(config)` gives the arguments of one call of the network."""
    recipe = next((recipe for recipe in uniform.RECIPES if recipe.name == task.options.base), None)
    if recipe is None:
        known = ", ".join(recipe.name for recipe in uniform.RECIPES)
        raise Misuse(f"base {task.options.base!r} is no uniform recipe.", f"Use one of {known}.")
    base = recipe.search(task.problem, **task.base_overrides, timestep_bounds=bounds)
    names = [name for name, layer in base.layers.items() if task.problem.roles[name] == "block" and layer.is_quantized]
    module, family = load_transformer(task.source.folder)
    call = inputs(module.config)
    units = units_of(module, names, call)
    if not units:
        raise Misuse(f"{task.source.folder}: has no block linears to search.", "Use a uniform recipe.")
    prices = _prices(task, base, names, module, call)
    network = Simulation(module, bounds=bounds, timestep_scale=family.timestep_scale, seed=task.problem.seed)
    return Layers(network, base, units, [unit.weight(task.options.weighting) for unit in units], prices)


def _prices(
    task: Task, base: Policy, searched: Sequence[str], module: torch.nn.Module, call: Mapping[str, Any]
) -> Prices:
    """With all that `base` has around the searched layers as the fixed cost."""
    sizes = task.problem.linears
    prices = Prices(task.budget.unit, sizes=sizes, device=task.device)
    others = {name: layer for name, layer in base.layers.items() if name not in searched}
    if prices.unit == "bytes":
        kept = {name: layer for name, layer in others.items() if layer.is_quantized}
        quantized = {*kept, *searched}
        tensors = task.source.tensors
        plain = sum(tensors.nbytes(name) for name in tensors if name.rpartition(".")[0] not in quantized)
        return replace(prices, fixed=float(plain + sum(stored_bytes(kept[name], sizes[name]) for name in kept)))
    if prices.unit == "milliseconds":
        around = units_of(module, list(others), call)
        times = [
            prices.of({name: others[name] for name in unit.layers}, rows=unit.rows, bits=0, share=0) for unit in around
        ]
        return replace(prices, fixed=sum(times))
    return prices


def at_widths(policy: LayerPolicy, bits: Sequence[int], rule: Mapping[str, str]) -> LayerPolicy:
    """The layer with these activation bits, one a timestep group, and with the clip and grid of `uniform.rule_of`."""
    return policy.model_copy(update={"activation_bits": tuple(bits), **rule})
