"""SmoothQuant without a new op: a layer's input divided channel by channel in the layer that makes it, exactly.

SmoothQuant (https://arxiv.org/abs/2211.10438; methods.md 6.2) divides input channel j of a layer by c_j and multiplies
column j of its weight by c_j. Where the division can go, the family says (models/folds.py). Rows have scales of their
own in every format, so that the codes of the layers that take it stay what they were.

PTQ4DiT's Channel-wise Salience Balancing (https://arxiv.org/abs/2405.16005; methods.md 6.7) is alpha 0.5: with
e_j = sqrt(max|X_j| max|W_j|), X e_j / max|X_j| is X / c. Its salience calibration is `salience`. The paper balances the
inputs of qkv, of the projection and of the first linear of the MLP, as we do.

LSGQuant (https://arxiv.org/abs/2602.03182) has a "Dynamic Range Adaptive Quantizer" for tokens. [inferred, its code is
not out] It divides by each channel's largest value, then by each token's. The first division along K cannot leave an
integer product at run time; with maxima of the calibration set it is this file at alpha 1, and the second one is the
absmax token scale. Its alternation of a quantized and a low-rank branch is V3 (branches.py). What is not
here: VOLTS, which freezes or trains layers by the variance of their statistics.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dit2deploy.artefacts.calibration_set import CalibrationSet
from dit2deploy.artefacts.policy import LayerPolicy, Policy
from dit2deploy.base.errors import Misuse
from dit2deploy.models.folds import Fold
from dit2deploy.models.load import linears_of
from dit2deploy.models.stream import held
from dit2deploy.quantizers.inputs import channel_maxima

_CURE = "Set the smoothing of these layers to 0 in the policy."


@dataclass(frozen=True)
class Channels:
    """What becomes of one layer: weight * columns, then rows of weight and bias * rows, then bias + shift; and then the
    orders of permutation.py: the index of the channel that comes to each place."""

    columns: np.ndarray | None = None  # float32 [K]
    rows: np.ndarray | None = None  # float32 [N]
    shift: np.ndarray | None = None  # float32 [N]
    column_order: np.ndarray | None = None  # int64 [K]
    row_order: np.ndarray | None = None  # int64 [N]

    def apply(self, leaf: str, value: np.ndarray) -> np.ndarray:
        """The tensor `leaf` ("weight" [N, K] or "bias" [N]) after folding, float32; others as they are."""
        if leaf not in ("weight", "bias"):
            return value
        value = np.asarray(value, np.float32)
        if leaf == "weight" and self.columns is not None:
            value = value * self.columns
        if self.rows is not None:
            value = value * (self.rows[:, None] if leaf == "weight" else self.rows)
        if leaf == "bias" and self.shift is not None:
            value = value + self.shift
        if leaf == "weight" and self.column_order is not None:
            value = value[:, self.column_order]
        return value if self.row_order is None else np.ascontiguousarray(value[self.row_order])

    def apply_moments(self, hessian: torch.Tensor) -> torch.Tensor:
        """The second moments float32 [K, K] of the layer's inputs after folding."""
        if self.columns is not None:
            inverse = 1 / torch.from_numpy(self.columns)
            hessian = hessian * inverse * inverse.unsqueeze(1)
        if self.column_order is not None:
            order = torch.from_numpy(self.column_order)
            hessian = hessian[order][:, order]
        return hessian


def smoothed(policy: Policy, places: Sequence[Fold]) -> Iterator[tuple[Fold, LayerPolicy]]:
    """Those of the family's `places` that the policy asks for, with the policy of their readers.

    Raises Misuse for layers that cannot be smoothed and for layers of one place that do not agree.
    """
    open_to = {reader for fold in places for reader in fold.readers}
    for name, layer in policy.layers.items():
        if layer.is_quantized and layer.smoothing and not places:
            raise Misuse(f"{policy.model}: no places for smoothing are known in its family (layer {name}).", _CURE)
        if layer.is_quantized and layer.smoothing and name not in open_to:
            raise Misuse(f"layer {name}: no layer before it can take its smoothing factors.", _CURE)
    for fold in places:
        readers = [policy.layers[reader] for reader in fold.readers]
        if len({(reader.smoothing * reader.is_quantized, reader.smoothing_steps) for reader in readers}) > 1:
            raise Misuse(f"layers {', '.join(fold.readers)}: share their factors, but differ in smoothing.", _CURE)
        if readers[0].smoothing and readers[0].is_quantized:
            yield fold, readers[0]


