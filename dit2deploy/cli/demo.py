"""dit2deploy demo"""

from pathlib import Path

import click

from dit2deploy.base import progress
from dit2deploy.cli import options
from dit2deploy.cli.compile import summary


@click.command()
@click.option("-o", "--out", type=options.PATH, default=Path("build/demo"), show_default=True, help="The bundle.")
@options.common
def command(out: Path, seed: int):
    """Compile the trained DiT that comes with the package to ternary weights and 4-bit activations, end to end.

    Handwritten digits, 4.6 M parameters; engines for ONNX Runtime and, without a GPU, TensorRT-RTX.

    \b
    dit2deploy demo
    """
    from dit2deploy.demo import CLASSIFIER, PATH
    from dit2deploy.pipeline import compile
    from dit2deploy.targets import by_name

    targets = ["ort-cpu"]
    able = by_name("tensorrt-rtx").availability()
    if able.can_build:
        targets.append("tensorrt-rtx")
    else:
        progress.note(f"tensorrt-rtx is left out: {able.reason} {able.cure}")
    compile(PATH, out, recipe="w1.58a4", targets=targets, classifier=CLASSIFIER, runs=15, quality_samples=50, seed=seed)
    return summary(out)
