"""Attention with integer products, in the place of diffusers' attention processor (TQ-DiT)."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_processor import Attention

from dit2deploy.artefacts.policy import AttentionPolicy
from dit2deploy.nn.kernels import compute
from dit2deploy.nn.timestep_groups import TimestepGroups
from dit2deploy.ops import HADAMARD_QUANTIZE, MULTI_REGION_QUANTIZE, QUANT_MATMUL, Op

# q, k, v float32 [B, H, tokens, D], the factor of the scores, and what is then added to them -> float32 [B, H, M, D]
Products = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, torch.Tensor | float], torch.Tensor]


def attend(
    attention: Attention,
    x: torch.Tensor,
    context: torch.Tensor | None,
    mask: torch.Tensor | None,
    products: Products,
) -> torch.Tensor:
    """What diffusers' AttnProcessor2_0 computes, x float32 [B, M, C] and context [B, N, C'], with products of our own.

    For attentions of `models.places.attentions_of`; `mask` float32 [B, 1 or M, N] is added to the scores of all heads.
    """
    source = x if context is None else context
    made = (attention.get_submodule(name)(y) for name, y in (("to_q", x), ("to_k", source), ("to_v", source)))
    q, k, v = (value.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for value in made)
    if attention.norm_q is not None:
        q = attention.norm_q(q)
    if attention.norm_k is not None:
        k = attention.norm_k(k)
    bias = 0.0 if mask is None else mask.unsqueeze(1)
    out = products(q, k, v, q.shape[-1] ** -0.5, bias).transpose(1, 2).flatten(2)
    for layer in attention.to_out:  # the projection, and a dropout that does nothing
        out = layer(out)
    return out / attention.rescale_output_factor


class QuantAttention(torch.nn.Module):
    """Q K^T and P V as products of integers, P by two steps for two regions; softmax stays in float32.

    Q and K have a step a token and V one a channel, of each head: steps along the axis that a product sums over would
    not factor out. P is two planes of codes (MultiRegionQuantize), so P V is two integer products: one would do where
    the ratio of the steps, 2**i, leaves (2**(bits - 1) - 1) 2**i within int8, which neither 6 nor 8 bits do. The same
    in the forms "fused" and "qdq". As the ops define it, in PyTorch; after `use_kernels`, on the CPU by the kernels.
    """

    qmax: torch.Tensor
    probability_qmax: torch.Tensor
    regions: torch.Tensor

    def __init__(self, policy: AttentionPolicy, groups: TimestepGroups) -> None:
        super().__init__()
        self.policy, self.groups, self._by_kernels = policy, groups, False
        for name, bits in (("qmax", policy.bits), ("probability_qmax", policy.probability_bits)):
            self.register_buffer(name, 2.0 ** (torch.tensor(bits) - 1) - 1)
        self.register_buffer("regions", torch.ones(len(policy.bits), 3))  # comes from a checkpoint

    def forward(
        self,
        attention: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return attend(attention, hidden_states, encoder_hidden_states, attention_mask, self._products)

    def use_kernels(self) -> None:
        """From now on inputs on the CPU go through the compiled kernels."""
        self._by_kernels = True

    def _call(self, op: Op, *inputs: torch.Tensor, **attributes: int | str) -> Any:
        by_kernels = self._by_kernels and inputs[0].device.type == "cpu"
        return compute(op, *inputs, **attributes) if by_kernels else op.call(*inputs, **attributes)

    def _products(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, factor: float, bias: torch.Tensor | float
    ) -> torch.Tensor:
        qmax = self.groups.qmax(self.qmax)
        (q, q_step), (k, k_step), (v, v_step) = (
            self._call(HADAMARD_QUANTIZE, value, qmax, block=1, clip="absmax") for value in (q, k, v.transpose(-1, -2))
        )
        scores = self._call(QUANT_MATMUL, q, q_step * factor, k, k_step)
        if isinstance(bias, torch.Tensor):
            scores = scores + bias
        probabilities = scores.softmax(-1)
        low, high, low_step, high_step = self._call(
            MULTI_REGION_QUANTIZE,
            probabilities,
            self.groups.qmax(self.probability_qmax),
            self.groups.qmax(self.regions),
        )
        return self._call(QUANT_MATMUL, low, low_step, v, v_step) + self._call(QUANT_MATMUL, high, high_step, v, v_step)
