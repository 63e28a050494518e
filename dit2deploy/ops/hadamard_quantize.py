"""HadamardQuantize and its halves: (block) Walsh-Hadamard rotation and dynamic per-token symmetric quantization."""

from functools import partial
from itertools import product

import numpy as np
import torch

from dit2deploy.ops.op import PACKED, STREAM_TYPE, Case, Op, OutputRule, Port
from dit2deploy.ops.packed_codes import LARGEST, pack_codes

# MSE-optimal step of a unit normal for codes -qmax..qmax (Max 1960; re-derived in tests), qmax = 1, 3, .. 127.
GAUSSIAN_LEVELS = (1.0, 3.0, 7.0, 15.0, 31.0, 63.0, 127.0)
GAUSSIAN_STEPS = (1.224006, 0.650770, 0.353411, 0.193249, 0.105488, 0.057261, 0.030870)
# Half of that step for the odd codes of the same range, levels (k + 1/2) step: the mid-rise grid of 1, 2, .. 7 bits.
MID_RISE_STEPS = (0.797885, 0.4978435, 0.2930095, 0.1676005, 0.0940695, 0.0520315, 0.028434)
SMALLEST = 1e-30  # a row below this is a row of zeros: its step would leave float32's normal range


def block_size(k: int) -> int:
    """The largest power of two that divides K: the block of the block Hadamard transform."""
    return k & -k


def fwht(x: torch.Tensor, block: int) -> torch.Tensor:
    """The unnormalised fast Walsh-Hadamard transform of each block of the last axis, [.., K] float32, no gradients.

    Every output is a fixed tree of additions, so all kernels agree bit for bit.
    """
    # Tokens side by side: a stage adds long runs of memory. A copy even of one token, whose transpose is x itself.
    columns = x.reshape(-1, x.shape[-1]).T.clone(memory_format=torch.contiguous_format)
    other, h = torch.empty_like(columns), 1
    while h < block:
        pairs = len(columns) // (2 * h), 2, h, columns.shape[1]
        a, b = columns.view(pairs).unbind(1)
        total, difference = other.view(pairs).unbind(1)
        torch.add(a, b, out=total)
        torch.sub(a, b, out=difference)
        columns, other, h = other, columns, 2 * h
    return columns.T.reshape(x.shape)


def norm(block: int) -> float:
    """1 / sqrt(block), as float32 arithmetic gives it."""
    return float(np.float32(1) / np.sqrt(np.float32(block)))


def hadamard(x: torch.Tensor, *, block: int) -> torch.Tensor:
    """The normalised block Walsh-Hadamard transform along the last axis (its own inverse)."""
    return fwht(x, block) * norm(block)


