"""The checkpoint holds what the policy says, is the same after a kill, and refuses what does not belong together."""

import math
import sys

import numpy as np
import pytest
import torch

from dit2deploy.artefacts.checkpoint import SCHEDULER, TENSORS, Checkpoint
from dit2deploy.artefacts.policy import LayerPolicy, MonarchGrid, Policy
from dit2deploy.base import progress
from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import sha256_of_file, write_tensors
from dit2deploy.formats import by_name, unpack
from dit2deploy.models.load import linears, load_transformer, open_model
from dit2deploy.nn.convert import load_quantized
from dit2deploy.ops.hadamard_quantize import hadamard
from dit2deploy.quantizers.branches import total
from dit2deploy.quantizers.linear import quantize_linear
from dit2deploy.quantizers.round_to_nearest import dequantize
from dit2deploy.stages.calibrate import calibrate
from dit2deploy.stages.quantize import quantize
from dit2deploy.stages.quantize.hessians import gather, passes
from dit2deploy.stages.search import search
from tests.packing import with_equal_embedders
from tests.variants import with_weights

BLOCK = "transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def model(tiny_dit_folder):
    return tiny_dit_folder


@pytest.fixture(scope="module")
def calibration(model, tmp_path_factory):
    return calibrate(model, tmp_path_factory.mktemp("calibration") / "set", samples=4, steps=4)


@pytest.fixture
def policy(model, tmp_path):
    return search(model, tmp_path / "policy.json", recipe="w1.58a4", low_rank=2)


def float_weight(tensors: dict[str, np.ndarray], layer: LayerPolicy, k: int) -> torch.Tensor:
    """What a layer's tensors stand for, in the space before rotation and with the branch."""
    codes = torch.from_numpy(unpack(tensors["weight"], by_name(layer.weight), k)).float()
    weight = hadamard(dequantize(codes, torch.from_numpy(tensors["weight_scale"])), block=layer.hadamard)
    if layer.branch_leaves:
        weight = weight + total({leaf: torch.from_numpy(tensors[leaf]) for leaf in layer.branch_leaves})
    return weight


