"""Fisher scores of layers: how much the network's output turns on each weight (AdaTSQ, methods.md 5.3)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

PROBES = 4  # random projections a call: more items do not make the score of one projection less noisy


def fisher_scores(
    network: torch.nn.Module,
    weights: Sequence[torch.Tensor],
    inputs: Mapping[str, Any],
    *,
    seed: int,
    probes: int = PROBES,
) -> list[float]:
    """E |d(v . f(x)) / dW|^2 for each of `weights`, over the items of one call and normal v.

    `network` is the full-precision transformer f, which is called with `inputs`; f and v are [B, ..]. [inferred] The
    paper (https://arxiv.org/abs/2602.09883) has the squared gradient with respect to weights, of a loss that it does
    not tell: here random projections of the output, whose expectation is the trace of the Gauss-Newton matrix. The
    distance to the full-precision output has no gradient at that output, and one of the fake-quantized network would
    depend on what the scores decide about. Items have a v of their own, so that they add up without cross terms; the
    mean over `probes` draws of v. A weight that the call does not reach has 0. Holds one gradient of each weight.
    """
    generator = torch.Generator().manual_seed(seed)
    power = [0.0] * len(weights)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            output = network(**inputs, return_dict=False)[0]
            for probe in range(probes):
                v = torch.randn(output.shape, generator=generator)
                gradients = torch.autograd.grad(
                    (output * v).sum(), weights, allow_unused=True, retain_graph=probe + 1 < probes
                )
                for place, gradient in enumerate(gradients):
                    if gradient is not None:
                        power[place] += float(gradient.double().square().sum())
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return [total / (probes * len(output)) for total in power]
