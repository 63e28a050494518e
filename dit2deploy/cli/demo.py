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
    """Compile the trained DiT that comes with the package, end to end: ternary weights, 4-bit activations.

    Handwritten digits, 4.6 M parameters, quantized and then trained by `dit2deploy finetune`; engines for ONNX Runtime
    and, without a GPU, TensorRT-RTX; for onnxruntime-gpu where it runs.

    \b
    dit2deploy demo
    """
    from dit2deploy.demo import CHECKPOINT, CLASSIFIER, PATH
    from dit2deploy.pipeline import compile
    from dit2deploy.targets import by_name

    targets = ["ort-cpu", *(["ort-cuda"] if by_name("ort-cuda").availability().can_run else [])]
    able = by_name("tensorrt-rtx").availability()
    if able.can_build:
        targets.append("tensorrt-rtx")
    else:
        progress.note(f"tensorrt-rtx is left out: {able.reason} {able.cure}")
    settings = {"classifier": CLASSIFIER, "runs": 15, "quality_samples": 50, "seed": seed}
    compile(PATH, out, checkpoint=CHECKPOINT, targets=targets, **settings)
    return summary(out)
