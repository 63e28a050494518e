"""Where ONNX Runtime runs the nodes of a graph, by its own record, and which of them must be on the GPU.

A node that computes with shapes alone is placed on the CPU on purpose: what it makes is read by the host. Any other
node there moves activations over the bus and back, and a CUDA graph would leave it out: what it made when the graph was
captured would stand for all later calls.
"""

# onnx_ir types every name and producer as optional.
# pyright: reportArgumentType=false

from typing import Any

import onnx_ir as ir

from dit2deploy.base.errors import Failed
from dit2deploy.targets.graph import DOMAIN
from dit2deploy.targets.ort import ON_CPU

# Makes a session keep the record, from onnxruntime 1.24 on.
RECORD = {"session.record_ep_graph_assignment_info": "1"}
_OF_SHAPES = ("Shape", "Size")


def on_cpu(session: Any) -> set[str] | None:
    """Names of the nodes that a session runs on the CPU; None where the runtime does not tell."""
    tell = getattr(session, "get_provider_graph_assignment_info", None)
    if tell is None:
        return None
    return {node.name for part in tell() if part.ep_name == ON_CPU for node in part.get_nodes()}


def check_placement(model: ir.Model, names: set[str]) -> str:
    """Why steps must not be captured, or "": nodes of these names run on the CPU.

    Raises Failed where one of them is an op of ours or makes floats of more than shapes.
    """
    strays = [node for node in model.graph if node.name and node.name in names and not _of_shapes(node)]
    wrong = [node for node in strays if node.domain == DOMAIN or any(_is_float(value) for value in node.outputs)]
    if wrong:
        raise Failed(
            f"ONNX Runtime runs {len(wrong)} nodes on the CPU that belong on the GPU: {_named(wrong)}.",
            "Use a newer onnxruntime-gpu, or target ort-cpu.",
        )
    return f"{len(strays)} nodes that read more than shapes run on the CPU: {_named(strays)}" if strays else ""


def _of_shapes(node: ir.Node) -> bool:
    """Whether a node computes with nothing but shapes and constants."""
    seen: set[ir.Node] = set()
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node in seen or node.op_type in _OF_SHAPES:
            continue
        seen.add(node)
        for value in node.inputs:
            if value is None or value.is_initializer():
                continue
            if value.producer() is None:
                return False
            waiting.append(value.producer())
    return True


def _is_float(value: ir.Value) -> bool:
    """Whether it may be one: what the file does not tell the type of counts."""
    return value.dtype is None or value.dtype.is_floating_point()


def _named(nodes: list[ir.Node]) -> str:
    return ", ".join(f"{node.name} ({node.op_type})" for node in nodes[:3])
