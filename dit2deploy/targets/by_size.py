"""Engines of one model that differ in the size of their latents: one Runner over all of them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from dit2deploy.artefacts.bundle import Bundle
from dit2deploy.artefacts.onnx_model import OWN, PortRecord, size_label
from dit2deploy.base.errors import Misuse
from dit2deploy.targets.target import Runner

LATENTS = "hidden_states"


def size_of(inputs: Sequence[PortRecord]) -> str:
    """The label of the size of the latents that a graph with these inputs is for; "" where it takes any."""
    size = next((port.shape[-2:] for port in inputs if port.name == LATENTS), ())
    fixed = [dim for dim in size if isinstance(dim, int)]
    return size_label((fixed[0], fixed[1])) if len(fixed) == 2 else ""


class BySize:
    """A Runner over the engines of several sizes; each is opened when it is asked for."""

    def __init__(self, engines: Mapping[str, Path], open: Callable[[Path], Runner]) -> None:
        self._engines, self._open = engines, open
        self._opened: dict[str, Runner] = {}

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name. Raises Misuse for latents of a size that has no engine, and as the engines' runners do."""
        if LATENTS not in inputs or inputs[LATENTS].ndim < 2:
            raise Misuse(f"the engine refused the inputs: there are no {LATENTS}.", "Compare them with the manifest.")
        height, width = inputs[LATENTS].shape[-2:]
        label = size_label((height, width))
        if label not in self._engines:
            raise Misuse(
                f"the engine has no graph for latents of {label} (there: {', '.join(self._engines)}).",
                f"Export the model with --size {label} too, and build it anew.",
            )
        if label not in self._opened:
            self._opened[label] = self._open(self._engines[label])
        return self._opened[label].run(inputs)

    def close(self) -> None:
        for runner in self._opened.values():
            runner.close()


def open_sizes(engines: Mapping[str, Path], open: Callable[[Path], Runner]) -> Runner:
    """The one engine, or all by their sizes."""
    if len(engines) == 1:
        return open(*engines.values())
    return BySize(engines, open)


def graphs_of(bundle: Bundle, target: str) -> dict[str, Path]:
    """The ONNX files of a target that keeps the labels of OnnxModel.graphs, by size."""
    own = size_of(bundle.manifest.inputs)
    engines = bundle.target(target).engines
    return {own if label == OWN else label: bundle.path(name) for label, name in engines.items()}
