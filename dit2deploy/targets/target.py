"""What a runtime target is: four functions. The same contract for each of them is tested in tests/targets."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dit2deploy.artefacts.bundle import Bundle, TargetRecord
from dit2deploy.artefacts.onnx_model import OnnxModel
from dit2deploy.base.errors import Misuse
from dit2deploy.targets.kernel import LIBRARY_NAME


@dataclass(frozen=True)
class Availability:
    """What this machine can do with a target, and what would cure what it cannot."""

    can_build: bool
    can_run: bool
    reason: str = ""
    cure: str = ""


class Runner(Protocol):
    """An engine that is open. Inputs and outputs are numpy arrays by port name."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]: ...

    def close(self) -> None: ...


class Open(Protocol):
    """Opens the target's engine of a bundle. `values`: further values of the graph to give back beside the outputs.

    Raises Misuse where the target cannot run here or cannot give such values; `threads` None: all cores.
    """

    def __call__(self, bundle: Bundle, *, threads: int | None = None, values: Sequence[str] = ()) -> Runner: ...


class Check(Protocol):
    """Raises Misuse for options that `build` would refuse, on whatever machine: before the long stages are run."""

    def __call__(self, options: Mapping[str, Any]) -> None: ...


class Build(Protocol):
    """Writes engines into `root / name` and tells of them, with names relative to `root`.

    `options` are the target's own (e.g. compute capabilities). Raises Misuse where the target cannot build here, Failed
    where the build fails.
    """

    def __call__(self, onnx: OnnxModel, *, root: Path, options: Mapping[str, Any]) -> TargetRecord: ...


@dataclass(frozen=True)
class Target:
    """One runtime: its list is TARGETS in `dit2deploy.targets`."""

    name: str
    availability: Callable[[], Availability]
    check: Check
    build: Build
    open: Open


def library_of(bundle: Bundle, target: str) -> Path:
    """The kernel library that the bundle holds for a target; Misuse where it holds none."""
    for name in bundle.target(target).files:
        if name.endswith(LIBRARY_NAME):
            return bundle.path(name)
    raise Misuse(f"{bundle.folder}: holds no {LIBRARY_NAME}.", "Make it anew with `dit2deploy build`.")
