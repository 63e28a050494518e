"""The low-rank branch that takes the largest directions of a weight before the rest is quantized (SVDQuant, RobuQ)."""

from collections.abc import Callable

import torch

OVERSAMPLING = 2  # directions followed for each one wanted
POWER_ITERATIONS = 8
ALTERNATIONS = 4  # at most; they end at the first that does not help


def truncated_svd(weight: torch.Tensor, rank: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best branch of that rank: up float16 [N, r] and down float16 [r, K], up @ down being about SVD_r(weight).

    Randomised subspace iteration (https://arxiv.org/abs/0909.4061, algorithm 4.4), so that a 9216 x 3072 weight costs
    a few thin products. Singular values are split evenly between both factors, which keeps them in float16's range.
    """
    generator = torch.Generator().manual_seed(seed)
    width = min((1 + OVERSAMPLING) * rank, *weight.shape)
    basis = torch.randn(weight.shape[1], width, generator=generator)
    for _ in range(POWER_ITERATIONS):
        left = torch.linalg.qr(weight @ basis).Q
        basis = torch.linalg.qr(weight.T @ left).Q
    left, values, right = torch.linalg.svd(weight @ basis, full_matrices=False)
    root = values[:rank].sqrt()
    up = left[:, :rank] * root
    down = root.unsqueeze(1) * (right[:rank] @ basis.T)
    return up.half(), down.half()


def branch(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """What the branch adds to the weight, float32 [N, K]."""
    return up.float() @ down.float()


def split(
    weight: torch.Tensor, rank: int, quantized: Callable[[torch.Tensor], torch.Tensor], *, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The branch (up, down) of a float32 weight [N, K] whose remainder is quantized.

    The branch comes first (methods.md 3.3, V2): SVD_r of the weight. Then, in turn, SVD_r of what quantizing the
    remainder leaves (V3, SVDQuant step 4) for as long as the squared error of the sum falls. `quantized` maps a
    remainder [N, K] to its dequantized codes. The remainder is taken from the float16 branch, so that quantization
    makes up for the rounding of the branch as well.
    """
    best = truncated_svd(weight, rank, seed=seed)
    left_over = quantized(weight - branch(*best))
    least = (weight - branch(*best) - left_over).square().sum()
    for _ in range(ALTERNATIONS):
        candidate = truncated_svd(weight - left_over, rank, seed=seed)
        left_over = quantized(weight - branch(*candidate))
        error = (weight - branch(*candidate) - left_over).square().sum()
        if error >= least:
            break
        best, least = candidate, error
    return best
