"""From a module with fake weights to an ONNX graph: torch.export first, then the ONNX exporter on the program."""

from collections.abc import Mapping

import onnx_ir as ir
import onnxscript
import torch

from dit2deploy.base.errors import Failed
from dit2deploy.models.family import Axis, Family, Inputs
from dit2deploy.ops import DOMAIN, OPS, OPSET, VERSION, Op
from dit2deploy.stages.export.quiet import quiet

OUTPUT = "sample"
_DOMAIN_OPS = onnxscript.values.Opset(DOMAIN, VERSION)
_ONNX_OPS = onnxscript.values.Opset("", OPSET)


def trace(module: torch.nn.Module, family: Family, inputs: Inputs, axes: Mapping[str, Mapping[int, Axis]]) -> ir.Model:
    """The graph of one call `module(**inputs, return_dict=False)`; weights are initializers named by state_dict key.

    Raises Failed where the module cannot be traced or an axis that should be dynamic became a constant.
    """
    # `torch.onnx.export(module)` would fall back to a static graph in silence; `torch.export.export` raises.
    try:
        with torch.no_grad(), quiet():
            program = torch.export.export(
                module,
                (),
                {**inputs, "return_dict": False},
                dynamic_shapes={**_dims(inputs, axes), "return_dict": None},
                strict=False,
            )
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                optimize=False,
                custom_translation_table=_translations(),
                verbose=False,
            )
    except (
        torch.onnx.errors.OnnxExporterError,
        torch._dynamo.exc.TorchDynamoException,
        RuntimeError,
        ValueError,
    ) as error:
        reason = str(error).strip().splitlines()[0]
        raise Failed(
            f"{family.class_name}: cannot be exported: {reason}", "Report it with the model's config.json."
        ) from error
    model = exported.model
    _name_axes(model, family, axes)
    model.graph.outputs[0].name = OUTPUT
    return model


def _dims(inputs: Inputs, axes: Mapping[str, Mapping[int, Axis]]) -> dict[str, dict[int, object]]:
    """torch.export's dynamic shapes. A multiple m of an axis is m times a Dim of patches."""
    dims: dict[str, object] = {}
    for axis in {axis for named in axes.values() for axis in named.values()}:
        dim = torch.export.Dim(_patches(axis), min=1, max=axis.most)
        dims[axis.name] = dim if axis.multiple == 1 else axis.multiple * dim
    return {name: {i: dims[axis.name] for i, axis in axes.get(name, {}).items()} for name in inputs}


def _patches(axis: Axis) -> str:
    return axis.name if axis.multiple == 1 else f"{axis.name}_patches"


def _name_axes(model: ir.Model, family: Family, axes: Mapping[str, Mapping[int, Axis]]) -> None:
    """Gives dynamic axes the family's names in place of torch's symbols; Failed where one is not dynamic."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for i, axis in axes.get(value.name or "", {}).items():
            symbol = getattr(value.shape[i], "value", None)
            # A length that the model bakes in comes back as a number, or as the symbol of the axis that it must equal.
            if not isinstance(symbol, str) or symbol.isdecimal() or names.setdefault(symbol, axis.name) != axis.name:
                raise Failed(
                    f"{family.class_name}: {axis.name} of {value.name} cannot be dynamic: it became {value.shape[i]}.",
                    "Leave it out of the family's axes.",
                )
            names[symbol.rpartition("*")[2]] = _patches(axis)
    torch.onnx._internal.exporter._ir_passes.rename_axis(model, names)


def _translations() -> dict:
    return {op.torch_op: _translation(op) for op in OPS} | {torch.ops.aten.squeeze.dim: _squeeze}


def _translation(op: Op):
    """Emits the op's node with all its attributes; the function body is added after the passes."""

    def emit(*arguments):
        count = len(op.inputs)
        attributes = op.node_attributes(dict(zip(op.attributes, arguments[count:], strict=True)))
        return getattr(_DOMAIN_OPS, op.name)(*arguments[:count], **attributes)

    return emit


def _squeeze(x, dim: int):
    """PyTorch's squeeze leaves an axis whose length is not 1; ONNX's refuses it (PixArt)."""
    if x.shape[dim] == 1:
        return _ONNX_OPS.Squeeze(x, _ONNX_OPS.Constant(value_ints=[dim]))
    return _ONNX_OPS.Identity(x)
