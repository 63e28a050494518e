"""How good generated pictures are: read by a small classifier, and as a Fréchet distance to real ones (numpy only)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import TensorFile

_CHUNK = 256  # images at a time: keeps the unfolded convolution input below 20 MB


@dataclass(frozen=True)
class Classifier:
    """A convolutional network over small square pictures, and what it makes of the real ones.

    3 x 3 convolution, ReLU, 2 x 2 maximum, twice; a linear layer to the features; ReLU; a linear layer to the logits.
    """

    tensors: dict[str, np.ndarray]
    metadata: dict[str, str]

    @classmethod
    def load(cls, path: Path) -> "Classifier":
        """Reads the safetensors file that tools/train_classifier.py writes."""
        file = TensorFile(Path(path), cure="Make it with tools/train_classifier.py.")
        missing = sorted(_TENSORS - set(file))
        if missing:
            raise Misuse(
                f"{path}: tensor {missing[0]!r} is missing.",
                "Make it with tools/train_classifier.py.",
            )
        return cls({name: file.read(name) for name in file}, dict(file.metadata))

    @property
    def real_moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean [F] and covariance [F, F] (float64) of the features of real pictures."""
        return self.tensors["real.mean"], self.tensors["real.covariance"]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """C, H, W of the pictures that it reads."""
        size = 4 * round((self.tensors["features.weight"].shape[1] / len(self.tensors["conv2.bias"])) ** 0.5)
        return self.tensors["conv1.weight"].shape[1], size, size

    def features(self, images: np.ndarray) -> np.ndarray:
        """float32 [N, F], before their ReLU, of images [N, C, H, W] in -1..1."""
        images = np.asarray(images, dtype=np.float32)
        if images.ndim != 4 or images.shape[1:] != self.image_shape:
            raise Misuse(
                f"Classifier: images have the shape {images.shape}.",
                f"Give [N, {', '.join(map(str, self.image_shape))}] in -1..1.",
            )
        chunks = [self._features(images[at : at + _CHUNK]) for at in range(0, len(images), _CHUNK)]
        return np.concatenate([np.zeros((0, len(self.tensors["features.bias"])), np.float32), *chunks])

    def _features(self, x: np.ndarray) -> np.ndarray:
        for name in ("conv1", "conv2"):
            x = _convolve(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])
            x = _halve(np.maximum(x, 0))
        return x.reshape(len(x), -1) @ self.tensors["features.weight"].T + self.tensors["features.bias"]

    def logits(self, images: np.ndarray) -> np.ndarray:
        """float32 [N, classes] of images [N, C, H, W] in -1..1."""
        active = np.maximum(self.features(images), 0)
        return active @ self.tensors["logits.weight"].T + self.tensors["logits.bias"]

    def class_accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Share (0..1) of images [N, C, H, W] that are read as the labels [N] they were asked for."""
        labels = np.asarray(labels)
        if labels.shape != (len(images),) or not len(images):
            raise Misuse(
                f"class_accuracy: {len(images)} images and labels {labels.shape}.",
                "Give one label an image.",
            )
        return float(np.mean(self.logits(images).argmax(axis=1) == labels))

    def distance_to_real(self, images: np.ndarray) -> float:
        """Fréchet distance (FD) of images [N, C, H, W] to the real ones, in squared feature units."""
        return frechet_distance_of_moments(*moments(self.features(images)), *self.real_moments)


_TENSORS = frozenset(
    ["real.mean", "real.covariance"]
    + [f"{layer}.{part}" for layer in ("conv1", "conv2", "features", "logits") for part in ("weight", "bias")]
)


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [F] and unbiased covariance [F, F] in float64 of features [N, F], N at least 2."""
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise Misuse(
            f"moments: features have the shape {features.shape}.",
            "Give [N, F] of at least two samples.",
        )
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Fréchet distance (FD) between normals fitted to two sets of features [N, F] and [M, F], in squared units.

    It is no FID: that name belongs to Inception features. Biased upwards for few samples: compare only sets of
    equal size, and give the distance of a real set of that size as the floor.
    """
    return frechet_distance_of_moments(*moments(features_a), *moments(features_b))


def frechet_distance_of_moments(
    mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray
) -> float:
    """|m_a - m_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), Dowson and Landau 1982; means [F], covariances [F, F].

    The product is symmetric, so eigh serves for both roots and a singular covariance (N <= F) does no harm.
    """
    values, vectors = np.linalg.eigh(covariance_a)
    root_a = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = root_a @ covariance_b @ root_a
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh((product + product.T) / 2), 0)).sum()
    apart = np.sum((mean_a - mean_b) ** 2)
    distance = apart + np.trace(covariance_a) + np.trace(covariance_b) - 2 * shared
    return float(max(distance, 0.0))  # rounding alone can make it negative


def _convolve(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """3 x 3 convolution [N, C, H, W] -> [N, O, H, W], zero padding."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    y = np.tensordot(windows, weight, axes=((1, 4, 5), (1, 2, 3))) + bias
    return y.transpose(0, 3, 1, 2)


def _halve(x: np.ndarray) -> np.ndarray:
    """The largest of each 2 x 2 block: [N, C, H, W] -> [N, C, H / 2, W / 2]."""
    n, c, h, w = x.shape
    return x.reshape(n, c, h // 2, 2, w // 2, 2).max(axis=(3, 5))
