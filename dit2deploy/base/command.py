"""The command that is being run, for records that say how to go on; empty where the library is called."""

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_running: list[str] = []


@contextmanager
def running(arguments: Sequence[str]) -> Iterator[None]:
    """Within, `dit2deploy` with these arguments is what is being run."""
    _running.append(shlex.join(["dit2deploy", *arguments]))
    try:
        yield
    finally:
        _running.pop()


def command() -> str:
    return _running[-1] if _running else ""
