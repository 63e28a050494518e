"""Adds our ops' function bodies, so that any ONNX runtime can execute the file. Last, lest a pass inlines them."""

import onnx_ir as ir

from dit2deploy.ops import DOMAIN, OPS, VERSION


def add_bodies(model: ir.Model) -> None:
    used = {node.op_type for node in model.graph if node.domain == DOMAIN}
    used |= {name.removesuffix("Residual") for name in used}  # what parity asks for, see targets/graph.py
    for op in OPS:
        if op.name in used:
            function = ir.serde.deserialize_function(op.function())
            model.functions[function.identifier()] = function
    if used:
        model.graph.opset_imports[DOMAIN] = VERSION
