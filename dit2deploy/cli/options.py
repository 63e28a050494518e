"""Options that commands share, and how they print: progress on stderr, results on stdout."""

import functools
import inspect
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from dit2deploy.base import progress
from dit2deploy.base.estimate import Estimate
from dit2deploy.base.shown import gigabytes

EVERY = 30.0  # seconds between two lines of progress
PATH = click.Path(path_type=Path)


class _Model(click.ParamType):
    """A folder, or a name on the hub, whose files are then fetched: the folder of them."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        from dit2deploy.models.hub import local

        return local(value)


MODEL = _Model()
TARGET_NAMES = ("ort-cpu", "ort-cuda", "tensorrt-rtx", "tensorrt", "reference")


class _Lines:
    """Progress for logs and pipes: a line when an item starts and ends, and now and then how far it is."""

    def __init__(self, verbose: bool) -> None:
        self.started: dict[str, tuple[float, int]] = {}  # when, and how much an earlier run had done
        self.told: dict[str, float] = {}
        self.verbose = verbose

    def __call__(self, what: str, done: int, total: int | None) -> None:
        if total == 0:
            click.echo(f"note: {what}", err=True)
        elif what not in self.started:
            self.started[what] = time.monotonic(), done
            self.told[what] = time.monotonic()
            click.echo(f"{what} ..." if total is None else f"{what} ({total}) ...", err=True)
        elif done == total:
            seconds = time.monotonic() - self.started.pop(what)[0]
            click.echo(f"{what}: done in {seconds:.1f} s", err=True)
        elif self.verbose or time.monotonic() - self.told[what] >= EVERY:
            self.told[what] = time.monotonic()
            begun, before = self.started[what]
            click.echo(f"{what}: {pace(done, total, done - before, time.monotonic() - begun)}", err=True)


def pace(done: int, total: int | None, now: int, seconds: float) -> str:
    """How far, how fast and how long still, where `now` of `done` were made in these seconds."""
    text = f"{done}/{total or '?'}"
    if total is None or now <= 0 or seconds <= 0:
        return text
    speed = f"{now / seconds:.1f} a second" if now > seconds else f"{seconds / now:.1f} s each"
    return f"{text}, {speed}, {duration((total - done) * seconds / now)} left"


class _Speed(ProgressColumn):
    """Items a second, or seconds an item."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed > 1 else f"{1 / speed:.1f} s each")


class _Bars:
    """Progress for people: a bar with elapsed and remaining time for each item."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.tasks: dict[str, Any] = {}

    def __call__(self, what: str, done: int, total: int | None) -> None:
        if total == 0:
            self.bars.console.print(f"note: {what}", style="dim", highlight=False, markup=False)
            return
        if what not in self.tasks:
            self.tasks[what] = self.bars.add_task(what, total=total)
        self.bars.update(self.tasks[what], completed=done, total=total)
        if done == total:
            del self.tasks[what]


def common(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --seed, --json, -q, -v and --traceback, shows progress, and prints what the command gives back.

    A command returns (values, text): `values` for --json, `text` (a string or a rich table) for people. One that draws
    nothing at random has no parameter `seed`; it takes the option all the same, so that scripts can pass it everywhere.
    """
    draws = "seed" in inspect.signature(function).parameters

    @click.option("--seed", default=0, show_default=True, help="Seed of everything that is drawn at random.")
    @click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
    @click.option("-q", "--quiet", is_flag=True, help="No progress, no notes.")
    @click.option("-v", "--verbose", is_flag=True, help="Every step of the progress, as lines.")
    @click.option("--traceback", is_flag=True, help="On an error, print where it was raised.")
    @functools.wraps(function)
    def run(*, as_json: bool, quiet: bool, verbose: bool, traceback: bool, seed: int, **values: Any) -> None:
        if draws:
            values["seed"] = seed
        if quiet:
            result = function(**values)
        elif sys.stderr.isatty() and not verbose:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                _Speed(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=Console(stderr=True)) as bars:
                stop = progress.listen(_Bars(bars))
                try:
                    result = function(**values)
                finally:
                    stop()
        else:
            stop = progress.listen(_Lines(verbose))
            try:
                result = function(**values)
            finally:
                stop()
        show(*result, as_json=as_json)

    return run


def show(values: dict[str, Any], text: Any, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(values, default=str))
    elif isinstance(text, str):
        click.echo(text)
    else:
        width = None if sys.stdout.isatty() else 110
        Console(width=width).print(text)


