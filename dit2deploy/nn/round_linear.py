"""The quantized linear layer whose codes are being chosen: float weights in the rotated space, open or settled."""

from collections.abc import Mapping

import numpy as np
import torch

from dit2deploy.artefacts.policy import LayerPolicy, Policy
from dit2deploy.formats import by_name, unpack
from dit2deploy.models.load import linears_of
from dit2deploy.nn.timestep_groups import TimestepGroups
from dit2deploy.nn.train_linear import quantized_input
from dit2deploy.quantizers.adaround import Rounding
from dit2deploy.quantizers.branches import add_branches, total
from dit2deploy.quantizers.gain import clip_gain
from dit2deploy.quantizers.linear import rotate
from dit2deploy.quantizers.round_to_nearest import dequantize


class RoundLinear(torch.nn.Module):
    """QuantLinear's function of x float32 [.., K] -> float32 [.., N] with gradients for its input and, while it is
    open, for the choice of its codes. Holds its weight as float32 [N, K]."""

    def __init__(self, tensors: Mapping[str, np.ndarray], k: int, *, policy: LayerPolicy, groups: TimestepGroups):
        """`tensors` are the checkpoint's of this layer, by suffix."""
        super().__init__()
        self.policy, self.groups = policy, groups
        self.format = by_name(policy.weight).limited(policy.weight_bits)
        held = {name: torch.from_numpy(value) for name, value in tensors.items() if name != "weight"}
        self.scales, self.bias, self.qmax = held["weight_scale"], held["bias"], held["qmax"]
        self.factors = {leaf: held[leaf] for leaf in policy.branch_leaves}
        self.rounding: Rounding | None = None
        self.close(torch.from_numpy(unpack(tensors["weight"], self.format, k)))

    def close(self, codes: torch.Tensor) -> None:
        """Settles on these codes [N, K]."""
        self.rounding = None
        self.codes = codes.to(torch.int8)
        self.try_codes(self.codes)

    def open(self, weight: torch.Tensor) -> Rounding:
        """Begins the choice of codes for the layer's full-precision weight float32 [N, K]; until it is settled, `codes`
        are those of round to nearest."""
        if self.factors:
            weight = weight - total(self.factors)
        # The scales give back what the clip takes from the inputs; the weight is rounded to the grid before that.
        grid = self.scales / clip_gain(self.policy)
        self.rounding = Rounding(rotate(weight, self.policy.hadamard), grid, self.format)
        self.codes = self.rounding.hard().to(torch.int8)
        return self.rounding

    def try_codes(self, codes: torch.Tensor | None) -> None:
        """Computes with these codes [N, K]; None: with the soft ones of `rounding`."""
        self.weight = None if codes is None else dequantize(codes.float(), self.scales)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if self.rounding is not None and weight is None:
            weight = dequantize(self.rounding.soft(), self.scales)
        y = quantized_input(x, self.groups.qmax(self.qmax), self.policy) @ weight.T + self.bias
        return add_branches(y, x, {leaf: factor.float() for leaf, factor in self.factors.items()})


def swap_for_rounding(
    module: torch.nn.Module, policy: Policy, tensors: Mapping[str, Mapping[str, np.ndarray]], groups: TimestepGroups
) -> dict[str, RoundLinear]:
    """Puts a RoundLinear, by its checkpoint's tensors, in the place of every linear that the policy quantizes; attaches
    the timestep groups. Returns the new layers by name, in order of registration."""
    made = {}
    for name, (_, k) in linears_of(module).items():
        if policy.layers[name].is_quantized:
            made[name] = RoundLinear(tensors[name], k, policy=policy.layers[name], groups=groups).eval()
            module.set_submodule(name, made[name])
    groups.attach(module)
    return made
