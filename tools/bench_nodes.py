"""Where a step of DiT-XL/2's geometry spends its time, by op, and how much faster each op is with more threads.

    python tools/bench_nodes.py --out tools/results/bench_nodes.json

By ONNX Runtime's own profiler, thread counts in turns; of each node the least of the rounds' medians counts, since what
is asked is how the work scales and not how busy the machine was.
"""

import argparse
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from blocks.made import OWN, TOKENS, Made, inputs

from dit2deploy.artefacts.bundle import Bundle
from dit2deploy.artefacts.results import write_results
from dit2deploy.base.errors import Dit2DeployError
from dit2deploy.base.machine import cores
from dit2deploy.stages.profile.ops import traced
from dit2deploy.stages.profile.summary import Column, table
from dit2deploy.targets import kernel

SMALL = 0.005  # of a step: ops below it are one row
COLUMNS: dict[str, Column] = {
    "op": lambda row: row["op"],
    "nodes": lambda row: str(row["nodes"]),
    "ms, 1 thread": lambda row: f"{row['ms'][0]:.1f}",
    "ms, all threads": lambda row: f"{row['ms'][-1]:.1f}",
    "times as fast": lambda row: f"{row['ms'][0] / row['ms'][-1]:.2f}",
}


def measure(bundle: Bundle, *, threads: list[int], rounds: int, runs: int) -> list[dict]:
    """Rows of ops, the longest first, then all others and the sum: `ms` by thread count."""
    feed = inputs(1)
    least: dict[tuple[str, str], list[float]] = {}
    with TemporaryDirectory(prefix="dit2deploy-") as folder:
        for _ in range(rounds):
            for index, count in enumerate(threads):
                nodes = traced(bundle, "ort-cpu", feed, threads=count, runs=runs, trace=Path(folder) / "trace.json")
                for node in nodes:
                    times = least.setdefault((node.op, node.node), [float("inf")] * len(threads))
                    times[index] = min(times[index], node.milliseconds)
    whole = _row("all", list(least.values()))
    ops = [_row(op, [times for (of, _), times in least.items() if of == op]) for op in {op for op, _ in least}]
    ops.sort(key=lambda row: -row["ms"][0])
    shown = [row for row in ops if row["ms"][0] >= SMALL * whole["ms"][0]]
    small = {row["op"] for row in ops} - {row["op"] for row in shown}
    rest = _row("others", [times for (op, _), times in least.items() if op in small])
    return [*shown, rest, whole]


def _row(op: str, times: list[list[float]]) -> dict:
    return {"op": op, "nodes": len(times), "ms": [sum(column) for column in zip(*times, strict=True)]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=list(OWN), default="ternary A4")
    parser.add_argument("--blocks", type=int, default=28)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, cores()])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=5, help="of a round")
    parser.add_argument("--folder", type=Path, default=Path("build/blocks"), help="as of bench_model.py --blocks")
    parser.add_argument("--out", type=Path, help="also write the result file")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    try:
        bundle = Bundle.load(Made(options.folder, options.blocks).bundle(OWN[options.engine]), check_hashes=False)
        rows = measure(bundle, threads=options.threads, rounds=options.rounds, runs=options.runs)
    except Dit2DeployError as error:
        print(f"error: {error.cause}\n  -> {error.cure}", file=sys.stderr)
        return error.exit_code
    print(table(rows, COLUMNS))
    if options.out:
        found = {"isa": kernel.isa_in_use(), "engine": options.engine, "blocks": options.blocks, "tokens": TOKENS}
        write_results(
            options.out, "bench_nodes", {**found, "threads": options.threads, "load_before": load, "rows": rows}
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
