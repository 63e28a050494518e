"""SmoothQuant without a new op: a layer's input divided channel by channel in the layer that makes it, exactly.

SmoothQuant (https://arxiv.org/abs/2211.10438; methods.md 6.2) divides input channel j of a layer by c_j and multiplies
column j of its weight by c_j. Where the division goes, in the diffusers DiT:
1. q, k, v and the first linear of the MLP read x = LN(h) (1 + scale) + shift, and the modulation (adaLN) linear gives
   scale and shift. x / c has shift / c and 1 + scale' = (1 + scale) / c, so scale' = scale / c + (1 / c - 1): rows of
   weight and bias times 1 / c, and 1 / c - 1 on the bias of scale, which takes up what is not linear (PTQ4DiT's
   identity term, methods.md 6.7). q, k and v read the same x and share one c.
2. The output projection of attention reads sums of rows of V over tokens: rows of to_v times 1 / c.
3. The second linear of the MLP reads GELU: no linear lies before it, so it cannot be smoothed.
Rows have scales of their own in every format, so that the codes of the folded layers stay what they were.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dit2deploy.artefacts.policy import Policy
from dit2deploy.base.errors import Misuse

_CURE = "Set the smoothing of these layers to 0 in the policy."


@dataclass(frozen=True)
class Fold:
    """Layers that read one input, and the linear before them: its rows that are divided, and those of scale."""

    readers: tuple[str, ...]
    producer: str
    rows: slice
    scale_rows: slice | None = None  # rows that give a scale s which is used as 1 + s


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


def folds(model: str, linears: Mapping[str, tuple[int, int]]) -> list[Fold]:
    """The places of the module docstring in a model of class `model`; none for a class that it does not describe."""
    found = []
    for name, (n, k) in linears.items():
        match = re.fullmatch(r"(transformer_blocks\.\d+)\.norm1\.linear", name)
        if model != "DiTTransformer2DModel" or match is None or n != 6 * k:
            continue
        block = match.group(1)
        attention = tuple(f"{block}.attn1.to_{letter}" for letter in "qkv")
        # norm1.linear gives shift, scale and gate of attention, then those of the MLP
        found += [
            Fold(attention, name, slice(0, 2 * k), slice(k, 2 * k)),
            Fold((f"{block}.ff.net.0.proj",), name, slice(3 * k, 5 * k), slice(4 * k, 5 * k)),
            Fold((f"{block}.attn1.to_out.0",), attention[2], slice(0, k)),
        ]
    return found


def smoothed(policy: Policy, linears: Mapping[str, tuple[int, int]]) -> Iterator[tuple[Fold, float]]:
    """The folds that the policy asks for, with their alpha.

    Raises Misuse for layers that cannot be smoothed and for layers of one input that do not agree.
    """
    places = folds(policy.model, linears)
    open_to = {reader for fold in places for reader in fold.readers}
    for name, layer in policy.layers.items():
        if layer.is_quantized and layer.smoothing and name not in open_to:
            raise Misuse(f"layer {name}: no layer before it can take its smoothing factors.", _CURE)
    for fold in places:
        alphas = {policy.layers[reader].smoothing * policy.layers[reader].is_quantized for reader in fold.readers}
        if len(alphas) > 1:
            raise Misuse(f"layers {', '.join(fold.readers)}: read one input, but differ in smoothing.", _CURE)
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
    """What becomes of each layer: from the readers' full-precision weights [N, K] and `maxima` [K] of |input| of each
    fold's first reader."""
    columns: dict[str, np.ndarray] = {}
    rows: dict[str, np.ndarray] = {}
    shift: dict[str, np.ndarray] = {}
    for fold, alpha in wanted:
        largest = np.max([np.abs(np.asarray(weights[name], np.float32)).max(0) for name in fold.readers], axis=0)
        c = factors(maxima[fold.readers[0]].numpy(), largest, alpha)
        columns |= dict.fromkeys(fold.readers, c)
        n = linears[fold.producer][0]
        inverse = 1 / c
        rows.setdefault(fold.producer, np.ones(n, np.float32))[fold.rows] = np.resize(
            inverse, fold.rows.stop - fold.rows.start
        )
        if fold.scale_rows is not None:
            shift.setdefault(fold.producer, np.zeros(n, np.float32))[fold.scale_rows] = inverse - 1
    return {name: Channels(columns.get(name), rows.get(name), shift.get(name)) for name in {**columns, **rows}}
