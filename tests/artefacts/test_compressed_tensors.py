"""The checkpoint's config read by compressed-tensors' own schemas."""

import json

import pytest

from dit2deploy.artefacts.checkpoint import CONFIG
from dit2deploy.artefacts.compressed_tensors import described
from dit2deploy.artefacts.policy import LayerPolicy, Policy


@pytest.fixture
def policy() -> Policy:
    layers = {
        "a": LayerPolicy(weight="ternary", activation_bits=(4, 3), hadamard=16, low_rank=4),
        "b": LayerPolicy(weight="int4", activation_bits=(4, 4), group_size=32),
        "c": LayerPolicy(weight="ternary", activation_bits=(3, 4), hadamard=32),
        "d": LayerPolicy(weight="float"),
        "e": LayerPolicy(weight="int8", activation_bits=(8, 8), weight_bits=6, regions="gelu"),
    }
    return Policy(method="test", model="X", timestep_bounds=(500, 1000), layers=layers)


def test_layers_of_one_scheme_are_one_group(policy):
    told = described(policy)
    assert [group["targets"] for group in told["config_groups"].values()] == [["a", "c"], ["b"], ["e"]]
    assert told["ignore"] == ["d"]
    ternary, grouped, narrowed = told["config_groups"].values()
    assert (ternary["weights"]["num_bits"], ternary["weights"]["strategy"]) == (2, "channel")
    assert (grouped["weights"]["strategy"], grouped["weights"]["group_size"]) == ("group", 32)
    assert (narrowed["weights"]["num_bits"], narrowed["input_activations"]["strategy"]) == (6, "tensor")
    rotations = told["transform_config"]["config_groups"]
    assert {name: one["head_dim"] for name, one in rotations.items()} == {"hadamard_16": 16, "hadamard_32": 32}
    assert [place["location"] for place in rotations["hadamard_16"]["apply"]] == ["input", "weight_input"]


def test_its_own_schemas_read_the_checkpoint(policy, tiny_checkpoint):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.transform import TransformConfig

    written = json.loads((tiny_checkpoint.folder / CONFIG).read_text())["quantization_config"]
    assert written["quant_method"] == "dit2deploy"
    for told in (described(policy), written):
        read = QuantizationConfig(
            quant_method="dit2deploy", **{name: told[name] for name in ("config_groups", "ignore", "format")}
        )
        assert {str(scheme.weights.type) for scheme in read.config_groups.values()} == {"int"}
        rotations = TransformConfig.model_validate(told["transform_config"])
        assert {scheme.type for scheme in rotations.config_groups.values()} == {"hadamard"}
