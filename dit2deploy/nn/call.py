"""Calls of a transformer with numpy arrays, and the outputs of its inner layers."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch


def call_numpy(module: torch.nn.Module, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """The output of one call of a diffusers transformer, keyword arguments by name, without gradients."""
    with torch.inference_mode():
        tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()}
        return module(**tensors, return_dict=False)[0].numpy()


@contextmanager
def outputs_of(
    layers: Mapping[str, torch.nn.Module], *, instead: Mapping[str, np.ndarray] | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Yields a dictionary that holds, after a call, what each of the layers gave last (float32 [.., N]).

    With `instead`, the call goes on with these values in the place of the layers' own: each layer is then asked for
    what follows from the given values of the layers before it.
    """
    seen: dict[str, np.ndarray] = {}

    def hook(name: str):
        def keep(module: torch.nn.Module, arguments: tuple, output: torch.Tensor) -> torch.Tensor | None:
            seen[name] = output.numpy()
            return torch.from_numpy(np.ascontiguousarray(instead[name])) if instead is not None else None

        return keep

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
