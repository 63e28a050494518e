"""dit2deploy search"""

from pathlib import Path
from typing import get_args

import click

from dit2deploy.artefacts.policy import BranchInit, Weight
from dit2deploy.cli import options


@click.command()
@click.argument("model", type=options.MODEL)
@click.option(
    "--recipe",
    default="w1.58a4",
    show_default=True,
    help="Uniform: w8a8, w4a8, w4a4, w3a3, w1.58a8, w1.58a4. Static, by regions: tq-dit, tq-dit-w6a6. "
    "Mixed precision: robuq-ampn, treeq-tss, adatsq. Weight formats: hawq. Group sizes: q-dit.",
)
@click.option("--low-rank", type=click.IntRange(0), help="Rank of the side branch.  [default: the recipe's]")
@click.option("--group-size", type=click.IntRange(1), help="Weights a scale along K.  [default: one scale a channel]")
@click.option(
    "--modulation",
    type=click.Choice(get_args(Weight)),
    help="Weights of the adaLN linears; ternary, as RobuQ has them, is the smallest file.  [default: the recipe's]",
)
@click.option("--rounding", type=click.Choice(("nearest", "gptq", "adaround")), help="[default: the recipe's]")
@click.option("--clip", type=click.Choice(("absmax", "gaussian")), help="Of activations.  [default: the recipe's]")
@click.option(
    "--branch-init",
    type=click.Choice(get_args(BranchInit)),
    help="Of the side branch: RobuQ's V1, V2, V3; V3, and V2 once more, in the norm of the inputs; of salient "
    "input channels.  [default: refit with GPTQ, else alternating]",
)
@click.option(
    "--hessian",
    type=click.Choice(("uniform", "fisher")),
    help="How the calibration's steps count in GPTQ; fisher: AdaTSQ's weights.  [default: uniform]",
)
@click.option("--smoothing", type=click.FloatRange(0, 1), help="SmoothQuant's alpha, where layers have a place for it.")
@click.option("--grid", type=click.Choice(("mid-tread", "mid-rise")), help="Of activations.  [default: by their bits]")
@click.option("--calibration", type=options.PATH, help="Mixed: what is measured on, from `dit2deploy calibrate`.")
@click.option(
    "--budget",
    help="Mixed: average bits of the block linears (3), bytes of the checkpoint (1.8MB), or milliseconds of a step's "
    "linears on --device (3.2ms).  [default: 3; q-dit: 4.25]",
)
@click.option("--device", type=options.PATH, help="Mixed: a table of `dit2deploy measure-ops`, for milliseconds.")
@click.option(
    "--weighting",
    type=click.Choice(("macs", "parameters", "layers")),
    help="Mixed: what a layer counts in the average.  [default: macs]",
)
@click.option("--base", help="Mixed: the uniform recipe that says all else.  [default: w1.58a4; q-dit: w4a8]")
@click.option(
    "--allocate",
    type=click.Choice(("activations", "weights")),
    help="robuq-ampn, treeq-tss: whose bits.  [default: activations]",
)
@click.option(
    "--bits",
    callback=options.widths,
    help="Mixed: activation widths to choose from.  [default: robuq-ampn 1,2,3,4; adatsq 2,3,4,5,6; else 2,3,4,5,6,8]",
)
@click.option("--items", type=click.IntRange(2), help="robuq-ampn, treeq-tss, hawq: samples compared.  [default: 32]")
@click.option("--survivors", type=click.IntRange(2), help="treeq-tss: configurations a node keeps.  [default: 16]")
@click.option("--lam", type=click.FloatRange(0, 1), help="treeq-tss: noise of the other layers.  [default: 1]")
@click.option("--refine", is_flag=True, default=None, help="treeq-tss: swap widths at the end.")
@click.option("--groups", type=click.IntRange(1), help="Timestep groups.  [default: adatsq 5, tq-dit 10]")
@click.option("--beam", type=click.IntRange(1), help="adatsq: paths that are kept.  [default: 32]")
@click.option("--trajectories", type=click.IntRange(1), help="adatsq, q-dit: samples denoised.  [default: 4]")
@click.option("--probes", type=click.IntRange(1), help="adatsq: projections behind a Fisher score.  [default: 4]")
@click.option("--population", type=click.IntRange(1), help="q-dit: configurations of a generation.  [default: 20]")
@click.option("--generations", type=click.IntRange(1), help="q-dit: after the first one.  [default: 10]")
@click.option("--point", type=click.IntRange(0), help="No search: take this point of the front beside --out.")
@options.out("The policy to write, e.g. policy.json.")
@options.common
def command(model: Path, recipe: str, out: Path, seed: int, point: int | None, **overrides):
    """Find out what every layer of MODEL becomes, and write it down fully resolved.

    Mixed-precision recipes measure the model, leave the front of bits and error beside the policy (.front.json, .png),
    and go on where they were stopped (.journal.jsonl).

    \b
    dit2deploy search dit-xl-2/ --recipe w1.58a4 -o policy.json
    dit2deploy search dit-xl-2/ --recipe w4a4 --group-size 64 --low-rank 32 -o policy.json
    dit2deploy search dit-xl-2/ --recipe w1.58a4 --modulation ternary -o policy.json
    dit2deploy search dit-xl-2/ --recipe w4a4 --branch-init weighted --hessian fisher --smoothing 0.5 -o policy.json
    dit2deploy search dit-xl-2/ --recipe robuq-ampn --budget 3 --calibration calibration/ -o policy.json
    dit2deploy search dit-xl-2/ --recipe treeq-tss --base w4a4 --allocate weights --calibration calibration/ -o p.json
    dit2deploy search dit-xl-2/ --recipe robuq-ampn --allocate weights --budget 90MB --calibration c/ -o policy.json
    dit2deploy search dit-xl-2/ --recipe treeq-tss --device device.json --budget 30ms --calibration c/ -o policy.json
    dit2deploy search dit-xl-2/ --recipe adatsq --groups 5 --beam 32 --calibration calibration/ -o policy.json
    dit2deploy search dit-xl-2/ --recipe q-dit --base w4a8 --budget 4.25 --calibration calibration/ -o policy.json
    dit2deploy search dit-xl-2/ --point 4 -o policy.json
    """
    from dit2deploy.stages.search import search, take_point
    from dit2deploy.stages.search.budget import shown
    from dit2deploy.stages.search.mixed import COST_NAMES

    given = {name: value for name, value in overrides.items() if value is not None}
    policy = (
        take_point(model, out, point) if point is not None else search(model, out, recipe=recipe, seed=seed, **given)
    )
    counts: dict[str, int] = {}
    for layer in policy.layers.values():
        bits = "/".join(map(str, layer.activation_bits)) or "-"
        key = f"{layer.weight} A{bits}"
        counts[key] = counts.get(key, 0) + 1
    text = f"{out}: " + ", ".join(f"{count} layers {key}" for key, count in counts.items())
    values = {"out": str(out), "method": policy.method, "layers": counts}
    for unit, name in COST_NAMES.items():
        if name in policy.options:
            values[name] = policy.options[name]
            text += f"; {shown(values[name], unit)}" + (" on average" if unit == "bits" else "")
    return values, text
