"""Times one denoising step of a bundle side by side with full precision and with ONNX Runtime's own dynamic int8.

With --blocks N instead: a random DiT of DiT-XL/2's geometry in all our formats against all that users would pick.
"""

import argparse
import contextlib
import json
import logging
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from blocks.engines import ENTRIES
from blocks.folded import write_folded
from blocks.made import Made
from blocks.race import METHOD as BLOCKS_METHOD
from blocks.race import measure as measure_blocks

from dit2deploy.artefacts.bundle import Bundle
from dit2deploy.artefacts.onnx_model import OnnxModel
from dit2deploy.artefacts.results import write_results
from dit2deploy.base.errors import Dit2DeployError, Misuse
from dit2deploy.base.machine import cores
from dit2deploy.stages.profile.contestants import BASELINES, ENGINE, ORT_FLOAT, Entrant, entrant, inputs_of
from dit2deploy.stages.profile.measure import METHOD, ratios, statistics
from dit2deploy.stages.profile.profile import side_by_side
from dit2deploy.stages.profile.summary import RATIO_COLUMNS, Column, table
from dit2deploy.targets import kernel
from dit2deploy.targets.ort import open_session

ORT_INT8 = "ort-int8-dynamic"

EXAMPLE = """example:
  make demo && python tools/bench_model.py --quick
  python tools/bench_model.py build/demo --batch 1 --batch 8 --out tools/results/bench_model.json
  python tools/bench_model.py --blocks 1 --out tools/results/bench_blocks.json
  python tools/bench_model.py --blocks 28 --out tools/results/bench_dit_xl.json   # DiT-XL/2 itself
  python tools/bench_model.py --blocks 1 --only "ternary A4" "ORT dynamic int8" --threads 1

A ratio is the baseline's time over the engine's, taken within each round: above 1 the engine is faster."""


def int8_baseline(bundle: Bundle, folder: Path) -> Entrant:
    """What `quantize_dynamic` makes of the float ONNX model, run by plain ONNX Runtime."""
    label = "ONNX Runtime int8, dynamic"
    path = folder / "int8.onnx"

    @contextlib.contextmanager
    def open_(threads: int):
        runner = open_session(path, threads=threads, prepack=True)
        try:
            yield runner.run
        finally:
            runner.close()

    reason = entrant(bundle, "", ORT_FLOAT).reason
    if not reason:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        logging.disable(logging.WARNING)
        folded = folder / "folded.onnx"
        write_folded(OnnxModel.load(Path(bundle.manifest.provenance["float_onnx"])).path, folded)
        quantize_dynamic(folded, path, weight_type=QuantType.QInt8)
    return Entrant(ORT_INT8, label, open_, reason)


