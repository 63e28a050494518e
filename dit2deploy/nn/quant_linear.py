"""A linear layer with packed weights and dynamically quantized activations, in the two forms that are exported."""

from typing import Any, Literal

import torch

from dit2deploy.artefacts.policy import LayerPolicy
from dit2deploy.formats import by_name
from dit2deploy.nn.kernels import call, kernel_words
from dit2deploy.nn.timestep_groups import TimestepGroups
from dit2deploy.ops import (
    DEQUANTIZE_LINEARS,
    GEMMS,
    HADAMARD,
    HADAMARD_QUANTIZE,
    LOW_RANK_GEMMS,
    MONARCH_ADD,
    MULTI_REGION_QUANTIZE,
    PER_TOKEN_QUANTIZE_LINEAR,
    Op,
)
from dit2deploy.quantizers.branches import add_branches
from dit2deploy.targets.kernel import INTERCHANGE, KERNEL_ORDER

QuantForm = Literal["fused", "qdq"]


class QuantLinear(torch.nn.Module):
    """y = dequantized weight . quantized (rotated x) + bias (+ branches of x); state_dict keys are the checkpoint's.

    x float32 [.., K] -> y float32 [.., N]. Form "fused" is HadamardQuantize and a <Format>Gemm, and MonarchAdd for a
    Monarch branch; form "qdq" is Hadamard, PerTokenQuantizeLinear, <Format>DequantizeLinear around plain MatMuls. Both
    compute the same function, but for the rounding of floats. An input of two regions is MultiRegionQuantize, and in
    form "fused" two GEMMs of one weight.
    It computes what the ops define, in PyTorch; after `use_kernels`, form "fused" on the CPU by the compiled kernels.
    """

    down: torch.Tensor
    up: torch.Tensor
    monarch_down: torch.Tensor
    monarch_up: torch.Tensor
    qmax: torch.Tensor
    regions: torch.Tensor
    weight: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        policy: LayerPolicy,
        groups: TimestepGroups,
        form: QuantForm,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.policy, self.groups, self.form = policy, groups, form
        self.format = by_name(policy.weight)
        self._words: torch.Tensor | None = None  # the weight as the kernels read it
        scales = in_features // (policy.group_size or in_features)
        # Values come from a checkpoint; what is empty here costs no memory until then.
        self.register_buffer("weight", torch.empty(out_features, self.format.words(in_features), dtype=torch.int32))
        # Parameters, not buffers: diffusers asks modules for the dtype of their first parameter.
        self.weight_scale = torch.nn.Parameter(torch.empty(out_features, scales), requires_grad=False)
        self.bias = torch.nn.Parameter(torch.empty(out_features), requires_grad=False)
        self.register_buffer("qmax", torch.tensor(policy.largest_codes, dtype=torch.float32))
        if policy.regions != "token":
            self.register_buffer("regions", torch.ones(len(policy.activation_bits), 3))
        if policy.low_rank:
            self.register_buffer("down", torch.empty(policy.low_rank, in_features, dtype=torch.float16))
            self.register_buffer("up", torch.empty(out_features, policy.low_rank, dtype=torch.float16))
        if policy.monarch:
            a, b, rank = policy.monarch
            for leaf, shape in (
                ("monarch_down", (in_features, rank, b)),
                ("monarch_up", (a, rank, out_features)),
            ):
                self.register_buffer(leaf, torch.empty(shape, dtype=torch.float16))

    def extra_repr(self) -> str:
        bits = "/".join(map(str, self.policy.activation_bits))
        return f"{self.in_features}, {self.out_features}, {self.policy.weight}, activations {bits} bits"

    def use_kernels(self) -> None:
        """From now on inputs on the CPU go through the compiled kernels; the weight must be there and stay as it is.

        Its words in the kernels' layout are held beside those of the checkpoint. Raises Misuse without a library.
        """
        self._words = kernel_words(self.weight.cpu(), self.policy.weight, self.in_features)

    def _call(self, op: Op, *inputs: torch.Tensor, **attributes: int | str) -> Any:
        return call(op, *inputs, by_kernels=self._words is not None, **attributes)

    def _gemm(self, q: torch.Tensor, s: torch.Tensor, bias: torch.Tensor, *low_rank: torch.Tensor) -> torch.Tensor:
        op = (LOW_RANK_GEMMS if low_rank else GEMMS)[self.format.name]
        words, layout = self.weight, INTERCHANGE
        if self._words is not None and q.device.type == "cpu":
            words, layout = self._words, KERNEL_ORDER
        bits = self.policy.code_bits
        return self._call(op, q, s, words, self.weight_scale, bias, *low_rank, bits=bits, layout=layout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.policy.regions != "token":
            return self._of_regions(x)
        return self._fused(x) if self.form == "fused" else self._qdq(x)

    def _fused(self, x: torch.Tensor) -> torch.Tensor:
        policy, qmax = self.policy, self.groups.qmax(self.qmax)
        q, s = self._call(HADAMARD_QUANTIZE, x, qmax, block=policy.hadamard, clip=policy.clip, grid=policy.grid)
        branch = (x @ self.down.float().T, self.up.float()) if policy.low_rank else ()
        y = self._gemm(q, s, self.bias, *branch)
        if policy.monarch:
            y = self._call(MONARCH_ADD, y, x, self.monarch_down.float(), self.monarch_up.float())
        return y

    def _qdq(self, x: torch.Tensor) -> torch.Tensor:
        policy, qmax = self.policy, self.groups.qmax(self.qmax)
        rotated = HADAMARD.call(x, block=policy.hadamard) if policy.hadamard > 1 else x
        q, s = PER_TOKEN_QUANTIZE_LINEAR.call(rotated, qmax, clip=policy.clip, grid=policy.grid)
        weight = DEQUANTIZE_LINEARS[self.format.name].call(self.weight, self.weight_scale, k=self.in_features)
        y = (q.float() * s) @ weight.T + self.bias
        return add_branches(y, x, {leaf: getattr(self, leaf).float() for leaf in self.policy.branch_leaves})

    def _of_regions(self, x: torch.Tensor) -> torch.Tensor:
        qmax, regions = self.groups.qmax(self.qmax), self.groups.qmax(self.regions)
        q_low, q_high, s_low, s_high = self._call(MULTI_REGION_QUANTIZE, x, qmax, regions)
        if self.form == "qdq":
            weight = DEQUANTIZE_LINEARS[self.format.name].call(self.weight, self.weight_scale, k=self.in_features)
            return (q_low.float() * s_low + q_high.float() * s_high) @ weight.T + self.bias
        return self._gemm(q_low, s_low, self.bias) + self._gemm(q_high, s_high, torch.zeros(self.out_features))
