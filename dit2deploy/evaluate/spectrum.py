"""Where in the spectrum images differ: power by radius, and the error of high spatial frequencies (numpy only).

Low-bit models lose fine detail first, which sums of squares over pixels hide (methods.md 8.2, item 7; TreeQ). As in
`fidelity`, what is not finite gives the worst value of a measure.
"""

import numpy as np

from dit2deploy.base.errors import Misuse

HIGH = 0.75  # of the Nyquist frequency: the top quarter of spatial frequencies lies above
_FLOOR = 1e-12  # of the reference's mean power: below, power is rounding


def radial_power(images: np.ndarray) -> np.ndarray:
    """Mean power at each radius of spatial frequency, float64 [min(H, W) // 2 + 1], of images [N, C, H, W].

    Power is |FFT|^2 / (H W), averaged over images and channels and over the frequencies whose distance from 0, in
    cycles over the shorter side, rounds to the radius; the corners beyond Nyquist are left out. Entry 0 is the mean
    level's. Raises Misuse for another number of axes and for no images.
    """
    power, radii = _power(images), _radii(images.shape)
    bins = np.rint(radii * (min(images.shape[-2:]) // 2)).astype(int)
    return np.array([power[bins == radius].mean() for radius in range(min(images.shape[-2:]) // 2 + 1)])


def spectrum_error_db(reference: np.ndarray, value: np.ndarray) -> float:
    """Mean over radii of |10 log10 (power of value / power of reference)|, in dB; 0 for equal spectra.

    Compares distributions, not pairs: the images need not come from the same noise, nor be as many. Power counts as at
    least 1e-12 of the reference's mean. +inf where something is not finite.
    """
    if not (np.isfinite(reference).all() and np.isfinite(value).all()):
        return np.inf
    if np.shape(reference)[1:] != np.shape(value)[1:]:
        raise Misuse(f"spectrum: images {np.shape(reference)} and {np.shape(value)}.", "Compare images of one shape.")
    ours, theirs = radial_power(value), radial_power(reference)
    floor = max(_FLOOR * theirs.mean(), np.finfo(np.float64).tiny)
    return float(np.mean(np.abs(10 * np.log10(np.maximum(ours, floor) / np.maximum(theirs, floor)))))


def high_frequency_error(reference: np.ndarray, value: np.ndarray) -> float:
    """Energy of value - reference over energy of reference, both above 3 / 4 of the Nyquist frequency.

    Images [N, C, H, W] in pairs, from the same noise. 0 for equal images, 1 where all high frequencies are lost; +inf
    where something is not finite or the reference has none. Raises Misuse where shapes differ.
    """
    if np.shape(reference) != np.shape(value):
        raise Misuse(f"spectrum: images {np.shape(reference)} and {np.shape(value)}.", "Compare images in pairs.")
    x, y = np.asarray(reference, np.float64), np.asarray(value, np.float64)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return np.inf
    high = _radii(x.shape) > HIGH
    error, power = _power(y - x)[high].sum(), _power(x)[high].sum()
    if error == 0:
        return 0.0
    return float(error / power) if power > 0 else np.inf


def _power(images: np.ndarray) -> np.ndarray:
    """float64 [H, W]: |FFT|^2 / (H W), averaged over images and channels."""
    images = np.asarray(images, np.float64)
    if images.ndim != 4 or not images.size:
        raise Misuse(f"spectrum: images have the shape {images.shape}.", "Give [N, C, H, W] of at least one image.")
    h, w = images.shape[-2:]
    return (np.abs(np.fft.fft2(images)) ** 2).mean((0, 1)) / (h * w)


def _radii(shape: tuple[int, ...]) -> np.ndarray:
    """float64 [H, W]: distance of each frequency from 0, 1 being Nyquist of its axis."""
    vertical, horizontal = (2 * np.fft.fftfreq(length) for length in shape[-2:])
    return np.hypot(vertical[:, None], horizontal[None, :])
