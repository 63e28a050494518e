"""HadamardQuantize and what makes its input become one op: what the passes that do so share."""

from collections.abc import Sequence

import onnx_ir as ir

from dit2deploy.ops import DOMAIN, HADAMARD_QUANTIZE, Op
from dit2deploy.targets.graph import is_read_once


def quantizers(graph: ir.Graph) -> list[ir.Node]:
    """The HadamardQuantize nodes."""
    return [node for node in graph if node.domain == DOMAIN and node.op_type == HADAMARD_QUANTIZE.name]


def replace_quantizer(
    graph: ir.Graph,
    node: ir.Node,
    op: Op,
    keep: Op,
    inputs: Sequence[ir.Value],
    *,
    suffix: str,
    **own: str,
) -> None:
    """Puts a node of `op` (q, s), or, where others read the quantizer's input y too (a low-rank or Monarch branch, a
    quantizer of another width), of `keep` (q, s, y) in the place of the quantizer `node`.

    It reads `inputs` and has the quantizer's attributes beside its `own`. What made y before is left over for `tidy`.
    """
    y = node.inputs[0]
    is_kept = not is_read_once(y)
    chosen = keep if is_kept else op
    attributes = {key: attribute.value for key, attribute in node.attributes.items()}
    fused = ir.node(
        chosen.name,
        inputs,
        attributes | own,
        domain=DOMAIN,
        num_outputs=len(chosen.outputs),
        name=f"{node.name}.{suffix}",
    )
    graph.insert_before(node, fused)
    replaced = [*node.outputs, *([y] if is_kept else [])]
    for old, new in zip(replaced, fused.outputs, strict=True):
        new.name, new.type, new.shape = old.name, old.type, old.shape
        old.name = f"{old.name}.before"
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    graph.sort()  # other readers of y may come before the quantizer
