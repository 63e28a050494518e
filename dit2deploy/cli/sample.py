"""dit2deploy sample"""

from pathlib import Path

import click

from dit2deploy.cli import options


@click.command()
@click.argument("bundle", type=options.PATH)
@click.option("--label", "labels", multiple=True, type=click.IntRange(0), help="May be given several times.")
@options.prompts
@options.steps
@options.guidance
@options.target
@options.threads
@options.out("The picture, PNG.")
@options.common
def command(bundle: Path, labels, out: Path, seed: int, prompts, model, height, width, frames, **settings):
    """Draw images with the engine of a bundle: by labels, which needs no torch, or by prompts in the model's pipeline.

    Prompts are drawn in full precision too, from the same seeds; of videos a clip (.webp) lies beside the picture.

    \b
    dit2deploy sample bundle/ --label 7 --steps 20 --seed 0 -o seven.png
    dit2deploy sample bundle/ --prompts prompts.txt --steps 4 --guidance 0 -o pictures.png
    """
    from dit2deploy.stages.sample import sample, sample_prompts

    if bool(labels) == (prompts is not None):
        raise click.UsageError("Give --label or --prompts.")
    if prompts is None:
        images = sample(bundle, out, labels=labels, seed=seed, **settings)
        return {"out": str(out), "images": list(images.shape), "labels": list(labels), "seed": seed}, f"{out}"
    size = {"height": height, "width": width, "frames": frames}
    drawn = sample_prompts(bundle, out, prompts=prompts, model=model, seed=seed, **size, **settings)
    return {"out": str(out), "images": list(drawn["engine"].shape), "seed": seed}, f"{out}"
