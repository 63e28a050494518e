"""Half precision in ONNX graphs: matrix products alone, or all activations; casts stand where types meet.

Weights are neither read nor changed: what takes one in another type reads it through a cast, which runtimes fold.
Masks that are added to scores are bounded on the way: the lowest number of float32 is -inf in half precision, and a row
of nothing else gives NaN.
"""

# onnx_ir types every name, shape and producer as optional.
# pyright: reportArgumentType=false

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from dit2deploy.artefacts.bundle import Thresholds
from dit2deploy.base.errors import Misuse
from dit2deploy.targets import kernel
from dit2deploy.targets.graph import DOMAIN, OF_HALVES

FLOAT32, HALVES = "float32", {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
FLOATS = (FLOAT32, *HALVES)
_SIGNIFICANDS = {"float16": 11, "bfloat16": 8}  # bits, the leading one included
_PRODUCTS = ("MatMul", "Gemm", "Conv", "Einsum", "MultiHeadAttention")
# What moves values or makes one of each, and loses nothing in half precision that its inputs had: in the type of its
# inputs. All else stays float32: statistics (norms, reductions, powers), angles, and what comes before them.
_FOLLOWING = (
    *("Concat", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Slice", "Split", "Squeeze", "Tile"),
    *("Transpose", "Unsqueeze", "Where", "Add", "Sub", "Mul", "Div", "Neg", "Sigmoid", "Tanh", "Erf", "Gelu"),
    "Softmax",
)
_OF_ANY_TYPE = ("Cast", "Shape", "Size")
_MOVING = ("Expand", "Identity", "Reshape", "Slice", "Squeeze", "Tile", "Transpose", "Unsqueeze")

# Types of the float inputs and outputs of a node, by position; None: as they are.
_Types = tuple[list[ir.DataType | None], list[ir.DataType]]


def floats_of(target: str, options: Mapping[str, Any]) -> str:
    """Option `floats` of a target; Misuse for what is none of FLOATS."""
    floats = options.get("floats", FLOAT32)
    if floats not in FLOATS:
        raise Misuse(f"target {target} knows no floats {floats!r}.", f"Known: {', '.join(FLOATS)}.")
    return floats


def thresholds_of(floats: str) -> Thresholds | None:
    """Of engines whose activations are of that type; None: the bundle's."""
    return Thresholds.of_significand(_SIGNIFICANDS[floats]) if floats in HALVES else None


def use_half_products(model: ir.Model) -> None:
    """Every matrix product and convolution in float16: values beyond 65504 overflow; all else stays float32."""
    _retype(model.graph, lambda node: _uniform(node, ir.DataType.FLOAT16 if _is(node, _PRODUCTS) else _SINGLE))


def use_half_activations(model: ir.Model, floats: str) -> None:
    """Products and activations in a type of HALVES, our ops' among them; inputs and outputs of the graph stay float32.

    The function bodies of our ops, which are in float32, must not be what runs.
    """
    half = HALVES[floats]
    native = {entry["name"]: entry for entry in kernel.describe()}

    def types(node: ir.Node) -> _Types:
        if node.domain == DOMAIN and node.op_type in native:
            entry = native[node.op_type]
            ports = entry["inputs"], entry["outputs"]
            inputs, outputs = ([half if port["dtype"] == "stream" else _SINGLE for port in side] for side in ports)
            if half in (*inputs, *outputs):
                node.attributes["dtype"] = ir.AttrInt64("dtype", half.value)
            return inputs, outputs
        follows = _is(node, _FOLLOWING) and any(value is not None and value.dtype == half for value in node.inputs)
        return _uniform(node, half if follows or _is(node, _PRODUCTS) else _SINGLE)

    _retype(model.graph, types)


def name_halves(model: ir.Model) -> None:
    """Gives our ops of float16 activations the names that they have in ONNX Runtime."""
    for node in model.graph:
        dtype = node.attributes.get("dtype") if node.domain == DOMAIN else None
        if dtype is not None and dtype.as_int() == HALVES["float16"].value:
            node.op_type += OF_HALVES


_SINGLE = ir.DataType.FLOAT


def _is(node: ir.Node, names: Iterable[str]) -> bool:
    return node.domain != DOMAIN and node.op_type in names


def _uniform(node: ir.Node, dtype: ir.DataType) -> _Types:
    return [None if _is(node, _OF_ANY_TYPE) else dtype] * len(node.inputs), [dtype] * len(node.outputs)


def _retype(graph: ir.Graph, types: Callable[[ir.Node], _Types]) -> None:
    """Gives the floats of every node, in the order of the graph, the types that it asks for."""
    given, casts = [value.name for value in graph.outputs], {}
    floats = {value for value in _values(graph) if value.dtype == _SINGLE}
    for node in list(graph):
        inputs, outputs = types(node)
        for index, (value, dtype) in enumerate(zip(node.inputs, inputs, strict=True)):
            if value in floats and dtype is not None and value.dtype != dtype:
                node.replace_input_with(index, _cast(graph, node, value, dtype, casts))
        for value, dtype in zip(node.outputs, outputs, strict=True):
            if value in floats:
                value.dtype = dtype
    for index, name in enumerate(given):
        value = graph.outputs[index]
        if value in floats and value.dtype != _SINGLE:
            value.name = f"{name}/{value.dtype.name.lower()}"
            cast = _cast(graph, None, value, _SINGLE, casts)
            cast.name = name
            graph.outputs[index] = cast


def _cast(
    graph: ir.Graph, reader: ir.Node | None, value: ir.Value, dtype: ir.DataType, casts: dict[tuple, ir.Value]
) -> ir.Value:
    """`value` in that type: the one that it was cast from, or a cast before its first reader (None: at the end)."""
    before = value.producer()
    if before is not None and before.op_type == "Cast" and before.inputs[0].dtype == dtype:
        return before.inputs[0]
    if (value, dtype) not in casts:
        name, source = f"{value.name}/{dtype.name.lower()}", value
        if dtype in HALVES.values() and _holds_more(value, dtype):
            source = _bounded(graph, reader, value, dtype)
        node = ir.node("Cast", [source], {"to": dtype.value}, name=name)
        (made,) = node.outputs
        made.name, made.dtype, made.shape = name, dtype, value.shape
        graph.append(node) if reader is None else graph.insert_before(reader, node)
        casts[value, dtype] = made
    return casts[value, dtype]


def _largest(half: ir.DataType) -> float:
    return float(ml_dtypes.finfo(half.numpy()).max)


def _holds_more(value: ir.Value, half: ir.DataType) -> bool:
    """Whether it is a mask, chosen or scaled by a finite constant that half precision has no number for."""
    node = value.producer()
    while node is not None and _is(node, _MOVING):
        node = node.inputs[0].producer()
    if node is None or not _is(node, ("Where", "Mul")):
        return False
    constants = (source.const_value for source in node.inputs)
    numbers = [
        abs(float(constant.numpy().item())) for constant in constants if constant is not None and constant.size == 1
    ]
    return any(_largest(half) < number < np.inf for number in numbers)


def _bounded(graph: ir.Graph, reader: ir.Node | None, value: ir.Value, half: ir.DataType) -> ir.Value:
    """Within half of what the type holds: scores are added to it, and the sum must be finite too."""
    limits = []
    for name, number in (("least", -_largest(half) / 2), ("most", _largest(half) / 2)):
        limit = ir.Value(name=f"{value.name}/{name}", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.FLOAT))
        limit.const_value = ir.tensor(np.float32(number), name=limit.name)
        graph.initializers.add(limit)
        limits.append(limit)
    node = ir.node("Clip", [value, *limits], name=f"{value.name}/bounded")
    (made,) = node.outputs
    made.name, made.dtype, made.shape = node.name, value.dtype, value.shape
    graph.append(node) if reader is None else graph.insert_before(reader, node)
    return made


def _values(graph: ir.Graph) -> Iterable[ir.Value]:
    """All values; Misuse where the file does not tell the type of one."""
    values = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    for value in values:
        if value.dtype is None and value.name:
            raise Misuse(
                f"value {value.name}: the ONNX file does not tell its type.",
                "Make the file anew with `dit2deploy export`.",
            )
    return values