def table(title: str, columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> Table:
    made = Table(title=title, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        made.add_row(*(Text(str(cell)) for cell in row))  # no markup: brackets, as of extras, are themselves
    return made


target = click.option(
    "--target", type=click.Choice(TARGET_NAMES), default="ort-cpu", show_default=True, help="Engine of the bundle."
)
targets = click.option(
    "--target",
    "targets",
    type=click.Choice(TARGET_NAMES),
    multiple=True,
    default=("ort-cpu",),
    show_default=True,
    help="May be given several times.",
)
steps = click.option("--steps", default=20, show_default=True, type=click.IntRange(1, 1000), help="Sampler steps.")
guidance = click.option(
    "--guidance", default=1.5, show_default=True, help="Classifier-free guidance scale; of classes, 1 or less: none."
)
threads = click.option("--threads", type=click.IntRange(1), help="Threads of the engine.  [default: all cores]")


def size(function: Callable[..., Any]) -> Callable[..., Any]:
    """--height and --width of what a pipeline draws."""
    for name in ("width", "height"):
        asked = click.option(f"--{name}", type=click.IntRange(1), help="In pixels.  [default: the pipeline's own]")
        function = asked(function)
    return function


def prompts(function: Callable[..., Any]) -> Callable[..., Any]:
    """What drawing by prompts takes."""
    for decorate in (
        click.option("--frames", type=click.IntRange(1), help="Of a video.  [default: the pipeline's own]"),
        size,
        click.option("--model", type=MODEL, help="Folder of the pipeline.  [default: where the bundle's model was]"),
        click.option("--prompts", type=PATH, help="A text file, one prompt a line, for the model's own pipeline."),
    ):
        function = decorate(function)
    return function


def widths(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Of an option --bits: "2,3,4"."""
    if value is None:
        return None
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list of bits.", param_hint="--bits") from None


def _bytes(_context: click.Context, _parameter: click.Parameter, value: str | None) -> int | None:
    """Of an option like "8GB" or "512MB"; decimal units, as sizes are printed."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", value.strip(), re.IGNORECASE)
    if not found or not (size := int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " "))):
        raise click.BadParameter(f"{value!r} is no size, e.g. 8GB.", param_hint="--max-memory")
    return size


max_memory = click.option(
    "--max-memory",
    metavar="SIZE",
    callback=_bytes,
    help="Memory that the process may own, e.g. 8GB.  [default: what the machine has free]",
)


def _sizes(_context: click.Context, _parameter: click.Parameter, value: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Of an option --size: "64x96"."""
    found = [re.fullmatch(r"(\d+)x(\d+)", text) for text in value]
    if None in found:
        raise click.BadParameter(f"{value[found.index(None)]!r} is no size, e.g. 64x96.", param_hint="--size")
    return tuple((int(match[1]), int(match[2])) for match in found if match)


latent_sizes = click.option(
    "--size",
    "sizes",
    metavar="HxW",
    multiple=True,
    callback=_sizes,
    help="Of latents, beside the model's own; where a graph fixes it (DiT, PixArt). May be given several times.",
)


def _ranges(
    _context: click.Context, _parameter: click.Parameter, value: Sequence[str]
) -> dict[str, tuple[int, int, int]]:
    """Of an option --range: "text_tokens=1:77:512"."""
    found = {}
    for text in value:
        match = re.fullmatch(r"(\w+)=(\d+):(\d+):(\d+)", text)
        if not match:
            raise click.BadParameter(f"{text!r} is no range, e.g. text_tokens=1:77:512.", param_hint="--range")
        found[match[1]] = (int(match[2]), int(match[3]), int(match[4]))
    return found


ranges = click.option(
    "--range",
    "ranges",
    metavar="AXIS=LEAST:USUAL:MOST",
    multiple=True,
    callback=_ranges,
    help="Lengths of a dynamic axis that TensorRT engines are for, again for each axis.  [default: the family's]",
)


capabilities = click.option(
    "--compute-capability",
    "capabilities",
    multiple=True,
    default=("7.5", "8.0", "8.6", "8.9", "12.0"),
    show_default=True,
    help="GPUs that TensorRT-RTX engines are for; may be given several times.",
)
floats = click.option(
    "--floats",
    type=click.Choice(("float32", "float16", "bfloat16")),
    default="float32",
    show_default=True,
    help="Type of the activations in engines for GPUs; inputs and outputs stay float32.",
)
_RANGED = ("tensorrt-rtx", "tensorrt")  # targets whose engines are for a range of lengths


def of_targets(
    names: Sequence[str],
    *,
    capabilities: Sequence[str],
    ranges: Mapping[str, tuple[int, int, int]],
    floats: str,
    timing_cache: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """The options of each target. --floats goes to all, and those of CPUs refuse it."""
    if ranges and not set(_RANGED) & set(names):
        raise click.UsageError(f"--range is for {' and '.join(_RANGED)}: engines of other targets take any length.")
    own = {
        "tensorrt-rtx": {"compute_capabilities": list(capabilities), "ranges": ranges},
        "tensorrt": {"ranges": ranges, **({"timing_cache": timing_cache} if timing_cache else {})},
    }
    given = {} if floats == "float32" else {"floats": floats}
    made = {name: {**own.get(name, {}), **given} for name in names}
    return {name: values for name, values in made.items() if values}


dry_run = click.option("--dry-run", is_flag=True, help="Write nothing: tell what it would take in time and memory.")


def estimates(found: Sequence[Estimate]) -> tuple[dict[str, Any], Table]:
    """What a command with --dry-run gives back."""
    rows = []
    for one in found:
        told = (duration(one.seconds), gigabytes(one.memory), gigabytes(one.disk))
        rows.append((one.stage, *(f"{least} or more" for least in told)) if one.left_out else (one.stage, *told))
        if one.left_out:
            progress.note(f"{one.stage} --dry-run leaves out {one.left_out}")
    columns = ("stage", "time here and now", "peak memory", "disk")
    return {"estimates": [one.told() for one in found]}, table("nothing was written; about:", columns, rows)


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def out(help: str) -> Callable:
    return click.option("-o", "--out", required=True, type=PATH, help=help)
