"""dit2deploy targets"""

import click

from dit2deploy.cli import options


@click.command()
@options.common
def command():
    """What this machine can build and run, and what is missing.

    \b
    dit2deploy targets
    """
    from dit2deploy.targets import TARGETS

    there = {target.name: target.availability() for target in TARGETS}
    rows = [
        (
            name,
            "yes" if found.can_build else "no",
            "yes" if found.can_run else "no",
            f"{found.reason} {f'-> {found.cure}' if found.cure else ''}".strip() or "ready",
        )
        for name, found in there.items()
    ]
    values = {name: vars(found) for name, found in there.items()}
    made = options.table("Targets on this machine", ("target", "build", "run", "why, and the cure"), rows)
    made.columns[3].justify = "left"
    return values, made
