"""MonarchAdd: a Monarch branch (TreeQ's GMB) beside what it is added to, in one op."""

import numpy as np
import torch

from dit2deploy.ops.op import STREAM_TYPE, Case, Op, OutputRule, Port


def monarch_add(plain: torch.Tensor, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """plain + M x, float32 [.., N], for the block-structured M of the factors; plain [.., N] and x [.., K] float32.

    down float32 [K, r, B] and up float32 [A, r, N] for A blocks of inputs, B of outputs and rank r a block, as
    quantizers/monarch.py lays them out:
        z[m, a, i, b] = sum over k of block a of x[m, k] down[k, i, b]
        y[m, o] = plain[m, o] + sum_(a, i) z[m, a, i, o % B] up[a, i, o]
    which is methods.md 4.3 (https://arxiv.org/abs/2204.00595 for r = 1; r [inferred] from "general"), its factors
    turned so that kernels read them in place and the permutation between them is a way of counting.
    """
    (k, rank, b), (a, _, n) = down.shape, up.shape
    blocks = x.reshape(-1, a, k // a).transpose(0, 1)  # [A, M, K / A]
    z = (blocks @ down.reshape(a, k // a, -1)).reshape(a, -1, rank, b)
    z = z.permute(3, 1, 0, 2).reshape(b, -1, a * rank)  # [B, M, A rank]
    added = z @ up.reshape(a * rank, n // b, b).permute(2, 0, 1)  # [B, M, N / B]
    return plain + added.permute(1, 2, 0).reshape(plain.shape)


# (allowzero: the last Reshape of an empty result must not take its own 0 for "as it was".)
_BODY = """
  k = Shape <start = 0, end = 1> (down)
  rank = Shape <start = 1, end = 2> (down)
  b = Shape <start = 2, end = 3> (down)
  a = Shape <start = 0, end = 1> (up)
  n = Shape <start = 2, end = 3> (up)
  rank_a = Mul (rank, a)
  rank_b = Mul (rank, b)
  p = Div (k, a)
  s = Div (n, b)
  lead = Shape <start = 0, end = -1> (x)
  m = ReduceProd <keepdims = 1> (lead)
  cut_shape = Concat <axis = 0> (m, a, p)
  cut = Reshape <allowzero = 1> (x, cut_shape)
  blocks = Transpose <perm = [1, 0, 2]> (cut)
  down_shape = Concat <axis = 0> (a, p, rank_b)
  down_blocks = Reshape (down, down_shape)
  z_rows = MatMul (blocks, down_blocks)
  z_shape = Concat <axis = 0> (a, m, rank, b)
  z_cut = Reshape <allowzero = 1> (z_rows, z_shape)
  z_dealt = Transpose <perm = [3, 1, 0, 2]> (z_cut)
  dealt_shape = Concat <axis = 0> (b, m, rank_a)
  z = Reshape <allowzero = 1> (z_dealt, dealt_shape)
  up_shape = Concat <axis = 0> (rank_a, s, b)
  up_cut = Reshape (up, up_shape)
  up_blocks = Transpose <perm = [2, 0, 1]> (up_cut)
  added_blocks = MatMul (z, up_blocks)
  added_dealt = Transpose <perm = [1, 2, 0]> (added_blocks)
  out_shape = Shape (plain)
  added = Reshape <allowzero = 1> (added_dealt, out_shape)
  y = Add (plain, added)"""


def cases() -> list[Case]:
    """Square and oblong grids, one block, one token, none, tails of every vector width, NaN in a row."""
    out = []

    def add(name: str, lead: tuple[int, ...], n: int, k: int, grid: tuple[int, int, int]) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(len(out))
        a, b, rank = grid
        shapes = {"plain": (*lead, n), "x": (*lead, k), "down": (k, rank, b), "up": (a, rank, n)}
        inputs = {port: rng.standard_normal(shape).astype(np.float32) for port, shape in shapes.items()}
        out.append(Case(name, inputs))
        return inputs

    add("square", (2, 9), 48, 64, (4, 4, 2))
    add("oblong", (19,), 60, 48, (2, 3, 3))
    add("one-block", (5,), 33, 40, (1, 1, 6))
    add("one-output-block", (3, 3), 20, 96, (8, 1, 1))
    add("one-input-block", (17,), 96, 20, (1, 8, 1))
    add("one-token", (1,), 24, 36, (3, 2, 1))
    add("no-token", (0, 4), 24, 36, (3, 2, 1))
    add("odd", (7,), 35, 77, (7, 5, 2))
    add("uneven", (38,), 84, 90, (6, 12, 7))
    add("wide", (3,), 22, 1200, (2, 1, 11))
    add("classical", (33,), 64, 64, (8, 8, 1))
    add("nan-row", (6,), 24, 36, (3, 2, 1))["x"][2, 5] = np.nan
    add("dit-fc1", (65,), 768, 192, (4, 4, 3))
    add("dit-fc2", (65,), 192, 768, (12, 12, 1))
    add("dit-xl", (6,), 1152, 1152, (4, 4, 8))
    return out


MONARCH_ADD = Op(
    "MonarchAdd",
    inputs=(Port("plain", "stream"), Port("x", "stream"), Port("down", "f32"), Port("up", "f32")),
    outputs=(Port("y", "stream"),),
    attributes=STREAM_TYPE,
    shapes=(OutputRule(0),),
    reference=monarch_add,
    body=_BODY,
    cases=cases,
)
