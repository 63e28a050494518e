"""Measures of closeness: known noise gives known decibels, and nothing that is not finite ever looks good."""

import numpy as np
import pytest

from dit2deploy.base.errors import Misuse
from dit2deploy.evaluate import cosine, max_abs, psnr_db, sqnr_db

REFERENCE = np.random.default_rng(0).standard_normal((50, 400)).astype(np.float32)


@pytest.mark.parametrize("decibels", [-10, 0, 20, 60])
def test_sqnr_of_known_noise(decibels):
    noise = np.random.default_rng(1).standard_normal(REFERENCE.shape) * 10 ** (-decibels / 20)
    assert sqnr_db(REFERENCE.astype(np.float64), REFERENCE + noise) == pytest.approx(decibels, abs=0.2)


def test_sqnr_does_not_depend_on_the_unit_but_does_on_which_is_the_reference():
    value = REFERENCE * np.float32(0.5)
    assert sqnr_db(REFERENCE, value) == pytest.approx(10 * np.log10(4))
    assert sqnr_db(value, REFERENCE) == pytest.approx(0)
    assert sqnr_db(REFERENCE * 1024, value * 1024) == pytest.approx(sqnr_db(REFERENCE, value))


def test_sqnr_of_uniform_rounding_is_about_six_decibels_a_bit():
    values = np.random.default_rng(2).uniform(-1, 1, 100_000)
    got = [sqnr_db(values, np.round(values * 2 ** (bits - 1)) / 2 ** (bits - 1)) for bits in (6, 7, 8)]
    np.testing.assert_allclose(np.diff(got), 6.02, atol=0.1)


def test_psnr_of_known_error():
    image = np.zeros((2, 1, 4, 4), np.float32)
    assert psnr_db(image, image + np.float32(0.25), data_range=2) == pytest.approx(20 * np.log10(8))
    assert psnr_db(image, image, data_range=2) == np.inf


def test_max_abs_finds_the_one_element():
    value = REFERENCE.copy()
    value[7, 9] += 3
    assert max_abs(REFERENCE, value) == pytest.approx(3, rel=1e-6)


def test_cosine_of_known_angles():
    assert cosine(np.array([1.0, 0]), np.array([1.0, 1])) == pytest.approx(np.sqrt(0.5))
    assert cosine(REFERENCE, 3 * REFERENCE) == pytest.approx(1)
    assert cosine(REFERENCE, -REFERENCE) == pytest.approx(-1)


def test_equal_zero_and_empty_arrays():
    zero, one, empty = np.zeros(4), np.ones(4), np.zeros((0, 3))
    assert sqnr_db(one, one) == sqnr_db(zero, zero) == sqnr_db(empty, empty) == np.inf
    assert sqnr_db(zero, one) == -np.inf
    assert max_abs(empty, empty) == 0
    assert (cosine(zero, zero), cosine(zero, one), cosine(empty, empty)) == (1, 0, 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("both", [False, True])
def test_what_is_not_finite_is_the_worst(bad, both):
    value = REFERENCE.copy()
    value[0, 0] = bad
    reference = value if both else REFERENCE
    assert sqnr_db(reference, value) == psnr_db(reference, value, 2.0) == -np.inf
    assert max_abs(reference, value) == np.inf
    assert cosine(reference, value) == -1


def test_misuse_is_told():
    for measure in (sqnr_db, max_abs, cosine):
        with pytest.raises(Misuse, match="shapes"):
            measure(np.zeros(3), np.zeros((3, 1)))
    with pytest.raises(Misuse, match="data_range"):
        psnr_db(np.zeros(3), np.zeros(3), data_range=0)
