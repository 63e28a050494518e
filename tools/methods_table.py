"""Compares quantization methods on one model: fidelity, quality and size by method and bit-widths, over seeds."""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from methods import chart
from methods.cases import COLUMNS, Case, block_linears
from methods.cells import ask, draw, judged, measure
from methods.claims import FULL
from methods.journal import Journal
from methods.page import render
from methods.rows import ROWS

from dit2deploy.artefacts.results import write_results
from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import write_bytes
from dit2deploy.base.machine import versions
from dit2deploy.evaluate import Classifier
from dit2deploy.models.load import load_transformer, open_model
from dit2deploy.sampling import Scheduler
from dit2deploy.stages.calibrate import calibrate
from dit2deploy.stages.search.uniform import default_rank

EXAMPLE = """example:
  python tools/methods_table.py --quick --rows RTN "RTN + Hadamard" --columns W4A4 --out build/methods
  python tools/methods_table.py                 # all of it: hours; goes on where a killed run stopped
  python tools/methods_table.py --collect       # the result file from what is done so far
  python tools/methods_table.py --render        # docs/methods.md from tools/results/methods_table.json

The journal holds every cell that is done; remove it when the code of a method has changed."""

RESULT, JOURNAL = "methods_table.json", "methods_table.jsonl"
FLOAT_TO_QUANTIZED = 2.3  # times a call of full precision takes, both measures together; for the estimate only
QUANTIZING = 20.0  # seconds a cell; for the estimate only


def chosen(known: Sequence[Any], names: Sequence[str] | None, what: str) -> list[Any]:
    """The entries of these names, in the list's order; Misuse for a name that is not in it."""
    by_name = {entry.name.lower(): entry for entry in known}
    for name in names or ():
        if name.lower() not in by_name:
            raise Misuse(f"there is no {what} {name!r}.", f"Known: {', '.join(entry.name for entry in known)}.")
    wanted = {name.lower() for name in names or by_name}
    return [entry for entry in known if entry.name.lower() in wanted]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures what the journal lacks, and writes the result file."""
    rows, columns = chosen(ROWS, options.rows, "row"), chosen(COLUMNS, options.columns, "column")
    source = open_model(options.model)
    network, _ = load_transformer(options.model)
    scheduler, judge = Scheduler.load(options.model), Classifier.load(options.classifier)
    settings = {name: getattr(options, name) for name in ("samples", "steps", "guidance", "calibration_samples")}
    journal = Journal(options.out / JOURNAL, [source.sha256, settings, versions("dit2deploy")])
    pairs = [(row, column) for column in columns for row in rows if column.name in row.columns]
    missing = (
        []
        if options.collect
        else [
            (seed, row, column)
            for seed in range(options.seeds)
            for row, column in pairs
            if journal.get(row.name, column.name, seed) is None
        ]
    )
    seeds = sorted({seed for seed, _, _ in missing})
    if seeds:
        tell_estimate(network, options, cells=len(missing), seeds=len(seeds))
    rank, begun, done = default_rank(min(block_linears(options.model).values(), key=min)), time.monotonic(), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed in seeds:
            calibration = calibrate(
                options.model,
                folder / f"calibration-{seed}",
                samples=options.calibration_samples,
                steps=options.steps,
                guidance=options.guidance,
                seed=seed,
            )
            reference = draw(network, scheduler, options, seed)
            if journal.get(FULL, "", seed) is None:
                journal.add(FULL, "", seed, judged(judge, reference.images, network.config["num_embeds_ada_norm"]))
            for _, row, column in (cell for cell in missing if cell[0] == seed):
                case = Case(options.model, column, calibration, folder, rank, seed)
                values = measure(row, case, reference, judge, scheduler, options)
                journal.add(row.name, column.name, seed, values)
                done += 1
                left = (time.monotonic() - begun) / done * (len(missing) - done) / 60
                print(
                    f"{row.name:<22} {column.name:<8} seed {seed}: {values['sqnr_db']:5.1f} dB, accuracy "
                    f"{values['accuracy']:.3f}, FD {values['fd']:.2f}; {left:.0f} min left",
                    flush=True,
                )

    def by_seed(row: str, column: str) -> dict[str, dict[str, float]]:
        held = ((seed, journal.get(row, column, seed)) for seed in range(options.seeds))
        return {str(seed): values for seed, values in held if values is not None}

    ordered = sorted(pairs, key=lambda pair: rows.index(pair[0]))
    cells = [
        {"row": row.name, "column": column.name, "seeds": by_seed(row.name, column.name)} for row, column in ordered
    ]
    cells = [cell for cell in cells if cell["seeds"]]
    return write_results(
        options.out / RESULT,
        "methods_table",
        {
            "model": str(options.model),
            "model_sha256": source.sha256,
            **settings,
            "rendered_by": "python tools/methods_table.py --render",
            "full_precision": by_seed(FULL, ""),
            "rows": {row.name: row.what for row in rows if any(cell["row"] == row.name for cell in cells)},
            "cells": cells,
        },
    )


def tell_estimate(network: torch.nn.Module, options: argparse.Namespace, *, cells: int, seeds: int) -> None:
    config, batch = network.config, 2 * options.samples
    values = (
        np.zeros((batch, config["in_channels"], config["sample_size"], config["sample_size"]), np.float32),
        np.zeros(batch, np.int64),
        np.zeros(batch, np.int64),
    )
    ask(network, values)  # the first call is slower
    begun = time.monotonic()
    ask(network, values)
    step = (time.monotonic() - begun) * options.steps
    minutes = (cells * (step * FLOAT_TO_QUANTIZED + QUANTIZING) + 2 * seeds * step) / 60
    print(f"{cells} cells to measure, about {minutes:.0f} minutes", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("dit2deploy/demo"), help="class-conditional pipeline folder")
    parser.add_argument("--classifier", type=Path, default=Path("dit2deploy/demo/classifier.safetensors"))
    parser.add_argument("--rows", nargs="+", help="methods, by name (default: all)")
    parser.add_argument("--columns", nargs="+", help="bit-widths, by name (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default %(default)s)")
    parser.add_argument("--samples", type=int, default=50, help="images a cell and seed (default %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="DDIM steps (default %(default)s)")
    parser.add_argument("--guidance", type=float, default=1.5, help="default %(default)s")
    parser.add_argument("--calibration-samples", type=int, default=8, help="default %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="1 seed, 20 samples, 10 steps, 4 calibration samples")
    parser.add_argument("--out", type=Path, default=Path("tools/results"), help=f"folder of {RESULT} and its journal")
    parser.add_argument("--document", type=Path, default=Path("docs/methods.md"), help="default %(default)s")
    parser.add_argument("--collect", action="store_true", help="measure nothing; write what the journal holds so far")
    parser.add_argument("--render", action="store_true", help="only write the document from the result file")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.samples, options.steps, options.calibration_samples = 1, 20, 10, 4
    torch.set_num_threads(options.threads)
    try:
        if not options.render:
            run(options)
        elif not (options.out / RESULT).exists():
            raise Misuse(f"{options.out / RESULT}: no such file.", "Measure first, without --render.")
        result = json.loads((options.out / RESULT).read_text())
        picture = options.document.with_suffix(".svg")
        chart.draw(result, picture)
        write_bytes(options.document, render(result, picture=picture.name).encode())
    except Misuse as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(options.document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
