"""Runs a session of ONNX Runtime on the GPU with fixed buffers there, a whole step as one CUDA graph.

ONNX Runtime captures by itself (provider option `enable_cuda_graph`, one graph for each value of the run option
`gpu_graph_id`, since 1.18); it asks for no control flow, no copies between host and device within the graph, and inputs
and outputs at addresses that do not move. What differs between steps of one shape, bit widths included, is data on the
GPU, so a graph serves all of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dit2deploy.base.progress import note
from dit2deploy.targets.ort import OrtRunner, errors, refused, runtime

_GRAPH, _NO_GRAPH = "gpu_graph_id", -1


@dataclass
class _Buffers:
    """Memory on the device for one set of shapes; `graph` is the id of its CUDA graph."""

    binding: Any
    inputs: dict[str, Any]
    outputs: list[Any]
    graph: int
    is_captured: bool = False


class OrtCudaRunner:
    """A Runner over a session whose inputs and outputs stay at their places on the GPU.

    The first call with inputs of some shapes goes node by node and ONNX Runtime allocates the outputs, the second is
    captured, later ones launch what was. Where a capture fails, `reopen` makes a session that captures nothing.
    """

    def __init__(
        self, opened: OrtRunner, *, captures: bool, reopen: Callable[[], OrtRunner], device: str = "cuda"
    ) -> None:
        self._opened, self._captures, self._reopen, self._device = opened, captures, reopen, device
        self._buffers: dict[tuple, _Buffers] = {}

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name. Raises Misuse for inputs that the engine does not have, lacks or cannot take."""
        shapes = tuple(sorted((name, value.dtype.str, value.shape) for name, value in inputs.items()))
        try:
            found = self._buffers.get(shapes)
            if found is None:
                found = self._buffers[shapes] = self._first(inputs)
            else:
                found = self._again(shapes, found, inputs)
            # Copies in new memory of the host: what is on the device is overwritten by the next call.
            return {
                name: np.array(value.numpy()) for name, value in zip(self._opened.outputs, found.outputs, strict=True)
            }
        except errors(runtime()) as error:
            raise refused(error) from None

    def close(self) -> None:
        self._buffers.clear()
        self._opened.close()

    def _first(self, inputs: Mapping[str, np.ndarray]) -> _Buffers:
        make = runtime().OrtValue.ortvalue_from_shape_and_type
        binding = self._opened.session.io_binding()
        held = {name: make(value.shape, value.dtype, self._device, 0) for name, value in inputs.items()}
        for name, value in held.items():
            value.update_inplace(np.ascontiguousarray(inputs[name]))
            binding.bind_ortvalue_input(name, value)
        for name in self._opened.outputs:
            binding.bind_output(name, self._device, 0)
        self._run(binding, _NO_GRAPH)
        outputs = binding.get_outputs()
        binding.clear_binding_outputs()
        for name, value in zip(self._opened.outputs, outputs, strict=True):
            binding.bind_ortvalue_output(name, value)
        return _Buffers(binding, held, outputs, graph=len(self._buffers) + 1)

    def _again(self, shapes: tuple, found: _Buffers, inputs: Mapping[str, np.ndarray]) -> _Buffers:
        for name, value in found.inputs.items():
            value.update_inplace(np.ascontiguousarray(inputs[name]))
        try:
            self._run(found.binding, found.graph if self._captures else _NO_GRAPH)
        except errors(runtime()) as error:
            if found.is_captured or not self._captures:
                raise
            note(f"a step could not be captured as a CUDA graph, so none is: {error}")
            self._captures = False
            self.close()  # its stream may still be in the capture
            self._opened = self._reopen()
            self._buffers[shapes] = self._first(inputs)
            return self._buffers[shapes]
        found.is_captured = self._captures
        return found

    def _run(self, binding: Any, graph: int) -> None:
        options = runtime().RunOptions()
        options.add_run_config_entry(_GRAPH, str(graph))
        self._opened.session.run_with_iobinding(binding, options)
