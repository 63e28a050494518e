"""The same measurements in the files that NVIDIA's analysers read: trtexec's times and profile, the inspector's layers.

times_TARGET.json    as `trtexec --exportTimes`: one record a timed run, milliseconds. Engines are given the host's
                     arrays here, so copies count as the run: the times of H2D and D2H are 0, at its ends.
profile_TARGET.json  as `trtexec --exportProfile`: the number of runs, then a record a node
layers_TARGET.json   as `trtexec --exportLayerInfo` of a detailed engine: nodes with their tensors
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dit2deploy.base.files import write_json
from dit2deploy.stages.profile.costs import Port
from dit2deploy.stages.profile.ops import NodeTime


def write(folder: Path, target: str, *, runs: Sequence[tuple[int, int]], nodes: Sequence[NodeTime]) -> None:
    """`runs`: begin and end in nanoseconds of each timed run of the headline. Without `nodes` there are only times."""
    write_json(folder / f"times_{target}.json", times(runs))
    if nodes:
        write_json(folder / f"profile_{target}.json", layer_times(nodes))
        write_json(folder / f"layers_{target}.json", layer_information(nodes))


def times(runs: Sequence[tuple[int, int]]) -> list[dict[str, float]]:
    """Milliseconds since the first run's begin."""
    return [_run((begin - runs[0][0]) / 1e6, (end - runs[0][0]) / 1e6) for begin, end in runs]


def _run(begin: float, end: float) -> dict[str, float]:
    took = end - begin
    points = {"Enq": (begin, begin), "H2d": (begin, begin), "Compute": (begin, end), "D2h": (end, end)}
    places: dict[str, float] = {}
    for point, (first, last) in points.items():
        places |= {f"start{point}Ms": first, f"end{point}Ms": last}
    return {**places, "h2dMs": 0.0, "computeMs": took, "d2hMs": 0.0, "latencyMs": took, "endToEndMs": took}


def layer_times(nodes: Sequence[NodeTime]) -> list[dict[str, Any]]:
    """The number of runs, then total, mean, median (ms) and share (%) of each node, in execution order."""
    total = sum(node.total for node in nodes) or 1.0
    rows = [
        {
            "name": node.node,
            "timeMs": node.total,
            "averageMs": node.total / node.runs,
            "medianMs": node.milliseconds,
            "percentage": 100 * node.total / total,
        }
        for node in nodes
    ]
    return [{"count": max(node.runs for node in nodes)}, *rows]


def layer_information(nodes: Sequence[NodeTime]) -> Mapping[str, Any]:
    """`LayerType` is the ONNX op; `Metadata` names the model's layers; tensors are named by node and place, as ONNX
    Runtime's profile tells their types and shapes only."""
    layers = [
        {
            "Name": node.node,
            "LayerType": node.op,
            "Inputs": _tensors(f"{node.node}:in", node.inputs),
            "Outputs": _tensors(f"{node.node}:out", node.outputs),
            "Metadata": node.layer,
        }
        for node in nodes
    ]
    return {"Layers": layers, "Bindings": []}


def _tensors(name: str, ports: Sequence[Port]) -> list[dict[str, Any]]:
    return [
        {"Name": f"{name}{place}", "Location": "Host", "Dimensions": shape, "Format/Datatype": dtype}
        for place, (dtype, shape) in enumerate(ports)
    ]
