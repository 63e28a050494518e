"""GEMMs of one block that share their quantized input (q, k and v) become one GEMM and a Split.

Weights, scales and biases are concatenated along N. The low-rank factors too: the `down`s along r, so that one MatMul
makes all t; each `up` is padded with zeros where the others' t are. Padding is done by nodes, so that no zeros are
stored. A group whose layers differ in format, groups of scales or the presence of a low-rank branch becomes one GEMM of
each kind. Layers of different blocks stay apart (cross-attention's keys and values of all blocks share one input).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from dit2deploy.ops import DOMAIN, GEMMS, LOW_RANK_GEMMS
from dit2deploy.stages.export.attach import is_weight, lazy
from dit2deploy.stages.export.layers import LayerOutput

_PLAIN = {op.name for op in GEMMS.values()}
_LOW_RANK = {op.name for op in LOW_RANK_GEMMS.values()}
_WEIGHTS = slice(2, 5)  # w, ws, bias


@dataclass(frozen=True)
class Branch:
    """A low-rank branch: t = MatMul(x, Transpose(Cast(down))), and Cast(up) enters the GEMM."""

    x: ir.Value
    down: ir.Value
    up: ir.Value


def share_input(model: ir.Model, outputs: Mapping[str, LayerOutput]) -> dict[str, LayerOutput]:
    """Fuses in place; returns where each layer's output is now."""
    layer_of = {id(output.value): layer for layer, output in outputs.items()}
    groups: dict[tuple, list[ir.Node]] = {}
    for node in model.graph:
        if node.domain == DOMAIN and node.op_type in _PLAIN | _LOW_RANK:
            layer = layer_of.get(id(node.outputs[0]))
            if layer is not None and all(is_weight(value) for value in node.inputs[_WEIGHTS]):
                scales = node.inputs[3].shape[1]
                key = node.op_type, _block(layer), id(node.inputs[0]), id(node.inputs[1]), scales
                groups.setdefault(key, []).append(node)
    moved: dict[int, LayerOutput] = {}
    for nodes in groups.values():
        branches = [branch for node in nodes if (branch := _branch(node))]
        can_join = nodes[0].op_type in _PLAIN or (
            len(branches) == len(nodes) and len({id(branch.x) for branch in branches}) == 1
        )
        if len(nodes) > 1 and can_join:
            layers = [layer_of[id(node.outputs[0])] for node in nodes]
            made = _fuse(model.graph, nodes, branches, layers)
            moved |= {id(outputs[layer].value): made[layer] for layer in layers}
    return {layer: moved.get(id(output.value), output) for layer, output in outputs.items()}


def _block(layer: str) -> str:
    """The part of the name up to the first number: the block that the layer is in."""
    found = re.match(r".*?\.\d+(?=\.)", layer)
    return found.group() if found else ""


def _branch(node: ir.Node) -> Branch | None:
    """The branch of a low-rank GEMM; None where there is none or it was made in another way."""
    if node.op_type not in _LOW_RANK:
        return None
    product = node.inputs[5].producer()
    if product is None or product.op_type != "MatMul":
        return None
    down = _before(product.inputs[1], "Transpose", "Cast")
    up = _before(node.inputs[6], "Cast")
    return Branch(product.inputs[0], down, up) if is_weight(down) and is_weight(up) else None


def _before(value: ir.Value | None, *op_types: str) -> ir.Value | None:
    """What goes into a chain of one-input nodes, the last of which makes `value`."""
    for op_type in op_types:
        producer = value.producer() if value is not None else None
        if producer is None or producer.op_type != op_type:
            return None
        value = producer.inputs[0]
    return value


