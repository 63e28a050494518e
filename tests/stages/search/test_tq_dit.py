"""The TQ-DiT recipes: what they quantize, how, and what they refuse."""

import pytest

from dit2deploy.artefacts.policy import Policy
from dit2deploy.base.errors import Misuse
from dit2deploy.models.flux import FLUX
from dit2deploy.models.load import linears, open_model
from dit2deploy.stages.search import search
from tests.packing import tiny_module


@pytest.mark.parametrize(("recipe", "bits"), [("tq-dit", 8), ("tq-dit-w6a6", 6)])
def test_what_it_says(tiny_dit_folder, tmp_path, recipe, bits):
    policy = search(tiny_dit_folder, tmp_path / "policy.json", recipe=recipe)
    source = open_model(tiny_dit_folder)
    policy.check_covers(source.class_name, linears(source))
    assert Policy.load(tmp_path / "policy.json") == policy
    assert policy.timestep_bounds == tuple(range(100, 1001, 100))
    assert set(policy.attentions) == {"transformer_blocks.0.attn1", "transformer_blocks.1.attn1"}
    assert {width for one in policy.attentions.values() for width in one.bits + one.probability_bits} == {bits}
    for name, layer in policy.layers.items():
        if source.family.role(name) == "block":
            assert (layer.weight, layer.activation_bits, layer.hadamard) == ("int8", (bits,) * 10, 1)
            assert layer.weight_bits == (None if bits == 8 else bits)
            assert layer.regions == ("gelu" if name.endswith("ff.net.2") else "token")
        else:
            assert layer.regions == "token" and layer.weight_bits is None


def test_groups_and_overrides(tiny_dit_folder, tmp_path):
    policy = search(tiny_dit_folder, tmp_path / "policy.json", recipe="tq-dit", groups=3, rounding="gptq")
    assert policy.timestep_bounds == (333, 666, 1000)
    assert policy.options == {"recipe": "tq-dit", "groups": 3, "rounding": "gptq"}
    assert policy.layers["transformer_blocks.0.attn1.to_q"].rounding == "gptq"
    bounds = (250, 1000)
    assert (
        search(tiny_dit_folder, tmp_path / "policy.json", recipe="tq-dit", timestep_bounds=bounds).timestep_bounds
        == bounds
    )


@pytest.mark.parametrize(
    ("overrides", "text"),
    [({"groups": 0}, "groups 0"), ({"low_rank": 4}, "two regions"), ({"beam": 3}, "no option 'beam'")],
)
def test_what_does_not_fit_is_refused(tiny_dit_folder, tmp_path, overrides, text):
    with pytest.raises(Misuse, match=text):
        search(tiny_dit_folder, tmp_path / "policy.json", recipe="tq-dit", **overrides)


def test_attentions_of_two_streams(tmp_path):
    tiny_module(FLUX).save_pretrained(tmp_path / "model")
    policy = search(tmp_path / "model", tmp_path / "policy.json", recipe="tq-dit", groups=2)
    assert list(policy.attentions) == ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"]
    assert [name for name, layer in policy.layers.items() if layer.regions == "gelu"] == [
        "transformer_blocks.0.ff.net.2",
        "transformer_blocks.0.ff_context.net.2",
    ]
