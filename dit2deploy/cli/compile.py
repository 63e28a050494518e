"""dit2deploy compile"""

from pathlib import Path

import click

from dit2deploy.artefacts.bundle import REPORT, Bundle
from dit2deploy.cli import options


@click.command()
@click.argument("model", type=options.MODEL)
@click.option("--recipe", default="w1.58a4", show_default=True, help="Of `dit2deploy search`.")
@click.option("--policy", type=options.PATH, help="A policy.json in place of the recipe.")
@click.option("--checkpoint", type=options.PATH, help="A checkpoint of MODEL in place of search and quantize.")
@click.option("--calibration", type=options.PATH, help="A calibration set in place of a new one.")
@click.option("--prompts", type=options.PATH, help="A text file, one prompt a line, to calibrate a text model with.")
@options.size
@click.option("--lora", type=options.PATH, help="A LoRA (safetensors) that is added to MODEL's weights first.")
@click.option("--lora-scale", default=1.0, show_default=True, help="Strength of the LoRA.")
@click.option("--samples", default=8, show_default=True, type=click.IntRange(1), help="Calibration trajectories.")
@click.option("--work", type=options.PATH, help="Folder of intermediate artefacts.  [default: OUT.work]")
@options.latent_sizes
@options.targets
@options.capabilities
@options.ranges
@options.floats
@options.steps
@options.guidance
@options.out("Folder of the bundle.")
@options.max_memory
@options.dry_run
@options.common
def command(model: Path, out: Path, targets, capabilities, ranges, floats: str, dry_run: bool, **settings):
    """Run all stages on MODEL: calibrate, search, quantize, export, build, parity, profile, report.

    MODEL is a folder, or OWNER/NAME[@REVISION] on the Hugging Face Hub.

    Stopped at any point (ctrl-C, a kill, a full disk), the same command goes on where it was; what the hashes of its
    inputs show to be done is skipped.

    \b
    dit2deploy compile dit-xl-2/ --recipe w1.58a4 --target ort-cpu -o bundle/
    dit2deploy compile dit-xl-2/ --checkpoint dit-xl-2-w1.58a4-qat/ -o bundle/
    dit2deploy compile facebook/DiT-XL-2-256@main -o bundle/
    dit2deploy compile flux-1-schnell/ --prompts prompts.txt --steps 4 --guidance 0 -o bundle/
    dit2deploy compile dit-xl-2/ --target tensorrt-rtx --floats float16 --range batch=1:2:8 -o bundle/
    dit2deploy compile dit-xl-2/ --lora style.safetensors --lora-scale 0.8 -o bundle/
    """
    from dit2deploy.pipeline import compile, estimate

    own = options.of_targets(targets, capabilities=capabilities, ranges=ranges, floats=floats)
    if dry_run:
        for name in ("work", "sizes", "lora", "lora_scale"):  # nothing that the estimate depends on
            del settings[name]
        return options.estimates(estimate(model, **settings))
    compile(model, out, targets=targets, options=own, **settings)
    return summary(out)


def summary(out: Path):
    """The bundle in a short table: size, latency, parity, quality, engines, and where the report is."""
    from dit2deploy.evaluate.headline import headline, rows

    found = headline(Bundle.load(out, check_hashes=False))
    values = {"bundle": str(out), "report": str(out / REPORT), **found}
    table = options.table(str(out), ("", ""), rows(found))
    table.show_header = False
    table.columns[1].justify = "left"
    table.caption = f"report: {out / REPORT}"
    table.caption_justify = "left"
    return values, table
