"""dit2deploy card"""

from pathlib import Path

import click

from dit2deploy.cli import options


@click.command()
@click.argument("bundle", type=options.PATH)
@click.option("--base-model", default="", help="Hub id of the full-precision model, e.g. facebook/DiT-XL-2-256.")
@click.option("--licence", default="", help="SPDX id of the weights' licence, e.g. cc-by-nc-4.0.")
@options.steps
@options.guidance
@options.common
def command(bundle: Path, base_model: str, licence: str, steps: int, guidance: float, seed: int):
    """Write the model card of BUNDLE (README.md and a grid of samples) from what was measured on it.

    \b
    dit2deploy card bundle/ --base-model facebook/DiT-XL-2-256 --licence cc-by-nc-4.0
    """
    from dit2deploy.stages.card import card

    path = card(bundle, base_model=base_model, licence=licence, steps=steps, guidance=guidance, seed=seed)
    return {"out": str(path)}, str(path)
