"""Widths by timestep group: within their mean, more where it helps, and the network runs them."""

import numpy as np
import pytest
import torch

from dit2deploy.base.errors import Misuse
from dit2deploy.models.load import linears, load_transformer, open_model
from dit2deploy.nn.convert import load_quantized
from dit2deploy.stages.calibrate import calibrate
from dit2deploy.stages.quantize import quantize
from dit2deploy.stages.quantize.hessians import sample_inputs
from dit2deploy.stages.quantize.time_widths import search_time_widths
from dit2deploy.stages.search import search

BLOCK = "transformer_blocks.0"


@pytest.fixture(scope="module")
def calibration(tiny_dit_folder, tmp_path_factory):
    return calibrate(tiny_dit_folder, tmp_path_factory.mktemp("calibration") / "set", samples=2, steps=4)


@pytest.fixture
def policy(tiny_dit_folder, tmp_path):
    return search(tiny_dit_folder, tmp_path / "p.json", recipe="w4a4", low_rank=0)


def mean_bits(policy, shapes, steps) -> float:
    """Over weights and the sampler's steps, counted from the policy."""
    groups = np.searchsorted(policy.timestep_bounds, steps, side="right")
    names = [name for name in shapes if "transformer_blocks" in name and "norm1" not in name]
    sizes = np.array([shapes[name][0] * shapes[name][1] for name in names])
    bits = np.array([np.asarray(policy.layers[name].activation_bits)[groups].mean() for name in names])
    return float(sizes @ bits / sizes.sum())


@pytest.mark.parametrize("average", [2.0, 3.5, 4.0])
def test_widths_keep_to_their_mean(tiny_dit_folder, policy, calibration, average):
    shapes = linears(open_model(tiny_dit_folder))
    found = search_time_widths(tiny_dit_folder, policy, calibration, average=average, groups=2)
    found.check_covers(policy.model, shapes)
    assert len(found.timestep_bounds) == 2 and found.timestep_bounds[-1] == policy.timestep_bounds[-1]
    assert mean_bits(found, shapes, calibration.manifest.timesteps) <= average + 1e-9
    for side in "kv":
        other = found.layers[f"{BLOCK}.attn1.to_{side}"]
        assert other.activation_bits == found.layers[f"{BLOCK}.attn1.to_q"].activation_bits
    assert found.layers[f"{BLOCK}.norm1.linear"].activation_bits == (8, 8)


def test_a_group_of_more_trouble_gets_more_bits(tiny_dit_folder, policy, calibration, monkeypatch):
    """Values of one layer that are -1 and 1 in half of the calls, which 2 bits hold, and normal ones in the others."""
    layers = {name: layer.model_copy(update={"hadamard": 1}) for name, layer in policy.layers.items()}
    policy = policy.model_copy(update={"layers": layers})
    name = f"{BLOCK}.ff.net.2"

    def with_an_easy_half(*arguments, **keywords):
        inputs = sample_inputs(*arguments, **keywords)
        x = torch.randn(inputs[name].shape, generator=torch.Generator().manual_seed(0))
        x[len(x) // 2 :] = x[len(x) // 2 :].sign()
        return inputs | {name: x}

    monkeypatch.setattr("dit2deploy.stages.quantize.time_widths.sample_inputs", with_an_easy_half)
    found = search_time_widths(tiny_dit_folder, policy, calibration, average=4.0, groups=2).layers[name]
    late, early = found.activation_bits  # rising timesteps: the first calls, the noisiest, are the last group
    assert late == 2 and early >= 4


def test_the_checkpoint_changes_its_widths_with_the_timestep(tiny_dit_folder, policy, calibration, tmp_path):
    found = search_time_widths(tiny_dit_folder, policy, calibration, average=4.0, groups=2)
    name = f"{BLOCK}.ff.net.2"
    layers = found.layers | {name: found.layers[name].model_copy(update={"activation_bits": (2, 8)})}
    made = quantize(tiny_dit_folder, found.model_copy(update={"layers": layers}), calibration, tmp_path / "out")
    np.testing.assert_array_equal(made.tensors.read(f"{name}.qmax"), [1.0, 127.0])
    network, family = load_transformer(tiny_dit_folder)
    inputs = family.inputs(network.config, batch=2, seed=0) | {"timestep": torch.tensor([0, 999])}
    with torch.no_grad():
        assert torch.isfinite(load_quantized(made)(**inputs, return_dict=False)[0]).all()


def test_what_cannot_be(tiny_dit_folder, policy, calibration):
    for keywords, fault in (({"average": 1.5}, "below 2"), ({"average": 4, "groups": 5}, "too few for 5")):
        with pytest.raises(Misuse, match=fault):
            search_time_widths(tiny_dit_folder, policy, calibration, **keywords)
    grouped = search_time_widths(tiny_dit_folder, policy, calibration, average=4, groups=2)
    with pytest.raises(Misuse, match="groups already"):
        search_time_widths(tiny_dit_folder, grouped, calibration, average=4)
