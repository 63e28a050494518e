"""Attention with integer products (TQ-DiT), around any processor of diffusers that asks torch for its attention."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from dit2deploy.artefacts.policy import AttentionPolicy
from dit2deploy.nn.kernels import call
from dit2deploy.nn.timestep_groups import TimestepGroups
from dit2deploy.ops import HADAMARD_QUANTIZE, MULTI_REGION_QUANTIZE, QUANT_MATMUL, Op

Processor = Callable[..., Any]
# q, k, v float32 [B, H, tokens, D], the factor of the scores, and what is then added to them -> float32 [B, H, M, D]
Products = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, torch.Tensor | float], torch.Tensor]


class _Instead(TorchFunctionMode):
    """While it is entered, torch's scaled_dot_product_attention is computed by `products`."""

    def __init__(self, products: Products) -> None:
        super().__init__()
        self._products = products

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is scaled_dot_product_attention:
            return self._products(*_operands(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def _operands(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, torch.Tensor | float]:
    """Arguments of Products from those of scaled_dot_product_attention."""
    if is_causal or dropout_p or enable_gqa:
        raise ValueError("attention: causal masks, dropout and shared keys are not written out")
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    if attn_mask is None:
        return query, key, value, factor, 0.0
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
    return query, key, value, factor, attn_mask


def attend(processor: Processor, products: Products, *args: Any, **kwargs: Any) -> Any:
    """What `processor` makes of an attention and its inputs, with products of our own.

    For the processors of `models.places.attentions_of`. Raises ValueError where one asks for more than Products give.
    """
    with _Instead(products):
        return processor(*args, **kwargs)


class QuantAttention(torch.nn.Module):
    """Q K^T and P V as products of integers, P by two steps for two regions; softmax stays in float32.

    It stands in the place of `processor`, which goes on making Q, K and V and using what comes out. Q and K have a step
    a token and V one a channel, of each head: steps along the axis that a product sums over would not factor out. P is
    two planes of codes (MultiRegionQuantize), so P V is two integer products: one would do where the ratio of the
    steps, 2**i, leaves (2**(bits - 1) - 1) 2**i within int8, which neither 6 nor 8 bits do. The same in the forms
    "fused" and "qdq". As the ops define it, in PyTorch; after `use_kernels`, on the CPU by the kernels.
    """

    qmax: torch.Tensor
    probability_qmax: torch.Tensor
    regions: torch.Tensor

    def __init__(self, policy: AttentionPolicy, groups: TimestepGroups, processor: Processor) -> None:
        super().__init__()
        self.policy, self.groups, self._processor, self._by_kernels = policy, groups, processor, False
        for name, bits in (("qmax", policy.bits), ("probability_qmax", policy.probability_bits)):
            self.register_buffer(name, 2.0 ** (torch.tensor(bits) - 1) - 1)
        self.register_buffer("regions", torch.ones(len(policy.bits), 3))  # comes from a checkpoint
        self.__call__ = processor.__call__  # never called: diffusers hands on the arguments that its signature names

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the processor is called: the attention, its inputs, and what else the processor takes."""
        return attend(self._processor, self._products, *args, **kwargs)

    def use_kernels(self) -> None:
        """From now on inputs on the CPU go through the compiled kernels."""
        self._by_kernels = True

    def _call(self, op: Op, *inputs: torch.Tensor, **attributes: int | str) -> Any:
        return call(op, *inputs, by_kernels=self._by_kernels, **attributes)

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
