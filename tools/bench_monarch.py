"""Times MonarchAdd beside its own function body and a low-rank branch, both in ONNX Runtime's own ops."""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from dit2deploy.artefacts.policy import MonarchGrid
from dit2deploy.artefacts.results import write_results
from dit2deploy.base.errors import Dit2DeployError
from dit2deploy.base.machine import cpu_model
from dit2deploy.ops import MONARCH_ADD, OPSET
from dit2deploy.ops.op import Case
from dit2deploy.stages.profile.measure import METHOD, Contestant, race, ratios, statistics
from dit2deploy.stages.profile.summary import aligned
from dit2deploy.targets import kernel
from dit2deploy.targets.ort import open_session

SHAPES = ((1152, 4608), (1152, 3456), (1152, 1152), (4608, 1152))  # (K, N) of fc1, qkv, proj, fc2
GRIDS = (MonarchGrid(2, 2, 8), MonarchGrid(4, 4, 4), MonarchGrid(8, 8, 2), MonarchGrid(16, 16, 1))
RANK = 16  # of the low-rank branch: as many parameters as each grid
EXAMPLE = """example:
  python tools/bench_monarch.py --seconds 20

A ratio is the other's time over ours, within each round: above 1 MonarchAdd is faster. "body": two batched MatMuls with
their reshapes and transposes, optimized and prepacked by ONNX Runtime. "low rank": y + (x down) up of rank 16."""


def contestant(folder: Path, name: str, model: onnx.ModelProto, inputs: dict[str, np.ndarray], threads: int):
    path = folder / f"{name}.onnx"
    onnx.save(model, path)
    runner = open_session(
        path, threads=threads, library=kernel.library_path() if name == "ours" else None, prepack=True
    )
    return Contestant(name, name, lambda: runner.session.run(["y"], inputs))


def low_rank(inputs: dict[str, np.ndarray], k: int, n: int) -> onnx.ModelProto:
    nodes = [
        helper.make_node("MatMul", ["x", "down"], ["t"]),
        helper.make_node("MatMul", ["t", "up"], ["added"]),
        helper.make_node("Add", ["plain", "added"], ["y"]),
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape) for name, value in inputs.items()]
    out = [helper.make_tensor_value_info("y", TensorProto.FLOAT, inputs["plain"].shape)]
    factors = [
        numpy_helper.from_array(np.ones(shape, np.float32), name)
        for name, shape in (("down", (k, RANK)), ("up", (RANK, n)))
    ]
    graph = helper.make_graph(nodes, "low_rank", ports, out, factors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


def times(m: int, k: int, n: int, grid: MonarchGrid, threads: int, seconds: float) -> dict[str, list[float]]:
    random = np.random.default_rng(0)
    a, b, rank = grid
    shapes = {"plain": (m, n), "x": (m, k), "down": (k, rank, b), "up": (a, rank, n)}
    values = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    inputs = {name: values[name] for name in ("plain", "x")}
    body = MONARCH_ADD.model(Case("bench", values), constants=("down", "up"))
    ours = onnx.ModelProto()
    ours.CopyFrom(body)
    del ours.functions[:]
    with TemporaryDirectory(prefix="dit2deploy-") as folder:
        racers = [
            contestant(Path(folder), name, model, inputs, threads)
            for name, model in (("ours", ours), ("body", body), ("low rank", low_rank(inputs, k, n)))
        ]
        return race(racers, rounds=60, seconds=seconds)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=256, help="M (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="default %(default)s")
    parser.add_argument("--seconds", type=float, default=60.0, help="for all races together (default %(default)s)")
    parser.add_argument("--out", type=Path, help="also write the result file")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    try:
        for k, n in SHAPES:
            for grid in GRIDS:
                share = options.seconds / (len(SHAPES) * len(GRIDS))
                found = times(options.tokens, k, n, grid, options.threads, share)
                ms = statistics(found["ours"], batch=1)["p50_ms"]
                macs = options.tokens * grid.parameters(n, k)
                row = {"shape": [options.tokens, k, n], "grid": list(grid), "ms": ms, "gmacs": macs / ms / 1e6}
                rows.append({**row, **ratios(found, "ours")})
    except Dit2DeployError as error:
        print(f"error: {error.cause}\n  -> {error.cure}", file=sys.stderr)
        return error.exit_code
    cells = [("M x K x N", "grid", "ms", "GMAC/s", "against body", "against low rank")]
    for row in rows:
        told = [
            f"{row[name]['ratio']:.2f}x ({row[name]['p25']:.2f}..{row[name]['p75']:.2f})"
            for name in ("body", "low rank")
        ]
        shape, grid = (" x ".join(map(str, row[name])) for name in ("shape", "grid"))
        cells.append((shape, grid, f"{row['ms']:.3f}", f"{row['gmacs']:.0f}", *told))
    print(
        f"{cpu_model()}, kernels for {kernel.isa_in_use()}, {options.threads} thread(s)\n" + "\n".join(aligned(cells))
    )
    if options.out:
        write_results(options.out, "bench_monarch", {"method": METHOD, "isa": kernel.isa_in_use(), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
