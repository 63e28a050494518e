"""What targets do to ONNX files: lay weights out for kernels, write them as one data file, expose values."""

# onnx_ir types every name, shape and constant as optional.
# pyright: reportArgumentType=false, reportReturnType=false

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from dit2deploy.artefacts.onnx_model import DATA, OnnxModel
from dit2deploy.base.disk import writing
from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import whole_file, write_bytes
from dit2deploy.base.progress import note, track
from dit2deploy.formats import by_name
from dit2deploy.targets import kernel

DOMAIN = "dit2deploy"
# Ends the names of ONNX Runtime's ops of float16 activations (plugins/adapters/ort.cc).
OF_HALVES = "Float16"
# Names of the GEMM ops: format, with a low-rank branch, with gate and residual (dit2deploy/ops/quant_gemm.py).
GEMM_NAME = re.compile(rf"(?P<format>\w+)Gemm(?P<low_rank>LowRank)?(?P<residual>Residual)?(?:{OF_HALVES})?")
# Their first ports, by position: T and UP are a low-rank branch's; residual and gate come last.
Q, S, W, WS, BIAS, T, UP = range(7)
# A GEMM with a residual makes the value LAYER + JOINED; the layer's own output, before gate and residual, is nowhere.
JOINED = ".joined"
_INLINE = 256  # bytes: smaller tensors stay in the model file, where runtimes need shapes and axes
_PAGE, _LINE = 4096, 64


def is_gemm(node: ir.Node) -> bool:
    return node.domain == DOMAIN and GEMM_NAME.fullmatch(node.op_type) is not None


def weight_format(node: ir.Node) -> str:
    """Name of the format whose packed words a node of our domain reads; "" where it reads none."""
    if found := GEMM_NAME.fullmatch(node.op_type):
        return found["format"].lower()
    name = node.op_type.removesuffix("DequantizeLinear")
    return "" if name == node.op_type else name.lower()


def is_read_once(value: ir.Value) -> bool:
    """By one input of one node, and by nobody outside of the graph."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def columns_of(node: ir.Node) -> int:
    """K of a GEMM node: the last dim of its input q.

    Raises Misuse where the file does not say.
    """
    shape = node.inputs[Q].shape if node.inputs[Q] is not None else None
    if shape is None or not isinstance(shape[-1], int):
        raise Misuse(
            f"node {node.name}: the ONNX file does not tell the last dim of its input q.",
            "Make the file anew with `dit2deploy export`.",
        )
    return 2 * shape[-1] if _integer(node, "packed", 0) else shape[-1]


def _integer(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def pack_codes(model: ir.Model) -> None:
    """Makes quantizers write two codes a byte (dit2deploy/ops/packed_codes.py) where every reader takes them.

    Those are GEMMs of activations and weights of at most 4 bits, whose K, or groups of it, are multiples of 64.
    """
    packing = {entry["name"] for entry in kernel.describe() if any(rule["is_codes"] for rule in entry["shapes"])}
    for node in model.graph:
        if node.domain != DOMAIN or node.op_type not in packing or not _is_read_packed(node.outputs[0]):
            continue
        codes = node.outputs[0]
        for one in (node, *codes.consumers()):
            one.attributes["packed"] = ir.AttrInt64("packed", 1)
        codes.shape = ir.Shape((*codes.shape[:-1], codes.shape[-1] // 2))


def packed_quantizers(model: ir.Model) -> int:
    """How many nodes write packed codes."""
    return sum(_integer(node, "packed", 0) for node in model.graph if node.domain == DOMAIN and not is_gemm(node))


def _is_read_packed(codes: ir.Value) -> bool:
    return bool(codes.uses()) and not codes.is_graph_output() and all(_reads_packed(*use) for use in codes.uses())


def _reads_packed(node: ir.Node, index: int) -> bool:
    if not is_gemm(node) or index != Q or _integer(node, "bits", 8) > 4 or by_name(weight_format(node)).bits > 4:
        return False
    return columns_of(node) // node.inputs[WS].shape.numpy()[1] % 64 == 0


def tell_slow_gemms(model: ir.Model, target: str, *, halves: bool) -> None:
    """A note of the GEMMs that the tiled CUDA kernels do not take (plugins/ops/quant_gemm/cuda_plan.cc)."""
    found = []
    for node in filter(is_gemm, model.graph):
        k, (n, groups) = columns_of(node), node.inputs[WS].shape.numpy()
        if k % 16 or (groups > 1 and k // groups % 32) or (halves and n % 2):
            found.append(node.name)
    if found:
        note(f"{target}: {len(found)} GEMMs take a slow kernel, for their K, N or groups: {', '.join(found[:3])}")


def use_kernel_layout(model: ir.Model, layout: int) -> None:
    """Makes the words of every GEMM node `layout`; the words are made when they are written, one tensor at a time."""
    done: set[str] = set()
    for node in filter(is_gemm, model.graph):
        node.attributes["layout"] = ir.AttrInt64("layout", layout)
        words = node.inputs[W]
        if words.const_value is None:
            raise Misuse(
                f"node {node.name}: its weights are no constant.", "Make the file anew with `dit2deploy export`."
            )
        if words.name in done:
            continue
        done.add(words.name)
        fmt, packed, k = weight_format(node), words.const_value, columns_of(node)
        shape = kernel.relayout_shape(fmt, node.inputs[WS].shape[0], k, layout=layout)

        def relaid(packed=packed, fmt=fmt, k=k, name=words.name) -> ir.Tensor:
            return ir.tensor(kernel.relayout(fmt, np.asarray(packed.numpy()), k, layout=layout), name=name)

        words.const_value = ir.LazyTensor(relaid, dtype=ir.DataType.INT32, shape=ir.Shape(shape), name=words.name)
        words.shape = ir.Shape(shape)


def drop_native_bodies(model: ir.Model) -> None:
    """Leaves only the functions of ops that have no kernel: a missing library is then an error, not a slow surprise."""
    native = {entry["name"] for entry in kernel.describe()}
    for identifier in [key for key in model.functions if key[0] == DOMAIN and key[1] in native]:
        del model.functions[identifier]


def in_execution_order(graph: ir.Graph) -> list[ir.Value]:
    """The graph's initializers, by the node that reads them first; those that nobody reads come last."""
    ordered: dict[str, ir.Value] = {}
    for node in graph:
        for value in node.inputs:
            if value is not None and value.name in graph.initializers:
                ordered.setdefault(value.name, value)
    for name, value in graph.initializers.items():
        ordered.setdefault(name, value)
    return list(ordered.values())


