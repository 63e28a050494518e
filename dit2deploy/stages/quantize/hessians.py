"""What is gathered of the layers' inputs over the calls of a calibration set: second moments and samples."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from dit2deploy.base.errors import Misuse
from dit2deploy.base.progress import note
from dit2deploy.quantizers.inputs import watch
from dit2deploy.quantizers.walk import Calls, by_block, walk


def passes(layers: Mapping[str, int], *, budget: int) -> Iterator[list[str]]:
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


def gather(
    network: torch.nn.Module,
    names: Sequence[str],
    calibration: Calls,
    *,
    weights: Mapping[str, Sequence[float] | np.ndarray] | None = None,
) -> dict[str, torch.Tensor]:
    """All that `gather_in_turn` finds of these layers, by layer name."""
    return dict(gather_in_turn(network, by_block(network, names), calibration, weights=weights))


def gather_in_turn(
    network: torch.nn.Module,
    runs: Sequence[Sequence[str]],
    calibration: Calls,
    *,
    weights: Mapping[str, Sequence[float] | np.ndarray] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Layers with the mean of x x^T over the tokens of the inputs that reach them, float32 [K, K]: of one run of layers
    at a time (`quantizers.walk.by_block`, split by `passes`), which is all that is in memory.

    `network` is the full-precision transformer. `weights` gives layers a weight for each call, of mean 1, as
    `quantizers.temporal.step_weights` makes them (AdaTSQ's H' = sum_t alpha_t X_t^T X_t); layers without weigh all
    calls alike, which is what ones give as well, bit for bit. Raises Misuse for a layer that no call reaches and for
    inputs that are not finite; notes layers with fewer tokens than channels, whose moments are singular (GPTQ damps
    them, but then knows little of the layer).
    """
    sums: dict[str, torch.Tensor] = {}
    tokens: dict[str, int] = {}
    last: list[tuple[torch.Tensor, torch.Tensor]] = []  # the newest input and its product: q, k and v share it
    few: list[str] = []

    def see(name: str, x: torch.Tensor, index: int) -> None:
        if not last or last[0][0] is not x:
            rows = x.reshape(-1, x.shape[-1]).float()
            last[:] = [(x, rows.T @ rows)]
        share = weights[name][index] if weights and name in weights else 1.0
        if name not in sums:
            sums[name] = torch.zeros_like(last[0][1])
        sums[name].add_(last[0][1], alpha=share)
        tokens[name] = tokens.get(name, 0) + x.numel() // x.shape[-1]

    for run in walk(network, runs, calibration, see):
        last.clear()
        for name in run:
            sums[name] /= tokens[name]
            if not torch.isfinite(sums[name]).all():
                raise Misuse(
                    f"layer {name}: its inputs are not finite on the calibration set.",
                    "Look for NaN or inf in the model's weights.",
                )
            if tokens[name] < len(sums[name]):
                few.append(f"{name} {tokens[name]} for {len(sums[name])}")
            yield name, sums.pop(name)
    if few:
        note(
            f"quantize: {len(few)} layers have fewer calibration tokens than channels, {few[0]}: calibrate with more "
            "samples or steps"
        )


def sample_inputs(
    network: torch.nn.Module, names: Sequence[str], calibration: Calls, *, tokens: int, seed: int
) -> dict[str, torch.Tensor]:
    """About `tokens` random tokens of each layer's input, float32 [M, K], as many of each call; raises as `gather`."""
    kept: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    each = -(-tokens // len(calibration))

    def see(name: str, x: torch.Tensor, index: int) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed + index))[:each]
        kept[name].append(rows[drawn])

    watch(network, names, calibration, see)
    return {name: torch.cat(parts) for name, parts in kept.items()}
