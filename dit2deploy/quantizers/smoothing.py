"""SmoothQuant without a new op: a layer's input divided channel by channel in the layer that makes it, exactly.

SmoothQuant (https://arxiv.org/abs/2211.10438; methods.md 6.2) divides input channel j of a layer by c_j and multiplies
column j of its weight by c_j. Where the division can go, the family says (models/folds.py). Rows have scales of their
own in every format, so that the codes of the layers that take it stay what they were.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dit2deploy.artefacts.calibration_set import CalibrationSet
from dit2deploy.artefacts.policy import Policy
from dit2deploy.base.errors import Misuse
from dit2deploy.models.folds import Fold
from dit2deploy.models.load import linears_of
from dit2deploy.quantizers.inputs import channel_maxima

_CURE = "Set the smoothing of these layers to 0 in the policy."


@dataclass(frozen=True)
class Channels:
    """Factors of one layer: weight * columns, then rows of weight and bias * rows, then bias + shift."""

    columns: np.ndarray | None = None  # float32 [K]
    rows: np.ndarray | None = None  # float32 [N]
    shift: np.ndarray | None = None  # float32 [N]

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
        return value


def smoothed(policy: Policy, places: Sequence[Fold]) -> Iterator[tuple[Fold, float]]:
    """Those of the family's `places` that the policy asks for, with their alpha.

    Raises Misuse for layers that cannot be smoothed and for layers of one place that do not agree.
    """
    open_to = {reader for fold in places for reader in fold.readers}
    for name, layer in policy.layers.items():
        if layer.is_quantized and layer.smoothing and not places:
            raise Misuse(f"{policy.model}: no places for smoothing are known in its family (layer {name}).", _CURE)
        if layer.is_quantized and layer.smoothing and name not in open_to:
            raise Misuse(f"layer {name}: no layer before it can take its smoothing factors.", _CURE)
    for fold in places:
        alphas = {policy.layers[reader].smoothing * policy.layers[reader].is_quantized for reader in fold.readers}
        if len(alphas) > 1:
            raise Misuse(f"layers {', '.join(fold.readers)}: share their factors, but differ in smoothing.", _CURE)
        if alpha := alphas.pop():
            yield fold, alpha


def factors(input_maxima: np.ndarray, weight_maxima: np.ndarray, alpha: float) -> np.ndarray:
    """c float32 [K] = max|X_j|^alpha / max|W_j|^(1 - alpha); 1 for channels whose input or weights are all zero."""
    x, w = (np.asarray(value, np.float64) for value in (input_maxima, weight_maxima))
    live = (x > 0) & (w > 0)
    c = np.where(live, x, 1.0) ** alpha / np.where(live, w, 1.0) ** (1 - alpha)
    return np.where(live, c, 1.0).astype(np.float32)


def channels_of(
    wanted: Sequence[tuple[Fold, float]],
    linears: Mapping[str, tuple[int, int]],
    weights: Mapping[str, np.ndarray],
    maxima: Mapping[str, torch.Tensor],
) -> dict[str, Channels]:
    """What becomes of each layer: from the readers' full-precision weights [N, K] and `maxima` [K] of their |input|.

    Readers of one place share one c, from the largest of each.
    """
    columns: dict[str, np.ndarray] = {}
    rows: dict[str, np.ndarray] = {}
    shift: dict[str, np.ndarray] = {}
    for fold, alpha in wanted:
        largest = np.max([np.abs(np.asarray(weights[name], np.float32)).max(0) for name in fold.readers], axis=0)
        c = factors(np.max([maxima[name].numpy() for name in fold.readers], axis=0), largest, alpha)
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


def gathered_channels(
    network: torch.nn.Module, wanted: Sequence[tuple[Fold, float]], calibration: CalibrationSet
) -> dict[str, Channels]:
    """`channels_of` the full-precision `network`, maxima taken over the calibration set; {} where nothing is wanted.

    Raises Misuse for a layer that no call reaches.
    """
    readers = [name for fold, _ in wanted for name in fold.readers]
    if not readers:
        return {}
    weights = {name: network.get_parameter(f"{name}.weight").detach().numpy() for name in readers}
    return channels_of(wanted, linears_of(network), weights, channel_maxima(network, readers, calibration))
