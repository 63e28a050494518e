"""dit2deploy compile"""

from pathlib import Path
from typing import Any

import click

from dit2deploy.artefacts import bundle as artefact
from dit2deploy.base.files import read_json
from dit2deploy.cli import options

QUALITY = "quality.json"


@click.command()
@click.argument("model", type=options.PATH)
@click.option("--recipe", default="w1.58a4", show_default=True, help="w8a8, w4a4, w3a3 or w1.58a4.")
@click.option("--policy", type=options.PATH, help="A policy.json in place of the recipe.")
@click.option("--calibration", type=options.PATH, help="A calibration set in place of a new one.")
@click.option("--samples", default=8, show_default=True, type=click.IntRange(1), help="Calibration trajectories.")
@click.option("--work", type=options.PATH, help="Folder of intermediate artefacts.  [default: OUT.work]")
@options.targets
@options.steps
@options.guidance
@options.out("Folder of the bundle.")
@options.common
def command(model: Path, out: Path, targets, **settings):
    """Run all stages on MODEL: calibrate, search, quantize, export, build, parity, profile, report.

    Stopped at any point (ctrl-C, a kill, a full disk), the same command goes on where it was; what the hashes of its
    inputs show to be done is skipped.

    \b
    dit2deploy compile dit-xl-2/ --recipe w1.58a4 --target ort-cpu -o bundle/
    """
    from dit2deploy.pipeline import compile

    compile(model, out, targets=targets, **settings)
    return summary(out)


def _latency(profile: dict[str, Any]) -> list[tuple[str, str]]:
    there = profile["headline"]
    at_headline = [row for row in profile["latency"] if all(row[name] == there[name] for name in there)]
    what = f"latency of a step, p50, batch {there['batch']}, {there['threads']} threads"
    return [(f"{what}: {row['label']}", f"{row['p50_ms']:.2f} ms") for row in at_headline]


def _parity(parity: dict[str, Any]) -> list[tuple[str, str]]:
    engine = parity["engine_against_quantized"]
    rows = [("parity, engine against quantized PyTorch", parity["status"])]
    if final := engine.get("trajectory", {}).get("final"):
        rows.append(("  whole trajectory", f"SQNR {final['sqnr_db']:.1f} dB"))
    cost = parity["against_full_precision"].get("engine", {}).get("trajectory", {})
    if final := cost.get("final"):
        rows.append(
            ("cost of quantization, whole trajectory", f"SQNR {final['sqnr_db']:.1f} dB against full precision")
        )
    return rows


def quality_rows(quality: dict[str, Any]) -> list[tuple[str, str]]:
    def of(who: str) -> str:
        found = quality[who]
        if "class_accuracy" not in found:
            return f"not measured: {found['reason']}"
        return f"{100 * found['class_accuracy']:.1f} % read as asked, FD {found['frechet_distance']:.2f}"

    what = f"quality of {quality['samples']} samples"
    return [(f"{what}, engine", of("engine")), (f"{what}, full precision", of("full_precision"))]


def summary(out: Path):
    """The bundle in a short table: size, latency, parity, quality, and where the report is."""
    made = artefact.Bundle.load(out, check_hashes=False).manifest
    parity = read_json(out / artefact.PARITY)
    profile = read_json(out / artefact.PROFILE) if (out / artefact.PROFILE).exists() else None
    quality = read_json(out / QUALITY) if (out / QUALITY).exists() else None
    held = sum(made.size.parts.values())
    values = {
        "bundle": str(out),
        "report": str(out / artefact.REPORT),
        "float32_bytes": made.size.float32,
        "weight_bytes": held,
        "size_ratio": made.size.ratio,
        "parity": parity["status"],
        "latency": profile["latency"] if profile else None,
        "quality": quality,
        "targets": {name: list(record.engines) for name, record in made.targets.items()},
    }
    sizes = f"{options.megabytes(made.size.float32)} -> {options.megabytes(held)}"
    rows = [("weights, float32 -> engine", f"{sizes} ({made.size.ratio:.1f}x smaller)")]
    rows += (_latency(profile) if profile else []) + _parity(parity)
    if quality is not None:
        rows += quality_rows(quality)
    rows += [(f"engines for {name}", ", ".join(record.engines)) for name, record in made.targets.items()]
    table = options.table(str(out), ("", ""), rows)
    table.show_header = False
    table.columns[1].justify = "left"
    table.caption = f"report: {out / artefact.REPORT}"
    table.caption_justify = "left"
    return values, table
