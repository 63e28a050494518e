"""dit2deploy calibrate"""

from pathlib import Path

import click

from dit2deploy.cli import options


@click.command()
@click.argument("model", type=options.MODEL)
@options.out("Folder of the calibration set.")
@click.option("--samples", default=8, show_default=True, type=click.IntRange(1), help="Trajectories to record.")
@click.option("--prompts", type=options.PATH, help="A text file, one prompt a line, for the model's own pipeline.")
@options.size
@options.steps
@options.guidance
@options.max_memory
@options.dry_run
@options.common
def command(model: Path, out: Path, dry_run: bool, seed: int, **settings):
    """Record inputs of MODEL's transformer on its own denoising trajectories.

    \b
    dit2deploy calibrate dit-xl-2/ --samples 16 -o calibration/
    dit2deploy calibrate flux-1-schnell/ --prompts prompts.txt --steps 4 --guidance 0 -o calibration/
    """
    from dit2deploy.stages.calibrate import calibrate, estimate

    if dry_run:
        return options.estimates([estimate(model, **settings)])
    made = calibrate(model, out, seed=seed, **settings)
    values = {"out": str(out), "calls": len(made), "timesteps": list(made.manifest.timesteps)}
    return values, f"{out}: {len(made)} calls of {made.manifest.model}"
