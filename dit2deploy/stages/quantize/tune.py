"""Options of a policy that are chosen layer by layer, by the error of the layer's own outputs on calibration tokens."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from dit2deploy.artefacts.calibration_set import CalibrationSet
from dit2deploy.artefacts.policy import LayerPolicy, MonarchGrid, Policy
from dit2deploy.base.errors import Misuse
from dit2deploy.base.progress import track
from dit2deploy.models.folds import Fold
from dit2deploy.models.load import linears_of, load_transformer
from dit2deploy.quantizers.inputs import channel_maxima
from dit2deploy.quantizers.linear import quantize_linear, threads_for
from dit2deploy.quantizers.output_error import output_error
from dit2deploy.quantizers.smoothing import factors
from dit2deploy.quantizers.walk import by_block
from dit2deploy.stages.quantize.hessians import gather_in_turn, sample_inputs

ALPHAS = tuple(tenths / 10 for tenths in range(11))
BLOCKS = (2, 4, 8, 16)  # along each side of a Monarch grid
LOW_RANK_SHARES = (1.0, 0.75, 0.5, 0.0)  # of a branch's budget
GROUP_SIZES = (32, 64, 96, 128, 192, 288, 384)  # those of Q-DiT, and what divides a hidden size of 192
TOKENS = 256  # of each layer
_BISECTIONS = 40


def search_smoothing(
    model: Path, policy: Policy, calibration: CalibrationSet, *, alphas: Sequence[float] = ALPHAS, seed: int = 0
) -> Policy:
    """The policy with the alpha of least output error for every place that can be smoothed (methods.md 6.2).

    Layers that share an input share alpha: the one of least sum of their noise to signal ratios. 0 is no smoothing.
    Weights round to nearest meanwhile, the branch is that of the policy (SVDQuant keeps it in the loop, 6.3).
    """
    network, family = load_transformer(Path(model))
    places = [
        fold
        for fold in family.folds(linears_of(network))
        if all(policy.layers[reader].is_quantized for reader in fold.readers)
    ]
    readers = [reader for fold in places for reader in fold.readers]
    inputs = sample_inputs(network, readers, calibration, tokens=TOKENS, seed=seed)
    maxima = {name: value.amax(0) for name, value in channel_maxima(network, readers, calibration).items()}
    layers = dict(policy.layers)
    for fold in track(places, "search smoothing"):
        largest = torch.stack([maxima[reader] for reader in fold.readers]).amax(0)
        errors = [_smoothed_error(network, policy, fold, inputs, largest, alpha, seed=seed) for alpha in alphas]
        best = alphas[int(np.argmin(errors))]
        layers |= {reader: layers[reader].model_copy(update={"smoothing": best}) for reader in fold.readers}
    return policy.model_copy(update={"layers": layers})


def _smoothed_error(
    network: torch.nn.Module,
    policy: Policy,
    fold: Fold,
    inputs: Mapping[str, torch.Tensor],
    maxima: torch.Tensor,
    alpha: float,
    *,
    seed: int,
) -> float:
    weights = [network.get_parameter(f"{reader}.weight").detach() for reader in fold.readers]
    c = torch.ones(len(maxima))
    if alpha:
        largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
        c = torch.from_numpy(factors(maxima.numpy(), largest.numpy(), alpha))
    return sum(
        _error(inputs[reader] / c, weight * c, policy.layers[reader], seed=seed)
        for reader, weight in zip(fold.readers, weights, strict=True)
    )


def search_group_sizes(
    model: Path,
    policy: Policy,
    calibration: CalibrationSet,
    *,
    sizes: Sequence[int] = GROUP_SIZES,
    extra_bits: float = 0.25,
    seed: int = 0,
) -> Policy:
    """The policy with a group size for each layer below 8-bit weights: least sum of the layers' noise to signal ratios
    for scales that cost at most `extra_bits` a weight on average (float32 scales: a group of 128 costs 0.25).

    Q-DiT (https://arxiv.org/abs/2406.17343; methods.md 6.5) draws sizes by an evolutionary search on FID, and shares
    them with activations. [inferred] Here layers are independent, so a Lagrangian multiplier, found by bisection,
    solves it; and activations keep one scale a token, which is what the ops have. Sizes that do not divide K are left
    out; a whole row is always a choice. Weights round to nearest meanwhile.

    Raises Misuse for a negative `extra_bits`.
    """
    if extra_bits < 0:
        raise Misuse(f"group sizes: {extra_bits} bits a weight are negative.", "Give 0 or more.")
    network, _ = load_transformer(Path(model))
    linears = linears_of(network)
    names = [name for name, layer in policy.layers.items() if layer.is_quantized and layer.weight != "int8"]
    inputs = sample_inputs(network, names, calibration, tokens=TOKENS, seed=seed)
    choices: dict[str, list[tuple[int | None, float, float]]] = {}  # size, error, bits of scales
    for name in track(names, "search group sizes"):
        n, k = linears[name]
        weight = network.get_parameter(f"{name}.weight").detach()
        choices[name] = []
        for size in (None, *(size for size in sizes if k % size == 0 and size < k)):
            layer = policy.layers[name].model_copy(update={"group_size": size})
            scales = 32.0 * n * (k // (size or k) - 1)
            choices[name].append((size, _error(inputs[name], weight, layer, seed=seed), scales))
    held = sum(linears[name][0] * linears[name][1] for name in names)
    chosen = least_error(choices, extra_bits * held)
    layers = {
        name: layer.model_copy(update={"group_size": chosen[name]}) if name in chosen else layer
        for name, layer in policy.layers.items()
    }
    return policy.model_copy(update={"layers": layers})


def search_monarch(
    model: Path,
    policy: Policy,
    calibration: CalibrationSet,
    *,
    blocks: Sequence[int] = BLOCKS,
    shares: Sequence[float] = LOW_RANK_SHARES,
    seed: int = 0,
) -> Policy:
    """The policy with the budget of each low-rank branch split, layer by layer, between low rank and a Monarch grid.

    TreeQ (https://arxiv.org/abs/2512.06353; methods.md 4.3). [inferred] A layer's `low_rank` R is its budget: a square
    grid of g x g blocks of rank r costs as many parameters as rank g r, so that low rank R - g r beside it spends all
    of R for every split with g r = R - low rank. Taken is what errs least in the layer's own outputs, activations
    quantized, on sampled calibration tokens. Weights round to nearest meanwhile; branches come from where the policy
    has them from, moments included.
    """
    network, _ = load_transformer(Path(model))
    linears = linears_of(network)
    names = [name for name, layer in policy.layers.items() if layer.is_quantized and layer.low_rank]
    inputs = sample_inputs(network, names, calibration, tokens=TOKENS, seed=seed)
    layers = dict(policy.layers)
    gathered = gather_in_turn(network, by_block(network, names), calibration)
    for name, moments in track(gathered, "search Monarch grids", len(names)):
        nearest = layers[name].model_copy(update={"rounding": "nearest"})
        options = [
            {"low_rank": rank, "monarch": grid}
            for rank, grid in budget_splits(layers[name].low_rank, linears[name], blocks=blocks, shares=shares)
        ]
        weight = network.get_parameter(f"{name}.weight").detach()
        errors = [
            _tried(inputs[name], weight, nearest.model_copy(update=option), moments, seed=seed) for option in options
        ]
        layers[name] = layers[name].model_copy(update=options[int(np.argmin(errors))])
    return policy.model_copy(update={"layers": layers})


def budget_splits(
    budget: int, shape: tuple[int, int], *, blocks: Sequence[int] = BLOCKS, shares: Sequence[float] = LOW_RANK_SHARES
) -> list[tuple[int, MonarchGrid | None]]:
    """(low rank, grid) pairs that hold as many parameters as low rank `budget` does, each once; low rank alone first.

    `shares` are those of the low-rank part; what a grid of g blocks a side cannot divide evenly goes to it as well.
    """
    found: dict[tuple[int, MonarchGrid | None], None] = {(budget, None): None}
    for share in shares:
        for side in blocks:
            rank = int(budget * (1 - share)) // side
            grid = MonarchGrid(side, side, rank)
            if rank and not grid.fault(*shape):
                found[budget - side * rank, grid] = None
    return list(found)


def least_error(
    choices: Mapping[str, Sequence[tuple[int | None, float, float]]], budget: float
) -> dict[str, int | None]:
    """The value of one (value, error, cost) for each name: least sum of errors + price * costs, at the lowest price
    that keeps the sum of costs within `budget`. Each name must have a choice that costs 0."""

    def at(price: float) -> dict[str, tuple[int | None, float, float]]:
        return {
            name: min(options, key=lambda option: option[1] + price * option[2]) for name, options in choices.items()
        }

    def cost(price: float) -> float:
        return sum(option[2] for option in at(price).values())

    low, high = 0.0, 1.0
    if cost(low) <= budget:
        high = low
    while cost(high) > budget:
        high *= 2
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) <= budget else (middle, high)
    return {name: option[0] for name, option in at(high).items()}


def _error(x: torch.Tensor, weight: torch.Tensor, layer: LayerPolicy, *, seed: int) -> float:
    """The noise to signal ratio of outputs for weights that round to nearest, without anything that needs moments."""
    return _tried(x, weight, layer.without_moments, None, seed=seed)


def _tried(
    x: torch.Tensor, weight: torch.Tensor, layer: LayerPolicy, moments: torch.Tensor | None, *, seed: int
) -> float:
    tensors = quantize_linear(weight.numpy(), None, layer, hessian=moments, seed=seed)
    with threads_for(*weight.shape):
        return output_error(x, weight, tensors, layer)
