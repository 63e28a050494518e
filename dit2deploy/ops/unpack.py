"""Unpacking of packed weights in PyTorch and in ONNX text: both go through the same table of a byte's digits."""

import torch

from dit2deploy.formats import Format, digit_table


def unpack(words: torch.Tensor, fmt: Format, k: int) -> torch.Tensor:
    """int32 words [N, W] to the integer weights, float32 [N, k] (exact)."""
    n = words.shape[0]
    octets = words.contiguous().view(torch.uint8).reshape(n, -1, fmt.planes, 4)
    table = torch.from_numpy(digit_table(fmt)).float()
    places = (2.0 ** torch.arange(fmt.planes)).reshape(1, 1, -1, 1, 1)
    codes = (table[octets.int()] * places).sum(2)
    return codes.reshape(n, -1)[:, :k] - fmt.offset


def dequantize_text(fmt: Format, k: str) -> str:
    """ONNX text that makes float `weight` [N, K] of ports `w` and `ws`; `k` names an int64 [1] tensor.

    A table look-up a byte: decoding through 64-bit arithmetic took 17 GB and 55 s for DiT-XL/2.
    """
    table = ", ".join(str(float(digit)) for digit in digit_table(fmt).ravel())
    places = ", ".join(str(float(1 << plane)) for plane in range(fmt.planes))
    return f"""
  word = Cast <to = 12> (w)
  u_minus_one = Constant <value_ints = [-1]> ()
  word_column = Unsqueeze (word, u_minus_one)
  shifts = Constant <value = uint32[4] {{0, 8, 16, 24}}> ()
  shifted = BitShift <direction = "RIGHT"> (word_column, shifts)
  mask = Constant <value = uint32 {{255}}> ()
  octet = BitwiseAnd (shifted, mask)
  octet_index = Cast <to = 6> (octet)
  digit_table = Constant <value = float[256, {fmt.digits_a_byte}] {{{table}}}> ()
  digits = Gather (digit_table, octet_index)
  plane_shape = Constant <value_ints = [0, -1, {fmt.planes}, {fmt.digits}]> ()
  planes = Reshape (digits, plane_shape)
  places = Constant <value = float[{fmt.planes}, 1] {{{places}}}> ()
  placed = Mul (planes, places)
  plane_axis = Constant <value_ints = [2]> ()
  codes = ReduceSum <keepdims = 0> (placed, plane_axis)
  row_shape = Constant <value_ints = [0, -1]> ()
  code_rows = Reshape (codes, row_shape)
  u_zero = Constant <value_ints = [0]> ()
  u_one = Constant <value_ints = [1]> ()
  padless = Slice (code_rows, u_zero, {k}, u_one)
  offset = Constant <value = float {{{float(fmt.offset)}}}> ()
  integers = Sub (padless, offset)
  scale_shape = Shape (ws)
  group_shape = Concat <axis = 0> (scale_shape, u_minus_one)
  grouped = Reshape (integers, group_shape)
  ws_column = Unsqueeze (ws, u_minus_one)
  scaled_weight = Mul (grouped, ws_column)
  weight = Reshape (scaled_weight, row_shape)"""
