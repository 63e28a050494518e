"""Which linears of a network read the same input, in the order of a call: they are quantized, and run, together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dit2deploy.models.blocks import blocks_of


@dataclass(frozen=True)
class Unit:
    """Layers that share their input (q, k and v: their quantized activations are computed once)."""

    layers: tuple[str, ...]
    block: int  # place among the network's blocks, see `blocks_of`; -1: in none of them
    rows: int  # tokens of one sample
    parameters: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one sample."""
        return self.rows * self.parameters

    def weight(self, weighting: str) -> int:
        """What a bit of this unit counts in an average: "macs", "parameters" or "layers"."""
        return {"macs": self.macs, "parameters": self.parameters, "layers": len(self.layers)}[weighting]


def units_of(network: torch.nn.Module, names: Sequence[str], inputs: Mapping[str, torch.Tensor]) -> list[Unit]:
    """The units of the layers `names` in the order in which one call with `inputs` (batch on axis 0) reaches them.

    `network` is a transformer whose linears have in_features and out_features. Layers that the call does not reach are
    left out.
    """
    reached: list[tuple[str, int, torch.Tensor]] = []
    samples = len(inputs["timestep"])

    def see(name: str, module: torch.nn.Module, arguments: tuple, keywords: Mapping[str, Any]) -> None:
        x = arguments[0] if arguments else next(iter(keywords.values()))
        reached.append((name, x.numel() // x.shape[-1] // samples, x))

    hooks = [
        network.get_submodule(name).register_forward_pre_hook(partial(see, name), with_kwargs=True) for name in names
    ]
    try:
        with torch.inference_mode():
            network(**inputs, return_dict=False)
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
    blocks = list(blocks_of(network))
    return [_unit(network, group, blocks) for group in groups]


def _unit(network: Any, group: list[tuple[str, int, torch.Tensor]], blocks: Sequence[str]) -> Unit:
    names = tuple(name for name, _, _ in group)
    modules = [network.get_submodule(name) for name in names]
    return Unit(
        layers=names,
        block=next((index for index, block in enumerate(blocks) if names[0].startswith(f"{block}.")), -1),
        rows=group[0][1],
        parameters=sum(module.in_features * module.out_features for module in modules),
    )
