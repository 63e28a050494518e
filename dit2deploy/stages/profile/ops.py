"""Where the time of a step goes: ONNX Runtime's own profile, by op type and by layer, and a trace for Perfetto."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from dit2deploy.artefacts.bundle import Bundle
from dit2deploy.base.disk import scratch_folder
from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import write_json
from dit2deploy.stages.profile.costs import Cost, Port, cost_of
from dit2deploy.targets.graph import JOINED
from dit2deploy.targets.kernel import FRAGMENT_ORDER, LIBRARY_NAME
from dit2deploy.targets.ort import open_session

_WARM_UP = 3
_TRACED = 3  # runs in the trace file
_NAMED = 4  # layers of a node; more are merged ones
_SUFFIX = "_kernel_time"


@dataclass(frozen=True)
class NodeTime:
    """One node of the graph: its median over the runs."""

    node: str
    op: str
    layer: str  # quantized layers that it computes or quantizes for, "" where none
    milliseconds: float
    cost: Cost
    total: float = 0.0  # milliseconds of all runs
    runs: int = 1
    inputs: tuple[Port, ...] = ()
    outputs: tuple[Port, ...] = ()


def traced(
    bundle: Bundle, target: str, inputs: Mapping[str, np.ndarray], *, threads: int, runs: int, trace: Path
) -> list[NodeTime]:
    """Runs the engine under ONNX Runtime's profiler and writes `trace` (Chrome trace events; Perfetto opens it).

    Raises Misuse for an engine that ONNX Runtime does not run.
    """
    record = bundle.target(target)
    if "onnx" not in record.engines:
        raise Misuse(f"{target} has no per-op profile.", "Use the profiler of its own runtime.")
    if record.details.get("layout") == FRAGMENT_ORDER:
        raise Misuse(f"{target} has no per-op profile: ONNX Runtime would time launches.", "Use Nsight Systems.")
    engine = bundle.path(record.engines["onnx"])
    library = next((bundle.path(name) for name in record.files if name.endswith(LIBRARY_NAME)), None)
    with scratch_folder() as folder:
        runner = open_session(engine, threads=threads, library=library, trace=folder / "ort")
        for _ in range(_WARM_UP + runs):
            runner.run(inputs)
        session: Any = runner.session
        events = json.loads(Path(session.end_profiling()).read_bytes())
        runner.close()
    kept = _runs(events)[_WARM_UP:]
    layers = layers_of_nodes(engine, bundle)
    write_json(trace, chrome_trace(kept[-_TRACED:], layers, title=f"{bundle.manifest.model}, {target}"))
    return node_times(kept, layers)


def layers_of_nodes(engine: Path, bundle: Bundle) -> dict[str, str]:
    """Node name -> the layers whose output it makes, or for whose input it quantizes."""
    by_output: dict[str, list[str]] = {}
    for layer, record in bundle.manifest.layers.items():
        by_output.setdefault(record.output, []).append(layer)
    found: dict[str, str] = {}
    for node in ir.load(engine).graph:
        outputs = [(value.name or "").removesuffix(JOINED) for value in node.outputs]
        names = [layer for output in outputs for layer in by_output.get(output, ())]
        if not names or node.name is None:
            continue
        found[node.name] = joined(names)
        for value in node.inputs[:2] if node.domain else ():  # q and s: what quantized them works for this layer
            maker = value.producer() if value is not None else None
            if maker is not None and maker.domain == node.domain and maker.name is not None:
                found.setdefault(maker.name, joined(names))
    return found


def joined(names: Sequence[str]) -> str:
    """ "a.b.to_q, to_k, to_v" for names that differ in their last part; of layers that were merged, the first."""
    if len(names) > _NAMED:
        return f"{names[0]} and {len(names) - 1} equal ones"
    stem, _, _ = names[0].rpartition(".")
    tails = [name.rpartition(".") for name in names]
    if len(names) == 1 or any(head != stem for head, _, _ in tails):
        return ", ".join(names)
    return ", ".join([names[0], *(tail for _, _, tail in tails[1:])])


def node_times(runs: Sequence[Sequence[Mapping[str, Any]]], layers: Mapping[str, str]) -> list[NodeTime]:
    """Median over the runs of each node, in execution order."""
    times: dict[str, list[float]] = {}
    sample: dict[str, Mapping[str, Any]] = {}
    for run in runs:
        for event in run:
            if _is_node(event):
                name = event["name"].removesuffix(_SUFFIX)
                times.setdefault(name, []).append(event["dur"] / 1000)
                sample[name] = event["args"]
    return [
        NodeTime(
            node=name,
            op=sample[name]["op_name"],
            layer=layers.get(name, ""),
            milliseconds=float(np.median(values)),
            cost=cost_of(sample[name]["op_name"], *_shapes(sample[name])),
            total=sum(values),
            runs=len(values),
            inputs=tuple(_shapes(sample[name])[0]),
            outputs=tuple(_shapes(sample[name])[1]),
        )
        for name, values in times.items()
    ]


def chrome_trace(
    runs: Sequence[Sequence[Mapping[str, Any]]], layers: Mapping[str, str], *, title: str
) -> dict[str, Any]:
    """Trace events of the runs: one slice a run and, nested in it, one a node."""
    start = min((event["ts"] for run in runs for event in run), default=0)
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "args": {"name": title}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 1, "args": {"name": "denoising steps"}},
    ]
    for index, run in enumerate(runs):
        for event in run:
            made = {"ph": "X", "pid": 1, "tid": 1, "ts": event["ts"] - start, "dur": event["dur"]}
            if not _is_node(event):
                events.append({**made, "name": f"step {index}", "cat": "step"})
                continue
            name = event["name"].removesuffix(_SUFFIX)
            cost = cost_of(event["args"]["op_name"], *_shapes(event["args"]))
            arguments = {"node": name, "layer": layers.get(name, ""), "macs": cost.macs, "bytes": cost.bytes}
            shapes = {
                "inputs": json.dumps(event["args"].get("input_type_shape", [])),
                "outputs": json.dumps(event["args"].get("output_type_shape", [])),
            }
            events.append({**made, "name": event["args"]["op_name"], "cat": "op", "args": {**arguments, **shapes}})
    return {"displayTimeUnit": "ms", "traceEvents": events}


def _runs(events: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The events of each run, the run's own first."""
    whole = sorted((e for e in events if e.get("name") == "model_run"), key=lambda e: e["ts"])
    nodes = sorted((e for e in events if _is_node(e)), key=lambda e: e["ts"])
    runs: list[list[Mapping[str, Any]]] = []
    at = 0
    for run in whole:
        inside: list[Mapping[str, Any]] = [run]
        while at < len(nodes) and nodes[at]["ts"] <= run["ts"] + run["dur"]:
            if nodes[at]["ts"] >= run["ts"]:
                inside.append(nodes[at])
            at += 1
        runs.append(inside)
    return runs


def _is_node(event: Mapping[str, Any]) -> bool:
    return event.get("cat") == "Node" and event.get("name", "").endswith(_SUFFIX) and "op_name" in event.get("args", {})


def _shapes(arguments: Mapping[str, Any]) -> tuple[list[Port], list[Port]]:
    def ports(key: str) -> list[Port]:
        return [next(iter(port.items())) for port in arguments.get(key, ()) if port]

    return ports("input_type_shape"), ports("output_type_shape")
