"""dit2deploy export"""

from pathlib import Path

import click

from dit2deploy.cli import options


@click.command()
@click.argument("checkpoint", type=options.PATH)
@click.option(
    "--form",
    type=click.Choice(("fused", "qdq", "float")),
    default="fused",
    show_default=True,
    help="fused: our GEMMs, for `build`. qdq: the interchange form. float: CHECKPOINT is an unquantized model.",
)
@options.latent_sizes
@options.out("Folder of the ONNX model.")
@options.max_memory
@options.common
def command(checkpoint: Path, form: str, sizes, out: Path, max_memory: int | None):
    """Lower a quantized CHECKPOINT to ONNX; the file runs in any ONNX runtime through its function bodies.

    \b
    dit2deploy export dit-xl-2-w1.58a4/ -o onnx/
    dit2deploy export dit-xl-2/ --form float -o onnx-float/
    dit2deploy export pixart-512-w4a4/ --size 96x64 --size 64x96 -o onnx/     # latents; 8 pixels each in PixArt
    """
    from dit2deploy.models.hub import local
    from dit2deploy.stages.export import export, export_float

    if form == "float" and sizes:
        raise click.UsageError("--size is for quantized checkpoints: the float model is the baseline at its own size.")
    if form == "float":
        made = export_float(local(checkpoint), out, max_memory=max_memory)
    else:
        made = export(checkpoint, out, form=form, sizes=sizes, max_memory=max_memory)
    inputs = ", ".join(f"{port.name}{list(port.shape)}" for port in made.manifest.inputs)
    values = made.manifest.model_dump(mode="json")
    return {"out": str(out), **values}, f"{made.path}: {len(made.manifest.layers)} quantized layers; inputs {inputs}"
