"""dit2deploy evaluate"""

from pathlib import Path

import click

from dit2deploy.cli import options


@click.command()
@click.argument("bundle", type=options.PATH)
@click.option("--classifier", type=options.PATH, help="Classifier of the images (safetensors).")
@click.option("--samples", default=200, show_default=True, type=click.IntRange(2), help="Read by the classifier.")
@options.prompts
@click.option("--clip", type=options.PATH, help="Folder of a CLIP model.  [default: openai/clip-vit-base-patch16]")
@click.option("--real", type=options.PATH, help="Folder of real images, for FID.")
@click.option("--geneval", type=options.PATH, help="Folder of GenEval's repository, with its detector's weights.")
@click.option("--evaluators", type=options.PATH, help="Python that GenEval and VBench are in.  [default: this one]")
@click.option("--keep", type=options.PATH, help="Keep what GenEval and VBench read in this folder.")
@options.steps
@options.guidance
@options.common
def command(
    bundle: Path,
    classifier: Path | None,
    samples: int,
    prompts: Path | None,
    model,
    clip,
    real,
    geneval,
    evaluators,
    keep,
    height,
    width,
    frames,
    **settings,
):
    """Draw with the engine and in full precision from the same seeds, and measure how good it is.

    With a classifier: class accuracy and Fréchet distance (FD, in the classifier's features). By prompts: PSNR and
    LPIPS between the two, CLIP score, FID to real images, of images GenEval, of videos VBench, by packages and weights
    that are on this disk; what is missing is named, and nothing is fetched.

    \b
    dit2deploy evaluate bundle/ --classifier classifier.safetensors --samples 500
    dit2deploy evaluate bundle/ --prompts prompts.txt --clip clip-vit-base-patch16/ --real photos/
    dit2deploy evaluate bundle/ --prompts geneval-prompts.txt --geneval geneval/ --evaluators geneval-env/bin/python
    """
    from dit2deploy.evaluate.headline import quality_rows
    from dit2deploy.stages.evaluate import evaluate, evaluate_prompts

    if (classifier is None) == (prompts is None):
        raise click.UsageError("Give --classifier or --prompts.")
    if classifier is not None:
        result = evaluate(bundle, classifier=classifier, samples=samples, **settings)
    else:
        folders = {"model": model, "clip": clip, "real": real}
        folders |= {"geneval": geneval, "evaluators": evaluators, "keep": keep}
        size = {"height": height, "width": width, "frames": frames}
        result = evaluate_prompts(bundle, prompts=prompts, **folders, **size, **settings)
    return result, options.table(str(bundle), ("", ""), quality_rows(result))