def factors(input_maxima: np.ndarray, weight_maxima: np.ndarray, alpha: float) -> np.ndarray:
    """c float32 [K] = max|X_j|^alpha / max|W_j|^(1 - alpha); 1 for channels whose input or weights are all zero."""
    x, w = (np.asarray(value, np.float64) for value in (input_maxima, weight_maxima))
    live = (x > 0) & (w > 0)
    c = np.where(live, x, 1.0) ** alpha / np.where(live, w, 1.0) ** (1 - alpha)
    return np.where(live, c, 1.0).astype(np.float32)


def salience(input_maxima: np.ndarray, weight_maxima: np.ndarray) -> np.ndarray:
    """max|X_j| [K] over the steps, from those of each step [C, K]: sum_t eta_t max|X_j^(t)|, eta = softmax_t(-rho_t),
    rho_t being Spearman's correlation over channels of max|X^(t)| and max|W| [K] (PTQ4DiT, equations of 6.7).

    Steps whose salient channels are not those of the weight count more: there is more to balance. Ties share the mean
    of their ranks; without any spread rho is 0.
    """
    weight = _ranks(weight_maxima)
    rho = np.array([_correlation(_ranks(step), weight) for step in input_maxima])
    eta = np.exp(-rho - (-rho).max())
    return (eta / eta.sum()) @ np.asarray(input_maxima, np.float64)


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size else 0.0


def channels_of(
    wanted: Sequence[tuple[Fold, LayerPolicy]],
    linears: Mapping[str, tuple[int, int]],
    weight_maxima: Mapping[str, np.ndarray],
    maxima: Mapping[str, torch.Tensor],
) -> dict[str, Channels]:
    """What becomes of each layer: from `weight_maxima` [K] of the readers' full-precision weights, over their outputs,
    and `maxima` [C, K] of their |input|, by calls. Readers of one place share one c, from the largest of each.
    """
    columns: dict[str, np.ndarray] = {}
    rows: dict[str, np.ndarray] = {}
    shift: dict[str, np.ndarray] = {}
    for fold, policy in wanted:
        largest = np.max([weight_maxima[name] for name in fold.readers], axis=0)
        steps = np.max([maxima[name].numpy() for name in fold.readers], axis=0)
        inputs = salience(steps, largest) if policy.smoothing_steps == "correlation" else steps.max(0)
        c = factors(inputs, largest, policy.smoothing)
        columns |= dict.fromkeys(fold.readers, c)
        inverse = 1 / c
        for producer in fold.producers:
            n, taken = linears[producer.layer][0], producer.rows
            rows.setdefault(producer.layer, np.ones(n, np.float32))[taken] = np.resize(
                inverse, taken.stop - taken.start
            )
            if producer.scale_rows is not None:
                shift.setdefault(producer.layer, np.zeros(n, np.float32))[producer.scale_rows] = inverse - 1
    return {name: Channels(columns.get(name), rows.get(name), shift.get(name)) for name in {**columns, **rows}}


def fold_into(network: torch.nn.Module, folded: Mapping[str, Channels]) -> None:
    """Folds the factors into the full-precision network, in place; it stays the same function."""
    with torch.no_grad():
        for name, channels in folded.items():
            layer = network.get_submodule(name)
            if layer.bias is None and channels.shift is not None:
                layer.bias = torch.nn.Parameter(
                    torch.zeros(len(network.get_parameter(f"{name}.weight"))), requires_grad=False
                )
            for leaf, value in layer.named_parameters():
                value.copy_(torch.from_numpy(channels.apply(leaf, value.numpy().copy())))


def gathered_channels(
    network: torch.nn.Module, wanted: Sequence[tuple[Fold, LayerPolicy]], calibration: CalibrationSet
) -> dict[str, Channels]:
    """`channels_of` the full-precision `network`, maxima taken over the calibration set; {} where nothing is wanted.

    Raises Misuse for a layer that no call reaches.
    """
    readers = [name for fold, _ in wanted for name in fold.readers]
    if not readers:
        return {}
    weight_maxima = {}
    for name in readers:
        with held(network.get_submodule(name)):
            weight_maxima[name] = network.get_parameter(f"{name}.weight").detach().abs().amax(0).numpy()
    return channels_of(wanted, linears_of(network), weight_maxima, channel_maxima(network, readers, calibration))
