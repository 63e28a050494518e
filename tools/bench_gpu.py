"""Times our CUDA kernels on a GPU beside torch's: GEMMs, quantizers and the blocks of DiT-XL/2, each checked first;
and a bundle's engines against the quantized PyTorch model."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a machine that has torch and numpy need not have this package installed

from gpu import bundle, gemm, quantize, step  # noqa: E402
from gpu.device import FLOATS, METHOD, Ceilings, Device, kernel  # noqa: E402
from gpu.rows import Row, table  # noqa: E402

from dit2deploy.artefacts.results import write_results  # noqa: E402
from dit2deploy.base.errors import Dit2DeployError  # noqa: E402
from dit2deploy.base.progress import listen, note  # noqa: E402

SECTIONS = ("quantize", "step", "gemm")  # in order: the last one has what is left of torch.compile's time
SAVED = 15.0  # seconds between two writings of the result file
EXAMPLE = """example:
  make gpu-check                                                     # the tests marked gpu, then this
  DIT2DEPLOY_LIBRARY=libdit2deploy.so python3 tools/bench_gpu.py     # with torch, numpy and the library alone
  python3 tools/bench_gpu.py --section gemm --tokens 4096 --model FLUX --out "$OUT/bench_gpu.json"

Every kernel is compared with its definition before it is timed. The result file is written anew every few seconds, so
that a run that is stopped leaves what it had. GEMMs of ours take int8 codes and give y with scales and bias, in each
of --floats; cuBLAS gives fp16 or bf16 without a bias, torch._int_mm bare int32. Exit code 1: a kernel computes
something else; 2: no GPU."""


def sections(device: Device, options: argparse.Namespace) -> dict[str, Callable[[], Iterator[Row]]]:
    models = options.model or sorted({shape.model for shape in gemm.SHAPES})
    shapes = tuple(shape for shape in gemm.SHAPES if shape.model in models)
    quantizers = tuple(what for what in quantize.QUANTIZERS if what.of in models)
    seconds, compiling = options.seconds / len(options.section), gemm.Compiling(options.compile_seconds)
    tokens, floats = options.tokens and tuple(options.tokens), tuple(options.floats or FLOATS)
    return {
        "quantize": lambda: quantize.measure(
            device, quantizers=quantizers, tokens=tokens or quantize.TOKENS, seconds=seconds, floats=floats
        ),
        "step": lambda: step.measure(device, step.DIT_XL_2, seconds=seconds, compiling=compiling),
        "gemm": lambda: gemm.measure(
            device,
            shapes=shapes,
            tokens=tokens or gemm.TOKENS,
            seconds=seconds,
            compiling=compiling,
            floats=floats,
            tactics=options.tactics,
        ),
    }


def measure(device: Device, options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """The record that is written, and whether all that was asked for is in it."""
    begin = time.monotonic()
    before = device.state()
    loaded = device.load()
    ceilings: Ceilings = device.ceilings()
    record: dict[str, Any] = {
        "method": METHOD,
        "device": device.describe(),
        "ceilings": vars(ceilings),
        "state": {"before": before, "host_load": os.getloadavg()},
        "library": str(kernel.library_path()),
        "kernels_loaded_s": loaded,
        "faults": [],
        "rows": [],
    }
    for name, rows in sections(device, options).items():
        if name not in options.section:
            continue
        note(f"{name}, after {time.monotonic() - begin:.0f} s")
        written = time.monotonic()
        try:
            for row in rows():
                record["rows"].append(row.record(ceilings))
                if time.monotonic() - written > SAVED:
                    written = time.monotonic()
                    write_results(options.out, "bench_gpu", record)
        except (Dit2DeployError, RuntimeError) as error:  # torch's own errors are RuntimeErrors
            record["faults"].append(f"{name}: {error}")
            note(f"{name} stopped: {error}")
        record["state"]["after"] = device.state()
        record["bars"] = [*gemm.bars(record["rows"]), *quantize.bars(record["rows"]), *step.bars(record["rows"])]
        record["seconds"] = time.monotonic() - begin
        write_results(options.out, "bench_gpu", record)
    record["bundles"] = list(bundle.measure(options.bundle))
    record["faults"] += [told["reason"] for told in record["bundles"] if told.get("parity") == "failed"]
    write_results(options.out, "bench_gpu", record)
    return record, not record["faults"]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--section", action="append", choices=SECTIONS, help="may be given several times; default: all")
    parser.add_argument("--model", action="append", choices=sorted({shape.model for shape in gemm.SHAPES}))
    parser.add_argument("--tokens", type=int, action="append", help="M; may be given several times")
    parser.add_argument("--floats", action="append", choices=FLOATS, help="of activations, several times; default: all")
    parser.add_argument("--tactics", action="store_true", help="GEMMs by each tile shape, too")
    parser.add_argument("--seconds", type=float, default=240.0, help="of timing, all sections together; default: 240")
    parser.add_argument("--compile-seconds", type=float, default=150.0, help="for torch.compile; default: 150")
    parser.add_argument("--bundle", type=Path, help="whose GPU engines run beside the quantized PyTorch model")
    parser.add_argument("--out", type=Path, default=ROOT / "tools" / "results" / "bench_gpu.json")
    options = parser.parse_args(arguments)
    options.section = options.section or list(SECTIONS)
    return options


def main(arguments: list[str] | None = None, open_device: Callable[[], Device] = Device) -> int:
    options = parse(arguments)
    listen(lambda what, done, total: print(f"note: {what}", file=sys.stderr) if total == 0 else None)
    try:
        record, whole = measure(open_device(), options)
    except Dit2DeployError as error:
        print(f"error: {error.cause}\n  -> {error.cure}", file=sys.stderr)
        return error.exit_code
    print(f"{record['device']['name']}, {record['state'].get('after')}")
    for what in dict.fromkeys(row["of"].split()[0] for row in record["rows"]):
        print(table([row for row in record["rows"] if row["of"].split()[0] == what]), end="\n\n")
    for told in record["bundles"]:
        print(f"{told['what']}: {told.get('parity') or told['reason']}")
    print(*record["bars"], *record["faults"], sep="\n")
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
