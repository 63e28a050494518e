"""LPIPS between the images of a pair (Zhang et al. 2018, https://arxiv.org/abs/1801.03924), by the package lpips."""

from typing import Any

import torch

from dit2deploy.stages.evaluate.metrics.pairs import Metric, Pairs, hub_file, package

_BATCH = 8
# Trunk of lpips -> torchvision's weights of it. The paper recommends alex for comparing images.
TRUNKS = {"alex": "AlexNet_Weights", "squeeze": "SqueezeNet1_1_Weights", "vgg": "VGG16_Weights"}


def measure(pairs: Pairs, *, trunk: str = "alex") -> dict[str, Any]:
    """ "pair": the mean; "worst": the largest."""
    network = _network(trunk)
    with torch.no_grad():
        distances = [
            network(engine, full, normalize=True).flatten()
            for engine, full in zip(pairs.engine.split(_BATCH), pairs.full_precision.split(_BATCH), strict=True)
        ]
    values = torch.cat(distances)
    return {"pair": values.mean().item(), "worst": values.max().item(), "trunk": trunk}


def _network(trunk: str) -> torch.nn.Module:
    lpips = package("lpips", "lpips torchvision")
    hub_file(getattr(package("torchvision.models", "torchvision"), TRUNKS[trunk]).IMAGENET1K_V1.url)
    return lpips.LPIPS(net=trunk, verbose=False).eval()


LPIPS = Metric("lpips", "LPIPS to full precision", "lower", measure)