def sqnr_db(reference: torch.Tensor, found: torch.Tensor) -> float:
    return 10 * math.log10(reference.square().sum() / (reference - found).square().sum())


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize(("weight", "least"), [("ternary", 6.9), ("int3", 13.0), ("int4", 18.6), ("int8", 41.0)])
def test_packed_layer_stands_for_the_weight(weight, least, group_size, rank):
    matrix = np.random.default_rng(0).standard_normal((40, 96)).astype(np.float16)
    layer = LayerPolicy(weight=weight, activation_bits=(4, 8), hadamard=32, group_size=group_size, low_rank=rank)
    tensors = quantize_linear(matrix, None, layer)
    assert sqnr_db(torch.from_numpy(matrix).float(), float_weight(tensors, layer, 96)) > least
    shapes = {name: (value.dtype.name, value.shape) for name, value in tensors.items()}
    branch = {"down": ("float16", (rank, 96)), "up": ("float16", (40, rank))} if rank else {}
    assert shapes == {
        "weight": ("int32", (40, by_name(weight).words(96))),
        "weight_scale": ("float32", (40, 96 // (group_size or 96))),
        "bias": ("float32", (40,)),
        "qmax": ("float32", (2,)),
        **branch,
    }
    assert tensors["qmax"].tolist() == [7, 127] and not tensors["bias"].any()


def decaying(size: int) -> np.ndarray:
    """Singular values k**-0.5."""
    u, v = (np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0] for seed in (1, 2))
    return ((u * np.arange(1, size + 1) ** -0.5) @ v.T).astype(np.float32)


def test_branches_gain_in_the_order_that_was_measured():
    """methods.md 3.3: V1 below V2 below V3, all above none."""
    matrix, found = decaying(256), []
    for rank, branch in ((0, "alternating"), (8, "residual"), (8, "weight"), (8, "alternating")):
        layer = LayerPolicy(weight="ternary", activation_bits=(4,), hadamard=64, low_rank=rank, branch_init=branch)
        tensors = quantize_linear(matrix, None, layer)
        found.append(sqnr_db(torch.from_numpy(matrix), float_weight(tensors, layer, 256)))
    assert found[0] + 0.2 < found[1] < found[2] < found[3]


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_the_residual_branch_takes_what_the_codes_leave(rounding):
    """V1: codes are those without a branch, whoever rounds."""
    matrix, hessian = decaying(64), torch.eye(64)
    layer = LayerPolicy(weight="int3", activation_bits=(4,), rounding=rounding)
    plain = quantize_linear(matrix, None, layer, hessian=hessian)
    layer = layer.model_copy(update={"low_rank": 4, "branch_init": "residual"})
    tensors = quantize_linear(matrix, None, layer, hessian=hessian)
    np.testing.assert_array_equal(tensors["weight"], plain["weight"])
    left = torch.from_numpy(matrix) - float_weight(tensors, layer, 64)
    least = torch.linalg.svdvals(torch.from_numpy(matrix) - float_weight(plain, layer_without_branch(layer), 64))[4:]
    assert left.square().sum() <= 1.002 * least.square().sum()


def layer_without_branch(layer: LayerPolicy) -> LayerPolicy:
    return layer.model_copy(update={"low_rank": 0})


def test_a_weighted_branch_serves_the_inputs_that_there_are():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2000, 64)) @ (rng.standard_normal((64, 64)) * np.linspace(1, 0.02, 64)[:, None])
    x, matrix, found = torch.from_numpy(x).float(), rng.standard_normal((48, 64)).astype(np.float32), {}
    for branch in ("alternating", "weighted"):
        layer = LayerPolicy(weight="ternary", activation_bits=(8,), hadamard=64, low_rank=6, branch_init=branch)
        tensors = quantize_linear(matrix, None, layer, hessian=x.T @ x)
        found[branch] = sqnr_db(x @ torch.from_numpy(matrix).T, x @ float_weight(tensors, layer, 64).T)
    assert found["weighted"] > found["alternating"] + 0.5
    with pytest.raises(ValueError, match="weighted branches need the Hessian"):
        quantize_linear(matrix, None, layer)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize(
    "sides", [{"low_rank": 8}, {"monarch": MonarchGrid(4, 4, 2)}, {"low_rank": 4, "monarch": MonarchGrid(2, 2, 2)}]
)
def test_a_refit_branch_takes_what_the_codes_leave_of_the_outputs(rounding, sides):
    """The codes are those of the branch of the weight; the branch serves the outputs better than that one."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2000, 64)) @ (rng.standard_normal((64, 64)) * np.linspace(1, 0.02, 64)[:, None])
    x, matrix, found, codes = torch.from_numpy(x).float(), decaying(64), {}, []
    for init in ("weight", "refit"):
        layer = LayerPolicy(
            weight="ternary", activation_bits=(8,), hadamard=64, rounding=rounding, branch_init=init, **sides
        )
        tensors = quantize_linear(matrix, None, layer, hessian=x.T @ x)
        codes.append(tensors["weight"])
        found[init] = sqnr_db(x @ torch.from_numpy(matrix).T, x @ float_weight(tensors, layer, 64).T)
    np.testing.assert_array_equal(*codes)
    assert found["refit"] > found["weight"] + 1


def test_a_salient_branch_serves_the_channels_whose_inputs_are_large():
    """Its codes are those without a branch; the product with unquantized inputs gains."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 64)).astype(np.float32)
    x[:, [5, 40]] *= 20
    x, matrix = torch.from_numpy(x), rng.standard_normal((48, 64)).astype(np.float32)
    layer = LayerPolicy(weight="int3", activation_bits=(8,), low_rank=2, branch_init="salient")
    tensors = quantize_linear(matrix, None, layer, hessian=x.T @ x)
    plain = quantize_linear(matrix, None, layer_without_branch(layer))
    np.testing.assert_array_equal(tensors["weight"], plain["weight"])
    assert tensors["down"].nonzero()[1].tolist() == [5, 40]
    exact = x @ torch.from_numpy(matrix).T
    before, after = (
        sqnr_db(exact, x @ float_weight(made, each, 64).T)
        for made, each in ((plain, layer_without_branch(layer)), (tensors, layer))
    )
    assert after > before + 6
    with pytest.raises(ValueError, match="salient"):
        quantize_linear(matrix, None, layer)


