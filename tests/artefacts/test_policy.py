"""A policy is fully resolved, fits its model or is refused, and survives a round trip byte for byte."""

import json

import pytest

from dit2deploy.artefacts.policy import LayerPolicy, Policy
from dit2deploy.base.errors import Misuse

LINEARS = {"a": (8, 64), "b": (8, 48)}


def _policy(**changes) -> Policy:
    layers = {
        "a": LayerPolicy(weight="ternary", activation_bits=(4,), clip="gaussian", hadamard=64, low_rank=2),
        "b": LayerPolicy(weight="float"),
    }
    return Policy(**{"method": "test", "model": "Net", "layers": layers, **changes})


def test_without_attentions_it_is_written_as_before_they_came():
    told = _policy().model_dump(mode="json")
    assert "attentions" not in told
    assert not {"regions", "weight_bits"} & set(told["layers"]["a"])


def test_attentions_have_bits_for_every_timestep_group():
    attention = {"bits": [8], "probability_bits": [8]}
    policy = _policy(attentions={"attn": attention})
    assert policy.has_regions and not _policy().has_regions
    assert policy.model_dump(mode="json")["attentions"] == {"attn": attention}
    with pytest.raises(ValueError, match="attention attn has 2 bits for 1 timestep groups"):
        _policy(attentions={"attn": {**attention, "probability_bits": [8, 8]}})


@pytest.mark.parametrize("change", ({"hadamard": 16}, {"low_rank": 2}))
def test_regions_are_of_what_the_layer_reads(change):
    with pytest.raises(ValueError, match="two regions"):
        _policy(layers={"a": {"weight": "int8", "activation_bits": [8], "regions": "gelu", **change}})


def test_round_trip(tmp_path):
    policy = _policy()
    policy.save(tmp_path / "one.json")
    again = Policy.load(tmp_path / "one.json")
    again.save(tmp_path / "two.json")
    assert again == policy
    assert again.sha256 == policy.sha256
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()


def test_a_policy_that_fits_is_taken():
    _policy().check_covers("Net", LINEARS)


@pytest.mark.parametrize(
    ("model", "linears", "text"),
    [
        ("Other", LINEARS, "policy for Net"),
        ("Net", {**LINEARS, "c": (1, 1)}, "nothing of layer c"),
        ("Net", {"a": (8, 64)}, "names layer b"),
        ("Net", {"a": (8, 96), "b": (8, 48)}, "does not divide K = 96"),
    ],
)
def test_a_policy_for_another_model_is_refused(model, linears, text):
    with pytest.raises(Misuse, match=text):
        _policy().check_covers(model, linears)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda p: p.update(schema_version=2), "newer"),
        (lambda p: p.update(extra=1), "extra"),
        (lambda p: p.pop("layers"), "layers"),
        (lambda p: p["layers"]["a"].update(weight="int5"), "layers.a.weight"),
        (lambda p: p["layers"]["a"].update(rnk=3), "layers.a.rnk"),
        (lambda p: p["layers"]["a"].update(activation_bits=[1]), "activation_bits"),
        (lambda p: p["layers"]["a"].update(activation_bits=[4, 4]), "timestep groups"),
        (lambda p: p["layers"]["a"].update(hadamard=48), "power of two"),
        (lambda p: p["layers"]["a"].update(branch_init="random"), "layers.a.branch_init"),
        (lambda p: p["layers"]["a"].update(hessian="late"), "layers.a.hessian"),
        (lambda p: p["layers"]["a"].update(smoothing=1.5), "layers.a.smoothing"),
        (lambda p: p["layers"]["a"].update(monarch=[4, 4]), "layers.a.monarch"),
        (lambda p: p["layers"]["a"].update(grid="odd"), "layers.a.grid"),
        (lambda p: p["layers"]["a"].update(grid="mid-rise", activation_bits=[8]), "at most 7 bits"),
        (lambda p: p["layers"]["a"].update(activation_bits=[1]), "1 bit takes the mid-rise grid"),
        (lambda p: p["layers"]["a"].update(grid="mid-rise", activation_bits=[0]), "activation_bits"),
        (lambda p: p["layers"]["a"].update(log_bits=8), "layers.a.log_bits"),
        (lambda p: p["layers"]["a"].update(monarch=[1, 1, 1], branch_init="salient"), "no such Monarch"),
        (lambda p: p["layers"]["a"].update(permutation="random"), "layers.a.permutation"),
        (lambda p: p.update(timestep_bounds=[500, 100]), "rise"),
    ],
)
def test_a_broken_policy_names_its_fault(tmp_path, change, text):
    value = _policy().model_dump(mode="json")
    change(value)
    (tmp_path / "policy.json").write_text(json.dumps(value))
    with pytest.raises(Misuse, match=text):
        Policy.load(tmp_path / "policy.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xff", b"3"])
def test_no_json_is_refused(tmp_path, content):
    (tmp_path / "policy.json").write_bytes(content)
    with pytest.raises(Misuse, match=r"policy\.json"):
        Policy.load(tmp_path / "policy.json")


