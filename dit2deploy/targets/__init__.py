"""Runtime targets: THE list."""

from dit2deploy.base.errors import Misuse
from dit2deploy.targets import ort_cpu, ort_cuda, reference, tensorrt, tensorrt_rtx
from dit2deploy.targets.target import Availability, Runner, Target

TARGETS: tuple[Target, ...] = (
    ort_cpu.TARGET,
    ort_cuda.TARGET,
    tensorrt_rtx.TARGET,
    tensorrt.TARGET,
    reference.TARGET,
)


def by_name(name: str) -> Target:
    """The target of that name; Misuse names the known ones."""
    for target in TARGETS:
        if target.name == name:
            return target
    raise Misuse(f"unknown target {name!r}.", f"Known: {', '.join(target.name for target in TARGETS)}.")


def runnable(name: str) -> Target:
    """The target of that name; Misuse with the reason where it cannot run here."""
    target = by_name(name)
    able = target.availability()
    if not able.can_run:
        raise Misuse(f"{name} cannot run here: {able.reason}", able.cure)
    return target


__all__ = ["TARGETS", "Availability", "Runner", "Target", "by_name", "runnable"]
