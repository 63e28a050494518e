"""Permutations leave the network the same function and even out the blocks of a Hadamard transform."""

import numpy as np
import pytest
import torch

from dit2deploy.artefacts.policy import LayerPolicy, Policy
from dit2deploy.base.errors import Misuse
from dit2deploy.evaluate import sqnr_db
from dit2deploy.models.load import linears, load_transformer, open_model
from dit2deploy.nn.convert import load_quantized
from dit2deploy.ops.hadamard_quantize import hadamard_quantize
from dit2deploy.quantizers.permutation import choose_rotation, fluctuation, permuted, producers, zigzag
from dit2deploy.stages.calibrate import calibrate
from dit2deploy.stages.quantize import quantize

FC1, FC2 = (f"transformer_blocks.0.ff.{name}" for name in ("net.0.proj", "net.2"))


@pytest.fixture(scope="module")
def model(tiny_dit_folder):
    return tiny_dit_folder


@pytest.fixture(scope="module")
def calibration(model, tmp_path_factory):
    return calibrate(model, tmp_path_factory.mktemp("calibration") / "set", samples=2, steps=3)


def policy_of(model, layers: dict[str, LayerPolicy]) -> Policy:
    source = open_model(model)
    every = {name: LayerPolicy(weight="float") for name in linears(source)}
    return Policy(method="test", model=source.class_name, layers=every | layers)


def fine(**changes) -> LayerPolicy:
    return LayerPolicy(weight="int8", activation_bits=(8,), hadamard=16, **changes)


@pytest.mark.parametrize("both", [False, True])
def test_a_permuted_layer_is_the_same_layer_of_other_channels(model, calibration, tmp_path, both):
    """Codes of the second linear are those of the full-precision columns in zigzag order; what lies before it, in full
    precision or not, gives its outputs in that order; GPTQ's Hessian is permuted with them."""
    network, family = load_transformer(model)
    layers = {FC2: fine(permutation="zigzag", rounding="gptq")} | ({FC1: fine()} if both else {})
    made = quantize(model, policy_of(model, layers), calibration, tmp_path / "out")
    found = load_quantized(made)
    seen: dict[str, torch.Tensor] = {}
    layer = network.get_submodule(FC2)
    hook = layer.register_forward_pre_hook(lambda module, arguments: seen.update(x=arguments[0]))
    maxima = torch.zeros(192)
    with torch.no_grad():
        for index in range(len(calibration)):
            network(**{k: torch.from_numpy(v) for k, v in calibration.call(index).items()}, return_dict=False)
            maxima = torch.maximum(maxima, seen["x"].abs().reshape(-1, 192).amax(0))
        order = zigzag(maxima.numpy(), 16)
        inputs = family.inputs(network.config, batch=3, seed=1)
        exact = network(**inputs, return_dict=False)[0]
        x = seen["x"]
        hook.remove()
        assert sqnr_db(layer(x).numpy(), found.get_submodule(FC2)(x[..., order].contiguous()).numpy()) > 35
        assert sqnr_db(exact.numpy(), found(**inputs, return_dict=False)[0].numpy()) > 35
    if not both:
        before = made.tensors.read(f"{FC1}.weight")
        np.testing.assert_array_equal(before, network.get_parameter(f"{FC1}.weight").detach().numpy()[order])
        np.testing.assert_array_equal(
            made.tensors.read(f"{FC1}.bias"), network.get_parameter(f"{FC1}.bias").detach().numpy()[order]
        )


def test_permutation_and_smoothing_meet_in_the_layer_between(model, calibration, tmp_path):
    network, family = load_transformer(model)
    layers = {FC1: fine(smoothing=0.5), FC2: fine(permutation="zigzag")}
    found = load_quantized(quantize(model, policy_of(model, layers), calibration, tmp_path / "out"))
    inputs = family.inputs(network.config, batch=3, seed=1)
    with torch.no_grad():
        pair = [each(**inputs, return_dict=False)[0].numpy() for each in (network, found)]
    assert sqnr_db(*pair) > 35


def test_zigzag_deals_back_and_forth():
    np.testing.assert_array_equal(zigzag(np.array([5, 4, 3, 2, 1, 0]), 2), [0, 5, 1, 4, 2, 3])
    rng = np.random.default_rng(0)
    maxima = rng.lognormal(0, 2, 96)
    order = zigzag(maxima, 16)
    assert sorted(order) == list(range(96))
    ranks = np.argsort(np.argsort(-maxima))[order].reshape(6, 16)
    assert ranks.sum(1).max() - ranks.sum(1).min() <= 6  # alike
    assert set(ranks[:, 0]) == set(range(6))  # the six largest lie in six blocks


def test_outliers_of_one_block_cost_less_when_they_are_spread():
    """The largest value of a token decides its step: eight channels of 20 in one block of 32, or in four blocks."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(64, 128)).astype(np.float32)
    x[:, :8] *= 20
    order = zigzag(np.abs(x).max(0), 32)
    noise = []
    for values in (x, x[:, order]):
        values = torch.from_numpy(np.ascontiguousarray(values))
        q, s = hadamard_quantize(values, torch.tensor([7.0]), block=32, clip="absmax")
        exact, unit = hadamard_quantize(values, torch.tensor([127.0]), block=32, clip="absmax")
        noise.append(float((q.float() * s - exact.float() * unit).square().sum()))
    assert noise[1] < 0.6 * noise[0]


def test_layers_are_chosen_by_their_fluctuation(model, calibration):
    shapes = linears(open_model(model))
    policy = policy_of(model, {name: fine() for name in shapes if "transformer_blocks" in name})
    none, every = (choose_rotation(model, policy, calibration, salient=bound) for bound in (1e9, 0.0))
    assert none == policy
    assert list(permuted(every, shapes)) == [name for name in shapes if name.endswith("ff.net.2")]
    assert fluctuation(np.array([1.0, 2.0, 8.0])) == 4.0 and fluctuation(np.zeros(3)) == 1.0
    whole = policy_of(model, {FC2: fine().model_copy(update={"hadamard": 1})})
    assert choose_rotation(model, whole, calibration, salient=0.0) == whole


def test_where_nothing_can_be_permuted(model, calibration, tmp_path):
    policy = policy_of(model, {FC1: fine(permutation="zigzag")})
    with pytest.raises(Misuse, match=r"net.0.proj: no layer before it"):
        quantize(model, policy, calibration, tmp_path / "out")
    gated = {"b.ff.net.0.proj": (384, 48), "b.ff.net.2": (48, 192)}
    assert producers("DiTTransformer2DModel", gated) == {}
    assert producers("FluxTransformer2DModel", linears(open_model(model))) == {}
