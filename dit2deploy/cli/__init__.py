"""The command line: one file a command, thin over the Python API. Errors are printed here and nowhere else."""

import importlib
import json
import os
import sys
import traceback

import click

from dit2deploy.base.command import running
from dit2deploy.base.errors import Dit2DeployError

# THE list: name, in the order of the pipeline. Each is dit2deploy/cli/NAME.py with a function `command`.
COMMANDS = (
    "demo",
    "compile",
    "fuse-lora",
    "calibrate",
    "measure-ops",
    "search",
    "quantize",
    "finetune",
    "export",
    "build",
    "parity",
    "evaluate",
    "profile",
    "sample",
    "report",
    "card",
    "inspect",
    "targets",
)


class _Commands(click.Group):
    """Imports a command only when it is asked for: `--help` stays fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"dit2deploy.cli.{cmd_name.replace('-', '_')}").command


def _version(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if wanted:
        from dit2deploy import __version__

        click.echo(f"dit2deploy {__version__}")
        ctx.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Print it and stop."
)
def group() -> None:
    """Take a Diffusion Transformer to small, verified, profiled engines.

    \b
    model -> calibrate -> search -> quantize -> export -> build -> parity, profile, sample, report
    `compile` runs them all and skips what is done; each runs alone as well.

    \b
    dit2deploy demo                                          a trained ternary DiT, end to end
    dit2deploy compile MODEL --recipe w1.58a4 --out BUNDLE   your own
    """


def _say(cause: str, cure: str, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"error": cause, "cure": cure}), err=True)
    else:
        click.echo(f"error: {cause}" + (f"\n  -> {cure}" if cure else ""), err=True)


def main(arguments: list[str] | None = None) -> None:
    """Runs one command; exit code 0: done, 1: a contract failed, 2: usage or bad input, 130: interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in arguments
    wants_traceback = "--traceback" in arguments or bool(os.environ.get("DIT2DEPLOY_TRACEBACK"))
    try:
        with running(arguments):
            group.main(arguments, prog_name="dit2deploy", standalone_mode=False)
    except click.exceptions.Exit as exit_:
        sys.exit(exit_.exit_code)
    except click.UsageError as error:
        context = error.ctx.command_path if error.ctx else "dit2deploy"
        _say(error.format_message(), f"See `{context} --help`.", as_json)
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        _say("interrupted.", "Run the same command again: finished stages are kept.", as_json)
        sys.exit(130)
    except Dit2DeployError as error:
        if wants_traceback:
            traceback.print_exc()
        _say(error.cause, error.cure, as_json)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if wants_traceback:
            traceback.print_exc()
        where = f"{error.filename}: " if error.filename else ""
        _say(f"{where}{error.strerror or error}.", "Free some space or check the path and its permissions.", as_json)
        sys.exit(2)
    except Exception as error:  # the last line of defence: a bug, told as one
        if wants_traceback:
            traceback.print_exc()
        _say(
            f"unexpected {type(error).__name__}: {error}",
            "This is a bug of dit2deploy: run again with --traceback and report what it prints.",
            as_json,
        )
        sys.exit(1)
