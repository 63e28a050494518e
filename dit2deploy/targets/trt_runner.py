"""Runs TensorRT engines with buffers from the CUDA driver. Never run so far: no machine at hand had a GPU for it."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dit2deploy.artefacts.bundle import Bundle
from dit2deploy.base.errors import Failed, Misuse
from dit2deploy.targets import cuda, kernel
from dit2deploy.targets.graph import DOMAIN

_COMPARE = "Compare them with the manifest."


def open_runner(bundle: Bundle, target: str, *, module: str, values: Sequence[str], cure: str) -> "TensorRtRunner":
    """The bundle's engine for the GPU at hand.

    Raises Misuse without a GPU, without an engine for it, and for inner `values`: engines give outputs only.
    """
    found = bundle.target(target)
    outputs = {port.name for port in bundle.manifest.outputs}
    inner = [name for name in values if name not in outputs]
    here = cuda.capability()
    if inner:
        raise Misuse(f"the engine has no value {inner[0]!r}: {target} gives outputs only.", "Use target ort-cpu.")
    made = found.details["engines"]
    label = next((label for label in made if here in made[label]["compute_capabilities"]), None)
    if label is None:
        there = ", ".join(name for engine in made.values() for name in engine["compute_capabilities"])
        raise Misuse(
            f"{bundle.folder}: has no engine for this GPU, of compute capability {here} (there: {there}).",
            f"Build with `--compute-capability {here}`.",
        )
    library = next((name for name in found.files if name.endswith(kernel.LIBRARY_NAME)), None)
    if library is None:
        raise Misuse(f"{bundle.folder}: holds no {kernel.LIBRARY_NAME}.", "Make it anew with `dit2deploy build`.")
    try:
        runtime = importlib.import_module(module)
    except ImportError as error:
        raise Misuse(f"{module} cannot be imported: {error}.", cure) from None
    return TensorRtRunner(runtime, bundle.path(found.engines[label]), bundle.path(library))


class TensorRtRunner:
    """A Runner over an execution context. Each call copies its inputs to the GPU and its outputs back."""

    def __init__(self, trt: Any, engine: Path, library: Path) -> None:
        self._trt = trt
        self._device = cuda.Device()
        try:
            self._open(engine, library)
        except BaseException:
            self._device.close()
            raise

    def _open(self, engine: Path, library: Path) -> None:
        trt = self._trt
        registry = trt.get_plugin_registry()
        # A second library with the same plugins is refused.
        if registry.get_creator("HadamardQuantize", "1", DOMAIN) is None and not registry.load_library(str(library)):
            raise Failed(f"{library}: TensorRT cannot load the plugins.", "Build the bundle anew.")
        self._log = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(engine.read_bytes())
        if self._engine is None:
            raise Failed(
                f"{engine}: TensorRT cannot open it (its reason is above).", "Build it anew with this version."
            )
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise Failed(f"{engine}: TensorRT made no execution context.", "Free memory of the GPU.")
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        is_input = {name: self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        self._inputs = [name for name in names if is_input[name]]
        self._outputs = [name for name in names if not is_input[name]]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name. Raises Misuse for inputs that the engine does not have, lacks or cannot take."""
        self._check(inputs)
        self._device.use()
        addresses: dict[str, int] = {}
        try:
            for name, value in inputs.items():
                if not self._context.set_input_shape(name, value.shape):
                    raise Misuse(f"the engine refused the inputs: {name} of shape {value.shape}.", _COMPARE)
                addresses[name] = self._device.empty(value.nbytes)
                self._device.upload(addresses[name], value)
            outputs = {}
            for name in self._outputs:
                shape = tuple(self._context.get_tensor_shape(name))
                outputs[name] = np.empty(shape, self._dtype(name))
                addresses[name] = self._device.empty(outputs[name].nbytes)
            for name, address in addresses.items():
                self._context.set_tensor_address(name, address)
            if not self._context.execute_async_v3(self._device.stream):
                raise Failed("TensorRT did not run the engine (its reason is above).", "Look at `nvidia-smi`.")
            self._device.wait()
            for name, value in outputs.items():
                self._device.download(value, addresses[name])
            return outputs
        finally:
            for address in addresses.values():
                self._device.free(address)

    def close(self) -> None:
        self._context = self._engine = self._runtime = None
        self._device.close()

    def _dtype(self, name: str) -> np.dtype:
        return np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name)))

    def _check(self, inputs: Mapping[str, np.ndarray]) -> None:
        if set(inputs) != set(self._inputs):
            needed, got = ", ".join(self._inputs), ", ".join(inputs) or "none"
            raise Misuse(f"the engine refused the inputs: it takes {needed}, got {got}.", _COMPARE)
        for name, value in inputs.items():
            if value.dtype != self._dtype(name):
                raise Misuse(
                    f"the engine refused the inputs: {name} is {value.dtype}, not {self._dtype(name)}.", _COMPARE
                )
