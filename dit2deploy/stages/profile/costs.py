"""What a node must do at least: multiply-accumulates, and bytes read and written once, from its shapes."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from dit2deploy.targets.graph import GEMM_NAME, OF_HALVES, UP

Port = tuple[str, list[int]]  # ONNX Runtime's name of the dtype, and the shape

_BYTES = {
    "float": 4,
    "double": 8,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "uint64": 8,
    "int32": 4,
    "uint32": 4,
    "int16": 2,
    "uint16": 2,
}


@dataclass(frozen=True)
class Cost:
    """`macs` of the weights' precision; `float_macs` beside them (low-rank branch, or a float node's own)."""

    macs: int
    float_macs: int
    bytes: int


def cost_of(op: str, inputs: Sequence[Port], outputs: Sequence[Port]) -> Cost:
    """Of one node. Nodes that only move or map values have no MACs."""
    moved = sum(prod(shape) * _BYTES.get(dtype, 1) for dtype, shape in (*inputs, *outputs))
    shapes = [shape for _, shape in inputs]
    out = outputs[0][1] if outputs else []
    if (gemm := GEMM_NAME.fullmatch(op)) and shapes and shapes[0]:
        rank = shapes[UP][-1] if gemm["low_rank"] else 0
        return Cost(prod(out) * shapes[0][-1], prod(out) * rank, moved)
    if op.removesuffix(OF_HALVES) == "MonarchAdd" and len(shapes) == 4:
        return Cost(0, prod(out[:-1]) * (prod(shapes[2]) + prod(shapes[3])), moved)
    if op == "MatMulInteger":
        return Cost(prod(out) * shapes[0][-1], 0, moved)
    if op in ("MatMul", "FusedMatMul", "Gemm") and len(shapes) > 1 and shapes[0] and out:
        # K is what both operands have beside the rows and columns of the output; a transposed operand keeps the count.
        k = prod(shapes[0]) * out[-1] // max(1, prod(out)) if prod(out) else 0
        return Cost(0, prod(out) * k, moved)
    return Cost(0, 0, moved)
