"""The low-rank branch that takes the largest directions of a weight before the rest is quantized (SVDQuant, RobuQ)."""

import torch

from dit2deploy.quantizers.gptq import DAMP

OVERSAMPLING = 2  # directions followed for each one wanted
POWER_ITERATIONS = 8
ORDERS = 2  # of the binary residual of salient channels
TINY = 1e-30


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


def weighted_svd(
    weight: torch.Tensor, rank: int, root: torch.Tensor, *, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The branch of that rank that changes the layer's outputs as the weight does: ||(W - up down) L|| is least.

    root float32 [K, K] is any L with L L^T = C, the second moments of the layer's inputs, see `moments_root`
    (methods.md 4.3 at k = l = 1). [inferred] With U the first left singular vectors of W L, the branch is U U^T W:
    its product with L is SVD_r(W L), as 4.3 has it, and L, which may be all but singular, is not inverted.
    """
    left = truncated_svd(weight @ root, rank, seed=seed)[0].float()
    basis = torch.linalg.qr(left).Q  # singular vectors from the float16 factor: orthonormal again
    down = basis.T @ weight
    size = down.norm(dim=1).clamp_min(TINY).sqrt()
    return (basis * size).half(), (down / size.unsqueeze(1)).half()


def salient_residual(
    left: torch.Tensor, rank: int, power: torch.Tensor, *, orders: int = ORDERS
) -> tuple[torch.Tensor, torch.Tensor]:
    """The branch that gives `rank` input channels a binary residual (MPQ-DMv2, https://arxiv.org/abs/2507.04290).

    left float32 [N, K]: what the codes leave of the weight; power float32 [K]: the mean squares of the inputs, before
    rotation. [inferred] From the abstract, "an efficient binary residual branch for flexible quant steps to handle
    salient error", of any order z: the channels are those of the largest expected output error power_k |left_k|^2, and
    each gets the sum of `orders` terms scale * sign(what the terms before leave), scales of least squared error. `down`
    picks the channels, so that the branch is exact in the graph; it sees their inputs unquantized, and is stored
    as float16, where a kernel of its own would need N * rank * orders bits and the scales.
    """
    salient = (power * left.square().sum(0)).topk(rank).indices.sort().values
    rest = left[:, salient].clone()
    for _ in range(orders):
        rest -= rest.abs().mean(0) * torch.where(rest < 0, -1.0, 1.0)
    down = torch.zeros(rank, left.shape[1])
    down[torch.arange(rank), salient] = 1.0
    return (left[:, salient] - rest).half(), down.half()


def moments_root(hessian: torch.Tensor) -> torch.Tensor:
    """L float32 [K, K] with L L^T = C for the second moments C [K, K] of a layer's inputs, scaled to a mean diagonal
    of 1 and damped as for GPTQ. Raises ValueError for moments that are not finite."""
    if not torch.isfinite(hessian).all():
        raise ValueError("the second moments of the inputs are not finite")
    moments = hessian.double()
    moments = moments / moments.diagonal().mean().clamp_min(TINY)
    return torch.linalg.cholesky(moments + DAMP * torch.eye(len(moments), dtype=torch.float64)).float()
