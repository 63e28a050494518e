"""What this machine can do at most, measured: int8 multiply-accumulates and bytes from memory a second."""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from dit2deploy.base.disk import scratch_folder
from dit2deploy.stages.profile.ops import NodeTime
from dit2deploy.targets.graph import GEMM_NAME, OF_HALVES
from dit2deploy.targets.ort import open_session

_M, _K, _N = 512, 1024, 1024
_SECONDS = 0.5  # of each probe
_COPY = 128 << 20  # bytes: larger than the caches of most machines


@dataclass(frozen=True)
class Peaks:
    macs_per_second: float
    bytes_per_second: float
    how: str


def peaks(threads: int) -> Peaks:
    """The best of many runs of each probe, with `threads` threads."""
    return Peaks(
        _int8_macs(threads),
        _copy_bytes(threads),
        f"{threads} thread(s), best of several: int8 by ONNX Runtime's MatMulInteger [{_M}, {_K}] x [{_K}, {_N}]; "
        f"memory by copying {_COPY >> 20} MiB, bytes read and written both counted",
    )


def placed(nodes: Sequence[NodeTime], machine: Peaks) -> list[dict[str, Any]]:
    """Our own ops, with the rate each reaches and its share of what the machine could do.

    The bound is the longer of bytes / bandwidth and MACs / int8 peak; `share` is bound / time. Above 1: the bytes came
    from cache.
    """
    found = []
    for node in nodes:
        if not is_ours(node.op) or not node.milliseconds:
            continue
        seconds = node.milliseconds / 1000
        by_macs = (node.cost.macs + node.cost.float_macs) / machine.macs_per_second
        by_bytes = node.cost.bytes / machine.bytes_per_second
        found.append(
            {
                "node": node.node,
                "op": node.op,
                "layer": node.layer,
                "ms": node.milliseconds,
                "macs": node.cost.macs + node.cost.float_macs,
                "bytes": node.cost.bytes,
                "macs_per_second": (node.cost.macs + node.cost.float_macs) / seconds,
                "bytes_per_second": node.cost.bytes / seconds,
                "bound": "compute" if by_macs >= by_bytes else "memory",
                "share": max(by_macs, by_bytes) / seconds,
            }
        )
    return found


def by_op(ops: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What `placed` gives, by op type, longest first: rates over all its nodes, share weighted by time."""
    rows: dict[str, list[float]] = {}
    for node in ops:
        row = rows.setdefault(node["op"], [0.0, 0.0, 0.0, 0.0])
        for index, value in enumerate((node["ms"], node["macs"], node["bytes"], node["share"] * node["ms"])):
            row[index] += value
    return [
        {
            "op": op,
            "ms": ms,
            "macs_per_second": 1000 * macs / ms,
            "bytes_per_second": 1000 * moved / ms,
            "share": bound / ms,
        }
        for op, (ms, macs, moved, bound) in sorted(rows.items(), key=lambda item: -item[1][0])
    ]


def is_ours(op: str) -> bool:
    """An op of domain dit2deploy (ONNX Runtime's profile does not tell domains)."""
    return (
        "HadamardQuantize" in op
        or op.removesuffix(OF_HALVES) in ("Hadamard", "MonarchAdd", "MultiRegionQuantize", "QuantMatMul")
        or GEMM_NAME.fullmatch(op) is not None
    )


def _int8_macs(threads: int) -> float:
    generator = np.random.default_rng(0)
    weight = generator.integers(-127, 128, (_K, _N), dtype=np.int8)
    node = helper.make_node("MatMulInteger", ["a", "b"], ["y"])
    graph = helper.make_graph(
        [node],
        "peak",
        [helper.make_tensor_value_info("a", TensorProto.UINT8, [_M, _K])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [_M, _N])],
        [numpy_helper.from_array(weight, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with scratch_folder() as folder:
        path = folder / "peak.onnx"
        onnx.save(model, path)
        runner = open_session(path, threads=threads, prepack=True)
        a = generator.integers(0, 256, (_M, _K), dtype=np.uint8)
        best = _best(lambda: runner.run({"a": a}))
        runner.close()
    return _M * _K * _N / best


def _copy_bytes(threads: int) -> float:
    source = np.ones(_COPY // 8, np.float64)
    target = np.zeros_like(source)
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:  # numpy copies without the interpreter's lock
        best = _best(lambda: list(pool.map(lambda part: np.copyto(*part), parts)))
    return 2 * source.nbytes / best


def _best(work: Any) -> float:
    work()
    best, end = float("inf"), time.monotonic() + _SECONDS
    while time.monotonic() < end or best == float("inf"):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best
