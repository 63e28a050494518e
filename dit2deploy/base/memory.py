"""A ceiling of memory: what a stage may hold, told before the work and not by the system's killer in the middle.

Counted is anonymous memory, what the process owns. Pages of mapped files are the system's cache and not counted.
"""

import ctypes
import sys

from dit2deploy.base.errors import Misuse
from dit2deploy.base.machine import anonymous_bytes, available_bytes
from dit2deploy.base.shown import gigabytes

SLACK = 256 << 20  # libraries that are imported late, small tensors, the allocator's own


def room(max_memory: int | None) -> int:
    """Bytes that may still be taken below a ceiling for this process; None: all that the machine has to give."""
    free = available_bytes()
    return free if max_memory is None else min(free, max_memory - anonymous_bytes())


def require(what: str, needed: int, max_memory: int | None, *, cure: str = "") -> int:
    """Bytes that are left below the ceiling beside `needed` (and SLACK); Misuse where it cannot be kept."""
    left = room(max_memory) - needed - SLACK
    if left < 0:
        ceiling = "this machine" if max_memory is None else f"a ceiling of {gigabytes(max_memory)}"
        least = needed + SLACK + (anonymous_bytes() if max_memory is not None else 0)
        raise Misuse(
            f"{what} takes {gigabytes(least)} of memory, more than {ceiling} "
            f"{'has free' if max_memory is None else 'allows'}.",
            cure or f"Give at least `--max-memory {least / 1e9 + 0.05:.1f}GB`.",
        )
    return left


def give_back() -> None:
    """Hands freed memory back to the system where the C library can: glibc keeps what lies between what is in use.

    Opening an engine folds constants, and frees as much as it keeps: 47 of 108 MiB for a ternary DiT-XL/2.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
