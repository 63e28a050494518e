"""Bits are those that a checkpoint holds, and averages weigh by MACs and by time."""

import math

import numpy as np
import pytest

from dit2deploy.artefacts.policy import LayerPolicy, MonarchGrid, Policy
from dit2deploy.base.errors import Misuse
from dit2deploy.evaluate.size import average_activation_bits, effective_weight_bits, layer_bits
from dit2deploy.models.load import build, linears_of
from dit2deploy.quantizers.linear import quantize_linear

LINEARS = {"a": (30, 60), "b": (10, 20)}


def _policy(bounds=(1000,), **layers) -> Policy:
    return Policy(method="test", model="Net", timestep_bounds=bounds, layers=layers)


def test_bits_are_those_of_the_checkpoint(tiny_checkpoint):
    policy, tensors = tiny_checkpoint.policy, tiny_checkpoint.tensors
    linears = linears_of(build(tiny_checkpoint.config, tiny_checkpoint.folder))
    for name, shape in linears.items():
        if policy.layers[name].is_quantized:
            leaves = ("weight", "weight_scale", *policy.layers[name].branch_leaves)
            held = sum(tensors.read(f"{name}.{leaf}").nbytes for leaf in leaves)
            assert layer_bits(policy.layers[name], shape) == 8 * held, name


def test_codes_scales_and_branch_are_counted():
    layer = LayerPolicy(weight="ternary", activation_bits=(4,), group_size=30, low_rank=2)
    codes = 3 * 32  # words of 20 trits
    assert layer_bits(layer, (30, 60)) == 30 * codes + 30 * 2 * 32 + 16 * 2 * 90
    grid = layer.model_copy(update={"monarch": MonarchGrid(6, 3, 2)})
    factors = quantize_linear(np.ones((30, 60), np.float32), None, grid)
    held = sum(factors[leaf].nbytes for leaf in ("monarch_down", "monarch_up"))
    assert layer_bits(grid, (30, 60)) == layer_bits(layer, (30, 60)) + 8 * held
    policy = _policy(a=layer, b=LayerPolicy(weight="float"))
    assert effective_weight_bits(policy, LINEARS) == pytest.approx((layer_bits(layer, (30, 60)) + 16 * 200) / 2000)
    assert effective_weight_bits(policy, {"b": (10, 20)}, float_bits=32) == 32


def test_activation_bits_are_averaged_over_macs_and_steps():
    policy = _policy(
        (500, 1000),
        a=LayerPolicy(weight="int4", activation_bits=(8, 4)),
        b=LayerPolicy(weight="int4", activation_bits=(2, 2)),
    )
    assert average_activation_bits(policy, {"a": (30, 60)}, [1000, 750, 500, 0]) == pytest.approx((3 * 4 + 8) / 4)
    assert average_activation_bits(policy, LINEARS, [999]) == pytest.approx((4 * 1800 + 2 * 200) / 2000)
    tokens = {"a": 64}
    assert average_activation_bits(policy, LINEARS, [0], rows=tokens) == pytest.approx(
        (8 * 64 * 1800 + 2 * 200) / (64 * 1800 + 200)
    )


def test_float_inputs_count():
    policy = _policy(a=LayerPolicy(weight="float"), b=LayerPolicy(weight="int4", activation_bits=(4,)))
    assert average_activation_bits(policy, LINEARS, [1]) == pytest.approx((16 * 1800 + 4 * 200) / 2000)


def test_misuse_is_told():
    policy = _policy(a=LayerPolicy(weight="int4", activation_bits=(4,)))
    with pytest.raises(Misuse, match="layer b"):
        effective_weight_bits(policy, LINEARS)
    with pytest.raises(Misuse, match="no linears"):
        average_activation_bits(policy, {}, [1])
    for timesteps in ([1001], [-1], []):
        with pytest.raises(Misuse, match=r"in 0 \.\. 1000"):
            average_activation_bits(policy, {"a": (30, 60)}, timesteps)
    assert math.isfinite(effective_weight_bits(policy, {"a": (30, 60)}))