def save_streamed(model: ir.Model, path: Path, *, data: Path | None = None) -> None:
    """Writes the model to `path` and its weights to `path`.data, one tensor in memory at a time, in execution order.

    `data`: a data file beside it that is there already: weights that lie in it stay, the others are added to it. Large
    tensors start on a page, so that a runtime maps them and reads in place; small ones on a cache line. The model's
    tensors are replaced by records of where they now lie, and its initializers put in execution order.
    """
    values = in_execution_order(model.graph)
    for value in values:
        model.graph.initializers.add(model.graph.initializers.pop(value.name))
    if data is None:
        data = path.with_name(path.name + ".data")
        size = sum(value.const_value.nbytes for value in values)
        with whole_file(data, size=size) as temporary, open(temporary, "wb") as file:
            _add_weights(file, values, data)
    else:
        with writing(data), open(data, "ab") as file:
            _add_weights(file, values, data)
    content = ir.to_proto(model).SerializeToString()
    write_bytes(path, content)


def _add_weights(file: BinaryIO, values: Sequence[ir.Value], data: Path) -> None:
    for value in track(values, "write weights"):
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and Path(tensor.path) == data:
            continue
        if tensor.nbytes <= _INLINE:
            value.const_value = ir.tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=value.name)
            continue
        step = _PAGE if tensor.nbytes >= 4 * _PAGE else _LINE
        file.write(b"\0" * (-file.tell() % step))
        offset = file.tell()
        file.write(tensor.tobytes())
        value.const_value = ir.ExternalTensor(
            data.name, offset, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=value.name, base_dir=data.parent
        )


def share_weights(model: ir.Model, saved: ir.Model, names: Iterable[str]) -> None:
    """Initializers of these names become those of a model that is saved."""
    for name in names:
        value, place = model.graph.initializers[name], saved.graph.initializers[name]
        value.const_value, value.shape = place.const_value, place.shape


def save_graphs(onnx: OnnxModel, folder: Path, prepare: Callable[[ir.Model], None]) -> ir.Model:
    """Writes each graph of an ONNX model, as `prepare` leaves it, into `folder` over one data file.

    Gives back the first, whose tensors are records of where they lie.
    """
    first, places = None, {}
    for name in onnx.graphs.values():
        model = ir.load(onnx.folder / name)
        found = {
            value.name: value.const_value.offset
            for value in model.graph.initializers.values()
            if isinstance(value.const_value, ir.ExternalTensor)
        }
        prepare(model)
        if first is None:
            save_streamed(model, folder / name)
            first, places = model, found
        else:
            share_weights(model, first, [value for value, offset in found.items() if places.get(value) == offset])
            save_streamed(model, folder / name, data=folder / DATA)
    return first


