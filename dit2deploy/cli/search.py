"""dit2deploy search"""

from pathlib import Path

import click

from dit2deploy.cli import options


@click.command()
@click.argument("model", type=options.PATH)
@click.option("--recipe", default="w1.58a4", show_default=True, help="w8a8, w4a4, w3a3 or w1.58a4.")
@click.option("--low-rank", type=click.IntRange(0), help="Rank of the side branch.  [default: the recipe's]")
@click.option("--group-size", type=click.IntRange(1), help="Weights a scale along K.  [default: one scale a channel]")
@click.option("--rounding", type=click.Choice(("nearest", "gptq")), help="[default: the recipe's]")
@click.option("--clip", type=click.Choice(("absmax", "gaussian")), help="Of activations.  [default: the recipe's]")
@options.out("The policy to write, e.g. policy.json.")
@options.common
def command(model: Path, recipe: str, out: Path, seed: int, **overrides):
    """Find out what every layer of MODEL becomes, and write it down fully resolved.

    \b
    dit2deploy search dit-xl-2/ --recipe w1.58a4 -o policy.json
    dit2deploy search dit-xl-2/ --recipe w4a4 --group-size 64 --low-rank 32 -o policy.json
    """
    from dit2deploy.stages.search import search

    given = {name: value for name, value in overrides.items() if value is not None}
    policy = search(model, out, recipe=recipe, seed=seed, **given)
    counts: dict[str, int] = {}
    for layer in policy.layers.values():
        bits = "/".join(map(str, layer.activation_bits)) or "-"
        key = f"{layer.weight} A{bits}"
        counts[key] = counts.get(key, 0) + 1
    text = f"{out}: " + ", ".join(f"{count} layers {key}" for key, count in counts.items())
    return {"out": str(out), "method": policy.method, "layers": counts}, text
