"""The quantized linear against its definition written out in float64, in both forms; timestep groups."""

import pytest
import torch

from dit2deploy.artefacts.policy import LayerPolicy, MonarchGrid
from dit2deploy.formats import FORMATS, unpack
from dit2deploy.models import FAMILIES
from dit2deploy.models.dit import DIT
from dit2deploy.nn.convert import load_quantized, use_kernels
from dit2deploy.nn.quant_linear import QuantLinear
from dit2deploy.nn.timestep_groups import TimestepGroups
from dit2deploy.ops.hadamard_quantize import hadamard
from dit2deploy.quantizers.monarch import dense
from tests.packing import pack_checkpoint, pack_layer, policy_of, tiny_module

K, N = 96, 40


def layer(form: str, policy: LayerPolicy) -> QuantLinear:
    torch.manual_seed(0)
    source = torch.nn.Linear(K, N)
    made = QuantLinear(K, N, policy=policy, groups=TimestepGroups((1000,), 1.0), form=form)
    made.load_state_dict({name: torch.from_numpy(value) for name, value in pack_layer(source, policy).items()})
    return made


def by_definition(made: QuantLinear, x: torch.Tensor, policy: LayerPolicy) -> torch.Tensor:
    state = {name: value.double() for name, value in made.state_dict().items()}
    codes = torch.from_numpy(unpack(made.weight.numpy(), made.format, K)).double()
    scale = state["weight_scale"]
    weight = (codes.reshape(N, scale.shape[1], -1) * scale.unsqueeze(-1)).reshape(N, K)
    t = hadamard(x.double(), block=policy.hadamard)
    if policy.grid == "mid-rise":  # Table B of methods.md 1.2: levels (k + 1/2) step of two bits
        step = 0.995687 * t.square().mean(-1, keepdim=True).sqrt()
        rounded = ((t / step).floor() + 0.5).clamp(-1.5, 1.5)
    else:
        step = t.abs().amax(-1, keepdim=True) / state["qmax"]
        rounded = (t / step).round()
    y = (rounded * step) @ weight.T + state["bias"]
    if policy.low_rank:
        y = y + x.double() @ state["down"].T @ state["up"].T
    if policy.monarch:
        y = y + x.double() @ dense(state["monarch_down"], state["monarch_up"]).T
    return y


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("form", ["fused", "qdq"])
@pytest.mark.parametrize(
    "low_rank, monarch, group_size, hadamard_block",
    [(0, None, None, 32), (5, None, 16, 1), (3, MonarchGrid(4, 2, 3), None, 8), (0, MonarchGrid(2, 8, 1), None, 32)],
)
def test_it_computes_its_definition(fmt, form, low_rank, monarch, group_size, hadamard_block):
    policy = LayerPolicy(
        weight=fmt.name,
        activation_bits=(6,),
        hadamard=hadamard_block,
        low_rank=low_rank,
        monarch=monarch,
        group_size=group_size,
    )
    check_definition(form, policy)


@pytest.mark.parametrize("form", ["fused", "qdq"])
def test_it_computes_its_definition_on_a_mid_rise_grid(form):
    kind = {"clip": "gaussian", "grid": "mid-rise", "hadamard": 32, "low_rank": 3, "group_size": 16}
    check_definition(form, LayerPolicy(weight="ternary", activation_bits=(2,), **kind))


def check_definition(form: str, policy: LayerPolicy) -> None:
    made = layer(form, policy)
    x = torch.randn(3, 7, K, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = made(x)
    assert y.dtype == torch.float32
    exact = by_definition(made, x, policy)
    assert (y - exact).abs().max() < 1e-4
    made.use_kernels()
    if form == "fused":
        made.weight.zero_()  # the kernels read words of their own
    with torch.no_grad():
        assert (made(x) - exact).abs().max() < 1e-4


def test_what_is_not_on_the_cpu_is_computed_as_the_ops_define_it():
    made = layer("fused", LayerPolicy(weight="ternary", activation_bits=(4,), hadamard=32)).to("meta")
    with pytest.raises(NotImplementedError):  # no weight to be packed anew
        made.use_kernels()
    made = layer("fused", LayerPolicy(weight="ternary", activation_bits=(4,), hadamard=32))
    made.use_kernels()
    assert made.to("meta")(torch.empty(2, K, device="meta")).shape == (2, N)


def test_words_of_the_kernels_are_not_saved():
    made = layer("fused", LayerPolicy(weight="int3", activation_bits=(4,)))
    before = {name: value.clone() for name, value in made.state_dict().items()}
    made.use_kernels()
    after = made.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_it_stands_for_the_linear_it_was_made_of():
    torch.manual_seed(0)
    source = torch.nn.Linear(K, N)
    made = layer("fused", LayerPolicy(weight="int8", activation_bits=(8,), hadamard=32))
    x = torch.randn(50, K)
    with torch.no_grad():
        assert (made(x) - source(x)).std() < 0.02 * source(x).std()


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name in ("dit", "flux")], ids=lambda family: family.name)
@pytest.mark.parametrize("form", ["fused", "qdq"])
def test_bits_follow_the_timestep_of_each_sample(family, form, tmp_path):
    """A model of two groups gives, sample by sample, what the models of one group give."""
    module = tiny_module(family)
    inputs = family.inputs(module.config, batch=4, seed=0)
    inputs["timestep"] = torch.tensor([10, 499, 500, 900]).to(inputs["timestep"].dtype) / family.timestep_scale
    if family is DIT:
        inputs["timestep"] = inputs["timestep"].long()
    results = {}
    for name, bits, bounds in (("low", (2,), (1000,)), ("high", (8,), (1000,)), ("both", (2, 8), (500, 1000))):
        policy = policy_of(family, module, weight="int8", bits=bits, bounds=bounds)
        checkpoint = pack_checkpoint(tmp_path / name, module, policy)
        with torch.no_grad():
            results[name] = load_quantized(checkpoint, form=form)(**inputs, return_dict=False)[0]
    assert (results["low"] - results["high"]).abs().max() > 1e-2
    assert torch.allclose(results["both"][:2], results["low"][:2], atol=1e-5)
    assert torch.allclose(results["both"][2:], results["high"][2:], atol=1e-5)
    with torch.no_grad():
        by_kernels = use_kernels(load_quantized(checkpoint, form=form))(**inputs, return_dict=False)[0]
    assert torch.allclose(by_kernels, results["both"], atol=1e-3 * float(results["both"].std()))


def test_timestep_groups_are_known_only_within_a_call():
    groups = TimestepGroups((500, 1000), 1.0)
    with pytest.raises(RuntimeError, match="outside"):
        groups.qmax(torch.tensor([1.0, 7.0]))
