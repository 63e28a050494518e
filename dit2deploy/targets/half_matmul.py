"""Matrix products in float16 between casts: what TensorRT-RTX asks of an ONNX file for compute capability 7.5."""

import shutil
from pathlib import Path

import onnx_ir as ir

OPS = ("MatMul", "Gemm", "Conv", "Einsum")


def with_half_matmuls(source: Path, folder: Path) -> Path:
    """Writes `source` into `folder` with every float32 matrix product and convolution in float16; gives the path.

    Their inputs are cast to float16 and their outputs back, so values beyond 65504 overflow; all else stays float32.
    Weights are neither read nor changed: data files are linked beside the new file, or copied where links cannot be.
    """
    model = ir.load(source)
    halves: dict[str, ir.Value] = {}
    for node in list(model.graph):
        if node.domain in ("", "ai.onnx") and node.op_type in OPS and _is_float32(node):
            _cast_around(model.graph, node, halves)
    _use_data_beside(model, source, folder)
    path = folder / source.name
    path.write_bytes(ir.to_proto(model).SerializeToString())
    return path


def _is_float32(node: ir.Node) -> bool:
    return all(value is None or value.dtype in (None, ir.DataType.FLOAT) for value in node.inputs)


def _cast_around(graph: ir.Graph, node: ir.Node, halves: dict[str, ir.Value]) -> None:
    for index, value in enumerate(node.inputs):
        if value is None:
            continue
        if value.name not in halves:
            cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT16.value}, name=f"{value.name}/half")
            cast.outputs[0].name = f"{value.name}/half"
            cast.outputs[0].dtype, cast.outputs[0].shape = ir.DataType.FLOAT16, value.shape
            graph.insert_before(node, cast)
            halves[value.name] = cast.outputs[0]
        node.replace_input_with(index, halves[value.name])
    output = node.outputs[0]
    name, is_output = output.name, any(output is value for value in graph.outputs)
    users = list(output.uses())
    back = ir.node("Cast", [output], {"to": ir.DataType.FLOAT.value}, name=f"{name}/single")
    single = back.outputs[0]
    single.dtype, single.shape = ir.DataType.FLOAT, output.shape
    graph.insert_after(node, back)
    for user, index in users:
        user.replace_input_with(index, single)
    if is_output:
        graph.outputs[:] = [single if value is output else value for value in graph.outputs]
    output.name, single.name, output.dtype = f"{name}/half_result", name, ir.DataType.FLOAT16


def _use_data_beside(model: ir.Model, source: Path, folder: Path) -> None:
    tensors = (value.const_value for value in model.graph.initializers.values())
    for location in {tensor.location for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}:
        data = (source.parent / location).resolve()
        link = folder / location
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            link.symlink_to(data)
        except OSError:
            shutil.copyfile(data, link)
