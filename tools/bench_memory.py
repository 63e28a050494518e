"""Takes a random model of true geometry through the stages, each in a child process, and records memory, time, sizes.

    python tools/bench_memory.py flux.1-dev --layers 2,4 --recipe w1.58a4 --recipe w4a4 --max-memory 3GB
    python tools/bench_memory.py wan2.1-t2v-14b --random-checkpoint --until export --max-memory 3GB

A case starts from nothing: `tools/random_model.py` writes the model (with --random-checkpoint, what quantize would
leave), recipes share it and the calibration set. Its record says by which command it was made. All lies in
`WORK/CASE/`; finished stages are skipped on a second run, an interrupted one goes on and its runs are added up.
Folders are removed as soon as no later stage reads them.

Anonymous memory is what the process owns (RssAnon, read every 10 ms: shorter peaks are missed); mapped memory is file
pages, which the system takes back when it wants them.
"""

import argparse
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit2deploy.artefacts.results import circumstances, write_results
from dit2deploy.base.files import write_json

PERIOD = 0.01  # seconds
CLI = (sys.executable, "-c", "from dit2deploy.cli import main; main()")
WRITE_MODEL = (sys.executable, str(Path(__file__).with_name("random_model.py")))
STAGES = ("model", "calibrate", "search", "quantize", "export", "build")
DEFAULTS = {
    "low_rank": None,
    "modulation": None,
    "rounding": None,
    "samples": 1,
    "steps": 4,
    "max_memory": None,
}  # what a case is made with


@dataclass(frozen=True)
class Step:
    """A stage of the case, of one recipe or of all: its command line, what it reads and makes in the case's folder."""

    stage: str
    recipe: str | None
    command: tuple[str, ...]
    reads: tuple[Path, ...]
    makes: Path


def measured(command: tuple[str, ...], *, longest: float) -> dict[str, Any]:
    """Runs the command and gives its seconds, exit code and peaks in bytes; interrupts it after `longest` seconds."""
    begun = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peaks = {"RssAnon": 0, "RssFile": 0, "VmHWM": 0}
    processor = 0.0
    while child.poll() is None:
        try:
            lines = Path(f"/proc/{child.pid}/status").read_text(encoding="ascii").splitlines()
            fields = Path(f"/proc/{child.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            break
        for name, _, value in (line.partition(":") for line in lines):
            if name in peaks:
                peaks[name] = max(peaks[name], 1024 * int(value.split()[0]))
        processor = (int(fields[11]) + int(fields[12])) / 100
        if time.perf_counter() - begun > longest:
            child.send_signal(signal.SIGINT)
            longest = math.inf
        time.sleep(PERIOD)
    return {
        "exit": child.wait(),
        "runs": 1,
        "seconds": round(time.perf_counter() - begun, 1),
        "processor_seconds": processor,
        "load_average": round(os.getloadavg()[0], 1),
        "peak_anonymous_bytes": peaks["RssAnon"],
        "peak_mapped_bytes": peaks["RssFile"],
        "peak_resident_bytes": peaks["VmHWM"],
    }


def together(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Of a stage that went on where it was interrupted: sums of the runs and their times, the highest of the peaks."""
    sums = {name: round(before[name] + after[name], 2) for name in ("runs", "seconds", "processor_seconds")}
    peaks = {name: max(before[name], after[name]) for name in after if name.startswith("peak_")}
    return after | sums | peaks


def size(path: Path) -> int:
    """Bytes of a file or of a folder's files; 0 where there is none."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def steps(options: argparse.Namespace, out: Path) -> list[Step]:
    """All stages of the case: the model and its calibration set, then recipe by recipe."""
    model, calibration = out / "model", out / "calibration"
    layers = ("--layers", options.layers) if options.layers else ()
    ceiling = ("--max-memory", options.max_memory) if options.max_memory else ()
    sampling = _words({"samples": options.samples, "steps": options.steps})
    chosen = _words({name: getattr(options, name) for name in ("rounding", "low_rank", "modulation")})
    made = []

    def step(stage: str, recipe: str | None, words: tuple[Path | str, ...], *also: Path, makes: Path) -> None:
        command = (*CLI, stage, *words, "-o", makes, "--traceback")
        if stage == "model":
            command = (*WRITE_MODEL, options.geometry, makes, *layers, *words)
        reads = (*(word for word in words if isinstance(word, Path)), *also)
        made.append(Step(stage, recipe, tuple(map(str, command)), reads, makes))

    if not options.random_checkpoint:
        step("model", None, (), makes=model)
        step("calibrate", None, (model, *sampling, *ceiling), makes=calibration)
    for recipe in options.recipe:
        policy, checkpoint, onnx, bundle = (out / recipe / n for n in ("policy.json", "checkpoint", "onnx", "bundle"))
        if options.random_checkpoint:
            step("model", recipe, ("--recipe", recipe), makes=checkpoint)
        else:
            step("search", recipe, (model, "--recipe", recipe, *chosen), makes=policy)
            given = ("--policy", policy, "--calibration", calibration, *ceiling)
            step("quantize", recipe, (model, *given), makes=checkpoint)
        step("export", recipe, (checkpoint, *ceiling), makes=onnx)
        step("build", recipe, (onnx,), checkpoint, makes=bundle)  # of which it takes the policy
    return made


def _words(fields: dict[str, Any]) -> tuple[str, ...]:
    """Fields that are given, as options of a command line."""
    given = {name: value for name, value in fields.items() if value is not None}
    return tuple(word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value)))


