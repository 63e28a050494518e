"""Reconstruction betters round to nearest, moves codes by one, goes on after a kill, and knows what it may be asked."""

import sys

import numpy as np
import pytest
import torch

from dit2deploy.artefacts.policy import Policy
from dit2deploy.base import progress
from dit2deploy.base.errors import Misuse
from dit2deploy.evaluate import sqnr_db
from dit2deploy.formats import by_name, unpack
from dit2deploy.models.flux import FLUX
from dit2deploy.models.load import linears, load_transformer, open_model
from dit2deploy.nn.convert import load_quantized
from dit2deploy.stages.calibrate import calibrate
from dit2deploy.stages.quantize import quantize
from dit2deploy.stages.quantize.conditions import ConditionPart, Conditions
from dit2deploy.stages.quantize.hessians import gather
from dit2deploy.stages.quantize.reconstruct import FEWEST, MOST, default_iterations, units_of
from tests import packing

ITERATIONS = 30


@pytest.fixture(scope="module")
def model(tiny_dit_folder):
    return tiny_dit_folder


@pytest.fixture(scope="module")
def calibration(model, tmp_path_factory):
    return calibrate(model, tmp_path_factory.mktemp("calibration") / "set", samples=4, steps=4)


def policy_of(model, *, weight="int3", low_rank=0, bits=(8,), bounds=(1000,), group_size=None, **changes) -> Policy:
    """Blocks with these changes, what is around them int8."""
    module, family = load_transformer(model)
    options = {"weight": weight, "bits": bits, "bounds": bounds, "low_rank": low_rank, "group_size": group_size}
    policy = packing.policy_of(family, module, **options)
    layers = {
        name: layer.model_copy(update=changes) if family.role(name) == "block" else layer
        for name, layer in policy.layers.items()
    }
    return policy.model_copy(update={"layers": layers})


def fidelity(model, calibration, made) -> float:
    network, quantized = load_transformer(model)[0], load_quantized(made)
    values: list[list[np.ndarray]] = [[], []]
    for index in range(len(calibration)):
        call = {name: torch.from_numpy(value) for name, value in calibration.call(index).items()}
        with torch.no_grad():
            for found, module in zip(values, (network, quantized), strict=True):
                found.append(module(**call, return_dict=False)[0].numpy())
    return sqnr_db(np.stack(values[0]), np.stack(values[1]))


def codes_of(made, name: str) -> np.ndarray:
    fmt = by_name(made.policy.layers[name].weight)
    k = linears(open_model(made.manifest.model_path))[name][1]
    return unpack(made.tensors.read(f"{name}.weight"), fmt, k)


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("squared", {"weight": "int8", "weight_bits": 4}),
        ("squared", {"weight": "ternary", "low_rank": 4, "group_size": 16}),
        ("squared", {"bits": (8, 6), "bounds": (400, 1000)}),
        ("diagonal", {}),
        ("low_rank", {}),
    ],
    ids=["4 bits in int8", "ternary, branch, groups", "timestep groups", "BRECQ", "FIMA-Q"],
)
def test_blocks_come_nearer_and_codes_move_by_one(model, calibration, tmp_path, objective, options):
    made = {}
    for rounding in ("nearest", "adaround"):
        policy = policy_of(model, rounding=rounding, objective=objective, **options)
        made[rounding] = quantize(model, policy, calibration, tmp_path / rounding, iterations=ITERATIONS)
    gain = [fidelity(model, calibration, one) for one in made.values()]
    assert gain[1] > gain[0] + 0.4
    moved = 0
    for name in made["adaround"].tensors:
        nearest, learned = (one.tensors.read(name) for one in made.values())
        layer = made["adaround"].policy.layers.get(name.removesuffix(".weight"))
        if layer is not None and layer.rounding == "adaround":
            steps = codes_of(made["adaround"], name.removesuffix(".weight")) - codes_of(
                made["nearest"], name.removesuffix(".weight")
            )
            assert np.abs(steps).max() <= 1
            moved += (steps != 0).sum()
            high = by_name(layer.weight).limited(layer.weight_bits).high
            assert np.abs(codes_of(made["adaround"], name.removesuffix(".weight"))).max() <= high
        else:
            np.testing.assert_array_equal(learned, nearest)
    assert moved > 0
    assert made["adaround"].manifest.iterations == ITERATIONS


