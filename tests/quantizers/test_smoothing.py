"""Smoothing leaves the network the same function, whatever is folded where, and helps where channels stick out."""

import numpy as np
import pytest
import torch

from dit2deploy.artefacts.policy import LayerPolicy, Policy
from dit2deploy.base.errors import Misuse
from dit2deploy.evaluate import sqnr_db
from dit2deploy.models.dit import DIT
from dit2deploy.models.flux import FLUX
from dit2deploy.models.load import linears, linears_of, load_transformer, open_model
from dit2deploy.models.pixart import PIXART
from dit2deploy.models.sd3 import SD3
from dit2deploy.models.wan import WAN
from dit2deploy.nn.convert import load_quantized
from dit2deploy.quantizers.inputs import channel_maxima
from dit2deploy.quantizers.linear import quantize_linear
from dit2deploy.quantizers.output_error import output_error
from dit2deploy.quantizers.smoothing import Channels, channels_of, factors, salience, smoothed
from dit2deploy.stages.calibrate import calibrate
from dit2deploy.stages.quantize import quantize
from tests.packing import tiny_module

QKV = tuple(f"transformer_blocks.0.attn1.to_{letter}" for letter in "qkv")
PROJ, FC1, FC2 = (f"transformer_blocks.0.{name}" for name in ("attn1.to_out.0", "ff.net.0.proj", "ff.net.2"))
MODULATION = "transformer_blocks.0.norm1.linear"


@pytest.fixture(scope="module")
def model(tiny_dit_folder):
    return tiny_dit_folder


@pytest.fixture(scope="module")
def calibration(model, tmp_path_factory):
    return calibrate(model, tmp_path_factory.mktemp("calibration") / "set", samples=4, steps=4)


def policy_of(model, *, weight="int8", bits=8, smoothing=None, **changes) -> Policy:
    """All block linears of block 0 quantized and `smoothing` (layer -> alpha) set; the rest float."""
    source = open_model(model)
    quantized = {*QKV, PROJ, FC1, FC2}
    layers = {
        name: LayerPolicy(weight=weight, activation_bits=(bits,), smoothing=(smoothing or {}).get(name, 0.0), **changes)
        if name in quantized
        else LayerPolicy(weight="float")
        for name in linears(source)
    }
    return Policy(method="test", model=source.class_name, layers=layers)


def fold(network: torch.nn.Module, channels: dict[str, Channels]) -> None:
    with torch.no_grad():
        for name, made in channels.items():
            layer = network.get_submodule(name)
            for leaf in ("weight", "bias"):
                value = getattr(layer, leaf)
                value.copy_(torch.from_numpy(made.apply(leaf, value.numpy().copy())))


# Places by family: in DiT 3 a block; SD3's second block is its last, of dual attention; FLUX has a single-stream block.
DUAL = {"num_layers": 2, "dual_attention_layers": [0, 1]}
PLACES = ((DIT, {}, 6), (PIXART, {}, 2), (SD3, {}, 4), (SD3, DUAL, 13), (FLUX, {}, 6))


@pytest.mark.parametrize(("family", "changes", "count"), PLACES)
def test_folding_leaves_the_full_precision_network_the_same_function(family, changes, count):
    """Factors over three decades: what is not linear in scale is on the bias."""
    network = tiny_module(family, **changes)
    inputs = family.inputs(network.config, batch=3, seed=1)
    shapes = linears_of(network)
    places = family.folds(shapes)
    assert len(places) == count
    rng = np.random.default_rng(0)
    weights = {name: network.get_submodule(name).weight.numpy() for place in places for name in place.readers}
    maxima = {name: torch.from_numpy(10 ** rng.uniform(-1.5, 1.5, (1, w.shape[1]))) for name, w in weights.items()}
    policy = LayerPolicy(weight="int8", activation_bits=(8,), smoothing=0.8)
    channels = channels_of(
        [(place, policy) for place in places],
        shapes,
        {name: np.abs(weight).max(0) for name, weight in weights.items()},
        maxima,
    )
    before_fold: dict[str, torch.Tensor] = {}
    after_fold: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for seen in (before_fold, after_fold):
            hooks = [
                network.get_submodule(name).register_forward_pre_hook(
                    lambda module, arguments, name=name, seen=seen: seen.update({name: arguments[0]})
                )
                for name in weights
            ]
            seen["output"] = network(**inputs, return_dict=False)[0]
            for hook in hooks:
                hook.remove()
            if seen is before_fold:
                fold(network, channels)
    assert sqnr_db(before_fold["output"].numpy(), after_fold["output"].numpy()) > 100
    for name in weights:
        c = torch.from_numpy(channels[name].columns)
        assert c.max() / c.min() > 15
        assert sqnr_db((before_fold[name] / c).numpy(), after_fold[name].numpy()) > 100, name


