"""One linear layer, from its float weight to the tensors that a checkpoint holds of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from dit2deploy.artefacts.policy import LayerPolicy
from dit2deploy.formats import Format, by_name, pack
from dit2deploy.ops.hadamard_quantize import hadamard
from dit2deploy.quantizers import branches, low_rank
from dit2deploy.quantizers.gain import clip_gain
from dit2deploy.quantizers.gptq import gptq, inverse_factor
from dit2deploy.quantizers.round_to_nearest import dequantize, mse_scales, round_to_nearest, row_chunks
from dit2deploy.quantizers.twin_log import twin_log

SMALL = 1 << 20  # weights


@contextmanager
def threads_for(n: int, k: int) -> Iterator[None]:
    """One thread for a small layer: on busy cores, the barriers of small LAPACK calls take 1000 times their work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if n * k < SMALL else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def rotate(matrix: torch.Tensor, block: int) -> torch.Tensor:
    """The block Hadamard transform along the last axis of [R, K], in chunks of rows."""
    if block == 1:
        return matrix
    rotated = torch.empty_like(matrix)
    for rows in row_chunks(*matrix.shape):
        rotated[rows] = hadamard(matrix[rows], block=block)
    return rotated


def rotate_hessian(hessian: torch.Tensor, block: int) -> torch.Tensor:
    """R^T H R [K, K]: the Hessian of rotated inputs."""
    return rotate(rotate(hessian, block).T.contiguous(), block)


def quantize_linear(
    weight: np.ndarray,
    bias: np.ndarray | None,
    policy: LayerPolicy,
    *,
    hessian: torch.Tensor | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """The checkpoint's tensors of a layer, by suffix: weight, weight_scale, bias, qmax, and the factors of branches.

    weight [N, K] and bias [N] of any float dtype; hessian float32 [K, K] of the layer's inputs before rotation (X^T X
    times any number), needed where `policy.needs_moments`. Layout and dtypes: artefacts/checkpoint.py.
    Of a smoothed layer, weight, bias and hessian are those after its factors were folded.
    Raises ValueError for a weight, bias or Hessian that is not finite, and for a Hessian that is missing.
    """
    matrix = torch.from_numpy(np.asarray(weight, np.float32))
    n, k = matrix.shape
    offsets = np.zeros(n, np.float32) if bias is None else np.asarray(bias, np.float32)
    if not torch.isfinite(matrix).all() or not np.isfinite(offsets).all():
        raise ValueError("the weight or the bias holds NaN or inf")
    if policy.needs_moments and hessian is None:
        raise ValueError("GPTQ, salient and weighted branches need the Hessian of the layer's inputs")
    fmt = by_name(policy.weight).limited(policy.weight_bits)
    groups = k // (policy.group_size or k)

    init, found = policy.branch_init, {}
    fit = partial(branches.fit, policy=policy, seed=seed)
    with threads_for(n, k):
        root = low_rank.moments_root(hessian) if policy.branch_leaves and init in ("weighted", "refit") else None
        if policy.branch_leaves and init not in ("residual", "salient"):
            norm = root if init == "weighted" else None
            found = branches.split(
                matrix,
                partial(fit, root=norm),
                lambda rest: _there_and_back(rest, fmt, groups, policy),
                alternations=0 if init in ("weight", "refit") else branches.ALTERNATIONS,
                root=norm,
            )
        rotated = rotate(matrix - branches.total(found) if found else matrix, policy.hadamard)
        if policy.rounding == "gptq":
            scales = mse_scales(rotated, fmt, groups=groups)
            codes = gptq(rotated, scales, fmt, inverse_factor(rotate_hessian(hessian, policy.hadamard)))
        else:
            codes, scales = _nearest(rotated, fmt, groups, policy)
        # The codes are made, whose ever they are: branches may take what they leave.
        if policy.branch_leaves and init in ("residual", "refit", "salient"):
            left = matrix - rotate(dequantize(codes, scales), policy.hadamard)
            if init == "salient":
                up, down = low_rank.salient_residual(left, policy.low_rank, hessian.diagonal())
                found = {"up": up, "down": down}
            else:
                found = fit(left, root=root, held=found)
    return {
        "weight": _pack(codes.numpy(), fmt),
        "weight_scale": (scales * clip_gain(policy)).numpy(),  # last: what was fitted above is for unbiased inputs
        "bias": offsets,
        "qmax": np.array(policy.largest_codes, np.float32),
        **{leaf: found[leaf].numpy() for leaf in policy.branch_leaves},
    }


def _nearest(rotated: torch.Tensor, fmt: Format, groups: int, policy: LayerPolicy) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of rounding to nearest."""
    if policy.log_bits:
        return twin_log(rotated, fmt, bits=policy.log_bits, groups=groups)
    scales = mse_scales(rotated, fmt, groups=groups)
    return round_to_nearest(rotated, scales, fmt), scales


def _there_and_back(matrix: torch.Tensor, fmt: Format, groups: int, policy: LayerPolicy) -> torch.Tensor:
    """What rounding to nearest in the rotated space makes of a matrix."""
    codes, scales = _nearest(rotate(matrix, policy.hadamard), fmt, groups, policy)
    return rotate(dequantize(codes, scales), policy.hadamard)


def _pack(codes: np.ndarray, fmt: Format) -> np.ndarray:
    words = np.empty((codes.shape[0], fmt.words(codes.shape[1])), np.int32)
    for rows in row_chunks(*codes.shape):
        words[rows] = pack(codes[rows], fmt)
    return words
