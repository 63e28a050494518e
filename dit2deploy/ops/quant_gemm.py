"""TernaryGemm, Int3Gemm, Int4Gemm, Int8Gemm: one definition over FORMATS.

Each is four ops: <Format>Gemm, <Format>GemmLowRank with a low-rank branch, <Format>GemmResidual with the gate and the
residual of a DiT's block, <Format>GemmLowRankResidual with both. Variants are ops of their own, since ONNX Runtime 1.18
and onnx.reference know no functions with absent inputs.
"""

from functools import partial

import numpy as np
import torch

from dit2deploy.formats import FORMATS, Format, pack
from dit2deploy.ops.op import PACKED, STREAM_TYPE, Case, Op, OutputRule, Port
from dit2deploy.ops.packed_codes import unpack_codes
from dit2deploy.ops.sample_rows import rows_like, rows_like_text
from dit2deploy.ops.unpack import dequantize_text, unpack


def integer_product(q: torch.Tensor, weight: torch.Tensor, largest: int) -> torch.Tensor:
    """sum_k q[.., k] * weight[n, k], exact: in float32 while all partial sums stay below 2**24, else in float64."""
    dtype = torch.float32 if q.shape[-1] * largest < 2**24 else torch.float64
    return q.to(dtype) @ weight.to(dtype).T


def quant_gemm(
    q: torch.Tensor,
    s: torch.Tensor,
    w: torch.Tensor,
    ws: torch.Tensor,
    bias: torch.Tensor,
    *more: torch.Tensor,
    fmt: Format,
    low_rank: bool,
    residual: bool,
    bits: int,
    layout: int,
    packed: int = 0,
) -> torch.Tensor:
    """y[m, n] = s[m] * sum_g ws[n, g] * (sum over k of group g of q[m, k] w[n, k]) + bias[n], + sum_r t[m, r] up[n, r];
    with a residual, residual[m, n] + gate[m, n] times that.

    q int8 [.., K] with |q| <= 2**(bits - 1) - 1; s float32 [.., 1]; w int32 words of `fmt` [N, words(K)] (layout 0, the
    interchange layout, is the only one that PyTorch reads); ws float32 [N, G], G divides K; bias float32 [N]; with a
    low-rank branch (SVDQuant; RobuQ) t float32 [.., r] and up float32 [N, r]; with a residual (AdaLN-Zero, Peebles and
    Xie 2022) residual float32 [.., N] and gate float32 [.., N], a row for each run of M / R rows of q: [B, N] or
    [B, 1, N], one a sample. Returns float32 [.., N].
    The inner sum is an exact integer. packed 1: q is int8 [.., K / 2], packed codes; bits and those of the weights are
    at most 4. Raises ValueError for another layout, and for other bits of packed codes.
    """
    if layout != 0:
        raise ValueError(f"layout {layout} belongs to a target's kernels; PyTorch reads layout 0")
    if packed:
        if bits > 4 or fmt.bits > 4:
            raise ValueError(f"packed codes and their weights have at most 4 bits, not {bits} and {fmt.bits:g}")
        q = unpack_codes(q)
    k, groups = q.shape[-1], ws.shape[1]
    weight = unpack(w, fmt, k)
    largest = (2 ** (bits - 1) - 1) * max(fmt.offset, fmt.levels - 1 - fmt.offset)
    if groups == 1:
        y = integer_product(q, weight, largest).float() * ws[:, 0]
    else:
        size = k // groups
        y = sum(
            integer_product(q[..., g * size : (g + 1) * size], weight[:, g * size : (g + 1) * size], largest).float()
            * ws[:, g]
            for g in range(groups)
        )
    y = y * s + bias
    if low_rank:
        t, up = more[:2]
        y = y + t @ up.T
    if residual:
        before, gate = more[-2:]
        y = before + rows_like(gate, y) * y
    return y


_GEMM = """
  y_k = Shape <start = -1> (q)
%s
  q_float = Cast <to = 1> (q)
  weight_t = Transpose <perm = [1, 0]> (weight)
  product = MatMul (q_float, weight_t)
  y_scaled = Mul (product, s)
"""


