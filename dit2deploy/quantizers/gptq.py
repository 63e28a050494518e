"""GPTQ: rounding that lets later columns make up for the error of earlier ones (https://arxiv.org/abs/2210.17323)."""

import torch

from dit2deploy.formats import Format
from dit2deploy.quantizers.round_to_nearest import row_chunks

DAMP = 0.01  # of the Hessian's mean diagonal, added to it
BLOCK = 128  # columns between two updates of all later columns


def inverse_factor(hessian: torch.Tensor, *, damp: float = DAMP) -> torch.Tensor:
    """The upper Cholesky factor U, float32 [K, K], of the damped Hessian's inverse: H^-1 = U^T U.

    hessian [K, K], symmetric, of the layer's inputs X [M, K]: X^T X times any positive number. Inputs that are always
    zero get a diagonal of 1. The factorisation runs in float64. Raises ValueError for a Hessian that is not finite.
    """
    hessian = hessian.to(torch.float64, copy=True)  # overwritten: K is 15360 in FLUX, and every copy 1.9 GB
    if not torch.isfinite(hessian).all():
        raise ValueError("the Hessian is not finite")
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    shift = damp * diagonal.mean()
    diagonal += torch.where(dead, 1.0, shift)
    torch.linalg.cholesky(hessian, out=hessian)
    torch.cholesky_inverse(hessian, out=hessian)
    return torch.linalg.cholesky(hessian, upper=True, out=hessian).float()


def gptq(weight: torch.Tensor, scales: torch.Tensor, fmt: Format, factor: torch.Tensor) -> torch.Tensor:
    """Codes int8 [N, K] of float32 weights [N, K] for scales [N, G] that are fixed before the loop (static groups).

    factor [K, K] comes from `inverse_factor`; weights and factor are both of the rotated space where a layer's
    inputs are rotated. Columns in their order, in blocks of BLOCK with a lazy update of the columns behind.
    """
    codes = torch.empty(weight.shape, dtype=torch.int8)
    for rows in row_chunks(*weight.shape):
        codes[rows] = _round_columns(weight[rows].clone(), scales[rows], fmt, factor).to(torch.int8)
    return codes


def _round_columns(weight: torch.Tensor, scales: torch.Tensor, fmt: Format, factor: torch.Tensor) -> torch.Tensor:
    # Columns are worked on as rows of the transpose: contiguous memory for the inner updates.
    remaining = weight.T.contiguous()  # [K, N], overwritten
    k = remaining.shape[0]
    scale = scales.repeat_interleave(k // scales.shape[1], 1).T  # [K, N]
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    codes = torch.empty_like(remaining)
    for start in range(0, k, BLOCK):
        end = min(start + BLOCK, k)
        block = remaining[start:end]
        errors = torch.empty_like(block)
        for j in range(end - start):
            column = start + j
            codes[column] = (block[j] * inverse[column]).round_().clamp_(fmt.low, fmt.high)
            errors[j] = (block[j] - codes[column] * scale[column]) / factor[column, column]
            block[j + 1 :].addr_(factor[column, column + 1 : end], errors[j], alpha=-1)
        remaining[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return codes.T
