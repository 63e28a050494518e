"""The words for a policy name all that a layer becomes, and a width is the one of its codes."""

from dit2deploy.artefacts.policy import AttentionPolicy, LayerPolicy, MonarchGrid, Policy
from dit2deploy.evaluate.words import counted, of_attention, of_layer


def test_a_layer_of_tq_dit_has_its_own_width_and_static_steps():
    words = of_layer(LayerPolicy(weight="int8", weight_bits=6, activation_bits=(6, 6), regions="gelu"))
    assert words.weight == "int8 (6 bit, per channel)"
    assert words.activation == "6 bit, static steps below and above 0 in each timestep group"
    assert "absmax" not in words.line and "8 bit" not in words.line


def test_all_that_is_set_is_told():
    layer = LayerPolicy(
        weight="int8",
        log_bits=4,
        group_size=16,
        activation_bits=(4, 6, 4),
        clip="gaussian",
        gain="clip",
        smoothing=0.5,
        hadamard=8,
        low_rank=2,
        monarch=MonarchGrid(4, 2, 1),
        permutation="zigzag",
    )
    assert of_layer(layer).line == (
        "weights int8 (4 bit, groups of 16, Twin-Log levels, columns in zigzag order); activations 4/6/4 bit "
        "per token, gaussian, mid-tread, gain given back by the weight scales, smoothed (alpha 0.5); "
        "Hadamard, blocks of 8; rank 2, Monarch 4 x 2 of rank 1"
    )
    assert of_layer(LayerPolicy(weight="float")).line == "full precision"


def test_attentions_count_beside_layers():
    attention = AttentionPolicy(bits=(6,), probability_bits=(8,))
    assert "Q, K, V 6 bit, softmax 8 bit in two regions" in of_attention(attention).line
    layer = LayerPolicy(weight="int4", activation_bits=(4,))
    policy = Policy(method="x", model="M", layers={"a": layer, "b": layer}, attentions={"c": attention})
    assert [(kind, count) for kind, _, count in counted(policy)] == [("linear layers", 2), ("attention", 1)]
