"""dit2deploy measure-ops"""

from pathlib import Path

import click

from dit2deploy.cli import options


@click.command()
@click.argument("model", type=options.MODEL)
@click.option("--policy", required=True, type=options.PATH, help="policy.json: ranks, groups, rotations, other layers.")
@click.option("--calibration", type=options.PATH, help="Its calls tell the number of tokens.  [default: the model's]")
@click.option(
    "--weights",
    multiple=True,
    type=click.Choice(("ternary", "int3", "int4", "int8")),
    help="Formats of the block linears; may be given several times.  [default: the policy's]",
)
@click.option("--bits", callback=options.widths, default="2,3,4,5,6,8", show_default=True, help="Activation widths.")
@click.option("--device", help="A name for this device.  [default: the processor's]")
@options.threads
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1), help="Samples a call; 2 with guidance.")
@click.option("--rounds", default=20, show_default=True, type=click.IntRange(1), help="Timed runs of each linear.")
@options.out("The table, e.g. device.json; one that is there is extended.")
@options.common
def command(model: Path, policy: Path, calibration: Path | None, out: Path, **settings):
    """Time the linears of MODEL on this device, for searches with a budget in milliseconds.

    \b
    dit2deploy search dit-xl-2/ --recipe w1.58a4 -o base.json
    dit2deploy measure-ops dit-xl-2/ --policy base.json -o device.json
    dit2deploy measure-ops dit-xl-2/ --policy base.json --weights ternary --weights int4 --bits 4,8 -o device.json
    dit2deploy search dit-xl-2/ --recipe robuq-ampn --device device.json --budget 30ms --calibration c/ -o policy.json
    """
    from dit2deploy.artefacts.calibration_set import CalibrationSet
    from dit2deploy.artefacts.policy import Policy
    from dit2deploy.stages.profile.linears import measure_ops

    held = None if calibration is None else CalibrationSet.load(calibration)
    table = measure_ops(model, Policy.load(policy), out, calibration=held, **settings)
    values = {"out": str(out), "device": table.device, "threads": table.threads, "times": len(table.times)}
    return (
        values,
        f"{out}: {len(table.times)} linears on {table.device}, {table.threads} thread(s), batch {table.batch}",
    )