def command_of(options: argparse.Namespace) -> str:
    """The command that makes the case from nothing, wherever it lies."""
    words = ["python", "tools/bench_memory.py", options.geometry]
    words += _words({"case": options.case, "layers": options.layers})
    words += ["--random-checkpoint"] if options.random_checkpoint else []
    words += [word for recipe in options.recipe for word in ("--recipe", recipe)]
    words += _words(
        {name: getattr(options, name) for name, usual in DEFAULTS.items() if getattr(options, name) != usual}
    )
    words += ["--until", options.until] if options.until != STAGES[-1] else []
    return shlex.join(words)


def name_of(options: argparse.Namespace) -> str:
    layers = f" {options.layers.replace(',', '+')}" if options.layers else ""
    return options.case or f"{options.geometry}{layers}{', random checkpoint' * options.random_checkpoint}"


def main(options: argparse.Namespace) -> None:
    name = name_of(options)
    out = options.work / re.sub(r"[^\w.]+", "-", name)
    journal = out / "case.json"
    asked = {"geometry": options.geometry, "layers": options.layers, "random_checkpoint": options.random_checkpoint}
    asked |= {field: getattr(options, field) for field in DEFAULTS}
    case = json.loads(journal.read_text()) if journal.exists() else asked | {"recipes": {r: {} for r in options.recipe}}
    if {field: case.get(field) for field in asked} != asked or list(case["recipes"]) != options.recipe:
        sys.exit(f"{out} holds this case made otherwise: {case['command']}\nRemove it, or give another --case.")
    case |= {"command": command_of(options)}
    wanted, todo = STAGES[: STAGES.index(options.until) + 1], steps(options, out)
    for at, step in enumerate(todo):
        if step.stage not in wanted:
            continue
        held = case if step.recipe is None else case["recipes"][step.recipe]
        before = held.get(step.stage)
        if before is None or before["exit"]:
            found = measured(step.command, longest=options.stop_after)
            held[step.stage] = (together(before, found) if before else found) | {"out_bytes": size(step.makes)}
            if (parts := step.makes.with_name(f"{step.makes.name}.parts")).is_dir():
                held[step.stage] |= {"parts_bytes": size(parts)}
            record(options.results, journal, name, case)
            told = " ".join(filter(None, (step.recipe, step.stage)))
            print(f"{told}: {json.dumps(held[step.stage])}", flush=True)
            if found["exit"]:
                sys.exit(f"{told} failed")
        if not options.keep:
            for path in set(step.reads) - {path for later in todo[at + 1 :] for path in later.reads}:
                if path.is_dir():
                    shutil.rmtree(path)


def record(results: Path, journal: Path, name: str, case: dict[str, Any]) -> None:
    """Writes the case beside its folders, and among the others in the results."""
    case |= {field: value for field, value in circumstances().items() if field != "command"}
    write_json(journal, case)
    cases = json.loads(results.read_text())["cases"] if results.exists() else {}
    write_results(
        results, "memory", {"command": case["command"].removeprefix("python tools/"), "cases": cases | {name: case}}
    )


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("geometry", help="of tools/random_model.py, e.g. flux.1-dev")
    parser.add_argument("--layers", help="fewer of them, e.g. 2,4")
    parser.add_argument("--case", help="its name in the results [default: geometry and layers]")
    parser.add_argument("--random-checkpoint", action="store_true", help="begin with export, of random words")
    parser.add_argument("--recipe", action="append", help="may be given several times [default: w1.58a4]")
    parser.add_argument("--rounding", help="of the recipe's layers")
    parser.add_argument("--low-rank", type=int, help="of the recipe's layers")
    parser.add_argument("--modulation", help="format of the adaLN linears' weights")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--max-memory", help="e.g. 3GB")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="the last stage [default: build]")
    parser.add_argument("--keep", action="store_true", help="remove nothing")
    parser.add_argument("--stop-after", type=float, default=math.inf, help="seconds of a stage; a second run goes on")
    parser.add_argument("--work", type=Path, default=Path("build/memory"))
    parser.add_argument("--results", type=Path, default=Path("tools/results/memory.json"))
    parser.set_defaults(**DEFAULTS)
    options = parser.parse_args(words)
    options.recipe = options.recipe or ["w1.58a4"]
    return options


if __name__ == "__main__":
    main(parsed())
