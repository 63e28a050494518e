"""What quantizing one layer does to its outputs, its inputs being those of full precision."""

from collections.abc import Mapping

import numpy as np
import torch

from dit2deploy.artefacts.policy import LayerPolicy
from dit2deploy.formats import by_name, unpack
from dit2deploy.ops.hadamard_quantize import hadamard_quantize
from dit2deploy.quantizers.branches import add_branches
from dit2deploy.quantizers.round_to_nearest import dequantize


def output(x: torch.Tensor, tensors: Mapping[str, np.ndarray], policy: LayerPolicy) -> torch.Tensor:
    """The outputs float32 [M, N], without bias, of inputs float32 [M, K]; `tensors` as `quantize_linear` makes them.

    Activations have the narrowest width of the policy's timestep groups.
    """
    codes = torch.from_numpy(unpack(tensors["weight"], by_name(policy.weight), x.shape[1]))
    weight = dequantize(codes.float(), torch.from_numpy(tensors["weight_scale"]))
    qmax = torch.tensor([float(min(policy.largest_codes))])
    q, s = hadamard_quantize(x, qmax, block=policy.hadamard, clip=policy.clip, grid=policy.grid)
    y = (q.float() * s) @ weight.T
    return add_branches(y, x, {leaf: torch.from_numpy(tensors[leaf]).float() for leaf in policy.branch_leaves})


def output_error(
    x: torch.Tensor, weight: torch.Tensor, tensors: Mapping[str, np.ndarray], policy: LayerPolicy
) -> float:
    """Noise to signal ratio |y - y_float|^2 / |y_float|^2 of the outputs; weight float32 [N, K]. 0 for no signal."""
    exact = (x @ weight.T).double()
    power = float(exact.square().sum())
    return float((output(x, tensors, policy) - exact).square().sum()) / power if power else 0.0
