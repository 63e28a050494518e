"""dit2deploy report"""

from pathlib import Path

import click

from dit2deploy.cli import options


@click.command()
@click.argument("bundle", type=options.PATH)
@options.prompts
@options.steps
@options.guidance
@options.target
@options.common
def command(bundle: Path, prompts, seed: int, **settings):
    """Write BUNDLE/report.html: one self-contained page of what was compiled, its size, latency, parity and pictures.

    \b
    dit2deploy report bundle/
    dit2deploy report bundle/ --prompts prompts.txt --steps 4 --guidance 0
    """
    from dit2deploy.stages.report import report

    drawing = {name: settings.pop(name) for name in ("model", "height", "width", "frames")}
    samples = None
    if prompts is not None:
        from dit2deploy.stages.sample import sample_prompts, tiles

        drawn = sample_prompts(bundle, bundle / "samples.png", prompts=prompts, seed=seed, **drawing, **settings)
        samples = {"Full precision": tiles(drawn["full_precision"]), "Engine": tiles(drawn["engine"])}
    path = report(bundle, samples=samples, seed=seed, **settings)
    return {"report": str(path)}, f"{path}"
