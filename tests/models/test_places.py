"""Attentions and GELUs are found by what they are, and a policy that names others is refused."""

import diffusers
import pytest

from dit2deploy.artefacts.policy import AttentionPolicy
from dit2deploy.base.errors import Misuse
from dit2deploy.models import FAMILIES
from dit2deploy.models.dit import DIT
from dit2deploy.models.places import after_gelu, attentions_of, check_places
from dit2deploy.models.wan import WAN
from tests.packing import policy_of, tiny_module, with_regions

FOUND = {  # attentions, GELU layers of the tiny models
    "dit": (["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"], 2),
    "pixart": (["transformer_blocks.0.attn1", "transformer_blocks.0.attn2"], 1),
    "sd3": (["transformer_blocks.0.attn"], 1),
    "flux": (["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"], 2),
    "z-image": (["noise_refiner.0.attention", "context_refiner.0.attention", "layers.0.attention"], 0),
    "wan": (["blocks.0.attn1", "blocks.0.attn2"], 1),
}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_places_of_the_families(family):
    module = tiny_module(family)
    attentions, gelus = FOUND[family.name]
    assert attentions_of(module) == attentions
    found = after_gelu(module)
    assert len(found) == gelus and all(name.endswith(".net.2") for name in found)


def test_an_attention_to_an_image_too_is_left_alone():
    module = diffusers.WanTransformer3DModel(**{**WAN.tiny, "image_dim": 8, "added_kv_proj_dim": 24})
    assert attentions_of(module) == ["blocks.0.attn1"]


def test_a_gate_is_no_gelu():
    module = diffusers.DiTTransformer2DModel(**{**DIT.tiny, "activation_fn": "geglu"})
    assert after_gelu(module) == []


def test_what_has_no_place_is_refused():
    module = tiny_module(DIT)
    policy = with_regions(policy_of(DIT, module), module, bits=(8,))
    check_places(module, policy)
    attention = AttentionPolicy(bits=(8,), probability_bits=(8,))
    with pytest.raises(Misuse, match="names attention transformer_blocks.7.attn1"):
        check_places(module, policy.model_copy(update={"attentions": {"transformer_blocks.7.attn1": attention}}))
    name = "transformer_blocks.0.ff.net.0.proj"
    layers = {**policy.layers, name: policy.layers["transformer_blocks.0.ff.net.2"]}
    with pytest.raises(Misuse, match=f"layer {name} the regions of GELU"):
        check_places(module, policy.model_copy(update={"layers": layers}))
