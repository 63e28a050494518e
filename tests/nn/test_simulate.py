"""A simulated network gives what the packed checkpoint of the same policy gives; blocks are replayed exactly."""

import pytest
import torch

from dit2deploy.artefacts.policy import LayerPolicy, MonarchGrid
from dit2deploy.models import FAMILIES
from dit2deploy.models.blocks import blocks_of, recording, replaying
from dit2deploy.models.dit import DIT
from dit2deploy.models.load import linears_of
from dit2deploy.nn.convert import load_quantized
from dit2deploy.nn.simulate import Simulation
from dit2deploy.quantizers.linear import quantize_linear
from tests import packing

BOUNDS = (500, 1000)


def simulated(module) -> Simulation:
    return Simulation(module, bounds=BOUNDS, timestep_scale=1.0)


def called(module, inputs) -> torch.Tensor:
    with torch.inference_mode():
        return module(**inputs, return_dict=False)[0]


@pytest.mark.parametrize(
    "weight, group_size, grid",
    [("ternary", None, "mid-rise"), ("int4", 8, "mid-tread"), ("int8", None, "mid-tread")],
)
def test_it_equals_the_checkpoint_of_its_policy(weight, group_size, grid, tmp_path, monkeypatch):
    module = packing.tiny_module(DIT)
    options = {"weight": weight, "bits": (3, 5), "bounds": BOUNDS, "low_rank": 3, "group_size": group_size}
    options["monarch"] = MonarchGrid(4, 4, 2) if weight == "int4" else None
    policy = packing.policy_of(DIT, module, clip="gaussian", grid=grid, **options)
    monkeypatch.setattr(
        packing,
        "pack_layer",
        lambda layer, entry: quantize_linear(layer.weight.numpy(), layer.bias.numpy(), entry),
    )
    reference = load_quantized(packing.pack_checkpoint(tmp_path / "packed", module, policy, half=False))
    inputs = DIT.inputs(module.config, batch=4, seed=1)
    assert inputs["timestep"].min() < 500 <= inputs["timestep"].max()
    exact = called(module, inputs)
    network = simulated(module)
    torch.testing.assert_close(network.call(inputs), exact)
    network.choose(policy.layers)
    torch.testing.assert_close(network.call(inputs), called(reference, inputs), rtol=1e-5, atol=1e-5)
    network.choose_float()
    torch.testing.assert_close(network.call(inputs), exact)


def test_branches_of_other_starts_are_other_forms():
    """Starts that need moments, which a search does not have, are tried as those without."""
    torch.manual_seed(0)
    source = torch.nn.Sequential(torch.nn.Linear(32, 24))
    x = torch.randn(5, 32)
    network = Simulation(source, bounds=(1000,), timestep_scale=1.0)
    given = {}
    for init in ("alternating", "residual", "weight", "weighted", "refit"):
        policy = LayerPolicy(weight="ternary", activation_bits=(8,), low_rank=4, branch_init=init)
        network.choose({"0": policy})
        given[init] = source(x)
    assert torch.equal(given["weighted"], given["alternating"])
    assert torch.equal(given["refit"], given["weight"])
    assert not torch.equal(given["residual"], given["alternating"])
    assert not torch.equal(given["residual"], given["weight"])


def test_strength_moves_a_layer_part_of_the_way():
    torch.manual_seed(0)
    source = torch.nn.Sequential(torch.nn.Linear(32, 8))
    x = torch.randn(5, 32)
    exact = source(x)
    network = Simulation(source, bounds=(1000,), timestep_scale=1.0)
    policy = LayerPolicy(weight="ternary", activation_bits=(3,), hadamard=32)
    network.choose({"0": policy})
    full = source(x) - exact
    network.choose({"0": policy}, strength=0.25)
    torch.testing.assert_close(source(x) - exact, 0.25 * full)
    network.choose({"0": policy}, strength=0.0)
    torch.testing.assert_close(source(x), exact)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_replayed_blocks_give_the_same_output(family):
    """Every family's blocks lie in lists at the top and hand on all that later blocks need."""
    module = packing.tiny_module(family)
    inputs = family.inputs(module.config, batch=2, seed=0)
    blocks = list(blocks_of(module).values())
    for name in linears_of(module):
        if family.role(name) == "block":
            assert any(name.startswith(f"{block}.") for block in blocks_of(module))
    with recording(blocks) as outputs:
        exact = called(module, inputs)
    last = len(blocks) - 1
    with replaying(blocks[:last], [outputs[index] for index in range(last)]):
        torch.testing.assert_close(called(module, inputs), exact, rtol=0, atol=0)
    torch.testing.assert_close(called(module, inputs), exact, rtol=0, atol=0)
