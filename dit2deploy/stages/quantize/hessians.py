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

    `network` is the full-precision transformer. Raises Misuse for a layer that no call reaches and for inputs that
    are not finite.
    """
    sums: dict[str, torch.Tensor] = {}
    tokens: dict[str, int] = {}
    last: list[tuple[torch.Tensor, torch.Tensor]] = []  # the newest input and its product: q, k and v share it

    def see(name: str, x: torch.Tensor) -> None:
        if not last or last[0][0] is not x:
            rows = x.reshape(-1, x.shape[-1]).float()
            last[:] = [(x, rows.T @ rows)]
        product = last[0][1]
        sums[name] = sums[name].add_(product) if name in sums else product.clone()
        tokens[name] = tokens.get(name, 0) + x.numel() // x.shape[-1]

    def hook(name: str):
        return lambda module, arguments, keywords: see(name, arguments[0] if arguments else keywords["input"])

    hooks = [network.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True) for name in names]
    try:
        for index in track(range(len(calibration)), "gather inputs"):
            call = {name: torch.from_numpy(value) for name, value in calibration.call(index).items()}
            with torch.no_grad():
                network(**call, return_dict=False)
            last.clear()
    finally:
        for handle in hooks:
            handle.remove()
    for name in names:
        if name not in sums:
            raise Misuse(
                f"layer {name}: no call of the calibration set reaches it.",
                "Give it the rounding `nearest` in the policy.",
            )
        sums[name] /= tokens[name]
        if not torch.isfinite(sums[name]).all():
            raise Misuse(
                f"layer {name}: its inputs are not finite on the calibration set.",
                "Look for NaN or inf in the model's weights.",
            )
    return sums
