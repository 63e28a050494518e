"""Writes weights into one external data file, in execution order, one tensor in memory at a time."""

from pathlib import Path

import onnx_ir as ir

from dit2deploy.artefacts.onnx_model import DATA
from dit2deploy.base.disk import writing
from dit2deploy.base.progress import track

_INLINE = 256  # bytes: shapes and scalars stay in the graph, where shape inference reads them
_PAGE, _LINE = 4096, 64
_LARGE = 1 << 16


def write_data(model: ir.Model, folder: Path) -> None:
    """Moves the initializers into `folder` / model.onnx.data.

    Large tensors start at a page, so that runtimes map them; small ones at a cache line, so that a small model is not
    mostly padding.
    """
    values = _in_execution_order(model.graph)
    size = sum(value.const_value.nbytes for value in values)
    with writing(folder / DATA, size), open(folder / DATA, "wb") as file:
        for value in track(values, "write weights"):
            tensor = value.const_value
            size = tensor.nbytes
            if size <= _INLINE:
                if isinstance(tensor, ir.LazyTensor):
                    value.const_value = ir.Tensor(tensor.numpy(), name=value.name)
                continue
            alignment = _PAGE if size >= _LARGE else _LINE
            file.write(b"\0" * (-file.tell() % alignment))
            offset = file.tell()
            file.write(tensor.tobytes())
            value.const_value = ir.ExternalTensor(
                DATA, offset, size, tensor.dtype, shape=tensor.shape, name=value.name, base_dir=folder
            )


def _in_execution_order(graph: ir.Graph) -> list[ir.Value]:
    """The initializers in the order in which nodes first read them; the graph's own list is put in this order too."""
    used = {
        value.name: value
        for node in graph
        for value in node.inputs
        if value is not None and graph.initializers.get(value.name) is value
    }
    for name in list(graph.initializers):
        value = graph.initializers.pop(name)
        used.setdefault(name, value)
    for value in used.values():
        graph.initializers.add(value)
    return list(used.values())
