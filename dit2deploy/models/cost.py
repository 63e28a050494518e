"""What a call of a transformer costs, found without weights or data: floating-point operations and activations."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dit2deploy.models.family import Inputs

_LIVE = 4  # activations alive beside a layer's own: residual stream, q, k and v [inferred, see tools/bench_memory.py]


@dataclass(frozen=True)
class Cost:
    """`flops` of matrix products and attention; `activations`: bytes at the peak, an estimate; `rows`: tokens that
    each linear sees."""

    flops: int
    activations: int
    rows: Mapping[str, int]


def cost_of_call(empty: torch.nn.Module, inputs: Inputs) -> Cost:
    """Of one call of a transformer with fake weights (`models.load.skeleton`), keyword arguments by name."""
    rows: dict[str, int] = {}
    largest = 0

    def see(name: str):
        def hook(module: torch.nn.Module, arguments: tuple, output: torch.Tensor) -> None:
            nonlocal largest
            rows[name] = output.numel() // output.shape[-1]
            largest = max(largest, output.nbytes)

        return hook

    linears = {name: module for name, module in empty.named_modules() if isinstance(module, torch.nn.Linear)}
    hooks = [module.register_forward_hook(see(name)) for name, module in linears.items()]
    # The weights' own mode: tensors of two modes do not mix.
    mode = next((p.fake_mode for p in empty.parameters() if hasattr(p, "fake_mode")), None) or FakeTensorMode()
    try:
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), mode, counter:
            empty(**{name: mode.from_tensor(value) for name, value in inputs.items()}, return_dict=False)
    finally:
        for handle in hooks:
            handle.remove()
    return Cost(counter.get_total_flops(), (1 + _LIVE) * largest, rows)
