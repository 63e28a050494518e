"""GEMMs of one block that share their quantized input (q, k and v) become one GEMM and a Split.

Weights, scales and biases are concatenated along N. The low-rank factors too: the `down`s along r, so that one MatMul
makes all t; each `up` is padded with zeros where the others' t are. Padding is done by nodes, so that no zeros are
stored. A group whose layers differ in format, groups of scales or the presence of a low-rank branch becomes one GEMM of
each kind. Layers of different blocks stay apart (cross-attention's keys and values of all blocks share one input).
"""

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from dit2deploy.ops import DOMAIN, GEMMS, LOW_RANK_GEMMS
from dit2deploy.stages.export.attach import is_weight, lazy
from dit2deploy.stages.export.layers import LayerOutput

_PLAIN = {op.name for op in GEMMS.values()}
_LOW_RANK = {op.name for op in LOW_RANK_GEMMS.values()}
_WEIGHTS = slice(2, 5)  # w, ws, bias


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
    moved = dict(outputs)
    for nodes in groups.values():
        if len(nodes) > 1 and (nodes[0].op_type in _PLAIN or _share_low_rank_input(nodes)):
            layers = [layer_of[id(node.outputs[0])] for node in nodes]
            moved |= _fuse(model.graph, nodes, layers)
    return moved


def _block(layer: str) -> str:
    """The part of the name up to the first number: the block that the layer is in."""
    found = re.match(r".*?\.\d+(?=\.)", layer)
    return found.group() if found else ""


def _down(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """(x, down) of t = MatMul(x, Transpose(Cast(down))); None where t was made in another way."""
    product = node.inputs[5].producer()
    if product is None or product.op_type != "MatMul":
        return None
    value = product.inputs[1]
    for op_type in ("Transpose", "Cast"):
        producer = value.producer()
        if producer is None or producer.op_type != op_type:
            return None
        value = producer.inputs[0]
    return (product.inputs[0], value) if is_weight(value) else None


def _up(node: ir.Node) -> ir.Value | None:
    """The stored factor of Cast(up)."""
    cast = node.inputs[6].producer()
    return cast.inputs[0] if cast is not None and cast.op_type == "Cast" and is_weight(cast.inputs[0]) else None


def _share_low_rank_input(nodes: Sequence[ir.Node]) -> bool:
    downs = [_down(node) for node in nodes]
    return all(downs) and all(map(_up, nodes)) and len({id(x) for x, _ in downs}) == 1


def _fuse(graph: ir.Graph, nodes: Sequence[ir.Node], layers: Sequence[str]) -> dict[str, LayerOutput]:
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
    widths = [int(output.shape[0]) for output in (node.inputs[3] for node in nodes)]
    if first.op_type in _LOW_RANK:
        inputs += _join_low_rank(graph, nodes, name, add)
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


def _join_low_rank(graph: ir.Graph, nodes: Sequence[ir.Node], name: str, add: Callable) -> list[ir.Value]:
    """t and up of the joined branch: t = x . [down; down; ..]^T, up = block diagonal of the ups."""
    x, t = _down(nodes[0])[0], nodes[0].inputs[5]
    down = _concatenate(graph, f"{name}.down", [_down(node)[1] for node in nodes])
    rank, k = map(int, down.shape)
    float32 = ir.DataType.FLOAT.value
    wide = add("Cast", [down], f"{name}.down.float32", t, [rank, k], to=float32)
    turned = add("Transpose", [wide], f"{name}.down.transposed", t, [k, rank], perm=[1, 0])
    joined = add("MatMul", [x, turned], f"{name}.t", t, [*t.shape[:-1], rank])
    ups, before = [], 0
    for i, node in enumerate(nodes):
        up = _up(node)
        n, own = map(int, up.shape)
        wide = add("Cast", [up], f"{name}.up{i}.float32", t, [n, own], to=float32)
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
