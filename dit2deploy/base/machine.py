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


def anonymous_bytes() -> int:
    """Memory that this process owns, without pages of files; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


def available_bytes(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that this process may still take: of the machine, and of its control group where that has a limit."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 4 << 30
    try:
        limit, used, told = ((group / f"memory.{name}").read_text("utf-8") for name in ("max", "current", "stat"))
        counts = dict(line.split() for line in told.splitlines())
        # Pages of files are counted as used, and given back when memory is asked for.
        cache = sum(int(counts.get(f"{kind}_file", 0)) for kind in ("active", "inactive"))
        return min(free, int(limit) - int(used) + cache)
    except (OSError, ValueError):  # no group, or "max": no limit
        return free


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
