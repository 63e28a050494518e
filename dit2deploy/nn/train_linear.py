"""The quantized linear layer that gradients pass through: what quantization-aware training turns."""

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from dit2deploy.artefacts.policy import MOST_MID_RISE, LayerPolicy, Policy, largest_code
from dit2deploy.formats import by_name, pack, unpack
from dit2deploy.models.load import linears_of
from dit2deploy.nn.timestep_groups import TimestepGroups
from dit2deploy.ops.hadamard_quantize import hadamard, hadamard_quantize, rows_of
from dit2deploy.quantizers.branches import add_branches, total
from dit2deploy.quantizers.gain import clip_gain

INSIDE = 0.49  # how far from its code a latent weight may start: rounding it gives that code, whatever floats do


class TrainLinear(torch.nn.Module):
    """QuantLinear's function of x float32 [.., K] -> float32 [.., N], with gradients (RobuQ, methods.md 3.3, 3.4, 3.6).

    Trainable, all float32:
        latent [N, K]     the weight in the rotated space, 1 being the format's largest code: codes are
                          round(high * latent), straight through (https://arxiv.org/abs/1308.3432)
        log_gain [N, G]   the weight's scales are the checkpoint's times exp(log_gain)
        bias [N]
        up [N, r], down [r, K]; monarch_up, monarch_down   the factors of the policy's branches (ranks of three for
            Monarch, see quantizers/monarch.py); computed with as float16, straight through
    Activations are quantized per token as the checkpoint's policy says; their gradient passes inside of the clipping
    range and is zero outside, the step counts as constant.

    Latent weights in units of their scale are our choice (LSQ, https://arxiv.org/abs/1902.08153, divides by the scale
    in each forward): one learning rate then suits every format and layer, and a scale that moves flips no codes.
    """

    scale: torch.Tensor
    qmax: torch.Tensor
    log_gain: torch.nn.Parameter

    def __init__(
        self, weight: torch.Tensor, tensors: Mapping[str, np.ndarray], *, policy: LayerPolicy, groups: TimestepGroups
    ) -> None:
        """`weight` float32 [N, K] at full precision, smoothing folded in; `tensors` the checkpoint's of this layer, by
        suffix.

        The latent weight starts at what the codes were made of: what branches leave of the full-precision weight, or
        all of it where they came after (V1, salient channels); of a branch that was fitted once more (refit) it is what
        the last one leaves, near to that. It is clipped into the cell of its code [our choice]: the layer starts as the
        checkpoint's, and weights near a border flip first.
        """
        super().__init__()
        self.policy, self.groups, self.format = policy, groups, by_name(policy.weight)
        self.out_features, self.in_features = weight.shape
        held = {name: torch.from_numpy(value) for name, value in tensors.items()}
        self.register_buffer("scale", held["weight_scale"])
        self.register_buffer("qmax", held["qmax"])
        self.bias = torch.nn.Parameter(held["bias"].clone())
        self.log_gain = torch.nn.Parameter(torch.zeros_like(held["weight_scale"]))
        for leaf in policy.branch_leaves:
            self.register_parameter(leaf, torch.nn.Parameter(held[leaf].float()))
        if policy.branch_leaves and policy.branch_init not in ("residual", "salient"):
            weight = weight - total(held)
        codes = torch.from_numpy(unpack(tensors["weight"], self.format, self.in_features)).float()
        scale = self.scale.repeat_interleave(self.in_features // self.scale.shape[1], 1) / clip_gain(policy)
        # A scale of 0 leaves its weights at their codes.
        ideal = torch.where(scale > 0, hadamard(weight, block=policy.hadamard) / scale, codes)
        self.latent = torch.nn.Parameter(ideal.clamp(codes - INSIDE, codes + INSIDE) / self.format.high)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.policy.weight}, trainable"

    def set_least_bits(self, bits: int) -> None:
        """Activations get the policy's bits or `bits`, whichever is more: the stages of RobuQ's schedule.

        The grid stays the policy's: a mid-rise one ends at 7 bits.
        """
        grid = self.policy.grid
        most = MOST_MID_RISE if grid == "mid-rise" else 8
        wider = (max(own, min(bits, most)) for own in self.policy.activation_bits)
        self.qmax = torch.tensor([largest_code(own, grid) for own in wider], dtype=torch.float32)

    def codes(self) -> torch.Tensor:
        """Integers as float32 [N, K], in the whole range that the format holds."""
        fmt = self.format
        return (self.latent.detach() * fmt.high).round_().clamp_(-fmt.offset, fmt.levels - 1 - fmt.offset)

    def settle(self) -> None:
        """Brings latent weights back to the outermost cells, so that they can flip back (BinaryConnect,
        https://arxiv.org/abs/1511.00363); to be called after each step of the optimizer."""
        fmt = self.format
        with torch.no_grad():
            self.latent.clamp_(-(fmt.offset + 0.5) / fmt.high, (fmt.levels - 0.5 - fmt.offset) / fmt.high)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, k = self.latent.shape
        codes = _Straight.apply(self.latent * self.format.high, self.codes())
        scale = self.scale * self.log_gain.exp()
        weight = (codes.reshape(n, scale.shape[1], -1) * scale.unsqueeze(-1)).reshape(n, k)
        y = quantized_input(x, self.groups.qmax(self.qmax), self.policy) @ weight.T + self.bias
        factors = {leaf: self.get_parameter(leaf) for leaf in self.policy.branch_leaves}
        halves = {leaf: _Straight.apply(factor, factor.detach().half().float()) for leaf, factor in factors.items()}
        return add_branches(y, x, halves)

    def pack(self) -> dict[str, np.ndarray]:
        """The checkpoint's tensors of this layer, by suffix (artefacts/checkpoint.py); QuantLinear runs them."""
        with torch.no_grad():
            out = {
                "weight": pack(self.codes().to(torch.int16).numpy(), self.format),
                "weight_scale": (self.scale * self.log_gain.exp()).numpy(),
                "bias": self.bias.numpy().copy(),
                "qmax": np.array(self.policy.largest_codes, np.float32),
            }
            out |= {leaf: self.get_parameter(leaf).half().numpy() for leaf in self.policy.branch_leaves}
        return out


