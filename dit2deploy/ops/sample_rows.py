"""Rows that belong to samples, as AdaLN's shift, scale and gate: what they are to the tokens, in PyTorch and ONNX."""

import torch


def rows_like(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """rows [.., K], R in all, as [.., K] over the rows of x: R divides their number M, row i has rows[i // (M / R)]."""
    k = x.shape[-1]
    rows = rows.reshape(-1, k)
    if len(rows) == 1 or x.numel() == 0:
        return rows[:1].expand_as(x)
    return rows.repeat_interleave(x.numel() // k // len(rows), 0).reshape(x.shape)


def rows_like_text(x: str, *names: str) -> str:
    """ONNX text that makes `NAME_rows`, of x's shape, of each port NAME."""
    return f"""
  r_minus_one = Constant <value_ints = [-1]> ()
  r_axis1 = Constant <value_ints = [1]> ()
  r_full = Shape ({x})
  r_lead = Shape <start = 0, end = -1> ({x})
  r_k = Shape <start = -1> ({x})
  r_count = ReduceProd <keepdims = 1> (r_lead)
  r_table = Concat <axis = 0> (r_minus_one, r_k)""" + "".join(
        f"""
  r_{name}_table = Reshape ({name}, r_table)
  r_{name}_count = Shape <start = 0, end = 1> (r_{name}_table)
  r_{name}_repeats = Div (r_count, r_{name}_count)
  r_{name}_runs = Unsqueeze (r_{name}_table, r_axis1)
  r_{name}_to = Concat <axis = 0> (r_{name}_count, r_{name}_repeats, r_k)
  r_{name}_expanded = Expand (r_{name}_runs, r_{name}_to)
  {name}_rows = Reshape <allowzero = 1> (r_{name}_expanded, r_full)"""
        for name in names
    )
