"""Second moments of the layers' inputs, gathered over the calls of a calibration set."""

from collections.abc import Iterator, Mapping, Sequence

import torch

from dit2deploy.artefacts.calibration_set import CalibrationSet
from dit2deploy.base.errors import Misuse
from dit2deploy.base.progress import track

BUDGET = 2 << 30  # bytes of Hessians in memory at once; more layers than fit are served by further passes


def passes(layers: Mapping[str, int], *, budget: int = BUDGET) -> Iterator[list[str]]:
    """Splits layers (name -> K) into runs, in their order, whose float32 Hessians [K, K] fit the budget."""
    run: list[str] = []
    size = 0
    for name, k in layers.items():
        if run and size + 4 * k * k > budget:
            yield run
            run, size = [], 0
        run.append(name)
        size += 4 * k * k
    if run:
        yield run


def gather(network: torch.nn.Module, names: Sequence[str], calibration: CalibrationSet) -> dict[str, torch.Tensor]:
    """The mean of x x^T over all tokens x of each layer's input, float32 [K, K], by layer name.

    `network` is the full-precision transformer. Layers that are given the very same tensor (q, k and v) share one
    Hessian. Raises Misuse for a layer that no call reaches and for inputs that are not finite.
    """
    gatherer = _Gatherer()
    hooks = [
        network.get_submodule(name).register_forward_pre_hook(gatherer.hook(name), with_kwargs=True) for name in names
    ]
    try:
        for index in track(range(len(calibration)), "gather inputs"):
            call = {name: torch.from_numpy(value) for name, value in calibration.call(index).items()}
            with torch.inference_mode():
                network(**call, return_dict=False)
            gatherer.end_call()
    finally:
        for hook in hooks:
            hook.remove()
    return {name: gatherer.hessian(name) for name in names}


class _Gatherer:
    """Sums by leader: of consecutive layers that see one tensor, the first adds it up for all."""

    def __init__(self) -> None:
        self._leaders: dict[str, str] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._last: tuple[str, torch.Tensor] | None = None

    def hook(self, name: str):
        def see(module: torch.nn.Module, arguments: tuple, keywords: dict) -> None:
            x = arguments[0] if arguments else keywords["input"]
            if self._last is not None and self._last[1] is x:
                leader = self._last[0]
                if self._leaders.setdefault(name, leader) == leader:
                    return
            leader = self._leaders.setdefault(name, name)
            if leader != name:  # it followed another layer before and now goes its own way
                self._leaders[name] = name
                self._sums[name] = self._sums[leader].clone()
                self._tokens[name] = self._tokens[leader]
            self._last = (name, x)
            self._add(name, x)

        return see

    def _add(self, name: str, x: torch.Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        if name not in self._sums:
            self._sums[name] = torch.zeros(rows.shape[1], rows.shape[1])
            self._tokens[name] = 0
        self._sums[name].addmm_(rows.T, rows)
        self._tokens[name] += rows.shape[0]

    def end_call(self) -> None:
        self._last = None

    def hessian(self, name: str) -> torch.Tensor:
        leader = self._leaders.get(name)
        if leader is None:
            raise Misuse(
                f"layer {name}: no call of the calibration set reaches it.",
                "Give it the rounding `nearest` in the policy.",
            )
        hessian = self._sums[leader] / self._tokens[leader]
        if not torch.isfinite(hessian).all():
            raise Misuse(
                f"layer {name}: its inputs are not finite on the calibration set.",
                "Look for NaN or inf in the model's weights.",
            )
        return hessian
