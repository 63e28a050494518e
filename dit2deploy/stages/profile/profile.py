"""profile(): all measurements of one engine on this machine."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dit2deploy.artefacts.bundle import PROFILE, Bundle
from dit2deploy.artefacts.results import write_results
from dit2deploy.base.errors import Dit2DeployError, Misuse
from dit2deploy.base.machine import cores
from dit2deploy.base.progress import note, track
from dit2deploy.stages.profile import interchange, memory
from dit2deploy.stages.profile.contestants import BASELINES, ENGINE, Entrant, entrant, inputs_of
from dit2deploy.stages.profile.measure import METHOD, Contestant, Told, race, ratios, statistics
from dit2deploy.stages.profile.ops import NodeTime, traced
from dit2deploy.stages.profile.roofline import by_op as shares_by_op
from dit2deploy.stages.profile.roofline import is_ours, peaks, placed
from dit2deploy.targets import runnable

FOLDER = "profile"
TRACE = "trace.json"


def profile(
    bundle: Path,
    *,
    target: str = "ort-cpu",
    threads: Sequence[int] = (),
    batches: Sequence[int] = (1,),
    runs: int = 30,
    baselines: bool = True,
) -> dict[str, Any]:
    """Measures one denoising step of the engine and writes profile.json and, in profile/, charts,
    a trace, and the files of `interchange`.

    `threads` (default: 1 and all cores) and `batches` are swept; most threads and the first batch are the headline,
    for which memory, the time of each op and its share of the machine's measured peak are told as well. `baselines`:
    full precision in PyTorch and ONNX Runtime run in turn with the engine, where they are at hand. What could not be
    measured is listed with its reason. Needs no torch. Raises Misuse for a bundle without this target, and for a target
    that cannot run here.
    """
    opened = Bundle.load(Path(bundle))
    opened.target(target)
    runnable(target)
    if not batches or min(batches) < 1 or min(threads, default=1) < 1 or runs < 1:
        raise Misuse("profile: threads, batches and runs must be positive.", "Leave them out for the defaults.")
    counts = sorted(set(threads)) or sorted({1, cores()})
    missing: list[dict[str, str]] = []
    entrants = _entrants(opened, target, BASELINES if baselines else (), missing)
    # The headline is measured first, while the machine is as it was found.
    settings = [(count, batch) for batch in batches for count in reversed(counts)]
    latency: list[dict[str, Any]] = []
    compared: list[dict[str, Any]] = []
    timed: list[tuple[int, int]] = []  # runs of the engine at the headline

    def told(name: str, begin: int, end: int) -> None:
        if name == ENGINE:
            timed.append((begin, end))

    for index, (count, batch) in enumerate(track(settings, "profile latency")):
        inputs = inputs_of(opened, batch=batch)
        times = side_by_side(entrants, inputs, threads=count, runs=runs, told=None if index else told)
        where = {"threads": count, "batch": batch}
        latency += [
            {"name": one.name, "label": one.label, **where, **statistics(times[one.name], batch=batch)}
            for one in entrants
        ]
        compared += [{"baseline": name, **where, **ratio} for name, ratio in ratios(times, ENGINE).items()]
    headline = {"threads": counts[-1], "batch": batches[0]}
    held = {}
    for one in track(entrants, "profile memory"):
        held[one.name] = memory.measure(opened, target, one.name, **headline)
        if "reason" in held[one.name]:
            missing.append({"what": f"memory of {one.label}", "reason": held.pop(one.name)["reason"]})
    folder = opened.folder / FOLDER
    nodes = _nodes(opened, target, folder / TRACE, missing, runs=min(runs, 20), **headline)
    interchange.write(folder, target, runs=timed, nodes=nodes)
    result = write_results(
        opened.folder / PROFILE,
        "profile",
        {
            "target": target,
            "headline": headline,
            "method": METHOD,
            "latency": latency,
            "ratios": compared,
            "memory": held,
            "ops": by_op(nodes),
            "layers": by_layer(nodes),
            "roofline": _roofline(nodes, counts[-1]),
            "not_measured": missing,
        },
    )
    # Here and not above: the child that memory starts imports this file, and drawing would weigh in it.
    from dit2deploy.evaluate import profile_charts

    profile_charts.write(result, folder)
    return result


def side_by_side(
    entrants: Sequence[Entrant],
    inputs: dict[str, np.ndarray],
    *,
    threads: int,
    runs: int,
    seconds: float = 60.0,
    told: Told | None = None,
) -> dict[str, list[float]]:
    """Milliseconds of each round by entrant, all open at once and taking turns; about `seconds` at most."""
    with contextlib.ExitStack() as stack:
        contestants = []
        for one in entrants:
            call = stack.enter_context(one.open(threads))
            contestants.append(Contestant(one.name, one.label, _bound(call, inputs)))
        return race(contestants, rounds=runs, seconds=seconds, told=told)


def by_op(nodes: Sequence[NodeTime]) -> list[dict[str, Any]]:
    """Milliseconds a step by op type, longest first, with the share of all nodes."""
    return _summed(nodes, lambda node: node.op, "op")


def by_layer(nodes: Sequence[NodeTime]) -> list[dict[str, Any]]:
    """Milliseconds a step of each quantized layer, its quantization included, in execution order."""
    layers = [node for node in nodes if node.layer]
    order = list(dict.fromkeys(node.layer for node in layers))
    return sorted(_summed(layers, lambda node: node.layer, "layer"), key=lambda row: order.index(row["layer"]))


def _summed(nodes: Sequence[NodeTime], key: Callable[[NodeTime], str], name: str) -> list[dict[str, Any]]:
    total = sum(node.milliseconds for node in nodes) or 1.0
    rows: dict[str, dict[str, Any]] = {}
    for node in nodes:
        row = rows.setdefault(key(node), {name: key(node), "nodes": 0, "ms": 0.0, "macs": 0, "bytes": 0})
        row["nodes"] += 1
        row["ms"] += node.milliseconds
        row["macs"] += node.cost.macs + node.cost.float_macs
        row["bytes"] += node.cost.bytes
    return [{**row, "share": row["ms"] / total} for row in sorted(rows.values(), key=lambda row: -row["ms"])]


def _entrants(bundle: Bundle, target: str, baselines: Sequence[str], missing: list[dict[str, str]]) -> list[Entrant]:
    found = [entrant(bundle, target, ENGINE)]
    for name in baselines:
        one = entrant(bundle, target, name)
        if one.reason:
            note(f"profile: {one.label} is left out: {one.reason}")
            missing.append({"what": one.label, "reason": one.reason})
        else:
            found.append(one)
    return found


def _nodes(
    bundle: Bundle, target: str, trace: Path, missing: list[dict[str, str]], *, threads: int, batch: int, runs: int
) -> list[NodeTime]:
    try:
        return traced(bundle, target, inputs_of(bundle, batch=batch), threads=threads, runs=runs, trace=trace)
    except Dit2DeployError as error:
        missing.append({"what": "time of each op", "reason": error.cause})
        return []


def _roofline(nodes: Sequence[NodeTime], threads: int) -> dict[str, Any] | None:
    """None where the engine has no op of ours."""
    if not any(is_ours(node.op) for node in nodes):
        return None
    machine = peaks(threads)
    ops = placed(nodes, machine)
    return {
        "macs_per_second": machine.macs_per_second,
        "bytes_per_second": machine.bytes_per_second,
        "how": machine.how,
        "by_op": shares_by_op(ops),
        "ops": ops,
    }


def _bound(call: Callable[..., Any], inputs: dict[str, np.ndarray]) -> Callable[[], Any]:
    return lambda: call(inputs)
