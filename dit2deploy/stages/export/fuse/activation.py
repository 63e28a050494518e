"""GELU and HadamardQuantize become one op.

    Gelu(x, approximate="tanh") -> HadamardQuantize(qmax)

is ActivationHadamardQuantize(x, qmax), as in the MLPs of all families; where others read the activated row too it is
ActivationHadamardQuantizeKeep, which gives them the row. The exact form of GELU, by erf, is left alone.
"""

import onnx_ir as ir

from dit2deploy.ops import ACTIVATION_HADAMARD_QUANTIZE, ACTIVATION_HADAMARD_QUANTIZE_KEEP
from dit2deploy.stages.export.fuse.quantizer import quantizers, replace_quantizer


def fuse_activation(model: ir.Model) -> None:
    """Fuses in place; the nodes that are left over are `tidy`'s to remove."""
    for node in quantizers(model.graph):
        gelu = node.inputs[0].producer()
        if gelu is not None and _is_tanh_gelu(gelu):
            inputs = [gelu.inputs[0], node.inputs[1]]
            replace_quantizer(
                model.graph,
                node,
                ACTIVATION_HADAMARD_QUANTIZE,
                ACTIVATION_HADAMARD_QUANTIZE_KEEP,
                inputs,
                suffix="gelu",
            )


def _is_tanh_gelu(node: ir.Node) -> bool:
    form = node.attributes.get("approximate")
    is_tanh = form is not None and form.as_string() == "tanh"
    return not node.domain and node.op_type == "Gelu" and is_tanh and node.inputs[0].dtype == ir.DataType.FLOAT
