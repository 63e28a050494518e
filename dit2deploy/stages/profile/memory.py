"""Resident memory of a contestant, read in a fresh child process: `python -m dit2deploy.stages.profile.memory`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from dit2deploy.artefacts.bundle import Bundle
from dit2deploy.stages.profile.contestants import TORCH_FLOAT, entrant, inputs_of

_STATUS = Path("/proc/self/status")
_RUNS = 3
_LONGEST = 300  # seconds


def measure(bundle: Bundle, target: str, name: str, *, threads: int, batch: int) -> dict[str, Any]:
    """Bytes that opening and running add to a process that has the libraries imported: `anonymous_bytes` (its own) and
    `file_bytes` (mapped from files: shared and evictable); `peak_bytes` of the whole process, libraries included.

    Where that cannot be read, {"reason": why}.
    """
    if not _STATUS.exists() or "RssAnon" not in _STATUS.read_text():
        return {"reason": "this system has no /proc/self/status with RssAnon"}
    order = {"bundle": str(bundle.folder), "target": target, "name": name, "threads": threads, "batch": batch}
    command = [sys.executable, "-m", "dit2deploy.stages.profile.memory", json.dumps(order)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_LONGEST,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},  # the child finds what we found
        )
    except subprocess.TimeoutExpired:
        return {"reason": f"took longer than {_LONGEST} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"reason": f"the child process failed: {lines[-1] if lines else done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def _child(order: dict[str, Any]) -> dict[str, int]:
    bundle = Bundle.load(order["bundle"], check_hashes=False)
    inputs = inputs_of(bundle, batch=order["batch"])
    chosen = entrant(bundle, order["target"], order["name"])
    if order["name"] == TORCH_FLOAT:
        import dit2deploy.models.load
        import dit2deploy.nn.call  # noqa: F401
    else:
        from dit2deploy.targets.ort import runtime

        if "onnx" in bundle.target(order["target"]).engines:
            runtime()
    before = _resident()
    with chosen.open(order["threads"]) as run:
        opened = _resident()
        for _ in range(_RUNS):
            run(inputs)
        after = _resident()
    return {
        "anonymous_bytes": after["RssAnon"] - before["RssAnon"],
        "file_bytes": after["RssFile"] - before["RssFile"],
        "opened_anonymous_bytes": opened["RssAnon"] - before["RssAnon"],
        "opened_file_bytes": opened["RssFile"] - before["RssFile"],
        "peak_bytes": after["VmHWM"],
    }


def _resident() -> dict[str, int]:
    lines = (line.split() for line in _STATUS.read_text().splitlines())
    return {
        words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if words[0] in ("RssAnon:", "RssFile:", "VmHWM:")
    }


if __name__ == "__main__":
    print(json.dumps(_child(json.loads(sys.argv[1]))))
