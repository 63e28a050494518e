"""What an op is: ports, attributes, shape rule, PyTorch semantics, ONNX function body and test cases, as one value."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import ml_dtypes
import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

DOMAIN = "dit2deploy"
VERSION = 1
OPSET = 20

DType = Literal["f32", "f16", "bf16", "i8", "i32"]
TORCH = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i8": torch.int8,
    "i32": torch.int32,
}
ONNX = {
    "f32": TensorProto.FLOAT,
    "f16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
    "i8": TensorProto.INT8,
    "i32": TensorProto.INT32,
}
NUMPY = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16, "i8": np.int8, "i32": np.int32}
# Values of the attribute `dtype`: of the ports of activations, whose dtype is "stream".
STREAMS: Mapping[int | str, DType] = {ONNX[name]: name for name in ("f32", "f16", "bf16")}
STREAM_TYPE = {"dtype": ONNX["f32"]}
# Of ops that give or take codes of activations: 1 where two of them share a byte (packed_codes.py).
PACKED = {"packed": 0}


@dataclass(frozen=True)
class Port:
    name: str
    dtype: DType | Literal["stream"]


@dataclass(frozen=True)
class OutputRule:
    """Dims of input `like`, the last one replaced by dim `last_dim` of input `last_input`.

    Without a `last_input` the last one is `last_dim` itself: a constant, "attribute NAME", or -1 (kept as it is). Of
    codes it is halved where the node packs them.
    """

    like: int
    last_input: int = -1
    last_dim: int | str = -1
    is_codes: bool = False


@dataclass(frozen=True)
class Case:
    """One line of the numerics table: inputs by port name, attributes, and how floats are compared."""

    name: str
    inputs: Mapping[str, np.ndarray]
    attributes: Mapping[str, int | str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Op:
    """One op of the domain `dit2deploy`.

    `reference` takes torch tensors by position and attributes by keyword; it is the definition. Of an op with ports of
    activations it is the one in float32, without the attribute `dtype`: `compute` is what that says.
    `body` is ONNX text of the function body (standard ops of opset 20), the same computation for any runtime.
    `native` ops have a folder in plugins/ops and a kernel in every target; the others exist as bodies only.
    """

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    attributes: Mapping[str, int | str]
    shapes: tuple[OutputRule, ...]
    reference: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
    body: str
    cases: Callable[[], list[Case]]
    native: bool = True

    def __str__(self) -> str:
        return self.name

    def dtype(self, port: Port, attributes: Mapping[str, int | str]) -> DType:
        """Of a port of a node with these attributes."""
        return STREAMS[attributes.get("dtype", STREAM_TYPE["dtype"])] if port.dtype == "stream" else port.dtype

    def compute(self, *inputs: torch.Tensor, **attributes: int | str) -> tuple[torch.Tensor, ...]:
        """What the op is: arithmetic in float32, activations of type `dtype` widened before, rounded once after it.

        Raises ValueError for inputs of another dtype.
        """
        for port, value in zip(self.inputs, inputs, strict=True):
            if value.dtype != TORCH[self.dtype(port, attributes)]:
                raise ValueError(f"{self.name}: {port.name} is {value.dtype}, not {self.dtype(port, attributes)}")
        own = {name: value for name, value in attributes.items() if name != "dtype"}
        wide = [x.float() if port.dtype == "stream" else x for port, x in zip(self.inputs, inputs, strict=True)]
        made = self.reference(*wide, **own)
        outputs = made if isinstance(made, tuple) else (made,)
        return tuple(x.to(TORCH[self.dtype(port, attributes)]) for port, x in zip(self.outputs, outputs, strict=True))

    def call(self, *inputs: torch.Tensor, **attributes: int | str):
        """Calls the registered torch.library op, which torch.export keeps as one node."""
        return self.torch_op(*inputs, *({**self.attributes, **attributes}[name] for name in self.attributes))

    @property
    def torch_name(self) -> str:
        return "".join(f"_{c.lower()}" if c.isupper() else c for c in self.name).lstrip("_")

    @property
    def torch_op(self):
        return getattr(torch.ops.dit2deploy, self.torch_name).default

    def output_shapes(self, shapes: list[tuple], attributes: Mapping[str, int | str]) -> list[tuple]:
        """Shapes of the outputs from those of the inputs; dims may be symbolic."""
        out = []
        for rule in self.shapes:
            dims = list(shapes[rule.like])
            if isinstance(rule.last_dim, str):
                dims[-1] = attributes[rule.last_dim.removeprefix("attribute ")]
            elif rule.last_input >= 0:
                dims[-1] = shapes[rule.last_input][rule.last_dim]
            elif rule.last_dim >= 0:
                dims[-1] = rule.last_dim
            elif rule.is_codes and attributes.get("packed"):
                dims[-1] = shapes[rule.like][-1] // 2
            out.append(tuple(dims))
        return out

    def function(self) -> onnx.FunctionProto:
        """The model-local function that any ONNX runtime can execute."""
        attributes = ", ".join(
            f"{name}: {'int' if isinstance(default, int) else 'string'} = "
            f"{default if isinstance(default, int) else chr(34) + default + chr(34)}"
            for name, default in self.attributes.items()
        )
        ports = ", ".join(port.name for port in self.inputs), ", ".join(port.name for port in self.outputs)
        text = (
            f'<opset_import: ["" : {OPSET}], domain: "{DOMAIN}">\n'
            f"{self.name}{attributes and f' <{attributes}>'} ({ports[0]}) => ({ports[1]}) {{\n{self.body}\n}}"
        )
        return onnx.parser.parse_function(text)

    def schema(self) -> onnx.defs.OpSchema:
        """The schema that the ONNX exporter and checker ask for: of what is exported, whose activations are float32."""
        schema = onnx.defs.OpSchema
        kinds = {int: schema.AttrType.INT, str: schema.AttrType.STRING}
        names = {"f32": "tensor(float)", "i8": "tensor(int8)", "i32": "tensor(int32)", "stream": "tensor(float)"}
        ports = [
            [schema.FormalParameter(port.name, names[port.dtype]) for port in p] for p in (self.inputs, self.outputs)
        ]
        return schema(
            self.name,
            DOMAIN,
            VERSION,
            inputs=ports[0],
            outputs=ports[1],
            attributes=[
                schema.Attribute(name, kinds[type(value)], required=False)
                for name, value in self.node_attributes({}).items()
            ],
        )

    def node_attributes(self, attributes: Mapping[str, int | str]) -> dict[str, int | str]:
        """All attributes of a node, defaults written out, and the two by which TensorRT's parser finds a plugin."""
        return {**self.attributes, **attributes, "plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}

    def model(self, case: Case, *, constants: tuple[str, ...] = ()) -> onnx.ModelProto:
        """A one-node model of the case; the ports named in `constants` become initializers."""
        shapes = self.output_shapes(
            [case.inputs[port.name].shape for port in self.inputs], {**self.attributes, **case.attributes}
        )
        graph = helper.make_graph(
            [
                helper.make_node(
                    self.name,
                    [port.name for port in self.inputs],
                    [port.name for port in self.outputs],
                    name="op",
                    domain=DOMAIN,
                    **self.node_attributes(case.attributes),
                )
            ],
            self.name,
            [
                helper.make_tensor_value_info(
                    port.name, ONNX[self.dtype(port, case.attributes)], case.inputs[port.name].shape
                )
                for port in self.inputs
                if port.name not in constants
            ],
            [
                helper.make_tensor_value_info(port.name, ONNX[self.dtype(port, case.attributes)], shape)
                for port, shape in zip(self.outputs, shapes, strict=True)
            ],
            [onnx.numpy_helper.from_array(np.ascontiguousarray(case.inputs[name]), name) for name in constants],
        )
        imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
        return helper.make_model(graph, opset_imports=imports, functions=[self.function()], ir_version=10)


_library = torch.library.Library(DOMAIN, "DEF")


def register(op: Op) -> Op:
    """Tells torch (a library op with its shape rule) and onnx (a schema) of the op."""
    attributes = "".join(
        f", {'int' if isinstance(default, int) else 'str'} {name}" for name, default in op.attributes.items()
    )
    inputs = ", ".join(f"Tensor {port.name}" for port in op.inputs)
    outputs = ", ".join("Tensor" for _ in op.outputs)
    _library.define(f"{op.torch_name}({inputs}{attributes}) -> ({outputs})")
    count = len(op.inputs)

    def run(*arguments):
        out = op.compute(*arguments[:count], **dict(zip(op.attributes, arguments[count:], strict=True)))
        return out[0] if len(out) == 1 else out

    def fake(*arguments):
        values = dict(zip(op.attributes, arguments[count:], strict=True))
        shapes = op.output_shapes([tensor.shape for tensor in arguments[:count]], values)
        out = [
            arguments[0].new_empty(shape, dtype=TORCH[op.dtype(port, values)])
            for port, shape in zip(op.outputs, shapes, strict=True)
        ]
        return out[0] if len(out) == 1 else tuple(out)

    _library.impl(op.torch_name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{DOMAIN}::{op.torch_name}", fake, lib=_library)
    onnx.defs.register_schema(op.schema())
    return op
