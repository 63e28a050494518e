"""The inputs of a network's layers over the calls of a calibration set, and their largest values."""

from collections.abc import Sequence

import torch

from dit2deploy.quantizers.walk import Calls, See, by_block, walk


def watch(network: torch.nn.Module, names: Sequence[str], calibration: Calls, see: See) -> None:
    """Runs the network over the calibration set; `see(name, x, call)` is given each input [.., K] of these layers.

    Raises Misuse for a layer that no call reaches.
    """
    for _ in walk(network, by_block(network, names), calibration, see):
        pass


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
