"""What a stage will take, told before it starts."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_SAMPLE = 64 << 20  # bytes that are read to see how fast


@dataclass(frozen=True)
class Estimate:
    """Seconds on this machine as it is now, by a short probe; peak bytes that the process owns; bytes it writes,
    temporary ones included. `left_out` says what is not in it, which then is told as the least."""

    stage: str
    seconds: float
    memory: int
    disk: int
    left_out: str = ""

    def told(self) -> dict[str, Any]:
        told = {**asdict(self), "seconds": float(f"{self.seconds:.3g}")}
        return told if self.left_out else {name: value for name, value in told.items() if name != "left_out"}


def read_rate(path: Path) -> float:
    """Bytes a second at which the file is read from where it is: the disk, or the system's cache of it."""
    begun = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        count = len(file.read(_SAMPLE))
    return max(count, 1) / max(time.perf_counter() - begun, 1e-9)
