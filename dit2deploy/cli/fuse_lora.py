"""dit2deploy fuse-lora"""

from pathlib import Path

import click

from dit2deploy.cli import options


@click.command()
@click.argument("model", type=options.MODEL)
@click.argument("lora", type=options.PATH)
@click.option("--scale", default=1.0, show_default=True, help="Strength of the LoRA.")
@options.out("Folder of the model with the LoRA in its weights.")
@options.common
def command(model: Path, lora: Path, scale: float, out: Path):
    """Add LORA (safetensors) to the weights of MODEL; quantize the result like any model.

    \b
    dit2deploy fuse-lora FLUX.1-dev/ style.safetensors --scale 0.8 -o flux-style/
    """
    from dit2deploy.stages.fuse_lora import fuse_lora

    made = fuse_lora(model, lora, out, scale=scale)
    return {"out": str(out), "model": made.class_name}, f"{out}: {made.class_name} with {lora.name}"
