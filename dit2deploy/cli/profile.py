"""dit2deploy profile"""

from pathlib import Path

import click

from dit2deploy.cli import options


@click.command()
@click.argument("bundle", type=options.PATH)
@options.target
@click.option("--threads", multiple=True, type=click.IntRange(1), help="May be given several times.  [default: 1, all]")
@click.option("--batch", "batches", multiple=True, default=(1,), show_default=True, type=click.IntRange(1))
@click.option("--runs", default=30, show_default=True, type=click.IntRange(3), help="Timed runs of each engine.")
@click.option("--no-baselines", is_flag=True, help="The engine alone, without full precision beside it.")
@options.common
def command(bundle: Path, target: str, threads, batches, runs: int, no_baselines: bool, seed: int):
    """Measure latency, memory and the share of this machine's peak, side by side with full precision.

    \b
    dit2deploy profile bundle/ --threads 1 --threads 2 --batch 1 --batch 4
    """
    from dit2deploy.stages.profile import profile, summary

    result = profile(bundle, target=target, threads=threads, batches=batches, runs=runs, baselines=not no_baselines)
    return result, summary(result)
