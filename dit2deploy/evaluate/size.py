"""How many bits a policy costs: of a weight with all that is stored for it, and of an activation."""

from collections.abc import Mapping, Sequence

import numpy as np

from dit2deploy.artefacts.policy import LayerPolicy, Policy
from dit2deploy.artefacts.timesteps import groups_of
from dit2deploy.base.errors import Misuse
from dit2deploy.formats import by_name

SCALE_BITS, BRANCH_BITS = 32, 16  # of float32 scales and float16 branches, see artefacts/checkpoint.py


def layer_bits(layer: LayerPolicy, shape: tuple[int, int], *, float_bits: float = 16.0) -> float:
    """Bits that a checkpoint stores for a weight [N, K]: packed codes with their padding, scales and branches.

    A layer that is not quantized holds `float_bits` a weight. Biases are left out: every model has them.
    """
    n, k = shape
    if not layer.is_quantized:
        return float_bits * n * k
    codes = 32 * n * by_name(layer.weight).words(k)
    scales = SCALE_BITS * n * (k // (layer.group_size or k))
    branches = layer.low_rank * (n + k) + (layer.monarch.parameters(n, k) if layer.monarch else 0)
    return float(codes + scales + BRANCH_BITS * branches)


def stored_bytes(layer: LayerPolicy, shape: tuple[int, int]) -> int:
    """Bytes of all tensors that a checkpoint holds of a quantized layer: as `layer_bits`, its bias and its qmax."""
    return round(layer_bits(layer, shape) / 8) + SCALE_BITS // 8 * (shape[0] + len(layer.activation_bits))


def effective_weight_bits(policy: Policy, linears: Mapping[str, tuple[int, int]], *, float_bits: float = 16.0) -> float:
    """Bits a weight, averaged over all weights of `linears` (name -> (N, K)): the model's, or the part of interest.

    (Codes + scales + branches) / weights, as methods.md 8.3 asks for. Raises Misuse for a layer that the policy does
    not name, and where there are none.
    """
    _check(policy, linears)
    stored = sum(layer_bits(policy.layers[name], shape, float_bits=float_bits) for name, shape in linears.items())
    return stored / sum(n * k for n, k in linears.values())


def average_activation_bits(
    policy: Policy,
    linears: Mapping[str, tuple[int, int]],
    timesteps: Sequence[float],
    *,
    rows: Mapping[str, int] | None = None,
    float_bits: float = 16.0,
) -> float:
    """Bits of a layer's input, averaged over MACs and over the sampler's `timesteps` (each in its timestep group).

    A layer's MACs are rows * N * K; `rows` (layer -> tokens a sample, 1 where it is not named) tells apart what sees
    every token from the modulation linears, which see one row a sample. Without `rows` all see as many. Inputs of
    layers that are not quantized count as `float_bits`. Raises Misuse as `effective_weight_bits` does, and for
    timesteps that are outside of 0 .. training steps.
    """
    _check(policy, linears)
    end = policy.timestep_bounds[-1]
    if not len(timesteps) or not 0 <= min(timesteps) <= max(timesteps) <= end:
        raise Misuse(
            f"activation bits: timesteps {list(timesteps)} are not all in 0 .. {end}.",
            "Give the sampler's timesteps, at least one.",
        )
    groups = groups_of(timesteps, policy.timestep_bounds)
    total = spent = 0.0
    for name, (n, k) in linears.items():
        layer, macs = policy.layers[name], (rows or {}).get(name, 1) * n * k
        bits = np.asarray(layer.activation_bits)[groups].mean() if layer.is_quantized else float_bits
        total, spent = total + macs, spent + macs * bits
    return float(spent / total)


def _check(policy: Policy, linears: Mapping[str, tuple[int, int]]) -> None:
    missing = [name for name in linears if name not in policy.layers]
    if missing or not linears:
        what = f"the policy says nothing of layer {missing[0]}" if missing else "there are no linears to average over"
        raise Misuse(f"bits: {what}.", "Give linears of the model that the policy is for.")
