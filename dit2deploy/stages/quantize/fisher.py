"""Fisher scores of layers at each denoising step (AdaTSQ, https://arxiv.org/abs/2602.09883; methods.md 5.3)."""

from collections.abc import Sequence

import torch

from dit2deploy.artefacts.calibration_set import CalibrationSet
from dit2deploy.base.progress import track

PROBES = 4  # random projections a call: more items do not make the score of one projection less noisy


def fisher_scores(
    network: torch.nn.Module, names: Sequence[str], calibration: CalibrationSet, *, seed: int
) -> dict[str, list[float]]:
    """I[t] = E |d(v . f(x_t)) / dW|^2 for each layer, one a call of the set, over its items and normal v.

    `network` is the full-precision transformer f; f and v are [B, C, H, W]. [inferred] The paper's squared gradient
    with respect to weights, of the loss that it does not tell: random projections of the output, whose expectation is
    the trace of the Gauss-Newton matrix. The distance to the full-precision output has no gradient at that output, and
    one of the fake-quantized network would depend on what it decides about. Items have a v of their own, so that they
    add up without cross terms. Holds one gradient of the weights asked for. A layer that a call does not reach has 0.
    """
    weights = [network.get_parameter(f"{name}.weight") for name in names]
    scores: dict[str, list[float]] = {name: [] for name in names}
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for index in track(range(len(calibration)), "Fisher scores"):
            call = {name: torch.from_numpy(value) for name, value in calibration.call(index).items()}
            generator = torch.Generator().manual_seed(seed + index)
            power = [0.0] * len(names)
            with torch.enable_grad():
                output = network(**call, return_dict=False)[0]
                for probe in range(PROBES):
                    v = torch.randn(output.shape, generator=generator)
                    gradients = torch.autograd.grad(
                        (output * v).sum(), weights, allow_unused=True, retain_graph=probe + 1 < PROBES
                    )
                    for place, gradient in enumerate(gradients):
                        if gradient is not None:
                            power[place] += float(gradient.double().square().sum())
            for name, total in zip(names, power, strict=True):
                scores[name].append(total / (PROBES * len(output)))
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return scores