def measure(bundle: Bundle, options: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """Rows of ratios, and who was left out with the reason."""
    rows, missing = [], []
    with TemporaryDirectory(prefix="dit2deploy-") as folder:
        entrants = [entrant(bundle, options.target, ENGINE)]
        baselines = [entrant(bundle, options.target, name) for name in BASELINES]
        for one in (*baselines, int8_baseline(bundle, Path(folder))):
            if one.reason:
                missing.append({"what": one.label, "reason": one.reason})
            else:
                entrants.append(one)
        settings = [(threads, batch) for batch in options.batch for threads in options.threads]
        for threads, batch in settings:
            seconds = (25 if options.quick else 180) / len(settings)
            inputs = inputs_of(bundle, batch=batch)
            times = side_by_side(entrants, inputs, threads=threads, runs=options.runs, seconds=seconds)
            found = {name: statistics(values, batch=batch) for name, values in times.items()}
            for name, ratio in ratios(times, ENGINE).items():
                rows.append(
                    {
                        "name": f"{bundle.manifest.model} step, {options.target}",
                        "baseline": name,
                        **ratio,
                        "threads": threads,
                        "batch": batch,
                        "engine_ms": found[ENGINE]["p50_ms"],
                        "baseline_ms": found[name]["p50_ms"],
                        "runs": found[ENGINE]["runs"],
                    }
                )
    return rows, missing


def run_blocks(options: argparse.Namespace, load: float) -> None:
    found = measure_blocks(
        Made(options.folder, options.blocks),
        options.only or list(ENTRIES),
        threads=options.threads,
        batches=options.batch,
        rounds=options.runs,
        seconds=options.seconds,
    )
    if options.json:
        for row in found["rows"] + found["engines"]:
            print(json.dumps(row))
    else:
        print(table(found["engines"], ENGINE_COLUMNS), table(found["rows"], BLOCK_COLUMNS), sep="\n\n")
    for entry in found["not_measured"]:
        print(f"not measured: {entry['what']}: {entry['reason']}", file=sys.stderr)
    if options.out:
        record = {"method": BLOCKS_METHOD, "isa": kernel.isa_in_use(), "blocks": options.blocks, **found}
        write_results(options.out, "bench_blocks", {**record, "load_before": load})


ENGINE_COLUMNS: dict[str, Column] = {
    "engine": lambda row: row["name"],
    "threads": lambda row: str(row["threads"]),
    "tokens": lambda row: str(row["tokens"]),
    "ms": lambda row: f"{row['ms']:.1f}",
    "least": lambda row: f"{row['least_ms']:.1f}",
    "GMAC/s": lambda row: f"{row['gmacs']:.0f}",
    "memory MiB, own + mapped": lambda row: f"{row['anonymous_bytes'] / 2**20:.0f} + {row['file_bytes'] / 2**20:.0f}",
    "files MB": lambda row: f"{row['stored_bytes'] / 1e6:.1f}",
    "error": lambda row: f"{row['error']:.4f}" if "error" in row else "",
}
BLOCK_COLUMNS: dict[str, Column] = {
    "ours": lambda row: row["name"],
    "against": lambda row: row["baseline"],
    "threads": lambda row: str(row["threads"]),
    "tokens": lambda row: str(row["tokens"]),
    **RATIO_COLUMNS,
    "by the least": lambda row: f"{row['least_ratio']:.2f}x",
}
STEP_COLUMNS: dict[str, Column] = {
    "baseline": lambda row: row["baseline"],
    "threads": lambda row: str(row["threads"]),
    "batch": lambda row: str(row["batch"]),
    "engine ms": lambda row: f"{row['engine_ms']:.3f}",
    "baseline ms": lambda row: f"{row['baseline_ms']:.3f}",
    **RATIO_COLUMNS,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, nargs="?", default=Path("build/demo"), help="default: build/demo")
    parser.add_argument("--target", default="ort-cpu")
    parser.add_argument("--threads", type=int, action="append", help="may be given several times; default: 1 and all")
    parser.add_argument("--batch", type=int, action="append", help="may be given several times; default: 1")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--blocks", type=int, help="of a random DiT-XL/2, instead of a bundle")
    parser.add_argument("--only", nargs="+", metavar="ENGINE", choices=list(ENTRIES), help="of --blocks; default: all")
    parser.add_argument("--seconds", type=float, default=900.0, help="of --blocks, for all races together")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("build/blocks"),
        help="of --blocks: keeps what engines are made of, kernels included; remove it when the code has changed",
    )
    parser.add_argument("--quick", action="store_true", help="all cores only, 20 runs; within 45 seconds")
    parser.add_argument("--json", action="store_true", help="one object a line")
    parser.add_argument("--out", type=Path, help="also write the result file, e.g. tools/results/bench_model.json")
    options = parser.parse_args()
    options.threads = options.threads or ([cores()] if options.quick else sorted({1, cores()}))
    options.batch = options.batch or ([1, 2] if options.blocks else [1])
    options.runs = min(options.runs, 20) if options.quick else options.runs
    load = os.getloadavg()[0]
    try:
        if options.blocks:
            run_blocks(options, load)
            return 0
        if not options.bundle.is_dir():
            raise Misuse(f"{options.bundle}: no such bundle.", "Make it with `make demo`, or name another.")
        bundle = Bundle.load(options.bundle)
        rows, missing = measure(bundle, options)
    except Dit2DeployError as error:
        print(f"error: {error.cause}\n  -> {error.cure}", file=sys.stderr)
        return error.exit_code
    if options.json:
        for row in rows:
            print(json.dumps(row))
    else:
        print(table(rows, STEP_COLUMNS))
    for entry in missing:
        print(f"not measured: {entry['what']}: {entry['reason']}", file=sys.stderr)
    if options.out:
        record = {"method": METHOD, "load_before": load, "rows": rows, "not_measured": missing}
        write_results(options.out, "bench_model", record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
