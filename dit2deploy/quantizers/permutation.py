"""Rotations chosen by the outliers of a layer's inputs, and permutations that the layer before carries out.

LRQ-DiT's Adaptive Rotation Scheme (https://arxiv.org/abs/2508.03485) gives layers with mild outliers a Hadamard
transform, and layers with salient ones, "large magnitudes concentrated in specific channels", an outlier-aware rotation
"based on activation fluctuation". In the authors' code that is DuQuant's: learned block rotations around a zigzag
permutation of channels; which layers get it, a person says. What is rebuilt: the zigzag before the block Hadamard of
HadamardQuantize, in the place of both rotations, and a rule for which layers [inferred]: the largest channel maximum
over the median one. Channels that stick out then lie in different blocks, so that no block holds most of a token.

A permutation costs nothing where the layer before can give its outputs in another order. In the diffusers DiT that is
the second linear of the MLP: GELU acts on each channel alone, so rows of the first linear change places. The
projections q, k and v and the first linear read the residual stream, whose order all blocks share, and the output
projection of attention reads heads, whose channels q, k and v align: these keep their order.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dit2deploy.artefacts.calibration_set import CalibrationSet
from dit2deploy.artefacts.policy import Policy
from dit2deploy.base.errors import Misuse
from dit2deploy.models.load import linears_of, load_transformer
from dit2deploy.quantizers.inputs import channel_maxima
from dit2deploy.quantizers.smoothing import Channels

SALIENT = 4.0  # largest channel maximum over the median one, from which outliers count as salient [inferred]


def producers(model: str, linears: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """The layers of a model of class `model` whose inputs may be permuted, and the layer that makes each one's."""
    if model != "DiTTransformer2DModel":
        return {}
    pairs = ((name, re.sub(r"\.ff\.net\.2$", ".ff.net.0.proj", name)) for name in linears)
    # Gated activations (GEGLU) make two outputs of the layer before one input: not the same function.
    return {name: before for name, before in pairs if before != name and linears[before][0] == linears[name][1]}


def permuted(policy: Policy, linears: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """The layers that the policy permutes, and those before them; Misuse for one that cannot be permuted."""
    places = producers(policy.model, linears)
    names = [name for name, layer in policy.layers.items() if layer.is_quantized and layer.permutation == "zigzag"]
    for name in names:
        if name not in places:
            raise Misuse(
                f"layer {name}: no layer before it can permute its inputs.",
                "Set the permutation of this layer to `none` in the policy.",
            )
    return {name: places[name] for name in names}


def zigzag(maxima: np.ndarray, block: int) -> np.ndarray:
    """Which channel comes to each place, int64 [K]: channels by falling maximum are dealt to the K / block blocks in
    turn, back and forth (DuQuant, https://arxiv.org/abs/2406.01721), so that the blocks' sums are alike."""
    falling = np.argsort(-np.asarray(maxima, np.float64), kind="stable")
    blocks = len(falling) // block
    rounds = falling.reshape(block, blocks).copy()
    rounds[1::2] = rounds[1::2, ::-1]
    return rounds.T.reshape(-1)


def fluctuation(maxima: np.ndarray) -> float:
    """The largest channel maximum over the median one; 1 for inputs that are all zero."""
    middle = float(np.median(maxima))
    return float(np.max(maxima)) / middle if middle > 0 else 1.0


def choose_rotation(model: Path, policy: Policy, calibration: CalibrationSet, *, salient: float = SALIENT) -> Policy:
    """The policy with the zigzag permutation where a layer can have it, several Hadamard blocks share its inputs, and
    its fluctuation on the calibration set is above `salient`. All others keep the policy's Hadamard transform."""
    network, _ = load_transformer(Path(model))
    linears = linears_of(network)
    names = [
        name
        for name in producers(policy.model, linears)
        if policy.layers[name].is_quantized and 1 < policy.layers[name].hadamard < linears[name][1]
    ]
    maxima = channel_maxima(network, names, calibration)
    layers = {
        name: policy.layers[name].model_copy(update={"permutation": "zigzag"})
        for name in names
        if fluctuation(maxima[name].amax(0).numpy()) > salient
    }
    return policy.model_copy(update={"layers": {**policy.layers, **layers}})


def with_orders(
    folded: Mapping[str, Channels],
    network: torch.nn.Module,
    wanted: Mapping[str, str],
    policy: Policy,
    calibration: CalibrationSet,
) -> dict[str, Channels]:
    """What is `folded` into the layers, with the orders of the inputs of each layer in `wanted` (see `permuted`), which
    are those of the outputs of the layer before it."""
    maxima = channel_maxima(network, list(wanted), calibration) if wanted else {}
    made = dict(folded)
    for name, before in wanted.items():
        order = zigzag(maxima[name].amax(0).numpy(), policy.layers[name].hadamard)
        made[name] = replace(made.get(name, Channels()), column_order=order)
        made[before] = replace(made.get(before, Channels()), row_order=order)
    return made
