"""Recipes write every layer out, take overrides that fit, and refuse the others by name."""

import pytest

from dit2deploy.artefacts.policy import Policy
from dit2deploy.base.errors import Misuse
from dit2deploy.models.load import linears, open_model
from dit2deploy.models.wan import WAN
from dit2deploy.stages.search import search
from dit2deploy.stages.search.uniform import RECIPES, default_hadamard, default_rank
from tests import packing

BLOCK = "transformer_blocks.0.ff.net.0.proj"
MODULATION = "transformer_blocks.1.norm1.linear"
EMBEDDING = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1"


@pytest.fixture(scope="module")
def model(tiny_dit_folder):
    return tiny_dit_folder


@pytest.mark.parametrize("recipe", [recipe.name for recipe in RECIPES])
def test_every_recipe_covers_the_model_and_is_read_back(model, tmp_path, recipe):
    policy = search(model, tmp_path / "policy.json", recipe=recipe, seed=3)
    source = open_model(model)
    policy.check_covers(source.class_name, linears(source))
    assert Policy.load(tmp_path / "policy.json") == policy
    assert policy.options["recipe"] == recipe and policy.seed == 3
    weight, bits = recipe[1:].split("a")
    block = policy.layers[BLOCK]
    assert block.weight == {"1.58": "ternary", "3": "int3", "4": "int4", "8": "int8"}[weight]
    assert block.activation_bits == (int(bits),)
    assert block.clip == ("gaussian" if int(bits) <= 3 else "absmax")
    assert block.hadamard == 16  # K = 48
    assert block.rounding == ("nearest" if weight == "8" else "gptq")


def test_what_surrounds_the_blocks_is_more_precise(model, tmp_path):
    layers = search(model, tmp_path / "policy.json", recipe="w1.58a4").layers
    assert (layers[MODULATION].weight, layers[MODULATION].activation_bits) == ("int4", (8,))
    assert (layers[EMBEDDING].weight, layers[EMBEDDING].rounding) == ("int8", "nearest")
    assert layers["proj_out_1"].weight == "int8"
    assert layers["proj_out_2"].weight == "float"
    assert search(model, tmp_path / "policy.json", recipe="w4a4").layers[MODULATION].weight == "int8"


@pytest.mark.parametrize(
    ("bits", "grid", "clip"),
    [
        (1, "mid-rise", "gaussian"),
        (2, "mid-rise", "gaussian"),
        (3, "mid-rise", "gaussian"),
        (4, "mid-tread", "absmax"),
        ((1, 5), "mid-rise", "absmax"),
        ((2, 4), "mid-tread", "absmax"),
        ((2, 3), "mid-rise", "gaussian"),
    ],
)
def test_grid_and_clip_follow_the_bits(model, tmp_path, bits, grid, clip):
    bounds = {"timestep_bounds": (500, 1000)} if isinstance(bits, tuple) else {}
    policy = search(model, tmp_path / "policy.json", recipe="w1.58a4", activation_bits=bits, **bounds)
    block = policy.layers[BLOCK]
    assert (block.grid, block.clip) == (grid, clip)
    assert policy.layers[EMBEDDING].grid == "mid-tread"


def test_overrides_reach_the_block_linears(model, tmp_path):
    policy = search(
        model,
        tmp_path / "policy.json",
        recipe="w4a4",
        group_size=16,
        low_rank=3,
        rounding="nearest",
        clip="absmax",
        grid="mid-rise",
        hadamard=4,
        modulation="float",
        timestep_bounds=(300, 1000),
        activation_bits=(6, 4),
    )
    block = policy.layers[BLOCK]
    assert (block.group_size, block.low_rank, block.rounding, block.clip) == (16, 3, "nearest", "absmax")
    assert (block.hadamard, block.activation_bits, block.grid) == (4, (6, 4), "mid-rise")
    assert policy.timestep_bounds == (300, 1000)
    assert policy.layers[EMBEDDING].activation_bits == (8, 8)
    assert policy.layers[MODULATION].weight == "float"
    assert not any(layer.rounding == "gptq" for layer in policy.layers.values())


def test_later_options_reach_the_layers_that_they_are_for(model, tmp_path):
    policy = search(
        model, tmp_path / "policy.json", recipe="w3a3", branch_init="weighted", hessian="fisher", smoothing=0.4
    )
    block, second = policy.layers[BLOCK], policy.layers["transformer_blocks.0.ff.net.2"]
    assert (block.branch_init, block.hessian, block.smoothing) == ("weighted", "fisher", 0.4)
    assert (second.branch_init, second.smoothing) == ("weighted", 0)  # it reads GELU: nothing can take its factors
    assert (policy.layers[MODULATION].hessian, policy.layers[MODULATION].smoothing) == ("fisher", 0)
    # left out, they leave no trace in the file, so that older policies keep their hashes
    assert "smoothing" not in search(model, tmp_path / "plain.json", recipe="w3a3").model_dump_json()


def test_smoothing_needs_a_family_with_places(tmp_path):
    packing.tiny_module(WAN).save_pretrained(tmp_path / "wan")
    with pytest.raises(Misuse, match="no layer of a WanTransformer3DModel"):
        search(tmp_path / "wan", tmp_path / "policy.json", recipe="w4a4", smoothing=0.5)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"recipe": "w2a2"}, "w1.58a4"),
        ({"rank": 4}, "low_rank"),
        ({"group_size": 7}, "group size 7 does not divide"),
        ({"hadamard": 32}, "block 32 does not divide"),
        ({"hadamard": 3}, "no power of two"),
        ({"low_rank": 49}, "rank 49"),
        ({"rounding": "up"}, "rounding"),
        ({"clip": "none"}, "clip"),
        ({"branch_init": "V1"}, "branch_init"),
        ({"hessian": "taylor"}, "hessian"),
        ({"smoothing": 1.5}, "smoothing"),
        ({"grid": "odd"}, "grid"),
        ({"recipe": "w8a8", "grid": "mid-rise"}, "at most 7 bits"),
        ({"activation_bits": 1, "grid": "mid-tread"}, "1 bit takes the mid-rise grid"),
        ({"timestep_bounds": (500, 1000), "activation_bits": (1, 8)}, "at most 7 bits"),
        ({"activation_bits": 9}, "activation_bits"),
        ({"activation_bits": (4, 4)}, "1 timestep groups"),
        ({"timestep_bounds": (500, 900)}, "not 1000"),
        ({"timestep_bounds": (700, 500, 1000)}, "must rise"),
    ],
)
def test_what_does_not_fit_is_refused(model, tmp_path, options, fault):
    with pytest.raises(Misuse, match=fault.replace("(", r"\(")):
        search(model, tmp_path / "policy.json", **options)
    assert not (tmp_path / "policy.json").exists()


def test_default_sizes():
    assert [default_rank(shape) for shape in ((192, 192), (192, 768), (1152, 4608), (9216, 3072), (4, 192))] == [
        8,
        8,
        16,
        16,
        0,
    ]
    assert [default_hadamard(k) for k in (192, 768, 1152, 4608, 3072, 77)] == [64, 256, 128, 512, 512, 1]
