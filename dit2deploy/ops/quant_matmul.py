"""QuantMatMul: products of two quantized activations, as attention has them (Q K^T and P V)."""

import numpy as np
import torch

from dit2deploy.ops.op import STREAM_TYPE, Case, Op, OutputRule, Port

LARGEST = 127 * 127  # of a product of two codes


def quant_matmul(a: torch.Tensor, sa: torch.Tensor, b: torch.Tensor, sb: torch.Tensor) -> torch.Tensor:
    """y[.., m, n] = (sum_k a[.., m, k] b[.., n, k]) * sa[.., m] * sb[.., n]: of each head, rows against rows.

    a int8 [B, H, M, K], sa float32 [B, H, M, 1]; b int8 [B, H, N, K], sb float32 [B, H, N, 1]; codes in -127..127.
    Returns float32 [B, H, M, N]. The sum is an exact integer, so the result is the same bit for bit everywhere.
    """
    # Exact in float32 while all partial sums stay below 2**24, else in float64.
    dtype = torch.float32 if a.shape[-1] * LARGEST < 2**24 else torch.float64
    return (a.to(dtype) @ b.to(dtype).transpose(-1, -2)).float() * sa * sb.transpose(-1, -2)


_BODY = """
  b_turned = Transpose <perm = [0, 1, 3, 2]> (b)
  sb_turned = Transpose <perm = [0, 1, 3, 2]> (sb)
  sums = MatMulInteger (a, b_turned)
  product = Cast <to = 1> (sums)
  scaled = Mul (product, sa)
  y = Mul (scaled, sb_turned)"""


def cases() -> list[Case]:
    """Odd shapes, K with tails, one token, none, cross-attention's M and N, extremes of codes and steps."""
    out = []

    def add(name: str, lead: tuple[int, int], m: int, n: int, k: int, *, fill: str = "random") -> None:
        rng = np.random.default_rng(len(out))
        inputs = {
            "a": rng.integers(-127, 127, (*lead, m, k), endpoint=True).astype(np.int8),
            "sa": rng.uniform(0.01, 0.1, (*lead, m, 1)).astype(np.float32),
            "b": rng.integers(-127, 127, (*lead, n, k), endpoint=True).astype(np.int8),
            "sb": rng.uniform(0.01, 0.1, (*lead, n, 1)).astype(np.float32),
        }
        if fill == "largest":
            inputs["a"][:], inputs["b"][:] = 127, -127
        elif fill == "nan":
            inputs["a"][0, 0, 0], inputs["sa"][0, 0, 0] = 0, np.nan
            inputs["sb"][0, 0, 1] = np.inf
        out.append(Case(name, inputs))

    add("scores", (2, 3), 16, 16, 16)
    add("values", (2, 3), 16, 32, 64)
    add("tails", (1, 2), 7, 37, 77)
    add("tiny", (1, 1), 1, 1, 1)
    add("one-token", (2, 1), 1, 9, 33)
    add("no-item", (0, 3), 4, 5, 16)
    add("no-token", (2, 2), 0, 5, 16)
    add("dit-xl-scores", (1, 2), 70, 256, 72)
    add("dit-xl-values", (1, 2), 70, 72, 256)
    add("video", (1, 1), 3, 5, 4100)
    add("largest", (1, 1), 3, 20, 5000, fill="largest")
    add("nan", (1, 2), 5, 6, 24, fill="nan")
    return out


QUANT_MATMUL = Op(
    "QuantMatMul",
    inputs=(Port("a", "i8"), Port("sa", "f32"), Port("b", "i8"), Port("sb", "f32")),
    outputs=(Port("y", "stream"),),
    attributes=STREAM_TYPE,
    shapes=(OutputRule(0, last_input=2, last_dim=2),),
    reference=quant_matmul,
    body=_BODY,
    cases=cases,
)
