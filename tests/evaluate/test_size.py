"""Bits are those that a checkpoint holds, and averages weigh by MACs and by time."""

import math

import numpy as np
import pytest
from random_model import GEOMETRIES

from dit2deploy.artefacts.policy import LayerPolicy, MonarchGrid, Policy
from dit2deploy.base.errors import Misuse
from dit2deploy.evaluate.size import average_activation_bits, effective_weight_bits, layer_bits, stored_bytes
from dit2deploy.models.load import build, fake_parameters, known_family, linears_of
from dit2deploy.quantizers.linear import quantize_linear
from dit2deploy.stages.search.problem import Problem
from dit2deploy.stages.search.uniform import RECIPES

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


def test_dit_xl_with_a_branch_is_a_sixteenth_of_float32(tmp_path):
    """W1.58A4, rank 16, modulation ternary as RobuQ has it (which says 15.2), by the bytes of each tensor, the
    embedders of the blocks once: so quantize and export write it (dit-xl-2 in tools/results/memory.json)."""
    config, _ = GEOMETRIES["dit-xl-2"]
    with fake_parameters():
        module = build(config, tmp_path / "config.json")
    shapes = linears_of(module)
    family = known_family(config["_class_name"], tmp_path)
    roles = {name: family.role(name) for name in shapes}
    problem = Problem(model=config["_class_name"], linears=shapes, roles=roles, training_steps=1000)
    recipe = next(entry for entry in RECIPES if entry.name == "w1.58a4")
    policy = recipe.search(problem, low_rank=16, modulation="ternary")
    repeated = tuple(f"transformer_blocks.{block}.norm1.emb." for block in range(1, 28))
    held = full = 0
    for name, tensor in module.state_dict().items():
        if name.startswith(repeated):
            continue
        layer, _, leaf = name.rpartition(".")
        is_quantized = layer in shapes and policy.layers[layer].is_quantized
        full += 4 * tensor.numel()
        held += 0 if is_quantized else 4 * tensor.numel()
        held += stored_bytes(policy.layers[layer], shapes[layer]) if is_quantized and leaf == "weight" else 0
    assert 2.6e9 < full < 2.8e9
    assert full / held >= 16, full / held


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
