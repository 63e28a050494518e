"""dit2deploy parity"""

from pathlib import Path

import click

from dit2deploy.cli import options


@click.command()
@click.argument("bundle", type=options.PATH)
@options.target
@click.option("--model", type=options.MODEL, help="The full-precision model.  [default: where the bundle says it was]")
@click.option("--checkpoint", type=options.PATH, help="The quantized one.  [default: where the bundle says it was]")
@options.steps
@options.max_memory
@options.common
def command(bundle: Path, target: str, model, checkpoint, steps: int, max_memory: int | None, seed: int):
    """Show that the engine computes what PyTorch computes, and what quantization cost. Exit code 1 if it does not.

    \b
    dit2deploy parity bundle/
    """
    from dit2deploy.stages.parity import parity, summary

    sources = {"model": model, "checkpoint": checkpoint}
    result = parity(bundle, target=target, **sources, steps=steps, max_memory=max_memory, seed=seed)
    return result, summary(result)