@pytest.mark.parametrize("modulation", ["float", "int8"])
def test_a_smoothed_checkpoint_is_the_model(model, calibration, tmp_path, modulation):
    policy = policy_of(model, smoothing={**dict.fromkeys(QKV, 0.5), PROJ: 0.7, FC1: 0.3})
    if modulation == "int8":
        layers = policy.layers | {MODULATION: LayerPolicy(weight="int8", activation_bits=(8,))}
        policy = policy.model_copy(update={"layers": layers})
    made = quantize(model, policy, calibration, tmp_path / "out")
    source = open_model(model)
    assert made.tensors.dtype(f"{MODULATION}.bias") == (
        "F32" if modulation == "int8" else source.tensors.dtype(f"{MODULATION}.bias")
    )
    assert not np.array_equal(made.tensors.read(f"{MODULATION}.bias"), source.tensors.read(f"{MODULATION}.bias"))
    network, family = load_transformer(model)
    inputs = family.inputs(network.config, batch=2, seed=1)
    with torch.no_grad():
        assert sqnr_db(network(**inputs).sample.numpy(), load_quantized(made)(**inputs).sample.numpy()) > 35


def test_gptq_sees_the_smoothed_inputs(model, calibration, tmp_path):
    """A wrong Hessian would still round; that of the inputs as they arrive rounds best."""
    alphas = {**dict.fromkeys(QKV, 0.5), PROJ: 0.5, FC1: 0.5}
    network, _ = load_transformer(model)
    call = {name: torch.from_numpy(value) for name, value in calibration.call(1).items()}
    found = {}
    for rounding in ("nearest", "gptq"):
        policy = policy_of(model, weight="int3", smoothing=alphas, rounding=rounding)
        made = quantize(model, policy, calibration, tmp_path / rounding)
        with torch.no_grad():
            found[rounding] = sqnr_db(network(**call).sample.numpy(), load_quantized(made)(**call).sample.numpy())
    assert found["gptq"] > found["nearest"] + 1


def test_a_channel_that_sticks_out_is_what_smoothing_is_for():
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((200, 64)).astype(np.float32))
    x[:, 7] *= 60
    weight = rng.standard_normal((32, 64)).astype(np.float32)
    policy = LayerPolicy(weight="int8", activation_bits=(4,))
    c = factors(x.abs().amax(0).numpy(), np.abs(weight).max(0), 0.5)
    plain = output_error(x, torch.from_numpy(weight), quantize_linear(weight, None, policy), policy)
    smooth = output_error(
        x / torch.from_numpy(c), torch.from_numpy(weight * c), quantize_linear(weight * c, None, policy), policy
    )
    assert smooth < plain / 3


def test_factors_are_those_of_smoothquant_and_dead_channels_keep_one():
    c = factors(np.array([8.0, 0.0, 2.0]), np.array([2.0, 1.0, 0.0]), 0.5)
    assert c.tolist() == [2.0, 1.0, 1.0]
    assert factors(np.array([8.0]), np.array([2.0]), 1.0).tolist() == [8.0]


def test_maxima_are_those_of_the_layers_inputs_call_by_call(model, calibration):
    network, _ = load_transformer(model)
    seen = []
    hook = network.get_submodule(FC1).register_forward_pre_hook(lambda m, arguments: seen.append(arguments[0].abs()))
    found = channel_maxima(network, [FC1], calibration)[FC1]
    hook.remove()
    assert torch.equal(found, torch.stack([x.flatten(0, 1).amax(0) for x in seen]))


