"""Nodes that compute the same become one, weights compared by content.

DiT's converted checkpoints hold one timestep and class embedder 28 times, once a block: diffusers' module has it there,
the original has a single one. (onnx_ir's pass compares weights by identity.)
"""

import hashlib
from collections.abc import Hashable, Mapping

import onnx_ir as ir

from dit2deploy.stages.export.attach import is_weight
from dit2deploy.stages.export.layers import LayerOutput


def merge_equal(model: ir.Model, outputs: Mapping[str, LayerOutput]) -> dict[str, LayerOutput]:
    """Merges in place; returns where each layer's output is now: layers may share one.

    A weight is only read where two nodes differ in nothing else, and then once: the layers of blocks, whose inputs
    differ, cost nothing. What is left over (a weight's transpose) is `tidy`'s to remove.
    """
    merger = _Merger()
    moved: dict[int, ir.Value] = {}
    for node in model.graph:
        kept = merger.kept_for(node)
        if kept is not None:
            for old, new in zip(node.outputs, kept.outputs, strict=True):
                old.replace_all_uses_with(new, replace_graph_outputs=True)
                moved[id(old)] = new
            model.graph.remove(node, safe=True)
    return {
        layer: LayerOutput(moved.get(id(output.value), output.value), output.begin, output.end)
        for layer, output in outputs.items()
    }


class _Merger:
    """Sees the nodes in execution order."""

    def __init__(self) -> None:
        self._constant: set[ir.Value] = set()  # computed of weights alone, such as the transpose of one
        self._first: dict[Hashable, ir.Node] = {}  # of the nodes that may differ in the contents of weights only
        self._kept: dict[Hashable, ir.Node] = {}  # of those that do differ
        self._contents: dict[ir.Value, bytes] = {}

    def kept_for(self, node: ir.Node) -> ir.Node | None:
        """The node before that computes the same, if there is one."""
        if all(value is None or self._is_constant(value) for value in node.inputs):
            self._constant.update(node.outputs)
            return None
        told = self._told(node, exact=False)
        if told is None:
            return None
        first = self._first.setdefault(told, node)
        if first is node:
            return None
        self._kept.setdefault(self._told(first, exact=True), first)
        kept = self._kept.setdefault(self._told(node, exact=True), node)
        return None if kept is node else kept

    def _is_constant(self, value: ir.Value) -> bool:
        return is_weight(value) or value in self._constant

    def _told(self, node: ir.Node, *, exact: bool) -> Hashable | None:
        """Op, attributes and inputs; None where an attribute is more than numbers and texts."""
        attributes = []
        for name, attribute in sorted(node.attributes.items()):
            if attribute.type in (ir.AttributeType.TENSOR, ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
                return None
            attributes.append((name, repr(attribute.value)))
        inputs = tuple(value if value is None else self._identity(value, exact=exact) for value in node.inputs)
        return node.op_identifier(), len(node.outputs), tuple(attributes), inputs

    def _identity(self, value: ir.Value, *, exact: bool) -> Hashable:
        """The value itself; for one that is made of weights how it is made, of weights dtype and shape, or contents."""
        if is_weight(value):
            return self._content(value) if exact else (value.dtype, tuple(value.shape))
        node = value.producer()
        if value in self._constant and node is not None:
            return node.outputs.index(value), self._told(node, exact=exact)
        return value

    def _content(self, value: ir.Value) -> bytes:
        if value not in self._contents:
            self._contents[value] = hashlib.sha256(value.const_value.numpy()).digest()
        return self._contents[value]
