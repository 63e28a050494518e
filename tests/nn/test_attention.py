"""Quantized attention against its definition in float64, and the whole model with it."""

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch.nn.functional import scaled_dot_product_attention

from dit2deploy.artefacts.policy import AttentionPolicy
from dit2deploy.models import FAMILIES
from dit2deploy.nn.attention import QuantAttention, attend
from dit2deploy.nn.convert import load_quantized
from dit2deploy.nn.timestep_groups import TimestepGroups
from tests.packing import pack_checkpoint, policy_of, tiny_module, with_regions


def attention(**changes) -> Attention:
    torch.manual_seed(0)
    return Attention(query_dim=24, heads=3, dim_head=8, bias=True, **changes).eval().requires_grad_(False)


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, factor: float, bias: torch.Tensor | float):
    return (q @ k.transpose(-1, -2) * factor + bias).softmax(-1) @ v


@pytest.mark.parametrize("changes", [{}, {"cross_attention_dim": 10}, {"qk_norm": "layer_norm"}], ids=str)
def test_written_out_it_is_what_diffusers_computes(changes):
    made = attention(**changes)
    x = torch.randn(2, 11, 24)
    context = torch.randn(2, 7, 10) if "cross_attention_dim" in changes else None
    torch.testing.assert_close(attend(made.processor, exact, made, x, context), made(x, context))
    mask = torch.zeros(2, 1, 11 if context is None else 7)
    mask[0, :, 2:] = mask[1, :, 4:] = -10000
    got = attend(made.processor, exact, made, x, context, attention_mask=mask)
    torch.testing.assert_close(got, made(x, context, attention_mask=mask))


def test_masks_of_booleans_and_scales_are_those_of_torch():
    q, k, v = (torch.randn(2, 3, tokens, 8) for tokens in (5, 7, 7))
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    mask[0, :, :, 3:] = False

    def ask(**changes):
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, **changes)

    torch.testing.assert_close(attend(ask, exact), ask())
    with pytest.raises(ValueError, match="causal"):
        attend(lambda: scaled_dot_product_attention(q, q, q, is_causal=True), exact)


def quantized(value: torch.Tensor, qmax: float) -> torch.Tensor:
    step = value.abs().amax(-1, keepdim=True) / qmax
    return (value / step).round() * step


def by_definition(q, k, v, factor, bias, *, qmax: float, regions: torch.Tensor) -> torch.Tensor:
    """Float64; Q and K by token, V by channel, P by two regions."""
    q, k, v = q.double(), k.double(), v.double()
    p = (quantized(q, qmax) @ quantized(k, qmax).transpose(-1, -2) * factor + bias).softmax(-1)
    split, low, high = regions.double()
    p = torch.where(p < split, (p / low).round().clamp(max=qmax) * low, (p / high).round().clamp(max=qmax) * high)
    return p @ quantized(v.transpose(-1, -2), qmax).transpose(-1, -2)


@pytest.mark.parametrize("bits", (4, 6, 8))
def test_it_computes_its_definition(bits):
    made, qmax = attention(), 2.0 ** (bits - 1) - 1
    policy = AttentionPolicy(bits=(bits,), probability_bits=(bits,))
    processor = QuantAttention(policy, TimestepGroups((1000,), 1.0), made.processor)
    processor.regions = torch.tensor([[1 / 4, 1 / 4 / (qmax + 1), 1 / (qmax + 1)]])
    x = 3 * torch.randn(2, 11, 24, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(2, 1, 11)
    mask[1, :, 6:] = -10000
    want = attend(
        made.processor,
        lambda *args: by_definition(*args, qmax=qmax, regions=processor.regions[0]).float(),
        *(made, x),
        attention_mask=mask,
    )
    for _ in ("in PyTorch", "by the kernels"):
        error = processor(made, x, attention_mask=mask) - want
        # Codes at ties may fall the other way; a wrong scale or axis leaves errors of the size of the output.
        assert error.std() < 0.02 * want.std()
        assert error.abs().median() < 1e-5 * want.std()
        processor.use_kernels()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("form", ["fused", "qdq"])
def test_a_model_of_eight_bits_is_near_full_precision(family, form, tmp_path):
    module = tiny_module(family)
    policy = with_regions(policy_of(family, module, weight="int8", bits=(8,)), module, bits=(8,))
    checkpoint = pack_checkpoint(tmp_path / "made", module, policy)
    made = load_quantized(checkpoint, form=form)
    assert sum(isinstance(part, QuantAttention) for part in made.modules()) == len(policy.attentions) > 0
    inputs = family.inputs(module.config, batch=3, seed=0)
    with torch.no_grad():
        want, got = module(**inputs, return_dict=False)[0], made(**inputs, return_dict=False)[0]
    assert 0 < (got - want).std() < 0.05 * want.std()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_tables_follow_the_timestep_of_each_sample(family, tmp_path):
    module = tiny_module(family)
    inputs = family.inputs(module.config, batch=4, seed=0)
    inputs["timestep"] = (torch.tensor([10, 499, 500, 900]) / family.timestep_scale).to(inputs["timestep"].dtype)
    results = {}
    for name, bits, bounds in (("low", (3,), (1000,)), ("high", (8,), (1000,)), ("both", (3, 8), (500, 1000))):
        policy = policy_of(family, module, weight="int8", bits=bits, bounds=bounds)
        checkpoint = pack_checkpoint(tmp_path / name, module, with_regions(policy, module, bits=bits))
        with torch.no_grad():
            results[name] = load_quantized(checkpoint)(**inputs, return_dict=False)[0]
    assert (results["low"] - results["high"]).abs().max() > 1e-2
    assert torch.allclose(results["both"][:2], results["low"][:2], atol=1e-5)
    assert torch.allclose(results["both"][2:], results["high"][2:], atol=1e-5)
