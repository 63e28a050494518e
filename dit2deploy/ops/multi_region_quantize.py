"""MultiRegionQuantize: two steps for two regions of values (TQ-DiT's MRQ), as two planes of codes."""

import numpy as np
import torch

from dit2deploy.ops.hadamard_quantize import SMALLEST, rows_of
from dit2deploy.ops.op import STREAM_TYPE, Case, Op, OutputRule, Port


def multi_region_quantize(
    x: torch.Tensor, qmax: torch.Tensor, regions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes of the values below the split and of the others: x is about q_low * s_low + q_high * s_high.

    TQ-DiT (https://arxiv.org/abs/2502.04056; methods.md 7.3), in the exclusive form: each value is in one region, and
    its code in the other plane is 0, so that mean(x_hat - x) is near 0 and a product with x_hat is the sum of two
    integer products.

    x float32 [.., K]; qmax float32 [R], the largest code, 2**(bits - 1) - 1, and regions float32 [R, 3] (split, step
    below it, step from it on), a row for each run of M / R rows of x (see `rows_of`): the tables of time groups (TGQ).
    Codes lie in -qmax..qmax: post-softmax regions use 0..qmax of both planes, post-GELU ones -qmax..0 and 0..qmax.
    The paper's code -K of negative values is left out, as kernels take symmetric operands.
    Returns q_low, q_high int8 [.., K] and s_low, s_high float32 [.., 1], the steps, one a row as the GEMMs take them.
    A row with NaN or inf gives codes 0 and steps NaN; a step below 1e-30 gives codes 0.
    """
    limit = rows_of(qmax, x)
    split, low, high = (rows_of(column, x) for column in regions.unbind(1))
    finite = torch.isfinite(x).all(-1, keepdim=True)
    below = x < split

    def codes(step: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        inverse = torch.where(step >= SMALLEST, 1 / step, 0.0)
        rounded = (x * inverse).round().clamp(-limit, limit)
        return torch.where(inside & finite, rounded, 0.0).to(torch.int8)

    nan = torch.full_like(limit, float("nan"))
    steps = (torch.where(finite, step, nan) for step in (low, high))
    return codes(low, below), codes(high, ~below), *steps


_BODY = """
  zero = Constant <value = float {0}> ()
  one = Constant <value = float {1}> ()
  smallest = Constant <value = float {1e-30}> ()
  nan = Constant <value = float {nan}> ()
  last = Constant <value_ints = [-1]> ()
  axis1 = Constant <value_ints = [1]> ()
  lead = Shape <start = 0, end = -1> (x)
  row_shape = Concat <axis = 0> (lead, axis1)
  rows = ReduceProd <keepdims = 1> (lead)
  groups = Shape (qmax)
  repeats = Div (rows, groups)
  expand_to = Concat <axis = 0> (groups, repeats)
  qmax_column = Unsqueeze (qmax, last)
  split_column, low_column, high_column = Split <axis = 1, num_outputs = 3> (regions)
  qmax_all = Expand (qmax_column, expand_to)
  split_all = Expand (split_column, expand_to)
  low_all = Expand (low_column, expand_to)
  high_all = Expand (high_column, expand_to)
  limit = Reshape <allowzero = 1> (qmax_all, row_shape)
  split = Reshape <allowzero = 1> (split_all, row_shape)
  low = Reshape <allowzero = 1> (low_all, row_shape)
  high = Reshape <allowzero = 1> (high_all, row_shape)
  least = Neg (limit)
  nothing = Mul (x, zero)
  trace = ReduceSum <keepdims = 1> (nothing, last)
  finite = Equal (trace, zero)
  below = Less (x, split)
  above = Not (below)
""" + "\n".join(
    f"""
  usable_{side} = GreaterOrEqual ({side}, smallest)
  inverse_raw_{side} = Div (one, {side})
  inverse_{side} = Where (usable_{side}, inverse_raw_{side}, zero)
  scaled_{side} = Mul (x, inverse_{side})
  rounded_{side} = Round (scaled_{side})
  at_most_{side} = Min (rounded_{side}, limit)
  clipped_{side} = Max (at_most_{side}, least)
  inside_{side} = And ({region}, finite)
  kept_{side} = Where (inside_{side}, clipped_{side}, zero)
  q_{side} = Cast <to = 3> (kept_{side})
  steps_{side} = Where (finite, {side}, nan)
  s_{side} = Reshape <allowzero = 1> (steps_{side}, row_shape)"""
    for side, region in (("low", "below"), ("high", "above"))
)


def cases() -> list[Case]:
    """Probabilities and GELU outputs at all widths, a table row a sample, tails, one row, none, extremes."""
    out = []

    def add(name: str, x: np.ndarray, bits: tuple[int, ...], regions: list[tuple[float, float, float]]) -> None:
        qmax = np.array([2 ** (b - 1) - 1 for b in bits], np.float32)
        inputs = {"x": x.astype(np.float32), "qmax": qmax, "regions": np.array(regions, np.float32)}
        out.append(Case(name, inputs))

    def probabilities(seed: int, *shape: int) -> np.ndarray:
        raised = np.exp(2 * np.random.default_rng(seed).standard_normal(shape))
        return raised / raised.sum(-1, keepdims=True)

    def gelu(seed: int, *shape: int) -> np.ndarray:
        h = 1.5 * np.random.default_rng(seed).standard_normal(shape)
        return 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))

    for bits in range(2, 9):
        k = 2.0 ** (bits - 1)
        add(f"softmax-bits{bits}", probabilities(bits, 2, 3, 5, 77), (bits,), [(1 / 16, 1 / 16 / k, 1 / k)])
        add(f"gelu-bits{bits}", gelu(bits, 2, 9, 96), (bits,), [(0, 0.16997 / k, 4.0 / k)])
    groups = [(2.0**-i, 2.0**-i / 128, 1 / 128) for i in range(4)]
    add("row-tables", probabilities(20, 4, 2, 3, 64), (8, 6, 4, 8), groups)
    add("one-row", gelu(21, 1, 33), (8,), [(0, 0.001, 0.03)])
    add("no-row", gelu(22, 0, 5, 40), (8,), [(0, 0.001, 0.03)])
    add("dit-xl", probabilities(23, 1, 2, 6, 256), (8,), [(1 / 32, 1 / 4096, 1 / 128)])
    add("wide", gelu(24, 3, 4608), (6,), [(0, 0.005, 0.1)])
    extremes = gelu(25, 8, 130)
    extremes[0] = 0.0
    extremes[1, 5] = np.nan
    extremes[2, 129] = np.inf
    extremes[3, 0] = -np.inf
    extremes[4] *= 1e30
    extremes[5] *= 1e-38
    extremes[6, ::2] = -0.0
    add("extremes", extremes, (8,), [(0, 0.001, 0.03)])
    add("ties", np.arange(-64, 66).reshape(1, 130) * 0.25, (4,), [(2.0, 0.5, 0.5)])
    add("no-step", gelu(26, 3, 40), (8,), [(0, 0.001, 0.0)])
    return out


MULTI_REGION_QUANTIZE = Op(
    "MultiRegionQuantize",
    inputs=(Port("x", "stream"), Port("qmax", "f32"), Port("regions", "f32")),
    outputs=(Port("q_low", "i8"), Port("q_high", "i8"), Port("s_low", "f32"), Port("s_high", "f32")),
    attributes=STREAM_TYPE,
    shapes=(OutputRule(0), OutputRule(0), OutputRule(0, last_dim=1), OutputRule(0, last_dim=1)),
    reference=multi_region_quantize,
    body=_BODY,
    cases=cases,
)
