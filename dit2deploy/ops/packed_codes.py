"""Packed codes: two codes of activations, of 4 bits each, in a byte, by attribute `packed` of quantizers and GEMMs.

Columns lie in runs of 64, of which K is a multiple. Byte i (0 .. 31) of a run holds the code of its column i in its low
half and that of column i + 32 in its high half, both in two's complement, -8 .. 7. Fragments of the tensor cores meet
the weights of a GPU's layout so as they lie, on int4 tensor cores and, half by half, on int8 ones
(plugins/ops/quant_gemm/fragments.h).
"""

import torch

RUN = 64
LARGEST = 7  # code of a quantizer


def pack_codes(q: torch.Tensor) -> torch.Tensor:
    """Codes int8 [.., K] of -8 .. 7 as int8 [.., K / 2]. Raises ValueError where K is no multiple of 64."""
    if q.shape[-1] % RUN:
        raise ValueError(f"packed codes lie in runs of {RUN} columns, which {q.shape[-1]} columns are not")
    low, high = q.unflatten(-1, (-1, 2, RUN // 2)).unbind(-2)
    return ((low & 15) | (high << 4)).flatten(-2)


def unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    """The codes int8 [.., K] of int8 [.., K / 2]."""
    halves = packed.unflatten(-1, (-1, RUN // 2))
    return torch.stack(((halves << 4) >> 4, halves >> 4), -2).flatten(-3)
