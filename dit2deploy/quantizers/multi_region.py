"""Steps of the multi-region quantizers after softmax and after GELU: TQ-DiT's MRQ, chosen by its search HO.

TQ-DiT: https://arxiv.org/abs/2502.04056; methods.md 7.2 and 7.3. With k bits, K = 2**(k - 1): one bit tells the region.
"Regions" are float32 [3]: the split, the step below it, the step from it on (ops/multi_region_quantize.py).
"""

import torch

SPLITS = tuple(2.0**-i for i in range(20))  # of softmax: where region 1 ends
GELU_DEPTH = 0.16997  # the minimum of GELU is -0.16997, at -0.7518
STEPS = 101  # candidates for the step of positive GELU outputs


def qmax_of(bits: int) -> float:
    """The largest code of a plane, K - 1."""
    return 2.0 ** (bits - 1) - 1


def softmax_candidates(bits: int) -> torch.Tensor:
    """float32 [20, 3]: regions [0, 2**-i) with step 2**-i / K, and [2**-i, 1] with step 1 / K."""
    k = 2.0 ** (bits - 1)
    return torch.tensor([(split, split / k, 1 / k) for split in SPLITS])


def gelu_candidates(largest: float, bits: int) -> torch.Tensor:
    """float32 [101, 3]: negative values with a fixed step, positive ones with d0 (0.01 + 1.19 i / 100), i = 0 .. 100,
    d0 = largest / (K - 1/2).

    [inferred] The fixed step is 0.16997 / (K - 1), not / K: the code -K does not exist here, see MultiRegionQuantize.
    """
    base = max(largest, GELU_DEPTH) / (2.0 ** (bits - 1) - 0.5)
    ratios = 0.01 + 1.19 * torch.arange(STEPS) / (STEPS - 1)
    low = GELU_DEPTH / max(qmax_of(bits), 1.0)
    return torch.stack([torch.zeros(STEPS), torch.full((STEPS,), low), base * ratios], dim=1)


def dequantized(x: torch.Tensor, regions: torch.Tensor, bits: int) -> torch.Tensor:
    """What MultiRegionQuantize with `regions` [3] makes of x float32 [.., K], but for the rounding of ties."""
    split, low, high = regions.unbind()
    steps = torch.where(x < split, low, high)
    return (x / steps).round_().clamp_(-qmax_of(bits), qmax_of(bits)).mul_(steps)


def output_errors(
    x: torch.Tensor, other: torch.Tensor, importance: torch.Tensor, candidates: torch.Tensor, bits: int
) -> torch.Tensor:
    """HO's score of each candidate, float64 [C]: the sum of importance * (z_hat - z)^2 over the outputs z = x other.

    x float32 [.., M, K], other [.., K, N], importance [.., M, N]: the squared gradient of the loss with respect to z,
    a diagonal Fisher matrix in the place of the Hessian.
    """
    errors = [
        (importance * ((dequantized(x, candidate, bits) - x) @ other).square()).sum(dtype=torch.float64)
        for candidate in candidates
    ]
    return torch.stack(errors)
