"""dit2deploy sample"""

from pathlib import Path

import click

from dit2deploy.cli import options


@click.command()
@click.argument("bundle", type=options.PATH)
@click.option(
    "--label", "labels", multiple=True, required=True, type=click.IntRange(0), help="May be given several times."
)
@options.steps
@options.guidance
@options.target
@options.threads
@options.out("The picture, PNG.")
@options.common
def command(bundle: Path, labels, steps: int, guidance: float, target: str, threads, out: Path, seed: int):
    """Draw images with the engine of a bundle; needs no torch.

    \b
    dit2deploy sample bundle/ --label 7 --steps 20 --seed 0 -o seven.png
    """
    from dit2deploy.stages.sample import sample

    images = sample(
        bundle, out, labels=labels, steps=steps, guidance=guidance, seed=seed, target=target, threads=threads
    )
    return {"out": str(out), "images": list(images.shape), "labels": list(labels), "seed": seed}, f"{out}"