@pytest.mark.parametrize("rank", [0, 4])
def test_log_levels_are_few_also_beside_a_branch(rank):
    matrix = np.random.default_rng(0).standard_t(4, (32, 256)).astype(np.float32)
    layer = LayerPolicy(weight="int8", activation_bits=(4,), hadamard=64, low_rank=rank, log_bits=3)
    tensors = quantize_linear(matrix, None, layer)
    codes = unpack(tensors["weight"], by_name("int8"), 256)
    assert max(len(np.unique(row)) for row in codes) <= 8
    assert sqnr_db(torch.from_numpy(matrix), float_weight(tensors, layer, 256)) > 13


def test_gptq_works_on_rotated_inputs():
    """Correlated inputs, rotation on: GPTQ gains on the layer's output only if the Hessian is rotated too."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2000, 64)) @ (rng.standard_normal((64, 64)) * np.linspace(1, 0.02, 64)[:, None])
    x = torch.from_numpy(x).float()
    matrix = rng.standard_normal((48, 64)).astype(np.float32)
    reference = x @ torch.from_numpy(matrix).T
    found = {}
    for rounding in ("nearest", "gptq"):
        layer = LayerPolicy(weight="int4", activation_bits=(8,), hadamard=64, rounding=rounding)
        tensors = quantize_linear(matrix, None, layer, hessian=x.T @ x / 2000)
        found[rounding] = sqnr_db(reference, x @ float_weight(tensors, layer, 64).T)
    assert found["gptq"] > found["nearest"] + 3


def test_checkpoint_is_the_model_and_loads_as_the_reference(model, policy, calibration, tmp_path):
    made = quantize(model, policy, calibration, tmp_path / "out")
    source = open_model(model)
    assert Checkpoint.load(tmp_path / "out").policy == policy
    assert made.config == source.config
    assert (tmp_path / "out" / SCHEDULER).exists()
    assert not (tmp_path / "out.parts").exists()
    for name, (n, k) in linears(source).items():
        layer = policy.layers[name]
        if not layer.is_quantized:
            assert made.tensors.dtype(f"{name}.weight") == source.tensors.dtype(f"{name}.weight")
            np.testing.assert_array_equal(made.tensors.read(f"{name}.weight"), source.tensors.read(f"{name}.weight"))
            continue
        leaves = ("weight", "weight_scale", *layer.branch_leaves)
        weight = float_weight({leaf: made.tensors.read(f"{name}.{leaf}") for leaf in leaves}, layer, k)
        expected = torch.from_numpy(source.tensors.read(f"{name}.weight")).float()
        assert weight.shape == (n, k)
        assert sqnr_db(expected, weight) > {"ternary": 4, "int4": 14, "int8": 40}[layer.weight], name
        np.testing.assert_array_equal(
            made.tensors.read(f"{name}.bias"), source.tensors.read(f"{name}.bias").astype(np.float32)
        )
    assert set(made.manifest.layer_seconds) == {n for n, layer in policy.layers.items() if layer.is_quantized}

    network, family = load_transformer(model)
    inputs = family.inputs(network.config, batch=2, seed=1)
    with torch.no_grad():
        assert sqnr_db(network(**inputs).sample, load_quantized(made)(**inputs).sample) > 8


def test_eight_bits_cost_next_to_nothing(model, calibration, tmp_path):
    made = quantize(model, search(model, tmp_path / "p.json", recipe="w8a8"), calibration, tmp_path / "out")
    network, family = load_transformer(model)
    inputs = family.inputs(network.config, batch=2, seed=1)
    with torch.no_grad():
        assert sqnr_db(network(**inputs).sample, load_quantized(made)(**inputs).sample) > 35


def test_checkpoint_is_as_small_as_its_bits_say(model, policy, calibration, tmp_path):
    made = quantize(model, policy, calibration, tmp_path / "out")
    expected = 0.0
    for name, (n, k) in linears(open_model(model)).items():
        layer = policy.layers[name]
        if layer.is_quantized:
            row = by_name(layer.weight).words(k) * 4
            assert row <= by_name(layer.weight).bits * k / 8 + 12  # padding of the last word of each plane
            expected += n * (row + 4 + 4) + 4 + 2 * layer.low_rank * (n + k)
    others = [name for name in made.tensors if name.rpartition(".")[0] not in made.manifest.layer_seconds]
    expected += sum(made.tensors.read(name).nbytes for name in others)
    held = sum(made.tensors.read(name).nbytes for name in made.tensors)
    assert held == expected


class Killed(Exception):
    """Stands for a signal in the middle of the work."""


def test_equal_embedders_are_stored_once_and_loaded_everywhere(model, tmp_path):
    """As diffusers has converted DiTs; rounded by GPTQ, which sees the same inputs of each."""
    module = with_equal_embedders(load_transformer(model)[0])
    equal = with_weights(model, tmp_path / "model", {name: v.numpy() for name, v in module.state_dict().items()})
    policy = search(equal, tmp_path / "policy.json", recipe="w4a4", rounding="gptq")
    seen = calibrate(equal, tmp_path / "calibration", samples=2, steps=2)
    made = quantize(equal, policy, seen, tmp_path / "checkpoint")
    first, second = (f"transformer_blocks.{block}.norm1.emb." for block in range(2))
    copies = {name: name.replace(second, first) for name in made.tensors if name.startswith(second)}
    large = {name: stored for name, stored in copies.items() if made.tensors.nbytes(name) >= 1024}
    assert len(large) == 3 and made.tensors.stored_as == large
    for name, stored in copies.items():
        np.testing.assert_array_equal(made.tensors.read(name), made.tensors.read(stored))
    write_tensors(tmp_path / "all", {name: made.tensors.read(name) for name in made.tensors})
    saved = (tmp_path / "all").stat().st_size - (made.folder / TENSORS).stat().st_size
    assert saved == pytest.approx(sum(made.tensors.nbytes(name) for name in large), abs=500)  # the header
    weights = load_quantized(made).state_dict()
    for name, stored in large.items():
        assert torch.equal(weights[name], weights[stored]) and weights[name].data_ptr() != weights[stored].data_ptr()


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(model, policy, calibration, tmp_path, monkeypatch):
    whole = quantize(model, policy, calibration, tmp_path / "whole")
    module = "dit2deploy.stages.quantize.quantize"
    done: list[str] = []

    def until(count):
        def step(*arguments, **options):
            if len(done) == count:
                raise Killed
            done.append("layer")
            return quantize_linear(*arguments, **options)

        return step

    monkeypatch.setattr(sys.modules[module], "quantize_linear", until(9))
    with pytest.raises(Killed):
        quantize(model, policy, calibration, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / "out.parts").glob("*.safetensors"))) == 9

    done.clear()
    monkeypatch.setattr(sys.modules[module], "quantize_linear", until(10_000))
    again = quantize(model, policy, calibration, tmp_path / "out")
    assert len(done) == len(whole.manifest.layer_seconds) - 9
    assert again.sha256 == whole.sha256
    assert not (tmp_path / "out.parts").exists()


def test_parts_of_other_options_are_not_used(model, policy, calibration, tmp_path, monkeypatch):
    calls = []

    def fail_late(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        return quantize_linear(*arguments, **options)

    monkeypatch.setattr(sys.modules["dit2deploy.stages.quantize.quantize"], "quantize_linear", fail_late)
    with pytest.raises(Killed):
        quantize(model, policy, calibration, tmp_path / "out", seed=1)
    quantize(model, policy, calibration, tmp_path / "out", seed=2)
    assert len(calls) == 4 + sum(layer.is_quantized for layer in policy.layers.values())


def test_the_seed_decides(model, policy, calibration, tmp_path):
    made = [
        quantize(model, policy, calibration, tmp_path / n, seed=s).sha256 for n, s in zip("abc", (0, 0, 1), strict=True)
    ]
    assert made[0] == made[1] != made[2]


def test_weights_with_nan_are_refused_by_name(model, calibration, tmp_path):
    for name, shape in ((f"{BLOCK}.weight", (48, 48)), ("pos_embed.proj.bias", (48,))):
        value = np.zeros(shape, np.float16)
        value.flat[3] = np.inf
        broken = with_weights(model, tmp_path / name, {name: value})
        policy = search(broken, tmp_path / "p.json", recipe="w8a8")
        manifest = calibration.manifest.model_copy(update={"model_sha256": open_model(broken).sha256})
        kept = type(calibration)(calibration.folder, manifest, calibration.tensors)
        with pytest.raises(Misuse, match=name):
            quantize(broken, policy, kept, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_what_does_not_belong_together_is_refused(model, policy, calibration, tmp_path):
    layers = dict(policy.layers)
    del layers[BLOCK]
    with pytest.raises(Misuse, match=BLOCK):
        quantize(model, policy.model_copy(update={"layers": layers}), calibration, tmp_path / "out")
    with pytest.raises(Misuse, match="FluxTransformer2DModel"):
        quantize(model, policy.model_copy(update={"model": "FluxTransformer2DModel"}), calibration, tmp_path / "out")
    other = with_weights(model, tmp_path / "other", {"pos_embed.proj.bias": np.ones(48, np.float32)})
    with pytest.raises(Misuse, match="another model"):
        quantize(other, policy, calibration, tmp_path / "out")


def test_second_moments_are_those_of_the_layers_inputs(model, calibration):
    network, _ = load_transformer(model)
    names = [BLOCK, "transformer_blocks.0.attn1.to_k", "transformer_blocks.1.ff.net.2"]
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for name in names:
        network.get_submodule(name).register_forward_pre_hook(
            lambda module, arguments, name=name: seen[name].append(arguments[0].flatten(0, -2))
        )
    found = gather(network, names, calibration)
    for name in names:
        x = torch.cat(seen[name]).double()
        torch.testing.assert_close(found[name].double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)


def test_too_few_calibration_tokens_are_told(calibration):
    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = torch.nn.Linear(64, 4)
            self.narrow = torch.nn.Linear(2, 4)

        def forward(self, **inputs) -> None:
            self.wide(torch.ones(3, 64))
            self.narrow(torch.ones(3, 2))

    notes: list[str] = []
    stop = progress.listen(lambda what, done, total: notes.append(what) if total == 0 else None)
    try:
        gather(Network(), ["wide", "narrow"], calibration)
    finally:
        stop()
    assert [note for note in notes if "1 layers have fewer calibration tokens than channels, wide" in note]


def test_a_layer_that_no_call_reaches_is_refused(calibration):
    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = torch.nn.Linear(4, 4)

        def forward(self, **inputs) -> None:
            return None

    with pytest.raises(Misuse, match="unused"):
        gather(Network(), ["unused"], calibration)


def test_passes_keep_to_the_memory_budget():
    layers = {"a": 10, "b": 10, "c": 20, "d": 10}
    assert list(passes(layers, budget=800)) == [["a", "b"], ["c"], ["d"]]
    assert list(passes({}, budget=800)) == []


def test_a_policy_that_leaves_all_alone_copies_the_model(model, calibration, tmp_path):
    source = open_model(model)
    policy = Policy(
        method="test",
        model=source.class_name,
        layers={name: LayerPolicy(weight="float") for name in linears(source)},
    )
    made = quantize(model, policy, calibration, tmp_path / "out")
    assert set(made.tensors) == set(source.tensors)
    assert sha256_of_file(made.folder / TENSORS) == made.sha256
