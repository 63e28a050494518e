"""The error of one layer's outputs is that of the layer the model will hold."""

import numpy as np
import pytest
import torch

from dit2deploy.artefacts.policy import LayerPolicy, MonarchGrid
from dit2deploy.nn.quant_linear import QuantLinear
from dit2deploy.nn.timestep_groups import TimestepGroups
from dit2deploy.quantizers.linear import quantize_linear
from dit2deploy.quantizers.output_error import output, output_error

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((24, 64)).astype(np.float32)
X = torch.from_numpy(RNG.standard_normal((50, 64)).astype(np.float32))


@pytest.mark.parametrize(
    "changes",
    [{}, {"hadamard": 32, "low_rank": 3, "monarch": MonarchGrid(4, 2, 2)}, {"group_size": 16, "clip": "gaussian"}],
)
def test_outputs_are_those_of_the_quantized_layer(changes):
    policy = LayerPolicy(weight="int4", activation_bits=(4,), **changes)
    tensors = quantize_linear(WEIGHT, None, policy)
    layer = QuantLinear(64, 24, policy=policy, groups=TimestepGroups((1000,), 1.0), form="fused")
    layer.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items()})
    torch.testing.assert_close(output(X, tensors, policy), layer(X), rtol=1e-4, atol=1e-4)


def test_error_falls_with_bits_and_is_zero_without_signal():
    errors = []
    for weight, bits in (("ternary", 2), ("int4", 4), ("int8", 8)):
        policy = LayerPolicy(weight=weight, activation_bits=(bits,))
        errors.append(output_error(X, torch.from_numpy(WEIGHT), quantize_linear(WEIGHT, None, policy), policy))
    assert errors[0] > 10 * errors[1] > 100 * errors[2] > 0
    assert (
        output_error(torch.zeros(3, 64), torch.from_numpy(WEIGHT), quantize_linear(WEIGHT, None, policy), policy) == 0
    )
