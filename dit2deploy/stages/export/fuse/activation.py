"""An activation, gated or not, and HadamardQuantize become one op.

    Gelu(x, approximate="tanh") or Mul(x, Sigmoid(x)), SiLU -> HadamardQuantize(qmax)

is ActivationHadamardQuantize(x, qmax), as in the MLPs of most families and before modulations;

    Mul(activation(x), factor) -> HadamardQuantize(qmax)

is GatedActivationHadamardQuantize(x, factor, qmax), as in SwiGLU. Where others read the activated row too it is the op
with Keep, which gives them the row. The exact form of GELU, by erf, is left alone, and so is a factor of another shape.
"""

from dataclasses import dataclass

import onnx_ir as ir

from dit2deploy.ops import (
    ACTIVATION_HADAMARD_QUANTIZE,
    ACTIVATION_HADAMARD_QUANTIZE_KEEP,
    GATED_ACTIVATION_HADAMARD_QUANTIZE,
    GATED_ACTIVATION_HADAMARD_QUANTIZE_KEEP,
)
from dit2deploy.stages.export.fuse.quantizer import quantizers, replace_quantizer
from dit2deploy.stages.export.fuse.values import dims, operands

_PLAIN = ACTIVATION_HADAMARD_QUANTIZE, ACTIVATION_HADAMARD_QUANTIZE_KEEP
_GATED = GATED_ACTIVATION_HADAMARD_QUANTIZE, GATED_ACTIVATION_HADAMARD_QUANTIZE_KEEP


@dataclass(frozen=True)
class Activated:
    """y = activation(x)."""

    x: ir.Value
    activation: str


def fuse_activation(model: ir.Model) -> None:
    """Fuses in place; the nodes that are left over are `tidy`'s to remove."""
    for node in quantizers(model.graph):
        y, qmax = node.inputs
        if found := _activated(y):
            ops, inputs = _PLAIN, [found.x, qmax]
        elif gated := _gated(y):
            found, factor = gated
            ops, inputs = _GATED, [found.x, factor, qmax]
        else:
            continue
        replace_quantizer(model.graph, node, *ops, inputs, suffix="activation", activation=found.activation)


def _activated(y: ir.Value) -> Activated | None:
    node = y.producer()
    if node is None or node.domain:
        return None
    if node.op_type == "Gelu":
        form = node.attributes.get("approximate")
        is_tanh = form is not None and form.as_string() == "tanh"
        return Activated(node.inputs[0], "gelu-tanh") if is_tanh and _is_float(node.inputs[0]) else None
    for x, gate in operands(y, "Mul"):
        sigmoid = gate.producer()
        is_sigmoid = sigmoid is not None and not sigmoid.domain and sigmoid.op_type == "Sigmoid"
        if is_sigmoid and sigmoid.inputs[0] is x and _is_float(x):
            return Activated(x, "silu")
    return None


def _gated(y: ir.Value) -> tuple[Activated, ir.Value] | None:
    """What y = activation(x) factor is made of."""
    for active, factor in operands(y, "Mul"):
        found = _activated(active)
        if found and _is_same_shape(factor, found.x):
            return found, factor
    return None


def _is_float(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.FLOAT


def _is_same_shape(a: ir.Value, b: ir.Value) -> bool:
    return bool(dims(a)) and None not in dims(a) and dims(a) == dims(b)