OLD = """{
  "schema_version": 1,
  "kind": "policy",
  "method": "uniform",
  "options": {},
  "seed": 0,
  "model": "Net",
  "timestep_bounds": [
    1000
  ],
  "layers": {
    "a": {
      "weight": "int4",
      "group_size": null,
      "activation_bits": [
        4
      ],
      "clip": "absmax",
      "hadamard": 1,
      "low_rank": 0,
      "rounding": "gptq"
    }
  }
}
"""


def test_a_policy_from_before_the_options_keeps_its_bytes_and_its_hash(tmp_path):
    """Checkpoints and bundles hold the hash of their policy."""
    (tmp_path / "old.json").write_text(OLD)
    old = Policy.load(tmp_path / "old.json")
    old.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == OLD
    assert old.sha256 == "a6de8ce11baff5668a1934a719286358dbaeb875374b8735870a17792995aa17"
    layer = old.layers["a"]
    assert (layer.branch_init, layer.hessian, layer.smoothing) == ("alternating", "uniform", 0)
    assert layer.grid == "mid-tread" and layer.monarch is None
    assert (layer.smoothing_steps, layer.objective, layer.calls) == ("largest", "squared", "trajectory")


@pytest.mark.parametrize(
    "change",
    [
        {"branch_init": "refit"},
        {"grid": "mid-rise"},
        {"monarch": [2, 4, 3]},
        {"hessian": "fisher"},
        {"smoothing": 0.3},
        {"smoothing_steps": "correlation"},
        {"rounding": "adaround"},
        {"objective": "low_rank"},
        {"calls": "conditions"},
    ],
)
def test_an_option_that_is_used_is_written(tmp_path, change):
    layers = {"a": LayerPolicy(weight="int4", activation_bits=(4,), **change), "b": LayerPolicy(weight="float")}
    policy = _policy(layers=layers)
    policy.save(tmp_path / "p.json")
    assert json.loads((tmp_path / "p.json").read_text())["layers"]["a"].items() >= change.items()
    assert Policy.load(tmp_path / "p.json") == policy
    assert policy.sha256 != _policy(layers=layers | {"a": LayerPolicy(weight="int4", activation_bits=(4,))}).sha256


@pytest.mark.parametrize(
    ("grid", "text"),
    [((3, 1, 1), "does not divide K = 64"), ((1, 3, 1), "and N = 8"), ((8, 4, 3), "rank 3 is above"), ((0, 1, 1), "1")],
)
def test_a_monarch_grid_must_fit_its_layer(grid, text):
    def of(grid) -> Policy:
        layer = LayerPolicy(weight="int4", activation_bits=(4,), monarch=grid)
        return _policy(layers={"a": layer, "b": LayerPolicy(weight="float")})

    of((8, 4, 2)).check_covers("Net", LINEARS)
    with pytest.raises(Misuse, match=f"layer a.*{text}"):
        of(grid).check_covers("Net", LINEARS)


def test_codes_of_both_grids_fit_their_width():
    def codes(grid: str, *bits: int) -> tuple[tuple[int, ...], int]:
        layer = LayerPolicy(weight="int4", activation_bits=bits, grid=grid)
        return layer.largest_codes, layer.code_bits

    assert codes("mid-tread", 2, 8) == ((1, 127), 8) and codes("mid-tread", 4) == ((7,), 4)
    assert codes("mid-rise", 1) == ((1,), 2) and codes("mid-rise", 3, 7, 2) == ((7, 127, 3), 8)


def test_moments_are_needed_by_gptq_and_weighted_branches():
    def needs(**changes) -> bool:
        return LayerPolicy(**{"weight": "int4", "activation_bits": (4,), **changes}).needs_moments

    assert needs(rounding="gptq") and needs(low_rank=2, branch_init="weighted")
    assert needs(monarch=(1, 1, 1), branch_init="refit") and not needs(monarch=(1, 1, 1))
    assert not needs() and not needs(branch_init="weighted") and not needs(low_rank=2)
    assert not LayerPolicy(weight="float", rounding="gptq").needs_moments


@pytest.mark.parametrize(
    ("weight", "rounding", "log_bits", "fits"),
    [
        ("int8", "nearest", 4, True),
        ("int4", "nearest", 3, True),
        ("int4", "nearest", 4, False),
        ("int8", "gptq", 4, False),
        ("ternary", "nearest", 2, False),
    ],
)
def test_log_levels_need_a_wider_format(weight, rounding, log_bits, fits):
    layer = LayerPolicy(weight=weight, activation_bits=(4,), rounding=rounding, log_bits=log_bits)
    policy = _policy(layers={"a": layer, "b": LayerPolicy(weight="float")})
    if fits:
        policy.check_covers("Net", LINEARS)
    else:
        with pytest.raises(Misuse, match=f"layer a: {log_bits}-bit log levels"):
            policy.check_covers("Net", LINEARS)