def kill_at(what: str, when: int):
    def kill(told: str, done: int, total: int | None) -> None:
        if told == what and done == when:
            raise KeyboardInterrupt

    return progress.listen(kill)


def test_a_killed_run_goes_on_to_the_same_bytes(model, calibration, tmp_path):
    policy = policy_of(model, rounding="adaround", objective="low_rank")
    options = {"iterations": 6, "seed": 3}
    whole = quantize(model, policy, calibration, tmp_path / "whole", **options)
    stop = kill_at("reconstruct transformer_blocks.1", 4)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, policy, calibration, tmp_path / "out", **options)
    stop()
    blocks = []
    stop = progress.listen(lambda what, done, total: blocks.append(what) if what.startswith("reconstruct") else None)
    again = quantize(model, policy, calibration, tmp_path / "out", **options)
    stop()
    assert set(blocks) == {"reconstruct transformer_blocks.1"}
    assert again.sha256 == whole.sha256
    assert not (tmp_path / "out.parts").exists()


def test_a_block_that_was_written_in_part_is_made_again(model, calibration, tmp_path, monkeypatch):
    policy = policy_of(model, rounding="adaround")
    whole = quantize(model, policy, calibration, tmp_path / "whole", iterations=6)
    parts = sys.modules["dit2deploy.stages.quantize.quantize"].Parts
    add = parts.add

    def until(self, name, tensors, seconds):
        if name.endswith("0.ff.net.2"):
            raise KeyboardInterrupt
        add(self, name, tensors, seconds)

    with monkeypatch.context() as patch:
        patch.setattr(parts, "add", until)
        with pytest.raises(KeyboardInterrupt):
            quantize(model, policy, calibration, tmp_path / "out", iterations=6)
    assert quantize(model, policy, calibration, tmp_path / "out", iterations=6).sha256 == whole.sha256


def test_families_whose_blocks_give_two_tensors_are_reconstructed_too(tmp_path):
    module = packing.tiny_module(FLUX)
    module.save_pretrained(tmp_path / "model")
    calibration = calibrate(tmp_path / "model", tmp_path / "calibration", samples=2, steps=2)
    made = {}
    for rounding in ("nearest", "adaround"):
        policy = policy_of(tmp_path / "model", rounding=rounding, objective="low_rank", weight="int3")
        made[rounding] = quantize(tmp_path / "model", policy, calibration, tmp_path / rounding, iterations=ITERATIONS)
    gain = [fidelity(tmp_path / "model", calibration, one) for one in made.values()]
    assert gain[1] > gain[0]


TEMPORAL = ("norm1.linear", "norm1.emb.timestep_embedder.linear_1", "norm1.emb.timestep_embedder.linear_2")


def temporal(policy: Policy, **changes) -> Policy:
    layers = {
        name: layer.model_copy(update=changes) if name.endswith(TEMPORAL) else layer
        for name, layer in policy.layers.items()
    }
    return policy.model_copy(update={"layers": layers})


