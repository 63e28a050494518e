"""parity.json and profile.json: measurements, each with machine, date, versions and command."""

import datetime
import shlex
import sys
from pathlib import Path
from typing import Any

from dit2deploy.base.command import command
from dit2deploy.base.files import write_json
from dit2deploy.base.machine import cores, cpu_model, versions

PACKAGES = ("dit2deploy", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt-rtx", "torch", "diffusers")


def circumstances() -> dict[str, Any]:
    """When, where and with what a measurement was made."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu_model(), "cores": cores()},
        "versions": versions(*PACKAGES),
        "command": command() or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def write_results(path: Path, kind: str, values: dict[str, Any]) -> dict[str, Any]:
    """Writes {"schema_version", "kind", circumstances, values} and gives it back."""
    record = {"schema_version": 1, "kind": kind, **circumstances(), **values}
    write_json(path, record)
    return record
