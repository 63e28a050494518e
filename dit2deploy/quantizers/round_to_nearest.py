"""Scales and codes of symmetric weights, per output channel or per group along K: round to nearest.

Every function takes float32 weights [N, K] and works a group of K / G weights at a time: scales are float32 [N, G],
codes int8 [N, K] in fmt.low..fmt.high. Rows are independent, so callers cut large weights into chunks of rows.
"""

from collections.abc import Iterator

import torch

from dit2deploy.formats import Format

CLIP_RATIOS = tuple(1 - 0.04 * step for step in range(16))  # 1.00, 0.96 .. 0.40 of the largest weight
CHUNK = 1 << 21  # weights in work at once: temporaries stay at a few times 8 MB however large the tensor


def row_chunks(n: int, k: int) -> Iterator[slice]:
    """Slices of rows of an [N, K] tensor that hold about CHUNK weights each."""
    rows = max(1, CHUNK // max(k, 1))
    for start in range(0, n, rows):
        yield slice(start, min(start + rows, n))


def grouped(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """A view [N, G, K / G]; ValueError where G does not divide K."""
    if weight.shape[1] % groups:
        raise ValueError(f"{groups} groups do not divide K = {weight.shape[1]}")
    return weight.reshape(weight.shape[0], groups, -1)


def absmax_scales(weight: torch.Tensor, fmt: Format, *, groups: int = 1) -> torch.Tensor:
    """Scales that map the largest weight of a group to the largest code (methods.md 6.1)."""
    return grouped(weight, groups).abs().amax(-1) / fmt.high


def absmean_scales(weight: torch.Tensor, fmt: Format, *, groups: int = 1) -> torch.Tensor:
    """Scales of BitNet b1.58: the mean magnitude of a group (https://arxiv.org/abs/2402.17764). Only for ternary."""
    if fmt.high != 1:
        raise ValueError(f"absmean scales are for ternary weights, not for {fmt.name}")
    return grouped(weight, groups).abs().mean(-1)


def mse_scales(weight: torch.Tensor, fmt: Format, *, groups: int = 1) -> torch.Tensor:
    """Scales of least squared error.

    Ternary: the exact optimum, the one of all fixed points of threshold = level / 2, level = mean of the survivors
    (methods.md 1.4) that errs least. Otherwise the best of CLIP_RATIOS of the absmax scale, then a least-squares refit.
    """
    scales = torch.empty(weight.shape[0], groups, dtype=torch.float32)
    for rows in row_chunks(*weight.shape):
        part = grouped(weight[rows], groups)
        scales[rows] = _ternary_levels(part) if fmt.high == 1 else _searched_scales(part, fmt)
    return scales


def _ternary_levels(weight: torch.Tensor) -> torch.Tensor:
    # With the m largest magnitudes kept at their mean S_m / m, the squared error is that of zeros less S_m**2 / m.
    sums = weight.abs().sort(-1, descending=True).values.cumsum(-1)
    counts = torch.arange(1, sums.shape[-1] + 1)
    kept = (sums.square() / counts).argmax(-1, keepdim=True)
    return (sums.gather(-1, kept) / (kept + 1)).squeeze(-1)


def _searched_scales(weight: torch.Tensor, fmt: Format) -> torch.Tensor:
    largest = weight.abs().amax(-1, keepdim=True) / fmt.high
    best_scale = largest.clone()
    best_error = torch.full_like(largest, float("inf"))
    for ratio in CLIP_RATIOS if fmt.high <= 7 else CLIP_RATIOS[:4]:  # 8 bits lose by a tighter clip
        scale = largest * ratio
        error = (weight - _round(weight, scale, fmt) * scale).square().sum(-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    codes = _round(weight, best_scale, fmt)
    power = codes.square().sum(-1, keepdim=True)
    refit = (weight * codes).sum(-1, keepdim=True) / power
    return torch.where(power > 0, refit, best_scale).squeeze(-1)


def _round(weight: torch.Tensor, scale: torch.Tensor, fmt: Format) -> torch.Tensor:
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    return (weight * inverse).round_().clamp_(fmt.low, fmt.high)


def round_to_nearest(weight: torch.Tensor, scales: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Codes int8 [N, K]: each weight goes to the nearest level of its group; a scale of 0 gives codes 0."""
    codes = torch.empty(weight.shape, dtype=torch.int8)
    for rows in row_chunks(*weight.shape):
        part = grouped(weight[rows], scales.shape[1])
        codes[rows] = _round(part, scales[rows].unsqueeze(-1), fmt).reshape(part.shape[0], -1).to(torch.int8)
    return codes


def dequantize(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The float32 weight [N, K] that codes int8 [N, K] and scales [N, G] stand for."""
    return (grouped(codes, scales.shape[1]) * scales.unsqueeze(-1)).reshape(codes.shape)