# Cases of the sums alone: the ops with a branch or a residual are left to those of their epilogue.
_OF_SUMS = ("bits2", "bits3", "bits5", "bits6", "bits7", "largest", "zero", "dit-fc1", "dit-fc2", "dit-xl", "long-runs")


def gemm_cases(fmt: Format, *, low_rank: bool, residual: bool) -> list[Case]:
    """Odd shapes, K and N with tails, every activation width, groups, one token, none, extremes of codes and scales;
    gates of one sample, of several, of every token."""
    out = []

    def add(
        name: str,
        lead: tuple[int, ...],
        n: int,
        k: int,
        *,
        bits: int = 4,
        groups: int = 1,
        fill: str = "random",
        gates: tuple[int, ...] = (),
    ):
        if (low_rank or residual) and name in _OF_SUMS:
            return
        rng = np.random.default_rng(len(out))
        largest = 2 ** (bits - 1) - 1
        q = rng.integers(-largest, largest, (*lead, k), endpoint=True)
        codes = rng.integers(-fmt.offset, fmt.levels - 1 - fmt.offset, (n, k), endpoint=True)
        s = rng.uniform(0.01, 0.1, (*lead, 1))
        if fill == "largest":
            q[:], codes[:] = largest, -fmt.offset
        elif fill == "zero":
            q[:] = 0
        elif fill == "nan":
            s[0] = np.nan
            q[0] = 0
        inputs = {
            "q": q.astype(np.int8),
            "s": s.astype(np.float32),
            "w": pack(codes, fmt),
            "ws": rng.uniform(0.01, 0.1, (n, groups)).astype(np.float32),
            "bias": rng.standard_normal(n).astype(np.float32),
        }
        if low_rank:
            rank = 1 + 5 * (len(out) % 4)
            inputs["t"] = rng.standard_normal((*lead, rank)).astype(np.float32)
            inputs["up"] = rng.standard_normal((n, rank)).astype(np.float32)
        if residual:
            samples = gates or ((lead[0] or 1) if len(lead) > 1 else 1, *(1,) * (len(lead) - 1))
            inputs["residual"] = rng.standard_normal((*lead, n)).astype(np.float32)
            gate = rng.uniform(0.5, 1.5, (*samples, n)) * rng.choice((-1, 1), (*samples, n))
            inputs["gate"] = gate.astype(np.float32)
        out.append(Case(name, inputs, {"bits": bits}))

    for bits in range(2, 9):
        add(f"bits{bits}", (2, 9), 48, 192, bits=bits)
    add("one-token", (1,), 33, 64)
    add("no-token", (0, 4), 32, 64)
    add("tails", (7,), 37, 77, bits=8)
    add("tiny", (3,), 1, 5)
    add("groups", (2, 5), 40, 256, groups=4, bits=8)
    add("odd-groups", (5,), 17, 90, groups=3)
    add("largest", (3,), 20, 4608, bits=8, fill="largest")
    add("zero", (3,), 20, 64, fill="zero")
    add("nan-row", (3,), 20, 64, fill="nan")
    add("dit-fc1", (65,), 768, 192)
    add("dit-fc2", (65,), 192, 768, bits=8)
    add("dit-xl", (6,), 130, 1152, bits=6)
    # The GPU kernels' own tails: tiles of 64 tokens and 32 outputs, steps of 64, for up to 16 tokens another kernel.
    add("step-tail", (17,), 70, 208, bits=8)
    add("many-tokens", (256,), 99, 144)
    add("few-tokens-tail", (16,), 35, 528, bits=8)
    add("many-groups", (33,), 70, 288, groups=9)
    add("groups-of-units", (17,), 40, 192, groups=3)
    add("long-k", (17,), 34, 64 * 64 + 16, bits=8)  # split among blocks: of halves, an even N alone
    add("long-runs", (17,), 34, 64 * 64)
    if residual:
        add("one-gate", (3, 4), 40, 64, gates=(1, 1))
        add("a-gate-a-token", (6,), 33, 96, gates=(6,))
        add("two-leads", (2, 3, 4), 20, 48)
        add("samples", (3, 23), 130, 208)  # that end inside of a tile
        add("samples-long-k", (2, 9), 34, 64 * 64 + 16, bits=8)
    return out


