"""Twin-Log Quantization of weights (LRQ-DiT, https://arxiv.org/abs/2508.03485): levels that are dense around zero.

Positive and negative weights have 2^(bits - 1) levels each, +-(2^l - eta) with l evenly spaced. What the authors' code
says: eta and the percentile at which the largest level lies are those of least squared error on a grid, weights round
to the nearest l, the smallest level is the smallest weight. What is ours: eta is in units of a row's root mean square
(theirs is absolute) and chosen for each row, as the percentiles are for each row and sign (theirs: one for the tensor,
over rows whose other sign counts as 0); exactly 2^(bits - 1) levels for both signs (theirs: one more negative one).

Levels become the nearest integers of a wider format, the largest one its largest code: the existing GEMM then computes
them exactly, and stores the wider format. As indices they would take `bits` a weight; no kernel here reads those.
"""

from typing import NamedTuple

import torch

from dit2deploy.formats import Format
from dit2deploy.quantizers.round_to_nearest import grouped, row_chunks

ETAS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0, 2.0, 5.0, 20.0)  # at 20 levels are as good as evenly spaced
PERCENTILES = (0.98, 0.99, 0.999, 0.9999, 1.0)
TINY = 1e-12


class _Side(NamedTuple):
    """One sign of some rows: what each weight becomes, and what that costs."""

    value: torch.Tensor  # [R, k], 0 where the weight has the other sign
    error: torch.Tensor  # [R, 1], squared


def twin_log(weight: torch.Tensor, fmt: Format, *, bits: int, groups: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [N, K], at most 2^bits different ones and 0 a group, and scales float32 [N, G] of weights [N, K].

    Weights that are exactly 0 stay 0. Raises ValueError for `bits` that the format does not exceed.
    """
    if bits < 2 or 2**bits > 2 * fmt.high:
        raise ValueError(f"{fmt.name} does not hold {bits}-bit log levels")
    n, k = weight.shape
    codes, scales = torch.empty(n, k, dtype=torch.int8), torch.empty(n, groups)
    for rows in row_chunks(n, k):
        part = grouped(weight[rows], groups).reshape(-1, k // groups)
        values = _nearest_levels(part, bits)
        scale = values.abs().amax(1, keepdim=True) / fmt.high
        inverse = torch.where(scale > 0, 1 / scale, 0.0)
        codes[rows] = (values * inverse).round_().to(torch.int8).reshape(-1, k)
        scales[rows] = scale.reshape(-1, groups)
    return codes, scales


def _nearest_levels(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """float32 [R, k]: the level that each weight becomes."""
    size = weight.square().mean(1, keepdim=True).sqrt().clamp_min(TINY)
    unit = weight / size
    ends = [_ends(sign * unit) for sign in (1, -1)]
    best = torch.zeros_like(unit)
    least = torch.full_like(size, float("inf"))
    for eta in ETAS:
        sides = [_best_side(sign * unit, end, eta, 2 ** (bits - 1)) for sign, end in zip((1, -1), ends, strict=True)]
        error = sides[0].error + sides[1].error
        better = error < least
        best = torch.where(better, sides[0].value - sides[1].value, best)
        least = torch.where(better, error, least)
    return best * size


def _ends(unit: torch.Tensor) -> torch.Tensor:
    """The least positive value of each row and those at PERCENTILES, [R, 1 + percentiles]; 1 where there is none."""
    count = (unit > 0).sum(1, keepdim=True)
    rising = torch.where(unit > 0, unit, float("inf")).sort(1).values  # the other sign comes last
    places = ((count - 1).clamp_min(0) * torch.tensor((0.0, *PERCENTILES))).round().long()
    return torch.where(count > 0, rising.gather(1, places), 1.0)


def _best_side(unit: torch.Tensor, ends: torch.Tensor, eta: float, levels: int) -> _Side:
    """The positive weights of rows [R, k], at the percentile of least error."""
    mine = unit > 0
    log = torch.log2(torch.where(mine, unit, 1.0) + eta)
    low, *highs = torch.log2(ends + eta).split(1, dim=1)
    best = _Side(torch.zeros_like(unit), torch.full_like(low, float("inf")))
    for high in highs:
        step = ((high - low) / (levels - 1)).clamp_min(TINY)
        index = ((log - low) / step).round_().clamp_(0, levels - 1)
        value = torch.where(mine, torch.exp2(low + index * step) - eta, 0.0)
        error = torch.where(mine, (value - unit).square(), 0.0).sum(1, keepdim=True)
        better = error < best.error
        best = _Side(torch.where(better, value, best.value), torch.where(better, error, best.error))
    return best
