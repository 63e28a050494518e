"""Waves show at their frequency, lost detail shows as its share, and what is not finite is the worst."""

import numpy as np
import pytest

from dit2deploy.base.errors import Misuse
from dit2deploy.evaluate.spectrum import high_frequency_error, radial_power, spectrum_error_db

NOISE = np.random.default_rng(0).standard_normal((64, 1, 16, 16))


def wave(cycles: int) -> np.ndarray:
    """A horizontal cosine of so many cycles over 16 pixels: power 1 / 2 in two of 256 frequencies."""
    return np.broadcast_to(np.cos(2 * np.pi * cycles * np.arange(16) / 16), (2, 1, 16, 16))


@pytest.mark.parametrize("cycles", [1, 3, 6])
def test_a_wave_is_all_at_its_radius(cycles):
    power = radial_power(wave(cycles))
    assert power.shape == (9,) and power.argmax() == cycles
    assert np.delete(power, cycles).max() < 1e-20


def test_white_noise_is_flat():
    many = np.random.default_rng(1).standard_normal((1000, 1, 16, 16))
    np.testing.assert_allclose(radial_power(many)[1:], 1, atol=0.1)
    assert radial_power(np.ones((1, 3, 8, 12)))[0] == pytest.approx(96)


def test_spectra_differ_by_their_ratio():
    assert spectrum_error_db(NOISE, NOISE) == 0
    assert spectrum_error_db(NOISE, 2 * NOISE) == pytest.approx(20 * np.log10(2))
    assert spectrum_error_db(NOISE, NOISE[::-1]) == pytest.approx(0, abs=1e-9)
    assert spectrum_error_db(NOISE, NOISE[:32]) < 0.5
    assert np.isfinite(spectrum_error_db(NOISE, np.zeros_like(NOISE)))


def test_high_frequencies_alone_count():
    reference = wave(2) + 0.1 * wave(7)
    assert high_frequency_error(reference, reference) == 0
    assert high_frequency_error(reference, wave(2)) == pytest.approx(1)
    assert high_frequency_error(reference, 0.5 * wave(2) + 0.1 * wave(7)) == pytest.approx(0, abs=1e-20)
    assert high_frequency_error(reference, wave(2) + 0.05 * wave(7)) == pytest.approx(0.25)
    assert high_frequency_error(np.zeros((1, 1, 8, 8)), np.random.default_rng(0).random((1, 1, 8, 8))) == np.inf


@pytest.mark.parametrize("measure", [spectrum_error_db, high_frequency_error])
def test_what_is_not_finite_is_the_worst(measure):
    bad = NOISE.copy()
    bad[0, 0, 0, 0] = np.nan
    assert measure(NOISE, bad) == measure(bad, NOISE) == np.inf


def test_misuse_is_told():
    with pytest.raises(Misuse, match="shape"):
        radial_power(np.zeros((4, 4)))
    with pytest.raises(Misuse, match="pairs"):
        high_frequency_error(NOISE, NOISE[:3])
    with pytest.raises(Misuse, match="one shape"):
        spectrum_error_db(NOISE, NOISE[:, :, :8])
