"""The inputs of a network's layers over the calls of a calibration set, and their largest values."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from dit2deploy.base.errors import Misuse
from dit2deploy.base.progress import track


class Calls(Protocol):
    """Calls of a network: a CalibrationSet, or what stands in for one."""

    def __len__(self) -> int: ...

    def call(self, index: int) -> dict[str, np.ndarray]:
        """Keyword arguments of one call, [B, ..] each."""
        ...


def watch(
    network: torch.nn.Module,
    names: Sequence[str],
    calibration: Calls,
    see: Callable[[str, torch.Tensor, int], None],
) -> None:
    """Runs the network over the calibration set; `see(name, x, call)` is given each input [.., K] of these layers.

    Raises Misuse for a layer that no call reaches.
    """
    seen: set[str] = set()
    current = 0

    def hook(name: str):
        def take(module: torch.nn.Module, arguments: tuple, keywords: Mapping[str, torch.Tensor]) -> None:
            seen.add(name)
            see(name, arguments[0] if arguments else keywords["input"], current)

        return take

    hooks = [network.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True) for name in names]
    try:
        for current in track(range(len(calibration)), "gather inputs"):
            call = {name: torch.from_numpy(value) for name, value in calibration.call(current).items()}
            with torch.no_grad():
                network(**call, return_dict=False)
    finally:
        for handle in hooks:
            handle.remove()
    for name in names:
        if name not in seen:
            raise Misuse(
                f"layer {name}: no call of the calibration set reaches it.",
                "Give it the rounding `nearest` and no smoothing in the policy.",
            )


def channel_maxima(network: torch.nn.Module, names: Sequence[str], calibration: Calls) -> dict[str, torch.Tensor]:
    """max |x_j| over the tokens of each call of each layer's input, float32 [C, K], by layer name; raises as `watch`
    does. A call that does not reach a layer has zeros there."""
    maxima: dict[str, torch.Tensor] = {}

    def see(name: str, x: torch.Tensor, index: int) -> None:
        largest = x.reshape(-1, x.shape[-1]).float().abs().amax(0)
        held = maxima.setdefault(name, torch.zeros(len(calibration), len(largest)))
        held[index] = torch.maximum(held[index], largest)

    watch(network, names, calibration, see)
    return maxima
