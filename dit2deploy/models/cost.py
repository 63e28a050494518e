"""What a call of a transformer costs, found without weights or data: floating-point operations and activations."""

import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dit2deploy.models.family import Inputs

_LIVE = 4  # activations alive beside a layer's own: residual stream, q, k and v [inferred, see tools/bench_memory.py]


@dataclass(frozen=True)
class Cost:
    """`flops` of matrix products and attention; `widest`: bytes of the largest output of a linear; `rows`: tokens that
    each linear sees."""

    flops: int
    widest: int
    rows: Mapping[str, int]

    @property
    def activations(self) -> int:
        """Bytes at the peak of a call, an estimate."""
        return (1 + _LIVE) * self.widest


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
    return Cost(counter.get_total_flops(), largest, rows)


@functools.cache
def product_rate() -> float:
    """Floating-point operations a second of float32 matrix products here, by a probe."""
    a, n = torch.ones(512, 2048), 2048
    b = torch.ones(n, n)
    a @ b
    begun = time.perf_counter()
    for _ in range(3):
        a @ b
    return 3 * 2 * 512 * n * n / (time.perf_counter() - begun)