def quantized_input(x: torch.Tensor, qmax: torch.Tensor, policy: LayerPolicy) -> torch.Tensor:
    """x float32 [.., K] rotated and quantized per token as the policy says, dequantized, with straight-through
    gradients inside of the clipping range; qmax float32 [R] as for `hadamard_quantize`."""
    rotated = _Rotate.apply(x, policy.hadamard) if policy.hadamard > 1 else x
    return _PerToken.apply(rotated, qmax, policy.clip, policy.grid)


class _Straight(torch.autograd.Function):
    """`value` going forward, the gradient of `latent` unchanged going back."""

    @staticmethod
    def forward(ctx, latent: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient, None


class _Rotate(torch.autograd.Function):
    """The block Hadamard transform, which is symmetric: its own adjoint."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, block: int) -> torch.Tensor:
        ctx.block = block
        return hadamard(x, block=block)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return hadamard(gradient, block=ctx.block), None


class _PerToken(torch.autograd.Function):
    """Rotated activations to their quantized values; the gradient passes up to the largest level that clips."""

    @staticmethod
    def forward(ctx, t: torch.Tensor, qmax: torch.Tensor, clip: str, grid: str) -> torch.Tensor:
        q, s = hadamard_quantize(t, qmax, block=1, clip=clip, grid=grid)
        # absmax clips nothing, but for a rounding of its largest value.
        ctx.save_for_backward(t.abs() <= rows_of(qmax, t) * s if clip == "gaussian" else None)
        return q * s

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        (inside,) = ctx.saved_tensors
        return gradient if inside is None else gradient * inside, None, None, None


def make_trainable(
    module: torch.nn.Module, policy: Policy, read: Mapping[str, Mapping[str, np.ndarray]], *, timestep_scale: float
) -> torch.nn.Module:
    """Swaps, in place, the linears of a full-precision transformer that the policy quantizes for TrainLinears.

    `read` gives a layer's checkpoint tensors by the layer's name. Returns the module; all else in it stays frozen.
    """
    groups = TimestepGroups(policy.timestep_bounds, timestep_scale)
    module.requires_grad_(False)
    for name in linears_of(module):
        if policy.layers[name].is_quantized:
            weight = module.get_parameter(f"{name}.weight").detach()
            module.set_submodule(name, TrainLinear(weight, read[name], policy=policy.layers[name], groups=groups))
    groups.attach(module)
    return module


def trainable_linears(module: torch.nn.Module) -> Iterator[tuple[str, TrainLinear]]:
    """The layers that `make_trainable` put in, by name, in order of registration."""
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, TrainLinear))
