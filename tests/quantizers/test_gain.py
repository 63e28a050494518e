"""What a clip takes is given back: a quantized linear answers with the amplitude of the float one."""

import numpy as np
import pytest
import torch

from dit2deploy.artefacts.policy import LayerPolicy
from dit2deploy.formats import by_name, unpack
from dit2deploy.nn.round_linear import RoundLinear
from dit2deploy.nn.simulate import Simulation
from dit2deploy.nn.timestep_groups import TimestepGroups
from dit2deploy.ops.hadamard_quantize import hadamard_quantize
from dit2deploy.quantizers.gain import clip_gain
from dit2deploy.quantizers.linear import quantize_linear


def layer(bits: int, grid: str, **changes) -> LayerPolicy:
    return LayerPolicy(weight="int8", activation_bits=(bits,), clip="gaussian", grid=grid, gain="clip", **changes)


# Distortion of the optimal uniform quantizer of a unit normal (Max 1960, table II): what it takes of the amplitude.
@pytest.mark.parametrize(("bits", "distortion"), [(1, 0.3634), (2, 0.1188), (3, 0.03744), (4, 0.01154)])
def test_it_is_what_the_optimal_quantizer_loses(bits, distortion):
    assert clip_gain(layer(bits, "mid-rise")) == pytest.approx(1 / (1 - distortion), rel=2e-3)


def test_outputs_keep_their_amplitude():
    generator = np.random.default_rng(0)
    weight, x = generator.standard_normal((64, 256), np.float32), generator.standard_normal((512, 256), np.float32)
    exact = x @ weight.T
    slopes = []
    for gain in ("none", "clip"):
        policy = layer(2, "mid-rise").model_copy(update={"gain": gain})
        q, s = hadamard_quantize(torch.from_numpy(x), torch.tensor([3.0]), block=1, clip="gaussian", grid="mid-rise")
        made = quantize_linear(weight, None, policy)
        codes = unpack(made["weight"], by_name("int8"), 256)
        y = (q.numpy().astype(np.float32) @ codes.astype(np.float32).T) * made["weight_scale"][:, 0] * s.numpy()
        slopes.append(float((exact * y).sum() / (exact * exact).sum()))
    assert slopes[0] == pytest.approx(0.881, abs=0.01) and slopes[1] == pytest.approx(1, abs=0.01)


def test_a_search_sees_it():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(128, 32))
    simulation = Simulation(module, bounds=[1000], timestep_scale=1.0)
    x = torch.randn(64, 128)
    found = []
    for gain in ("none", "clip"):
        simulation.choose({"0": layer(2, "mid-rise").model_copy(update={"gain": gain})})
        with torch.inference_mode():
            found.append(simulation.layers["0"](x) - simulation.layers["0"].bias)
    assert torch.allclose(found[1], found[0] * clip_gain(layer(2, "mid-rise")), rtol=1e-5, atol=1e-6)


def test_absmax_has_nothing_to_give_back():
    assert clip_gain(LayerPolicy(weight="int8", activation_bits=(2,), gain="clip")) == 1


def test_reconstruction_begins_at_the_codes_of_round_to_nearest():
    """AdaRound rounds the weight to the grid that it was quantized with, not to scales that hold the gain."""
    weight = np.random.default_rng(0).standard_normal((48, 64), np.float32)
    policy = layer(2, "mid-rise").model_copy(update={"weight": "int4"})
    made = quantize_linear(weight, None, policy)
    opened = RoundLinear(made, 64, policy=policy, groups=TimestepGroups((1000,), 1.0))
    nearest = opened.codes.clone()
    opened.open(torch.from_numpy(weight))
    assert (opened.codes != nearest).float().mean() < 0.005  # ties
