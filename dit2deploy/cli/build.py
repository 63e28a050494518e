"""dit2deploy build"""

from pathlib import Path

import click

from dit2deploy.base.shown import megabytes
from dit2deploy.cli import options

_RANGED = ("tensorrt-rtx", "tensorrt")  # targets whose engines are for a range of lengths


@click.command()
@click.argument("onnx", type=options.PATH)
@options.targets
@click.option("--calibration", type=options.PATH, help="Records reference steps of the quantized model in the bundle.")
@click.option("--model", type=options.MODEL, help="Records those of the full-precision model beside them.")
@click.option("--float-onnx", type=options.PATH, help="`export --form float` of the model: profile's baseline.")
@click.option(
    "--compute-capability",
    "capabilities",
    multiple=True,
    default=("7.5", "8.0", "8.6", "8.9", "12.0"),
    show_default=True,
    help="GPUs that TensorRT-RTX engines are for; may be given several times.",
)
@options.ranges
@click.option(
    "--floats",
    type=click.Choice(("float32", "float16", "bfloat16")),
    default="float32",
    show_default=True,
    help="Type of the activations in engines for GPUs; inputs and outputs stay float32.",
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
    out: Path,
    max_memory: int | None,
):
    """Build engines for the targets from an exported ONNX model, into one bundle.

    \b
    dit2deploy build onnx/ --target ort-cpu --target tensorrt-rtx --calibration calibration/ -o bundle/
    dit2deploy build onnx/ --target tensorrt-rtx --range batch=1:1:1 --range text_tokens=77:77:512 -o bundle/
    """
    from dit2deploy.stages.build import build

    if ranges and not set(_RANGED) & set(targets):
        raise click.UsageError(f"--range is for {' and '.join(_RANGED)}: engines of other targets take any length.")

    own = {
        "tensorrt-rtx": {"compute_capabilities": list(capabilities), "ranges": ranges},
        "tensorrt": {"ranges": ranges},
    }
    given = {} if floats == "float32" else {"floats": floats}  # which targets of CPUs refuse
    made = build(
        onnx,
        out,
        targets=targets,
        options={target: {**own.get(target, {}), **given} for target in targets},
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
