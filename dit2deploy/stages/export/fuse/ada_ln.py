"""LayerNormalization, AdaLN modulation and HadamardQuantize become one op.

    LayerNormalization(x, ones) -> Mul(1 + scale) -> Add(shift) -> HadamardQuantize(qmax)

is AdaLnHadamardQuantize(x, shift, scale, eps, qmax). Where others read the modulated row too (a low-rank or Monarch
branch, a quantizer of another width) it is AdaLnHadamardQuantizeKeep, which gives them the row. Only shifts and scales
of one row a sample, [B, 1, K] to x [B, T, K], are taken; a norm with weights of its own is left alone, and so is one
whose result before the modulation has other readers.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from dit2deploy.ops import ADA_LN_HADAMARD_QUANTIZE, ADA_LN_HADAMARD_QUANTIZE_KEEP
from dit2deploy.stages.export.fuse.quantizer import quantizers, replace_quantizer
from dit2deploy.stages.export.fuse.values import dims, is_row_a_sample, operands
from dit2deploy.targets.graph import is_read_once

_EPSILON = 1e-5  # of LayerNormalization, where the attribute is not written
_LARGEST_CONSTANT = 65536  # numbers: a norm's ones are fewer


@dataclass(frozen=True)
class Modulation:
    """What makes a row: y = LayerNorm(x) (1 + scale) + shift."""

    x: ir.Value
    shift: ir.Value
    scale: ir.Value
    epsilon: float


def fuse_ada_ln(model: ir.Model) -> None:
    """Fuses in place; the nodes that are left over are `tidy`'s to remove."""
    constants: dict[float, ir.Value] = {}
    for node in quantizers(model.graph):
        found = _modulation(node.inputs[0])
        if found:
            if found.epsilon not in constants:
                constants[found.epsilon] = _constant(model.graph, found.epsilon)
            inputs = [found.x, found.shift, found.scale, constants[found.epsilon], node.inputs[1]]
            replace_quantizer(
                model.graph, node, ADA_LN_HADAMARD_QUANTIZE, ADA_LN_HADAMARD_QUANTIZE_KEEP, inputs, suffix="ada_ln"
            )


def _modulation(y: ir.Value) -> Modulation | None:
    for scaled, shift in operands(y, "Add"):
        for normal, gain in operands(scaled, "Mul") if is_read_once(scaled) else ():
            for one, scale in operands(gain, "Add"):
                norm = _plain_norm(normal)
                if norm and _is_filled(one, 1.0):
                    x, rows = norm.inputs[0], (shift, scale)
                    if all(is_row_a_sample(row, x) for row in rows) and dims(shift) == dims(scale):
                        attribute = norm.attributes.get("epsilon")
                        epsilon = attribute.as_float() if attribute else _EPSILON
                        return Modulation(x, shift, scale, epsilon)
    return None


def _plain_norm(value: ir.Value) -> ir.Node | None:
    """The LayerNormalization over the last axis, without weights of its own, that makes `value` for one reader."""
    node = value.producer()
    if node is None or node.domain or node.op_type != "LayerNormalization" or not is_read_once(value):
        return None
    x, rank = node.inputs[0], len(value.shape) if value.shape is not None else 0
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    is_plain = _is_filled(node.inputs[1], 1.0) and (bias is None or _is_filled(bias, 0.0))
    is_alone = len(node.outputs) == 1 and axis in (-1, rank - 1) and x.dtype == ir.DataType.FLOAT
    return node if is_plain and is_alone else None


def _is_filled(value: ir.Value, number: float) -> bool:
    """Whether it is a constant that holds `number` everywhere."""
    tensor = value.const_value
    return tensor is not None and tensor.size <= _LARGEST_CONSTANT and bool(np.all(tensor.numpy() == number))


def _constant(graph: ir.Graph, number: float) -> ir.Value:
    tensor = ir.tensor(np.array([number], np.float32), name=f"epsilon_{number!r}")
    value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([1]), const_value=tensor)
    graph.initializers.add(value)
    return value
