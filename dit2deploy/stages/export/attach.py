"""Gives the fake weights of a traced graph their values: by name, one tensor at a time, read when written."""

from collections.abc import Callable, Mapping
from typing import TypeGuard

import numpy as np
import onnx_ir as ir
from torch._subclasses.fake_tensor import FakeTensor

from dit2deploy.base.errors import Failed

Read = Callable[[str], np.ndarray]


def attach_weights(model: ir.Model, read: Read, stored: Mapping[str, str]) -> None:
    """Every initializer that `stored` (name -> safetensors' dtype) knows becomes a lazy tensor of that name.

    A float32 weight that is stored as float16 stays so in the file and is cast where it is used.
    Raises Failed for a fake weight that nobody can fill.
    """
    narrow = {}
    for name, value in model.graph.initializers.items():
        if name in stored:
            if stored[name] == "F16" and value.dtype == ir.DataType.FLOAT:
                narrow[name] = value
            else:
                value.const_value = lazy(name, value.dtype, value.shape, lambda name=name: read(name))
        elif isinstance(getattr(value.const_value, "raw", None), FakeTensor):
            raise Failed(f"The graph has a weight {name} that the model does not hold.", "Report it with config.json.")
    _widen(model.graph, narrow, read)


def lazy(name: str, dtype: ir.DataType, shape: ir.Shape, read: Callable[[], np.ndarray]) -> ir.LazyTensor:
    """A tensor that is read each time it is asked for and never kept."""

    def make() -> ir.Tensor:
        return ir.Tensor(np.ascontiguousarray(read().astype(dtype.numpy(), copy=False)), name=name)

    return ir.LazyTensor(make, dtype=dtype, shape=ir.Shape(shape), name=name)


def is_weight(value: ir.Value | None) -> TypeGuard[ir.Value]:
    """Whether the value is an initializer that is read from the checkpoint."""
    return value is not None and isinstance(value.const_value, ir.LazyTensor)


def _widen(graph: ir.Graph, narrow: Mapping[str, ir.Value], read: Read) -> None:
    """Replaces float32 initializers by float16 ones of the same name and a Cast before the first node that uses it."""
    casts: dict[str, ir.Value] = {}
    for node in list(graph):
        for i, value in enumerate(node.inputs):
            if value is None or narrow.get(value.name) is not value:
                continue
            if value.name not in casts:
                stored = ir.Value(name=value.name, type=ir.TensorType(ir.DataType.FLOAT16), shape=value.shape)
                stored.const_value = lazy(value.name, ir.DataType.FLOAT16, value.shape, lambda n=value.name: read(n))
                cast = ir.node("Cast", [stored], attributes={"to": ir.DataType.FLOAT.value})
                cast.outputs[0].name = f"{value.name}.float32"
                cast.outputs[0].type, cast.outputs[0].shape = value.type, value.shape
                graph.insert_before(node, cast)
                casts[value.name] = cast.outputs[0]
            node.replace_input_with(i, casts[value.name])
    for name in casts:
        del graph.initializers[name]
    for cast in casts.values():
        graph.initializers.add(cast.producer().inputs[0])
