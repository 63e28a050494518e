"""What this machine is: written beside every measurement."""

import os
import platform
from importlib import metadata
from pathlib import Path


def cpu_model() -> str:
    """The processor's own name with family and model, as /proc/cpuinfo gives them."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return platform.processor() or platform.machine()
    pairs = (line.partition(":") for line in first.splitlines())
    lines = {name.strip(): value.strip() for name, _, value in pairs}
    name = lines.get("model name", platform.machine())
    return f"{name} (family {lines.get('cpu family', '?')}, model {lines.get('model', '?')})"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of the packages that are there, and Python's."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
