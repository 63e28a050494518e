"""Who is timed: the engine, and full precision in ONNX Runtime and PyTorch where they are at hand."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dit2deploy.artefacts.bundle import REFERENCE, Bundle
from dit2deploy.artefacts.onnx_model import BATCH, OnnxModel
from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import sha256_of_folder
from dit2deploy.nn import at_hand
from dit2deploy.targets import by_name
from dit2deploy.targets.ort import open_session

ENGINE, ORT_FLOAT, TORCH_FLOAT = "engine", "ort-fp32", "torch-fp32"
BASELINES = (ORT_FLOAT, TORCH_FLOAT)
Inputs = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Entrant:
    """Opens for a number of threads; what is opened takes the inputs of one step. `reason`: why it cannot be."""

    name: str
    label: str
    open: Callable[[int], contextlib.AbstractContextManager[Callable[[Inputs], Any]]]
    reason: str = ""


def entrant(bundle: Bundle, target: str, name: str) -> Entrant:
    """The engine or a baseline by name; a baseline that cannot be run here has its reason."""
    if name == ENGINE:
        return Entrant(ENGINE, f"{target} engine", lambda threads: _engine(bundle, target, threads))
    return {ORT_FLOAT: _ort_float, TORCH_FLOAT: _torch_float}[name](bundle)


def inputs_of(bundle: Bundle, *, batch: int) -> dict[str, np.ndarray]:
    """Inputs of one step: the recorded ones of the middle step, repeated or cut to `batch`.

    A bundle without recorded steps gets unit normal values and zeros. Raises Misuse where its inputs have dynamic axes
    beside the first, which nothing tells the length of, and for a batch that the engine does not take.
    """
    recorded = bundle.reference() if bundle.path(REFERENCE).is_file() else {}
    generator = np.random.default_rng(0)
    inputs = {}
    for port in bundle.manifest.inputs:
        # FLUX's positions have an open first axis as well, which is no batch.
        first_is_batch = bool(port.shape) and port.shape[0] == BATCH
        if f"input.{port.name}" in recorded:
            steps = recorded[f"input.{port.name}"]
            value = steps[len(steps) // 2]
        else:
            rest = port.shape[1:] if first_is_batch else port.shape
            fixed = [dim for dim in rest if isinstance(dim, int)]
            if len(fixed) < len(rest):
                raise Misuse(
                    f"{bundle.folder}: has no recorded steps, and {port.name} is of open shape {list(port.shape)}.",
                    "Build the bundle with --calibration.",
                )
            shape = (batch, *fixed) if first_is_batch else tuple(fixed)
            floating = np.issubdtype(np.dtype(port.dtype), np.floating)
            value = generator.standard_normal(shape) if floating else np.zeros(shape)
        if first_is_batch:
            value = np.take(value, np.arange(batch) % len(value), axis=0)
        elif port.shape and value.ndim and len(value) != batch and port is bundle.manifest.inputs[0]:
            raise Misuse(f"{bundle.folder}: the engine takes a batch of {len(value)} only.", "Profile that batch.")
        inputs[port.name] = np.ascontiguousarray(value, dtype=port.dtype)
    return inputs


@contextlib.contextmanager
def _engine(bundle: Bundle, target: str, threads: int) -> Iterator[Callable[[Inputs], Any]]:
    runner = by_name(target).open(bundle, threads=threads)
    try:
        yield runner.run
    finally:
        runner.close()


def _ort_float(bundle: Bundle) -> Entrant:
    label = "ONNX Runtime fp32"

    @contextlib.contextmanager
    def open_(threads: int) -> Iterator[Callable[[Inputs], Any]]:
        runner = open_session(OnnxModel.load(folder).path, threads=threads, prepack=True)
        try:
            yield runner.run
        finally:
            runner.close()

    provenance = bundle.manifest.provenance
    if "float_onnx" not in provenance:
        return Entrant(ORT_FLOAT, label, open_, "the bundle was built without the float ONNX model")
    folder = Path(provenance["float_onnx"])
    if not folder.is_dir():
        return Entrant(ORT_FLOAT, label, open_, f"{folder} is not on this machine")
    if sha256_of_folder(folder) != provenance.get("float_onnx_sha256"):
        return Entrant(ORT_FLOAT, label, open_, f"{folder} was changed since the bundle was built")
    return Entrant(ORT_FLOAT, label, open_)


def _torch_float(bundle: Bundle) -> Entrant:
    calls: list[at_hand.Call] = []  # loaded once for all settings

    @contextlib.contextmanager
    def open_(threads: int) -> Iterator[Callable[[Inputs], Any]]:
        import torch

        if not calls:
            calls.append(at_hand.full_precision(bundle))
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            yield calls[0]
        finally:
            torch.set_num_threads(before)

    return Entrant(TORCH_FLOAT, "PyTorch fp32 eager", open_, at_hand.why_no_full_precision(bundle))