def rows_of(qmax: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """qmax [R] as [.., 1] over the rows of x: R divides the number of rows M, row i has qmax[i // (M / R)]."""
    if qmax.shape[0] == 1 or x.numel() == 0:
        return qmax[:1].expand(*x.shape[:-1], 1)
    rows = x.numel() // x.shape[-1]
    return qmax.repeat_interleave(rows // qmax.shape[0]).reshape(*x.shape[:-1], 1)


def gaussian_step(qmax: torch.Tensor, grid: str = "mid-tread") -> torch.Tensor:
    """What a code of 1 stands for on a unit normal, for each qmax (of the largest tabled level not above it)."""
    index = (qmax.unsqueeze(-1) >= qmax.new_tensor(GAUSSIAN_LEVELS)).sum(-1) - 1
    steps = MID_RISE_STEPS if grid == "mid-rise" else GAUSSIAN_STEPS
    return qmax.new_tensor(steps)[index.clamp_min(0)]


def hadamard_quantize(
    x: torch.Tensor, qmax: torch.Tensor, *, block: int, clip: str, grid: str = "mid-tread", packed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and steps of each token: x is about (q * s) rotated back.

    x float32 [.., K]; qmax float32 [R], the largest code, a value a row (see `rows_of`), so that the bit-width may
    differ from sample to sample (TQ-DiT's time groups, AdaTSQ). Returns q int8 [.., K] and s float32 [.., 1].
    clip "absmax": the largest value becomes qmax. clip "gaussian": the step is the row's root mean square times the
    constant that is MSE-optimal for a unit normal (RobuQ, RobustQuantizer; tables above).
    grid "mid-tread": codes are the integers -qmax .. qmax, of which b bits hold 2^b - 1. grid "mid-rise": b bits hold
    the 2^b levels (k + 1/2) step. Their codes are the odd integers -qmax .. qmax, qmax = 2^b - 1, and s is half of that
    step [our form]: a GEMM of integers needs no correction for the half steps, and sees codes that are a bit wider.
    A row with NaN or inf gives q = 0, s = NaN; a row of zeros gives q = 0, s = 0.
    packed 1: q is int8 [.., K / 2], packed codes; a row whose qmax is 8 or more, of which 4 bits do not hold the codes,
    gives q = 0, s = NaN, and is no silent loss of bits. Raises ValueError where K is then no multiple of 64.
    """
    qmax = rows_of(qmax, x)
    t = fwht(x, block)
    if clip == "gaussian":
        statistic = t.double().square().mean(-1, keepdim=True).sqrt().float()
        step = gaussian_step(qmax, grid) * statistic
        scale = 1.0 / step
    else:
        statistic = t.abs().amax(-1, keepdim=True)
        step = statistic / qmax
        scale = qmax / statistic
    finite = torch.isfinite(statistic)
    if packed:
        finite &= qmax < LARGEST + 1
    usable = finite & (statistic >= SMALLEST)
    codes = 2 * (t * (scale * 0.5)).floor() + 1 if grid == "mid-rise" else (t * scale).round()
    q = torch.where(usable, codes.clamp(-qmax, qmax), 0.0).to(torch.int8)
    s = torch.where(usable, step * norm(block), 0.0).masked_fill(~finite, float("nan"))
    return pack_codes(q) if packed else q, s


# (What compares strings goes through one Concat: onnx.reference refuses to compare strings of different length.
# `trace` is NaN where the row holds NaN or inf: ONNX Runtime's ReduceMax passes NaN over. The last Reshape
# is for it too: its reductions keep the last axis of an empty tensor.)
# The loop runs log2(block) stages; partner of lane i at distance h is i ^ h, and (a + b, a - b) is
# x[i ^ h] + sign * x[i] with sign -1 in the upper lanes: the same two operands, hence the same rounding.
def rotate_body(source: str, target: str) -> str:
    """ONNX text that makes `target`, the unnormalised transform of `source`, and `norm`."""
    return f"""
  block = Constant <value_int: int = @block> ()
  axis0 = Constant <value_ints = [0]> ()
  zero = Constant <value = int64 {{0}}> ()
  one = Constant <value = int64 {{1}}> ()
  two = Constant <value = int64 {{2}}> ()
  most = Constant <value = int64 {{16}}> ()
  block_1d = Unsqueeze (block, axis0)
  minus_one = Constant <value_ints = [-1]> ()
  blocked = Concat <axis = 0> (minus_one, block_1d)
  full = Shape ({source})
  flat = Reshape ({source}, blocked)
  lanes = Range (zero, block, one)
  more = Less (one, block)
  h_end, flat_end = Loop (most, more, one, flat) <
    body = stage (int64 i, bool go, int64 h, float[m, b] v)
      => (bool again, int64 h2, float[m, b] v2) {{
    t2 = Constant <value = int64 {{2}}> ()
    t1 = Constant <value = float {{1}}> ()
    tm = Constant <value = float {{-1}}> ()
    place = Div (lanes, h)
    upper_int = Mod (place, t2)
    upper = Cast <to = 9> (upper_int)
    up = Add (lanes, h)
    down = Sub (lanes, h)
    partner = Where (upper, down, up)
    sign = Where (upper, tm, t1)
    other = Gather <axis = 1> (v, partner)
    own = Mul (v, sign)
    v2 = Add (other, own)
    h2 = Mul (h, t2)
    again = Less (h2, block)
  }}>
  {target} = Reshape <allowzero = 1> (flat_end, full)
  block_float = Cast <to = 1> (block)
  root = Sqrt (block_float)
  one_float = Constant <value = float {{1}}> ()
  norm = Div (one_float, root)"""


QUANTIZE_BODY = """
  f_one = Constant <value = float {1}> ()
  f_zero = Constant <value = float {0}> ()
  f_nan = Constant <value = float {nan}> ()
  f_smallest = Constant <value = float {1e-30}> ()
  f_largest = Constant <value = float {3.4028234e38}> ()
  q_minus_one = Constant <value_ints = [-1]> ()
  q_one = Constant <value_ints = [1]> ()
  levels = Constant <value = float[7] {LEVELS}> ()
  steps_tread = Constant <value = float[7] {STEPS}> ()
  steps_rise = Constant <value = float[7] {RISE}> ()
  t_shape = Shape (t)
  lead = Shape <start = 0, end = -1> (t)
  row_shape = Concat <axis = 0> (lead, q_one)
  rows = ReduceProd <keepdims = 1> (lead)
  groups = Shape (qmax)
  repeats = Div (rows, groups)
  qmax_column = Unsqueeze (qmax, q_minus_one)
  expand_to = Concat <axis = 0> (groups, repeats)
  qmax_all = Expand (qmax_column, expand_to)
  qm = Reshape <allowzero = 1> (qmax_all, row_shape)
  magnitude = Abs (t)
  absmax = ReduceMax <keepdims = 1> (magnitude, q_minus_one)
  wide = Cast <to = 11> (t)
  squares = Mul (wide, wide)
  mean = ReduceMean <keepdims = 1> (squares, q_minus_one)
  root_mean = Sqrt (mean)
  rms = Cast <to = 1> (root_mean)
  clip = Constant <value_string: string = @clip> ()
  clip_1d = Unsqueeze (clip, q_minus_one)
  gaussian_1d = Constant <value_strings = ["gaussian"]> ()
  grid = Constant <value_string: string = @grid> ()
  grid_1d = Unsqueeze (grid, q_minus_one)
  rise_1d = Constant <value_strings = ["mid-rise"]> ()
  names = Concat <axis = 0> (clip_1d, gaussian_1d, grid_1d, rise_1d)
  q_zero = Constant <value_ints = [0]> ()
  q_two = Constant <value_ints = [2]> ()
  q_three = Constant <value_ints = [3]> ()
  q_four = Constant <value_ints = [4]> ()
  clip_name = Slice (names, q_zero, q_one)
  gaussian_name = Slice (names, q_one, q_two)
  gaussian = Equal (clip_name, gaussian_name)
  grid_name = Slice (names, q_two, q_three)
  rise_name = Slice (names, q_three, q_four)
  mid_rise = Equal (grid_name, rise_name)
  statistic = Where (gaussian, rms, absmax)
  reached = GreaterOrEqual (qm, levels)
  reached_float = Cast <to = 1> (reached)
  ones = Constant <value = float[7, 1] {1, 1, 1, 1, 1, 1, 1}> ()
  count_float = MatMul (reached_float, ones)
  count = Cast <to = 7> (count_float)
  index_raw = Sub (count, q_one)
  index = Max (index_raw, q_zero)
  steps = Where (mid_rise, steps_rise, steps_tread)
  unit_step = Gather (steps, index)
  gaussian_s = Mul (unit_step, statistic)
  absmax_s = Div (statistic, qm)
  gaussian_inverse = Div (f_one, gaussian_s)
  absmax_inverse = Div (qm, statistic)
  step = Where (gaussian, gaussian_s, absmax_s)
  inverse = Where (gaussian, gaussian_inverse, absmax_inverse)
  f_half = Constant <value = float {0.5}> ()
  f_two = Constant <value = float {2}> ()
  share = Where (mid_rise, f_half, f_one)
  inverse_share = Mul (inverse, share)
  nothing = Mul (t, f_zero)
  trace = ReduceSum <keepdims = 1> (nothing, q_minus_one)
  clean = Equal (trace, f_zero)
  bounded = LessOrEqual (statistic, f_largest)
  finite = And (clean, bounded)
  big = GreaterOrEqual (statistic, f_smallest)
  usable = And (finite, big)
  scaled = Mul (t, inverse_share)
  rounded = Round (scaled)
  below = Floor (scaled)
  even = Mul (below, f_two)
  odd = Add (even, f_one)
  code = Where (mid_rise, odd, rounded)
  low = Neg (qm)
  at_most = Min (code, qm)
  clipped = Max (at_most, low)
  kept = Where (usable, clipped, f_zero)
  q = Cast <to = 3> (kept)
  s_rotated = Mul (step, norm)
  s_usable = Where (usable, s_rotated, f_zero)
  s_rows = Where (finite, s_usable, f_nan)
  s = Reshape <allowzero = 1> (s_rows, row_shape)"""
for _name, _values in (("LEVELS", GAUSSIAN_LEVELS), ("STEPS", GAUSSIAN_STEPS), ("RISE", MID_RISE_STEPS)):
    QUANTIZE_BODY = QUANTIZE_BODY.replace(_name, ", ".join(map(str, _values)))


def _tokens(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def cases() -> list[Case]:
    """Odd token counts, K not a power of two, one token, none; all widths, clips and grids; extremes; a qmax a row."""
    out = []

    def add(name: str, x: np.ndarray, qmax: tuple[float, ...], block: int, **kind: str) -> None:
        inputs = {"x": x, "qmax": np.array(qmax, np.float32)}
        out.append(Case("-".join((name, *kind.values())), inputs, {"block": block, **kind}))

    for clip, grid in product(("absmax", "gaussian"), ("mid-tread", "mid-rise")):
        kind = {"clip": clip} if grid == "mid-tread" else {"clip": clip, "grid": grid}
        wider = int(grid == "mid-tread")  # bits that the same codes take more
        for bits in range(1, 8):
            add(f"bits{bits + wider}", _tokens(bits + 1, 2, 5, 192), (2.0**bits - 1,), 64, **kind)
        add("unrotated", _tokens(10, 3, 40), (7.0,), 1, **kind)
        add("one-token", _tokens(11, 1, 64), (7.0,), 64, **kind)
        add("no-token", _tokens(12, 0, 5, 64), (7.0,), 64, **kind)
        add("dit-xl", _tokens(13, 7, 1152), (7.0,), 128, **kind)
        add("wide", _tokens(14, 3, 4608), (127.0,), 512, **kind)
        add("row-qmax", _tokens(15, 4, 3, 96), (1.0, 7.0, 31.0, 127.0), 32, **kind)
        add("odd-k", _tokens(16, 9, 77), (15.0,), 1, **kind)
        extremes = _tokens(17, 8, 128)
        extremes[0] = 0.0
        extremes[1] = 1e-35
        extremes[2, 5] = np.nan
        extremes[3, 7] = np.inf
        extremes[4, 9] = -np.inf
        extremes[5] *= 1e30
        extremes[6] = 0.0
        extremes[6, 3] = 1.0
        extremes[7] *= 1e-20
        add("extremes", extremes, (7.0,), 128, **kind)
        borders = np.arange(-96, 96, dtype=np.float32).reshape(2, 96) / 16
        borders[:, 0] = 7.0  # absmax: a step of 1 (mid-tread) or 2; then values on levels and half way between them
        add("borders", borders, (7.0,), 1, **kind)
    return out


def _plain_cases() -> list[Case]:
    return [Case(case.name, {"x": case.inputs["x"]}, {"block": case.attributes["block"]}) for case in cases()[:4]]


def _quantize_cases() -> list[Case]:
    return [Case(c.name, c.inputs, {n: v for n, v in c.attributes.items() if n != "block"}) for c in cases()]


HADAMARD_QUANTIZE = Op(
    "HadamardQuantize",
    inputs=(Port("x", "stream"), Port("qmax", "f32")),
    outputs=(Port("q", "i8"), Port("s", "f32")),
    attributes={"block": 1, "clip": "absmax", "grid": "mid-tread", **PACKED, **STREAM_TYPE},
    shapes=(OutputRule(0, is_codes=True), OutputRule(0, last_dim=1)),
    reference=hadamard_quantize,
    body=rotate_body("x", "t") + QUANTIZE_BODY,
    cases=cases,
)
HADAMARD = Op(
    "Hadamard",
    inputs=(Port("x", "f32"),),
    outputs=(Port("y", "f32"),),
    attributes={"block": 1},
    shapes=(OutputRule(0),),
    reference=hadamard,
    body=rotate_body("x", "t") + "\n  y = Mul (t, norm)",
    cases=_plain_cases,
    native=False,
)
PER_TOKEN_QUANTIZE_LINEAR = Op(
    "PerTokenQuantizeLinear",
    inputs=(Port("x", "f32"), Port("qmax", "f32")),
    outputs=HADAMARD_QUANTIZE.outputs,
    attributes={"clip": "absmax", "grid": "mid-tread"},
    shapes=(OutputRule(0), OutputRule(0, last_dim=1)),
    reference=partial(hadamard_quantize, block=1),
    body="  t = Identity (x)\n  norm = Constant <value = float {1}> ()" + QUANTIZE_BODY,
    cases=_quantize_cases,
    native=False,
)
