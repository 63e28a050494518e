"""dit2deploy quantize"""

from pathlib import Path

import click

from dit2deploy.base.shown import megabytes
from dit2deploy.cli import options


@click.command()
@click.argument("model", type=options.MODEL)
@click.option("--policy", required=True, type=options.PATH, help="policy.json, from `dit2deploy search`.")
@click.option("--calibration", required=True, type=options.PATH, help="From `dit2deploy calibrate`.")
@click.option("--iterations", type=click.IntRange(1), help="Of each block's reconstruction. [default: by its size]")
@options.out("Folder of the quantized checkpoint.")
@options.max_memory
@options.dry_run
@options.common
def command(
    model: Path,
    policy: Path,
    calibration: Path,
    iterations: int | None,
    out: Path,
    max_memory: int | None,
    dry_run: bool,
    seed: int,
):
    """Pack MODEL as the policy says; goes on where an earlier run was stopped.

    \b
    dit2deploy quantize dit-xl-2/ --policy policy.json --calibration calibration/ -o dit-xl-2-w1.58a4/
    """
    from dit2deploy.artefacts.calibration_set import CalibrationSet
    from dit2deploy.artefacts.checkpoint import TENSORS
    from dit2deploy.artefacts.policy import Policy
    from dit2deploy.stages.quantize import estimate, quantize

    held = CalibrationSet.load(calibration)
    if dry_run:
        found = estimate(model, Policy.load(policy), held.call(0), calls=len(held), max_memory=max_memory, seed=seed)
        return options.estimates([found])
    settings = {"iterations": iterations, "max_memory": max_memory, "seed": seed}
    made = quantize(model, Policy.load(policy), held, out, **settings)
    size = (made.folder / TENSORS).stat().st_size
    quantized = sum(layer.is_quantized for layer in made.policy.layers.values())
    return (
        {"out": str(out), "bytes": size, "quantized_layers": quantized},
        f"{out}: {quantized} quantized layers, {megabytes(size)}",
    )