def _fuse(
    graph: ir.Graph, nodes: Sequence[ir.Node], branches: Sequence[Branch], layers: Sequence[str]
) -> dict[str, LayerOutput]:
    first, name = nodes[0], _joined_name(layers)

    def add(op_type: str, inputs: Sequence[ir.Value], output: str, like: ir.Value, shape, domain="", **attributes):
        node = ir.node(op_type, inputs, attributes, domain=domain, name=f"node_{output}")
        node.outputs[0].name, node.outputs[0].type = output, ir.TensorType(like.dtype)
        node.outputs[0].shape = ir.Shape(shape)
        graph.insert_before(first, node)
        return node.outputs[0]

    inputs = list(first.inputs[:2])
    for i, leaf in zip(range(2, 5), ("weight", "weight_scale", "bias"), strict=True):
        inputs.append(_concatenate(graph, f"{name}.{leaf}", [node.inputs[i] for node in nodes]))
    widths = [int(node.inputs[3].shape[0]) for node in nodes]
    if branches:
        inputs += _join_branches(graph, branches, name, first.inputs[5], add)
    y = first.outputs[0]
    lead = list(y.shape[:-1])
    bits = max(node.attributes["bits"].as_int() for node in nodes)
    attributes = {key: attribute.value for key, attribute in first.attributes.items()} | {"bits": bits}
    fused = add(first.op_type, inputs, name, y, [*lead, sum(widths)], domain=DOMAIN, **attributes)

    sizes = _constant(graph, f"{name}.split", widths)
    split = ir.node("Split", [fused, sizes], {"axis": -1}, num_outputs=len(nodes), name=f"node_{name}.split")
    graph.insert_before(first, split)
    moved, begin = {}, 0
    for node, layer, value, width in zip(nodes, layers, split.outputs, widths, strict=True):
        value.name, value.type, value.shape = f"{layer}.part", ir.TensorType(y.dtype), ir.Shape([*lead, width])
        node.outputs[0].replace_all_uses_with(value)
        graph.remove(node, safe=True)
        moved[layer] = LayerOutput(fused, begin, begin + width)
        begin += width
    return moved


def _join_branches(
    graph: ir.Graph, branches: Sequence[Branch], name: str, t: ir.Value, add: Callable
) -> list[ir.Value]:
    """t and up of the joined branch: t = x . [down; down; ..]^T, up = block diagonal of the ups. `t` is the first's."""
    down = _concatenate(graph, f"{name}.down", [branch.down for branch in branches])
    rank, k = map(int, down.shape)
    float32 = ir.DataType.FLOAT.value
    wide = add("Cast", [down], f"{name}.down.float32", t, [rank, k], to=float32)
    turned = add("Transpose", [wide], f"{name}.down.transposed", t, [k, rank], perm=[1, 0])
    joined = add("MatMul", [branches[0].x, turned], f"{name}.t", t, [*t.shape[:-1], rank])
    ups, before = [], 0
    for i, branch in enumerate(branches):
        n, own = map(int, branch.up.shape)
        wide = add("Cast", [branch.up], f"{name}.up{i}.float32", t, [n, own], to=float32)
        pads = _constant(graph, f"{name}.up{i}.pads", [0, before, 0, rank - before - own])
        ups.append(add("Pad", [wide, pads], f"{name}.up{i}", t, [n, rank], mode="constant"))
        before += own
    rows = sum(int(up.shape[0]) for up in ups)
    return [joined, add("Concat", ups, f"{name}.up", t, [rows, rank], axis=0)]


def _concatenate(graph: ir.Graph, name: str, parts: Sequence[ir.Value]) -> ir.Value:
    """An initializer that is the parts along axis 0, read when written."""
    shape = ir.Shape([sum(int(part.shape[0]) for part in parts), *parts[0].shape[1:]])
    tensors = [part.const_value for part in parts]
    value = ir.Value(name=name, type=ir.TensorType(parts[0].dtype), shape=shape)
    value.const_value = lazy(name, parts[0].dtype, shape, lambda: np.concatenate([t.numpy() for t in tensors]))
    graph.initializers.add(value)
    return value


def _constant(graph: ir.Graph, name: str, values: Sequence[int]) -> ir.Value:
    tensor = ir.tensor(np.array(values, np.int64), name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape), const_value=tensor)
    graph.initializers.add(value)
    return value


def _joined_name(layers: Sequence[str]) -> str:
    """blocks.0.attn.to_q, blocks.0.attn.to_k: blocks.0.attn.to_q+to_k; what differs is written out."""
    parts = [layer.split(".") for layer in layers]
    same = 0
    while all(len(part) > same + 1 and part[same] == parts[0][same] for part in parts):
        same += 1
    return ".".join([*parts[0][:same], "+".join(".".join(part[same:]) for part in parts)])
