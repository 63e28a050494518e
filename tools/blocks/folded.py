"""The float model as the rivals' quantizers want it."""

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper


def write_folded(source: Path, path: Path) -> None:
    """Writes the ONNX model `source` to `path` with its weights transposed where the graph does so.

    Quantizers look for weights that are constants of their MatMul, and leave those in float that a Transpose comes
    before, as exported files have it: with them, "int8" would be a float model but for a few layers.
    """
    model = onnx.load(source)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in [node for node in model.graph.node if node.op_type == "Transpose" and node.input[0] in weights]:
        tensor = weights[node.input[0]]
        (perm,) = (list(attribute.ints) for attribute in node.attribute)
        turned = np.ascontiguousarray(numpy_helper.to_array(tensor).transpose(perm))
        model.graph.initializer.append(numpy_helper.from_array(turned, node.output[0]))
        model.graph.node.remove(node)
    read = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    del model.graph.value_info[:]  # quantize_dynamic transposes weights of Gemm nodes and stumbles over old shapes
    onnx.save(model, path, save_as_external_data=True, location=path.name + ".data")
