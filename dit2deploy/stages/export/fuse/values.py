"""What the fusing passes ask about the values of a graph."""

import onnx_ir as ir


def operands(value: ir.Value, op_type: str) -> list[tuple[ir.Value, ir.Value]]:
    """The two inputs of the `op_type` node that makes `value`, in both orders; empty where another op makes it."""
    node = value.producer()
    if node is None or node.domain or node.op_type != op_type:
        return []
    a, b = node.inputs
    return [(a, b), (b, a)]


def dims(value: ir.Value) -> list[int | str | None]:
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape] if value.shape is not None else []


def is_row_a_sample(row: ir.Value, x: ir.Value) -> bool:
    """Whether `row` is [.., 1, K] and else of x's dims, or of ones: broadcasting is then what our ops do with it."""
    rows, full = dims(row), dims(x)
    if len(rows) != len(full) or len(full) < 2 or rows[-2:] != [1, full[-1]] or None in (*rows, *full):
        return False
    return rows[:-2] == full[:-2] or set(rows[:-2]) <= {1}
