"""dit2deploy report"""

from pathlib import Path

import click

from dit2deploy.cli import options


@click.command()
@click.argument("bundle", type=options.PATH)
@options.common
def command(bundle: Path, seed: int):
    """Write BUNDLE/report.html: one self-contained page of what was compiled, its size, latency, parity and pictures.

    \b
    dit2deploy report bundle/
    """
    from dit2deploy.stages.report import report

    path = report(bundle, seed=seed)
    return {"report": str(path)}, f"{path}"