def bytes_by_part(model: ir.Model) -> dict[str, int]:
    """Bytes of the initializers: packed weights by format, "scales", "low_rank", "monarch"; all others as "float"."""
    parts: dict[str, int] = {}
    roles = dict(_roles(model.graph))
    for name, value in model.graph.initializers.items():
        role = roles.get(name, "float")
        parts[role] = parts.get(role, 0) + value.const_value.nbytes
    return parts


def float32_bytes(model: ir.Model) -> int:
    """Bytes of the same model in float32: N K a packed weight, its bias, and all initializers that are not packing."""
    roles = dict(_roles(model.graph))
    floats = {name: value.const_value for name, value in model.graph.initializers.items() if name not in roles}
    total = sum(tensor.size for tensor in floats.values() if tensor.dtype.is_floating_point())
    seen: set[str] = set()
    for node in model.graph:
        if is_gemm(node) and node.inputs[W].name not in seen:
            seen.add(node.inputs[W].name)
            total += node.inputs[WS].shape[0] * columns_of(node)
    return 4 * total


def add_outputs(model: ir.Model, names: Sequence[str]) -> None:
    """Makes inner values outputs of the graph; Misuse where there is no such value.

    What a GEMM with a residual computes before that is made beside it, from the same inputs, by the op without.
    """
    there = {value.name for value in model.graph.outputs}
    inner = {value.name: value for node in model.graph for value in node.outputs}
    for name in names:
        if name in there:
            continue
        if name not in inner and name + JOINED in inner:
            inner[name] = _without_residual(model.graph, inner[name + JOINED].producer(), name)
        if name not in inner:
            raise Misuse(f"the engine has no value {name!r}.", "Build the bundle anew.")
        model.graph.outputs.append(inner[name])
        there.add(name)


def _without_residual(graph: ir.Graph, node: ir.Node, name: str) -> ir.Value:
    """The value `name`: what the GEMM computes before gate and residual."""
    attributes = {key: attribute.value for key, attribute in node.attributes.items()}
    op_type = node.op_type.replace("Residual", "")
    plain = ir.node(op_type, node.inputs[:-2], attributes, domain=DOMAIN, name=f"{node.name}.plain")
    (value,), (joined,) = plain.outputs, node.outputs
    value.name, value.type, value.shape = name, joined.type, joined.shape
    graph.insert_after(node, plain)
    return value


def _roles(graph: ir.Graph) -> Iterator[tuple[str, str]]:
    """(initializer, part) of what quantization stores beside the model's own floats; biases count as the model's."""
    for node in graph:
        if node.domain != DOMAIN:
            continue
        fmt = weight_format(node)
        if node.op_type.removesuffix(OF_HALVES) == "MonarchAdd":
            yield from _initializers(_sources(node.inputs[2:4]), "monarch")
        elif not fmt:
            yield from _initializers(node.inputs[1:2], "scales")  # qmax
        elif is_gemm(node):
            yield from _initializers([node.inputs[W]], fmt)
            yield from _initializers([node.inputs[WS]], "scales")
            if GEMM_NAME.fullmatch(node.op_type)["low_rank"]:
                product = _uncast(node.inputs[T]).producer()
                factors = [node.inputs[UP], *(product.inputs[1:2] if product is not None else ())]
                yield from _initializers(_sources(factors), "low_rank")
        else:
            yield from _initializers(node.inputs[:1], fmt)
            yield from _initializers(node.inputs[1:2], "scales")


def _uncast(value: ir.Value) -> ir.Value:
    """What the casts that make `value` read."""
    node = value.producer()
    return value if node is None or node.op_type != "Cast" else _uncast(node.inputs[0])


def _initializers(values: Iterable[ir.Value | None], part: str) -> Iterator[tuple[str, str]]:
    return ((value.name, part) for value in values if value is not None and value.is_initializer())


def _sources(values: Iterable[ir.Value | None]) -> Iterator[ir.Value]:
    """Floats that the values are made of by standard ops (casts, transposes, concatenations)."""
    waiting = [value for value in values if value is not None]
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if node is not None and node.domain == "":
            waiting.extend(source for source in node.inputs if source is not None)
        elif value.is_initializer() and value.const_value.dtype.is_floating_point():
            yield value
