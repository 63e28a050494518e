"""A GEMM, the gate of its output and the sum with the residual become one op.

    y = <Format>Gemm[LowRank](..),  Add(residual, Mul(gate, y))

is <Format>Gemm[LowRank]Residual(.., residual, gate), as behind the attention and the MLP of DiT, PixArt, SD3, FLUX and
Wan. Only a gate of one row a sample, [B, 1, N] to y [B, T, N], and a residual of y's own shape are taken; a y that
others read, as that of joined layers is, is left alone. (Z-Image normalizes y first.)
"""

import onnx_ir as ir

from dit2deploy.ops import DOMAIN, GEMMS, LOW_RANK_GEMMS, LOW_RANK_RESIDUAL_GEMMS, RESIDUAL_GEMMS
from dit2deploy.stages.export.fuse.values import dims, is_row_a_sample, operands
from dit2deploy.targets.graph import JOINED, is_read_once

_RESIDUAL = {GEMMS[name].name: op.name for name, op in RESIDUAL_GEMMS.items()}
_RESIDUAL |= {LOW_RANK_GEMMS[name].name: op.name for name, op in LOW_RANK_RESIDUAL_GEMMS.items()}


def fuse_residual(model: ir.Model) -> None:
    """Fuses in place; the nodes that are left over are `tidy`'s to remove.

    The new op's output is named as the GEMM's was, and JOINED. The GEMM's own output is no value of the graph any more:
    what asks for it by its name gets it from a GEMM without residual (`targets.graph.add_outputs`).
    """
    for node in list(model.graph):
        if node.domain or node.op_type != "Add" or node.outputs[0].is_graph_output():
            continue
        for gated, residual in operands(node.outputs[0], "Add"):
            found = _gemm(gated, residual)
            if found:
                _replace(model.graph, node, *found, residual)
                break


def _gemm(gated: ir.Value, residual: ir.Value) -> tuple[ir.Node, ir.Value] | None:
    """The GEMM y and the gate of `gated` = gate * y, where all may be one op."""
    for gate, y in operands(gated, "Mul") if is_read_once(gated) else ():
        node = y.producer()
        if node is None or node.domain != DOMAIN or node.op_type not in _RESIDUAL or not is_read_once(y):
            continue
        is_float = residual.dtype == gate.dtype == ir.DataType.FLOAT
        if is_float and dims(residual) == dims(y) and is_row_a_sample(gate, y):
            return node, gate
    return None


def _replace(graph: ir.Graph, add: ir.Node, gemm: ir.Node, gate: ir.Value, residual: ir.Value) -> None:
    attributes = {key: attribute.value for key, attribute in gemm.attributes.items()}
    name = f"{gemm.name}.residual"
    fused = ir.node(_RESIDUAL[gemm.op_type], [*gemm.inputs, residual, gate], attributes, domain=DOMAIN, name=name)
    (new,), (old,) = fused.outputs, add.outputs
    new.name, new.type, new.shape = f"{gemm.outputs[0].name}{JOINED}", old.type, old.shape
    graph.insert_before(add, fused)
    old.replace_all_uses_with(new)
    graph.remove(add, safe=True)
