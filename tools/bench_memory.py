"""Takes a model through the stages, each in a child process of its own, and records memory, time and sizes.

    python tools/random_model.py flux.1-dev /tmp/flux --layers 2,4
    python tools/bench_memory.py /tmp/flux /tmp/flux-out --recipe w1.58a4 --max-memory 4GB

Anonymous memory is what the process owns (RssAnon, read every 10 ms: shorter peaks are missed); mapped memory is file
pages, which the system takes back when it wants them. Finished stages are skipped on a second run of the same case.
"""

import argparse
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dit2deploy.artefacts.results import write_results

PERIOD = 0.01  # seconds
CLI = "from dit2deploy.cli import main; main()"
RECIPE = ("rounding", "low_rank")  # options that go to the recipe
STAGES = ("calibrate", "search", "quantize", "export", "build")


def measured(command: list[str], *, longest: float) -> dict[str, Any]:
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
        "seconds": round(time.perf_counter() - begun, 1),
        "processor_seconds": processor,
        "peak_anonymous_bytes": peaks["RssAnon"],
        "peak_mapped_bytes": peaks["RssFile"],
        "peak_resident_bytes": peaks["VmHWM"],
    }


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else 0


def commands(options: argparse.Namespace) -> dict[str, tuple[list[str], Path]]:
    """Of each stage: the arguments of the command line, and what it makes."""
    out, model = options.out, str(options.model)
    made = {name: out / name for name in ("calibration", "policy.json", "checkpoint", "onnx", "bundle")}
    calibration, policy, checkpoint, onnx, bundle = map(str, made.values())
    ceiling = ["--max-memory", options.max_memory] if options.max_memory else []
    recipe = ["--recipe", options.recipe]
    for name in RECIPE:
        if (value := getattr(options, name)) is not None:
            recipe += [f"--{name.replace('_', '-')}", str(value)]
    samples = ["--samples", str(options.samples), "--steps", str(options.steps)]
    lines = {
        "calibrate": ["calibrate", model, *samples, *ceiling, "-o", calibration],
        "search": ["search", model, *recipe, "-o", policy],
        "quantize": ["quantize", model, "--policy", policy, "--calibration", calibration, *ceiling, "-o", checkpoint],
        "export": ["export", checkpoint, *ceiling, "-o", onnx],
        "build": ["build", onnx, "-o", bundle],
    }
    return {stage: (lines[stage], path) for stage, path in zip(STAGES, made.values(), strict=True)}


def main(options: argparse.Namespace) -> None:
    held = json.loads(options.results.read_text())["cases"] if options.results.exists() else {}
    case = held.setdefault(options.case, {"model_bytes": size(options.model), "recipe": options.recipe})
    case |= {name: getattr(options, name) for name in (*RECIPE, "max_memory", "samples", "steps")}
    for stage, (arguments, path) in commands(options).items():
        if stage not in options.stages or (path.exists() and stage in case):
            continue
        found = measured([sys.executable, "-c", CLI, *arguments, "--traceback"], longest=options.stop_after)
        case[stage] = found | {"out_bytes": path.stat().st_size if path.is_file() else size(path)}
        if (parts := path.with_name(f"{path.name}.parts")).is_dir():
            case[stage] |= {"parts": len(list(parts.glob("*.safetensors"))), "parts_bytes": size(parts)}
        write_results(options.results, "memory", {"cases": held})
        print(f"{stage}: {json.dumps(case[stage])}", flush=True)
        if found["exit"]:
            sys.exit(f"{stage} failed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path, help="folder of all that is made")
    parser.add_argument("--case", required=True, help="its name in the results")
    parser.add_argument("--recipe", default="w1.58a4")
    parser.add_argument("--rounding", help="of the recipe's layers")
    parser.add_argument("--low-rank", type=int, help="of the recipe's layers")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--max-memory")
    parser.add_argument("--stop-after", type=float, default=math.inf, help="seconds of a stage; a second run goes on")
    parser.add_argument("--stages", type=lambda text: text.split(","), default=list(STAGES))
    parser.add_argument("--results", type=Path, default=Path("tools/results/memory.json"))
    main(parser.parse_args())
