"""Attention as ONNX Runtime's own operator, com.microsoft MultiHeadAttention, for its CPU and CUDA providers.

    Softmax(MatMul(c q, c k^T)) v,  Transpose [B, H, T, D] -> [B, T, H, D],  Reshape -> [B, T, H D]

is what torch exports for scaled_dot_product_attention (c is the root of the scale). The operator goes over it by tiles
and never holds the H T L probabilities, which for FLUX.1 at 1024 pixels are 2 GB. Attention with a mask stays as it is
(the operator of older runtimes takes none that broadcasts), and so does integer attention, which is no MatMul.
"""

# onnx_ir types every name, shape and constant as optional.
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from dit2deploy.targets.graph import is_read_once

DOMAIN, NAME = "com.microsoft", "MultiHeadAttention"


@dataclass(frozen=True)
class Attention:
    """q [B, H, T, D], k [B, H, L, D], v [B, H, L, D] and the node that gives [B, T, H D]."""

    q: ir.Value
    k: ir.Value
    v: ir.Value
    scale: float
    last: ir.Node


def use_fused_attention(model: ir.Model) -> None:
    """Replaces in place all that match; shapes of heads and head sizes must be known."""
    for node in list(model.graph):
        found = _attention(node) if not node.domain and node.op_type == "Softmax" else None
        if found:
            _replace(model.graph, found)
            model.opset_imports[DOMAIN] = 1
    common.RemoveUnusedNodesPass()(model)


def _attention(softmax: ir.Node) -> Attention | None:
    scores, axis = softmax.inputs[0], softmax.attributes.get("axis")
    product = _made_by(scores, "MatMul")
    if product is None or (axis is not None and axis.as_int() not in (-1, 3)):
        return None
    (q, a), (transposed, b) = (_scaled(value) for value in product.inputs)
    k = _untransposed(transposed)
    weighted = _only_reader(softmax, "MatMul")
    heads = _only_reader(weighted, "Transpose")
    last = _only_reader(heads, "Reshape")
    if k is None or last is None or not _swaps(heads, [0, 2, 1, 3]) or weighted.inputs[0] is not softmax.outputs[0]:
        return None
    v, merged = weighted.inputs[1], last.outputs[0].shape
    known = [value.shape is not None and len(value.shape) == 4 for value in (q, k, v)]
    if not all(known) or merged is None or len(merged) != 3:
        return None
    sizes = {(value.shape[1], value.shape[3]) for value in (q, k, v)}
    ((h, d), *others) = sizes
    if others or not (isinstance(h, int) and isinstance(d, int)) or merged[2] != h * d:
        return None
    return Attention(q, k, v, a * b, last)


def _replace(graph: ir.Graph, found: Attention) -> None:
    h, d = found.q.shape[1], found.q.shape[3]
    name, (old,) = found.last.name, found.last.outputs
    shape = ir.Value(name=f"{name}.rows", shape=ir.Shape([3]), type=ir.TensorType(ir.DataType.INT64))
    shape.const_value = ir.tensor(np.array([0, 0, h * d]), name=shape.name)
    graph.initializers.add(shape)
    made, rows = [], []
    for part, value in (("q", found.q), ("k", found.k), ("v", found.v)):
        # The operator goes by tiles for [B, L, H D] alone; the transposes cancel those that made the heads.
        swapped = ir.node("Transpose", [value], {"perm": [0, 2, 1, 3]}, name=f"{name}.{part}.swap")
        merged = ir.node("Reshape", [swapped.outputs[0], shape], name=f"{name}.{part}.merge")
        swapped.outputs[0].type = merged.outputs[0].type = value.type
        made += [swapped, merged]
        rows.append(merged.outputs[0])
    fused = ir.node(NAME, rows, {"num_heads": h, "scale": found.scale}, domain=DOMAIN, name=f"{name}.attention")
    (new,) = fused.outputs
    new.name, new.type, new.shape = old.name, old.type, old.shape
    old.name = f"{old.name}.before"
    graph.insert_before(found.last, [*made, fused])
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def _made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and not node.domain and node.op_type == op_type else None


def _only_reader(node: ir.Node | None, op_type: str) -> ir.Node | None:
    """The one node that reads the node's one output, if it is of this type."""
    if node is None or not is_read_once(node.outputs[0]):
        return None
    reader = next(iter(node.outputs[0].uses())).node
    return reader if not reader.domain and reader.op_type == op_type else None


def _scaled(value: ir.Value) -> tuple[ir.Value, float]:
    """(x, c) of value = c x; c is 1 where it is no such product."""
    node = _made_by(value, "Mul")
    for index, factor in enumerate(node.inputs if node else ()):
        if factor.const_value is not None and factor.const_value.size == 1:
            return node.inputs[1 - index], float(factor.const_value.numpy().item())
    return value, 1.0


def _untransposed(value: ir.Value) -> ir.Value | None:
    """The [B, H, L, D] that `value` [B, H, D, L] is made of: by a Transpose, or as rank 3 where B is dynamic."""
    node = _made_by(value, "Transpose")
    if node is not None:
        return node.inputs[0] if _swaps(node, [0, 1, 3, 2]) else None
    outer = _made_by(value, "Reshape")
    node = _made_by(outer.inputs[0], "Transpose") if outer else None
    inner = _made_by(node.inputs[0], "Reshape") if node and _swaps(node, [0, 2, 1]) else None
    if inner is None:
        return None
    # [-1, L, D] of k's own shape: only batch and heads were merged.
    sizes = _made_by(inner.inputs[1], "Concat")
    first = sizes.inputs[0].const_value if sizes and len(sizes.inputs) == 3 else None
    return inner.inputs[0] if first is not None and first.numpy().tolist() == [-1] else None


def _swaps(node: ir.Node, perm: Sequence[int]) -> bool:
    return "perm" in node.attributes and list(node.attributes["perm"].as_ints()) == list(perm)
