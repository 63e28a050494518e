"""dit2deploy evaluate"""

from pathlib import Path

import click

from dit2deploy.cli import options


@click.command()
@click.argument("bundle", type=options.PATH)
@click.option("--classifier", required=True, type=options.PATH, help="Classifier of the images (safetensors).")
@click.option("--samples", default=200, show_default=True, type=click.IntRange(2))
@options.steps
@options.guidance
@options.common
def command(bundle: Path, classifier: Path, samples: int, steps: int, guidance: float, seed: int):
    """Sample from the engine and measure class accuracy and Fréchet distance (FD, in the classifier's features).

    \b
    dit2deploy evaluate bundle/ --classifier classifier.safetensors --samples 500
    """
    from dit2deploy.evaluate.headline import quality_rows
    from dit2deploy.stages.evaluate import evaluate

    result = evaluate(bundle, classifier=classifier, samples=samples, steps=steps, guidance=guidance, seed=seed)
    return result, options.table(str(bundle), ("", ""), quality_rows(result))