def test_salience_is_that_of_ptq4dit_computed_directly():
    """Spearman as Pearson's correlation of ranks counted one by one; e_j, B_X and B_W of methods.md 6.7 written out."""

    def ranks(values: np.ndarray) -> list[float]:
        return [(values < value).sum() + ((values == value).sum() + 1) / 2 for value in values]

    rng = np.random.default_rng(0)
    x, w = rng.exponential(size=(5, 64)).round(1) + 0.1, rng.exponential(size=64).round(1) + 0.1  # with ties
    rho = np.array([np.corrcoef(ranks(step), ranks(w))[0, 1] for step in x])
    eta = np.exp(-rho) / np.exp(-rho).sum()
    s = sum(weight * step for weight, step in zip(eta, x, strict=True))
    np.testing.assert_allclose(salience(x, w), s, rtol=1e-12)
    e = np.sqrt(s * w)
    c = factors(salience(x, w), w, 0.5)
    np.testing.assert_allclose(1 / c, e / s, rtol=1e-6)
    np.testing.assert_allclose(c, e / w, rtol=1e-6)
    np.testing.assert_allclose(salience(np.tile(x[0], (3, 1)), w), x[0])
    np.testing.assert_allclose(salience(x, np.ones(64)), x.mean(0))  # no channel stands out: all steps alike


def test_balancing_by_correlation_is_another_choice_of_factors(model, calibration, tmp_path):
    made = []
    for steps in ("largest", "correlation"):
        policy = policy_of(model, smoothing=dict.fromkeys(QKV, 0.5), smoothing_steps=steps)
        made.append(quantize(model, policy, calibration, tmp_path / steps).tensors.read(f"{QKV[0]}.weight_scale"))
    assert not np.array_equal(*made)
    layers = policy.layers | {QKV[0]: policy.layers[QKV[0]].model_copy(update={"smoothing_steps": "largest"})}
    with pytest.raises(Misuse, match="differ in smoothing"):
        list(smoothed(policy.model_copy(update={"layers": layers}), DIT.folds(linears(open_model(model)))))


def test_what_cannot_be_smoothed_is_refused(model, calibration, tmp_path):
    places = DIT.folds(linears(open_model(model)))
    with pytest.raises(Misuse, match=rf"{FC2}.*no layer before it"):
        list(smoothed(policy_of(model, smoothing={FC2: 0.5}), places))
    with pytest.raises(Misuse, match="differ in smoothing"):
        list(smoothed(policy_of(model, smoothing={QKV[0]: 0.5}), places))
    with pytest.raises(Misuse, match="no places for smoothing are known"):
        list(smoothed(policy_of(model, smoothing={FC1: 0.5}), WAN.folds(linears(open_model(model)))))
    with pytest.raises(Misuse, match="no layer before it"):
        quantize(model, policy_of(model, smoothing={FC2: 0.5}), calibration, tmp_path / "out")


def test_parts_of_another_smoothing_are_not_used(model, calibration, tmp_path):
    """The modulation linear's own policy is the same in both, its weight is not."""
    made = {}
    for alpha in (0.2, 0.9):
        policy = policy_of(model, smoothing={FC1: alpha})
        layers = policy.layers | {MODULATION: LayerPolicy(weight="int8", activation_bits=(8,))}
        policy = policy.model_copy(update={"layers": layers})
        made[alpha] = quantize(model, policy, calibration, tmp_path / "out")
        scale = made[alpha].tensors.read(f"{MODULATION}.weight_scale")
        made[alpha] = scale.copy()
    assert not np.array_equal(made[0.2], made[0.9])


def test_biases_after_smoothing_hold_what_is_not_linear():
    bias = np.array([1.0, 2.0], np.float32)
    made = Channels(rows=np.array([0.5, 0.25], np.float32), shift=np.array([0.0, -0.75], np.float32))
    assert made.apply("bias", bias).tolist() == [0.5, -0.25]
