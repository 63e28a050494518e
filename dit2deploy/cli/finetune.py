"""dit2deploy finetune"""

from pathlib import Path

import click

from dit2deploy.cli import options


def _bits(_ctx: click.Context, _param: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        return tuple(int(bits) for bits in value.split(",") if bits)
    except ValueError:
        raise click.BadParameter("give bits with commas, e.g. 8,4,3.") from None


@click.command()
@click.argument("model", type=options.MODEL)
@click.argument("checkpoint", type=options.PATH)
@click.option("--calibration", required=True, type=options.PATH, help="From `dit2deploy calibrate`.")
@click.option("--data", type=options.PATH, help="safetensors: images f32 [N, C, H, W] (latents), labels i64 [N].")
@click.option("--data-weight", default=1.0, show_default=True, help="Of the data's own loss, beside the teacher's.")
@click.option("--steps", default=2000, show_default=True, type=click.IntRange(1), help="Optimizer steps.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="End by then, fully decayed.")
@click.option("--batch", default=32, show_default=True, type=click.IntRange(1), help="Samples a step.")
@click.option("--learning-rate", default=1e-3, show_default=True, help="Of the weights, in shares of their range.")
@click.option("--branch-learning-rate", default=3e-4, show_default=True, help="Of branches, biases and scales.")
@click.option(
    "--trained",
    type=click.Choice(("all", "branch", "selective")),
    default="all",
    show_default=True,
    help="branch: the low-bit weights stay; selective: QuEST's choice of layers.",
)
@click.option("--schedule", default="", callback=_bits, help="Activation bits in equal parts of it, e.g. 8,4,3.")
@options.out("Folder of the trained checkpoint.")
@options.common
def command(
    model: Path,
    checkpoint: Path,
    calibration: Path,
    data: Path | None,
    minutes: float | None,
    out: Path,
    seed: int,
    **settings,
):
    """Train the quantized CHECKPOINT to answer as MODEL does; goes on where an earlier run was stopped.

    \b
    dit2deploy finetune dit-xl-2/ dit-xl-2-w1.58a4/ --calibration calibration/ -o dit-xl-2-w1.58a4-qat/
    """
    from dit2deploy.artefacts.calibration_set import CalibrationSet
    from dit2deploy.artefacts.checkpoint import Checkpoint
    from dit2deploy.stages.finetune import Settings, finetune

    made = finetune(
        model,
        Checkpoint.load(checkpoint),
        out,
        calibration=CalibrationSet.load(calibration),
        settings=Settings(**settings),
        data=data,
        minutes=minutes,
        seed=seed,
    )
    journal = made.manifest.training
    first, last = journal["losses"][0][1], journal["losses"][-1][1]
    return (
        {"out": str(out), "steps": journal["steps"], "seconds": journal["seconds"], "loss": [first, last]},
        f"{out}: {journal['steps']} steps in {journal['seconds'] / 60:.1f} min, loss {first:.6f} -> {last:.6f}",
    )
