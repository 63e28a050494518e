"""FID to real images (Heusel et al. 2017, https://arxiv.org/abs/1706.08500), features by the package torch-fidelity."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit2deploy.base.errors import Misuse
from dit2deploy.evaluate.quality import frechet_distance
from dit2deploy.stages.evaluate.metrics.pairs import Metric, Pairs, hub_file, package, whole_numbers

_BATCH = 8
_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")


def measure(pairs: Pairs) -> dict[str, Any]:
    """Of each model's images to the real ones; the numbers of images, as FID is biased upwards for few."""
    if pairs.real is None:
        raise Misuse("no folder of real images is given.", "Give one (--real).")
    paths = sorted(path for path in pairs.real.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if len(paths) < 2 or len(pairs.engine) < 2:
        raise Misuse(f"{pairs.real}: {len(paths)} real images, {len(pairs.engine)} drawn: too few.", "Give at least 2.")
    network = _network()
    real = np.concatenate([_features(network, _image(path)[None]) for path in paths])
    found = {"engine": pairs.engine, "full_precision": pairs.full_precision}
    return {
        **{who: frechet_distance(_features(network, whole_numbers(images)), real) for who, images in found.items()},
        "real": len(paths),
        "drawn": len(pairs.engine),
    }


def _network() -> torch.nn.Module:
    module = package("torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity")
    path = hub_file(module.URL_INCEPTION_V3)
    return module.FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))


def _image(path: Path) -> torch.Tensor:
    from PIL import Image

    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _features(network: torch.nn.Module, images: torch.Tensor) -> np.ndarray:
    """float32 [N, 2048] of uint8 [N, 3, H, W]."""
    with torch.no_grad():
        return torch.cat([network(part)[0] for part in images.split(_BATCH)]).numpy()


FID = Metric("fid", "FID to real images", "lower", measure)
