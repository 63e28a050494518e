"""dit2deploy build"""

from pathlib import Path

import click

from dit2deploy.base.shown import megabytes
from dit2deploy.cli import options


@click.command()
@click.argument("onnx", type=options.PATH)
@options.targets
@click.option("--calibration", type=options.PATH, help="Records reference steps of the quantized model in the bundle.")
@click.option("--model", type=options.MODEL, help="Records those of the full-precision model beside them.")
@click.option("--float-onnx", type=options.PATH, help="`export --form float` of the model: profile's baseline.")
@options.capabilities
@options.ranges
@options.floats
@click.option(
    "--timing-cache",
    type=options.PATH,
    help="Folder of what TensorRT timed in earlier builds, and will.  [default: the user's cache folder]",
)
@options.out("Folder of the bundle.")
@options.max_memory
@options.common
def command(
    onnx: Path,
    targets,
    calibration,
    model,
    float_onnx,
    capabilities,
    ranges,
    floats: str,
    timing_cache: Path | None,
    out: Path,
    max_memory: int | None,
):
    """Build engines for the targets from an exported ONNX model, into one bundle.

    \b
    dit2deploy build onnx/ --target ort-cpu --target tensorrt-rtx --calibration calibration/ -o bundle/
    dit2deploy build onnx/ --target tensorrt-rtx --range batch=1:1:1 --range text_tokens=77:77:512 -o bundle/
    """
    from dit2deploy.stages.build import build

    own = options.of_targets(
        targets, capabilities=capabilities, ranges=ranges, floats=floats, timing_cache=timing_cache
    )
    made = build(
        onnx,
        out,
        targets=targets,
        options=own,
        calibration=calibration,
        model=model,
        float_onnx=float_onnx,
        max_memory=max_memory,
    )
    size = made.manifest.size
    rows = [
        (name, ", ".join(record.engines) or "-", megabytes(record.weight_bytes))
        for name, record in made.manifest.targets.items()
    ]
    title = f"{out}: {size.ratio:.2f} times smaller than float32"
    values = {"out": str(out), "ratio": size.ratio, "targets": list(made.manifest.targets)}
    return values, options.table(title, ("target", "engines", "weights"), rows)
