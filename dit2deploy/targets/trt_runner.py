"""Runs TensorRT engines with buffers from the CUDA driver. Never run so far: no machine at hand had a GPU for it."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dit2deploy.artefacts.bundle import Bundle
from dit2deploy.artefacts.onnx_model import AxisRecord
from dit2deploy.base.errors import Failed, Misuse
from dit2deploy.base.progress import note
from dit2deploy.targets import cuda
from dit2deploy.targets.by_size import open_sizes
from dit2deploy.targets.graph import DOMAIN
from dit2deploy.targets.target import Runner, library_of
from dit2deploy.targets.trt_cache import KernelCache, kernels_file
from dit2deploy.targets.trt_profile import check_inputs
from dit2deploy.targets.trt_validity import check_release, check_validity

_COMPARE = "Compare them with the manifest."


def open_runner(bundle: Bundle, target: str, *, module: str, values: Sequence[str], cure: str) -> Runner:
    """The bundle's engine for the GPU at hand, or all of several sizes.

    Raises Misuse without a GPU, without an engine for it, for one that the installed release does not open, and for
    inner `values`: engines give outputs only.
    """
    found = bundle.target(target)
    outputs = {port.name for port in bundle.manifest.outputs}
    inner = [name for name in values if name not in outputs]
    here = cuda.capability()
    if inner:
        raise Misuse(f"the engine has no value {inner[0]!r}: {target} gives outputs only.", "Use target ort-cpu.")
    made = found.details["engines"]
    labels = [label for label in made if here in made[label]["compute_capabilities"]]
    if not labels:
        there = ", ".join(name for engine in made.values() for name in engine["compute_capabilities"])
        raise Misuse(
            f"{bundle.folder}: has no engine for this GPU, of compute capability {here} (there: {there}).",
            f"Build with `--compute-capability {here}`.",
        )
    library = library_of(bundle, target)
    try:
        runtime = importlib.import_module(module)
    except ImportError as error:
        raise Misuse(f"{module} cannot be imported: {error}.", cure) from None
    check_release(bundle, target, runtime.__version__)
    # Bundles that were built before there were sizes and ranges tell neither.
    names = {made[label].get("size", ""): found.engines[label] for label in labels}
    profile = {name: AxisRecord(**axis) for name, axis in found.details.get("profile", {}).items()}
    check = partial(check_inputs, profile, bundle.manifest.inputs)

    def opened(path: Path) -> Runner:
        compiled = None
        if module == "tensorrt_rtx":  # the other one compiles its kernels when it builds
            compiled = kernels_file(target, runtime.__version__, digests[path])
        return TensorRtRunner(runtime, path, library, check, compiled=compiled)

    digests = {bundle.path(name): bundle.manifest.sha256[name] for name in names.values()}
    return open_sizes({size: bundle.path(name) for size, name in names.items()}, opened)


@dataclass
class _Step:
    """An execution context for one set of shapes and its memory on the GPU; `graph` once it was captured."""

    context: Any
    addresses: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, tuple[tuple[int, ...], np.dtype]] = field(default_factory=dict)
    memory: int = 0  # of activations
    graph: int = 0
    is_warm: bool = False


class TensorRtRunner:
    """A Runner over execution contexts, one for each set of input shapes, with fixed memory on the GPU.

    Each call copies its inputs there and its outputs back. The first call with inputs of some shapes is enqueued, the
    second captured as a CUDA graph, later ones launch that; where a capture is refused, all are enqueued. What differs
    between steps of one shape, bit widths included, is data, so a graph serves all of them.
    """

    def __init__(
        self,
        trt: Any,
        engine: Path,
        library: Path,
        check: Callable[[Mapping[str, np.ndarray]], None],
        *,
        compiled: Path | None = None,
    ) -> None:
        """`check` raises Misuse for inputs of shapes that the engine was not built for. `compiled`: where the kernels
        lie that TensorRT-RTX compiled for this GPU when the engine ran before, and will lie; None: nowhere."""
        self._trt, self._check_shapes = trt, check
        self._steps: dict[tuple, _Step] = {}
        self._kernels: KernelCache | None = None
        self._captures = True
        self._device = cuda.Device()
        try:
            self._open(engine, library)
            self._config = self._configure(compiled)
        except BaseException:
            self._device.close()
            raise

    def _open(self, engine: Path, library: Path) -> None:
        trt = self._trt
        self._log = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._log)
        if hasattr(self._runtime, "get_engine_validity"):  # of TensorRT-RTX alone
            check_validity(trt, self._runtime, engine, cuda.capability())
        registry = trt.get_plugin_registry()
        # A second library with the same plugins is refused.
        if registry.get_creator("HadamardQuantize", "1", DOMAIN) is None and not registry.load_library(str(library)):
            raise Failed(f"{library}: TensorRT cannot load the plugins.", "Build the bundle anew.")
        self._engine = self._runtime.deserialize_cuda_engine(engine.read_bytes())
        if self._engine is None:
            raise Failed(
                f"{engine}: TensorRT cannot open it (its reason is above).", "Build it anew with this version."
            )
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        is_input = {name: self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        self._inputs = [name for name in names if is_input[name]]
        self._outputs = [name for name in names if not is_input[name]]

    def _configure(self, compiled: Path | None) -> Any:
        """What execution contexts are made with: memory is ours, kernels that were compiled before are used again."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if compiled is None:
            return strategy
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        self._kernels = KernelCache(config, compiled)
        return config

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name. Raises Misuse for inputs that the engine does not have, lacks or cannot take."""
        self._check(inputs)
        self._device.use()
        shapes = tuple(inputs[name].shape for name in self._inputs)
        if shapes not in self._steps:
            self._check_shapes(inputs)
            self._steps[shapes] = self._step(inputs)
        step = self._steps[shapes]
        for name, value in inputs.items():
            self._device.upload(step.addresses[name], value)
        if not step.graph and step.is_warm and self._captures:
            self._capture(step)
        if step.graph:
            self._device.launch(step.graph)
        elif not self._enqueue(step):
            raise Failed("TensorRT did not run the engine (its reason is above).", "Look at `nvidia-smi`.")
        self._device.wait()
        if self._kernels is not None and not step.is_warm:  # kernels of new shapes were compiled
            self._kernels.store()
        step.is_warm = True
        outputs = {name: np.empty(*told) for name, told in step.outputs.items()}
        for name, value in outputs.items():
            self._device.download(value, step.addresses[name])
        return outputs

    def _step(self, inputs: Mapping[str, np.ndarray]) -> _Step:
        """A context of its own: a captured graph holds addresses within its context, and that of a shape stays."""
        step = _Step(self._engine.create_execution_context(self._config))
        if step.context is None:
            raise Failed("TensorRT made no execution context (its reason is above).", "Free memory of the GPU.")
        try:
            for name, value in inputs.items():
                if not step.context.set_input_shape(name, value.shape):
                    raise Misuse(f"the engine refused the inputs: {name} of shape {value.shape}.", _COMPARE)
                step.addresses[name] = self._device.empty(value.nbytes)
            # By itself TensorRT would take what the longest shapes of the profile need.
            needed = step.context.update_device_memory_size_for_shapes()
            step.memory = self._device.empty(needed)
            step.context.set_device_memory(step.memory, needed)
            for name in self._outputs:
                shape, dtype = tuple(step.context.get_tensor_shape(name)), self._dtype(name)
                step.outputs[name] = shape, dtype
                step.addresses[name] = self._device.empty(int(np.prod(shape)) * dtype.itemsize)
        except BaseException:
            self._free(step)
            raise
        for name, address in step.addresses.items():
            step.context.set_tensor_address(name, address)
        return step

    def _enqueue(self, step: _Step) -> bool:
        return step.context.execute_async_v3(self._device.stream)

    def _capture(self, step: _Step) -> None:
        try:
            step.graph = self._device.capture(lambda: self._enqueue(step))
        except Failed as error:
            note(f"a step could not be captured as a CUDA graph, so none is: {error.cause}")
            self._captures = False

    def _free(self, step: _Step) -> None:
        if step.graph:
            self._device.forget(step.graph)
        for address in filter(None, (*step.addresses.values(), step.memory)):
            self._device.free(address)

    def close(self) -> None:
        if self._kernels is not None:  # some are compiled in the background
            self._kernels.store()
        for step in self._steps.values():
            self._free(step)
        self._steps.clear()
        self._kernels = self._config = self._engine = self._runtime = None
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
