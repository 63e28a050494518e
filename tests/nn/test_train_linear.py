"""The trainable linear computes what the packed one does, before and after training, and has the right gradients."""

import pytest
import torch

from dit2deploy.artefacts.policy import LayerPolicy, MonarchGrid
from dit2deploy.formats import FORMATS
from dit2deploy.nn.quant_linear import QuantLinear
from dit2deploy.nn.timestep_groups import TimestepGroups
from dit2deploy.nn.train_linear import TrainLinear, _PerToken, _Rotate
from tests.packing import pack_layer

K, N = 96, 40
GROUPS = TimestepGroups((1000,), 1.0)


def pair(policy: LayerPolicy) -> tuple[TrainLinear, dict]:
    torch.manual_seed(0)
    source = torch.nn.Linear(K, N)
    tensors = pack_layer(source, policy)
    return TrainLinear(source.weight.detach(), tensors, policy=policy, groups=GROUPS), tensors


def quantized(tensors: dict, policy: LayerPolicy) -> QuantLinear:
    made = QuantLinear(K, N, policy=policy, groups=GROUPS, form="qdq")
    made.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items()})
    return made


def tokens(seed: int = 1) -> torch.Tensor:
    return torch.randn(3, 7, K, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize(
    ("clip", "grid", "bits"), [("absmax", "mid-tread", 4), ("gaussian", "mid-tread", 4), ("gaussian", "mid-rise", 1)]
)
@pytest.mark.parametrize(
    ("low_rank", "monarch", "group_size", "block"),
    [(0, None, None, 32), (5, None, 16, 1), (3, MonarchGrid(4, 2, 3), None, 8), (0, MonarchGrid(2, 8, 1), None, 32)],
)
def test_it_starts_as_the_checkpoint_and_packs_what_it_computes(
    fmt, clip, grid, bits, low_rank, monarch, group_size, block
):
    branch = {"hadamard": block, "low_rank": low_rank, "monarch": monarch, "group_size": group_size}
    policy = LayerPolicy(weight=fmt.name, activation_bits=(bits,), clip=clip, grid=grid, **branch)
    layer, tensors = pair(policy)
    packed = layer.pack()
    assert {name: value.dtype for name, value in packed.items()} == {n: v.dtype for n, v in tensors.items()}
    assert all((packed[name] == tensors[name]).all() for name in tensors)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    for seed in range(3):
        optimizer.zero_grad()
        layer(tokens(seed)).square().mean().backward()
        optimizer.step()
        layer.settle()
    packed = layer.pack()
    assert any((packed[name] != tensors[name]).any() for name in ("weight", "weight_scale", "bias"))
    with torch.no_grad():
        torch.testing.assert_close(quantized(packed, policy)(tokens()), layer(tokens()), rtol=1e-5, atol=1e-5)


def test_gradients_of_scale_bias_and_branch_are_exact():
    layer, _ = pair(LayerPolicy(weight="ternary", activation_bits=(4,), hadamard=32, low_rank=3, clip="gaussian"))
    layer(tokens()).square().sum().backward()
    for parameter, at, step in ((layer.log_gain, (5, 0), 1e-3), (layer.bias, (7,), 1e-3)):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[at] += sign * step
                values.append(layer(tokens()).double().square().sum().item())
                parameter[at] -= sign * step
        assert parameter.grad[at].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=0.02)
    assert layer.up.grad.abs().min() > 0 and layer.down.grad.abs().max() > 0


def test_rotation_is_its_own_adjoint():
    a, b = tokens(1).requires_grad_(), tokens(2)
    (gradient,) = torch.autograd.grad((_Rotate.apply(a, 32) * b).sum(), a)
    torch.testing.assert_close(gradient, _Rotate.apply(b, 32))


def test_clipped_activations_get_no_gradient():
    t = torch.ones(1, 16)
    t[0, 3] = 40.0
    t.requires_grad_()
    _PerToken.apply(t, torch.tensor([7.0]), "gaussian", "mid-tread").sum().backward()
    assert t.grad[0].tolist() == [float(index != 3) for index in range(16)]


def test_signs_get_a_gradient_up_to_their_level():
    """One bit: the level is 0.798 root mean squares."""
    t = torch.tensor([[0.7, -0.7, 1.51**0.5, -(1.51**0.5)]], requires_grad=True)  # root mean square 1
    levels = _PerToken.apply(t, torch.tensor([1.0]), "gaussian", "mid-rise")
    levels.sum().backward()
    assert levels[0].tolist() == pytest.approx([0.797885, -0.797885, 0.797885, -0.797885])
    assert t.grad[0].tolist() == [1, 1, 0, 0]


def test_latent_weights_take_the_gradient_of_their_codes_straight_through():
    layer, _ = pair(LayerPolicy(weight="int4", activation_bits=(8,), hadamard=1))
    x, wanted = tokens(), torch.randn(3, 7, N, generator=torch.Generator().manual_seed(3))
    (layer(x) * wanted).sum().backward()
    with torch.no_grad():
        q = _PerToken.apply(x, torch.tensor([127.0]), "absmax", "mid-tread").flatten(0, 1)
    expected = wanted.flatten(0, 1).T @ q * layer.scale * layer.format.high
    torch.testing.assert_close(layer.latent.grad, expected, rtol=1e-4, atol=1e-5)


def test_settling_keeps_latent_weights_where_they_can_flip_back():
    layer, _ = pair(LayerPolicy(weight="ternary", activation_bits=(4,)))
    with torch.no_grad():
        layer.latent += 10
    layer.settle()
    assert layer.latent.max() == 1.5 and layer.codes().max() == 1


def test_wider_activations_for_a_while_and_a_scale_of_zero():
    policy = LayerPolicy(weight="ternary", activation_bits=(2, 6))
    source = torch.nn.Linear(K, N)
    tensors = pack_layer(source, policy)
    tensors["weight_scale"][4] = 0
    layer = TrainLinear(source.weight.detach(), tensors, policy=policy, groups=TimestepGroups((500, 1000), 1.0))
    layer.groups._index = torch.tensor([0, 1, 1])  # as within a call of three samples
    assert torch.isfinite(layer.latent).all() and torch.isfinite(layer(tokens())).all()
    layer.set_least_bits(4)
    assert layer.qmax.tolist() == [7, 31]
    layer.set_least_bits(2)
    assert layer.qmax.tolist() == [1, 31]


def test_a_mid_rise_grid_stays_one_at_wider_activations():
    layer, _ = pair(LayerPolicy(weight="ternary", activation_bits=(1,), grid="mid-rise"))
    found = []
    for bits in (8, 3, 1):
        layer.set_least_bits(bits)
        found += layer.qmax.tolist()
    assert found == [127, 7, 1]
