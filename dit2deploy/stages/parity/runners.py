"""Engines and PyTorch modules as Polygraphy runners that give the same names: the model's output, and each layer's."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.datatype import DataType

from dit2deploy.artefacts.bundle import Bundle
from dit2deploy.artefacts.onnx_model import PortRecord
from dit2deploy.nn.call import call_numpy, outputs_of
from dit2deploy.targets import Runner

OUTPUT = "output"  # the transformer's own output; layers have their module names


class _PortRunner(BaseRunner):
    """What both share: inputs are the bundle's ports."""

    def __init__(self, name: str, ports: Sequence[PortRecord]) -> None:
        super().__init__(name=name)
        self._ports = ports

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        for port in self._ports:
            shape = [None if isinstance(dim, str) else dim for dim in port.shape]
            metadata.add(port.name, dtype=DataType.from_dtype(np.dtype(port.dtype)), shape=shape)
        return metadata


class EngineRunner(_PortRunner):
    """An open engine; with `layers`, of which it gives the values, the outputs of these layers beside its own, in
    float32 where the engine has them in half precision: PyTorch goes on from them."""

    def __init__(self, bundle: Bundle, name: str, engine: Runner, *, layers: Sequence[str] = ()) -> None:
        super().__init__(name, bundle.manifest.inputs)
        self._engine = engine
        self._records = {layer: bundle.manifest.layers[layer] for layer in layers}
        self._output = bundle.manifest.outputs[0].name

    def infer_impl(self, feed_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        start = time.perf_counter()
        found = self._engine.run(feed_dict)
        self.inference_time = time.perf_counter() - start
        layers = {
            name: found[record.output][..., record.begin : record.end].astype(np.float32, copy=False)
            for name, record in self._records.items()
        }
        return {**layers, OUTPUT: found[self._output]}


class TorchRunner(_PortRunner):
    """A transformer in PyTorch; with `layers` (modules by name), their outputs beside its own."""

    def __init__(
        self,
        name: str,
        module: torch.nn.Module,
        ports: Sequence[PortRecord],
        *,
        layers: Mapping[str, torch.nn.Module] | None = None,
    ) -> None:
        super().__init__(name, ports)
        self._module, self._layers = module, layers or {}
        self._instead: Mapping[str, np.ndarray] | None = None

    @contextmanager
    def following(self, values: Mapping[str, np.ndarray]) -> Iterator[None]:
        """While this lasts, calls go on with `values` in the place of the layers' outputs."""
        self._instead = values
        try:
            yield
        finally:
            self._instead = None

    def infer_impl(self, feed_dict: Mapping[str, Any]) -> dict[str, np.ndarray]:
        start = time.perf_counter()
        with outputs_of(self._layers, instead=self._instead) as seen:
            output = call_numpy(self._module, feed_dict)
        self.inference_time = time.perf_counter() - start
        return {**{name: seen[name] for name in self._layers}, OUTPUT: output}