def define(fmt: Format, *, low_rank: bool = False, residual: bool = False) -> Op:
    ports = [Port("q", "i8"), Port("s", "f32"), Port("w", "i32"), Port("ws", "f32"), Port("bias", "f32")]
    plain = "y_plain" if low_rank or residual else "y"
    branched = plain if not low_rank else "y_branched" if residual else "y"
    body = _GEMM % dequantize_text(fmt, "y_k") + f"  {plain} = Add (y_scaled, bias)"
    if low_rank:
        ports += [Port("t", "f32"), Port("up", "f32")]
        body += f"""
  up_t = Transpose <perm = [1, 0]> (up)
  branch = MatMul (t, up_t)
  {branched} = Add ({plain}, branch)"""
    if residual:
        ports += [Port("residual", "stream"), Port("gate", "stream")]
        body += f"""{rows_like_text("residual", "gate")}
  y_gated = Mul (gate_rows, {branched})
  y = Add (residual, y_gated)"""
    return Op(
        f"{fmt.title}Gemm{'LowRank' if low_rank else ''}{'Residual' if residual else ''}",
        inputs=tuple(ports),
        outputs=(Port("y", "stream"),),
        attributes={"bits": 8, "layout": 0, **PACKED, **STREAM_TYPE},
        shapes=(OutputRule(0, last_input=3, last_dim=0),),
        reference=partial(quant_gemm, fmt=fmt, low_rank=low_rank, residual=residual),
        body=body,
        cases=partial(gemm_cases, fmt, low_rank=low_rank, residual=residual),
    )


def dequantize_linear(w: torch.Tensor, ws: torch.Tensor, *, k: int, fmt: Format) -> torch.Tensor:
    """The float weight [N, k] of int32 words [N, words(k)] and scales [N, G]: the weight half of the `qdq` form."""
    return (unpack(w, fmt, k).reshape(*ws.shape, -1) * ws.unsqueeze(-1)).reshape(-1, k)


def _dequantize_cases(fmt: Format) -> list[Case]:
    return [
        Case(case.name, {"w": case.inputs["w"], "ws": case.inputs["ws"]}, {"k": case.inputs["q"].shape[-1]})
        for case in gemm_cases(fmt, low_rank=False, residual=False)
        if not case.name.startswith("bits")
    ]


def define_dequantize(fmt: Format) -> Op:
    return Op(
        f"{fmt.title}DequantizeLinear",
        inputs=(Port("w", "i32"), Port("ws", "f32")),
        outputs=(Port("weight", "f32"),),
        attributes={"k": 1},
        shapes=(OutputRule(0, last_dim="attribute k"),),
        reference=partial(dequantize_linear, fmt=fmt),
        body="  k_scalar = Constant <value_int: int = @k> ()\n  k_axis = Constant <value_ints = [0]> ()\n"
        "  k_1d = Unsqueeze (k_scalar, k_axis)" + dequantize_text(fmt, "k_1d"),
        cases=partial(_dequantize_cases, fmt),
        native=False,
    )


GEMMS = {fmt.name: define(fmt) for fmt in FORMATS}
LOW_RANK_GEMMS = {fmt.name: define(fmt, low_rank=True) for fmt in FORMATS}
RESIDUAL_GEMMS = {fmt.name: define(fmt, residual=True) for fmt in FORMATS}
LOW_RANK_RESIDUAL_GEMMS = {fmt.name: define(fmt, low_rank=True, residual=True) for fmt in FORMATS}
DEQUANTIZE_LINEARS = {fmt.name: define_dequantize(fmt) for fmt in FORMATS}