def test_conditions_are_what_the_network_itself_gives_these_layers(model, calibration):
    """Second moments over all timesteps and classes, against the whole network asked for each."""
    network, family = load_transformer(model)
    calls = Conditions(calibration, family.classes_and_shape(network.config)[0])
    assert len(calls) == 4 and calls.call(0)["class_labels"].tolist() == list(range(11))
    names = [f"transformer_blocks.1.{leaf}" for leaf in TEMPORAL]
    found = gather(ConditionPart(network), names, calls)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for name in names:
        network.get_submodule(name).register_forward_pre_hook(lambda m, a, name=name: seen[name].append(a[0]))
    for timestep in calibration.manifest.timesteps:
        inputs = {"timestep": torch.full((11,), timestep), "class_labels": torch.arange(11)}
        with torch.no_grad():
            network(torch.randn(11, 1, 8, 8), **inputs, return_dict=False)
    for name in names:
        x = torch.cat(seen[name])
        torch.testing.assert_close(found[name], x.T @ x / len(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rounding", ["gptq", "adaround"])
def test_temporal_features_are_kept_on_the_finite_set(model, calibration, tmp_path, rounding):
    """Modulation vectors of every timestep and class: nearer than round to nearest brings them."""
    made = {}
    for name in ("nearest", rounding):
        policy = temporal(policy_of(model, weight="int8"), weight="int3", rounding=name, calls="conditions")
        made[name] = quantize(model, policy, calibration, tmp_path / name, iterations=ITERATIONS)
    network, family = load_transformer(model)
    calls = Conditions(calibration, family.classes_and_shape(network.config)[0])
    error = []
    for one in made.values():
        values: list[list[np.ndarray]] = [[], []]
        for found, module in zip(values, (network, load_quantized(one)), strict=True):
            for block in module.transformer_blocks:
                block.norm1.linear.register_forward_hook(lambda m, a, y, found=found: found.append(y.numpy()))
            part = ConditionPart(module)
            for index in range(len(calls)):
                call = {name: torch.from_numpy(value) for name, value in calls.call(index).items()}
                with torch.no_grad():
                    part(**call)
        error.append(sqnr_db(np.stack(values[0]), np.stack(values[1])))
    assert error[1] > error[0] + 1


def test_units_are_blocks_and_what_reads_conditions_comes_first(model):
    policy = temporal(
        policy_of(model, rounding="adaround", objective="diagonal"), rounding="adaround", calls="conditions"
    )
    names = list(linears(open_model(model)))
    units = units_of(policy, names, ["transformer_blocks.0", "transformer_blocks.1"])
    assert [unit.name for unit in units[-2:]] == ["transformer_blocks.0", "transformer_blocks.1"]
    assert [unit.objective for unit in units] == ["squared"] * 6 + ["diagonal"] * 2
    assert all(unit.layers == (unit.name,) and unit.name.endswith(TEMPORAL) for unit in units[:6])
    assert sorted(name for unit in units for name in unit.layers) == sorted(
        name for name in names if policy.layers[name].rounding == "adaround"
    )


def test_what_cannot_be_reconstructed_is_refused(model, calibration, tmp_path):
    block = "transformer_blocks.0.attn1.to_q"
    policy = policy_of(model, rounding="adaround")

    def with_layer(**changes) -> Policy:
        return policy.model_copy(
            update={"layers": policy.layers | {block: policy.layers[block].model_copy(update=changes)}}
        )

    for broken, text in (
        (with_layer(objective="diagonal"), "differ in their objective"),
        (with_layer(calls="conditions"), f"{block}.*timestep and class alone"),
        (temporal(policy, calls="conditions", hessian="fisher"), "Fisher scores are of trajectories"),
    ):
        with pytest.raises(Misuse, match=text):
            quantize(model, broken, calibration, tmp_path / "out", iterations=1)
    with pytest.raises(Misuse, match="two regions cannot be reconstructed"):
        units_of(with_layer(regions="gelu"), list(policy.layers), [])
    with pytest.raises(Misuse, match="iterations"):
        quantize(model, policy, calibration, tmp_path / "out", iterations=0)


def test_iterations_follow_the_size_of_the_model():
    assert default_iterations(10) == MOST and default_iterations(10**12) == FEWEST
    assert FEWEST < default_iterations(4_000_000) < MOST
