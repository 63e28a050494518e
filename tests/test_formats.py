"""Packing is exact for every format, code and tail, and as small as its bits say."""

import numpy as np
import pytest

from dit2deploy.formats import FORMATS, TERNARY, pack, unpack


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("k", [1, 5, 20, 31, 33, 192, 768])
def test_round_trip(fmt, k):
    codes = np.random.default_rng(k).integers(-fmt.offset, fmt.levels - fmt.offset, (7, k))
    words = pack(codes, fmt)
    assert words.dtype == np.int32
    assert words.shape == (7, fmt.words(k))
    np.testing.assert_array_equal(unpack(words, fmt, k), codes)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_a_code_out_of_range_is_refused(fmt):
    for code in (-fmt.offset - 1, fmt.levels - fmt.offset):
        with pytest.raises(ValueError, match=fmt.name):
            pack(np.full((1, 4), code), fmt)


def test_bits_are_as_said():
    assert {fmt.name: fmt.bits for fmt in FORMATS} == {"ternary": 1.6, "int3": 3.0, "int4": 4.0, "int8": 8.0}


def test_five_trits_lie_in_each_byte():
    words = pack(np.array([[1, 0, -1, 1, 1] + [-1] * 15]), TERNARY)
    assert words.view(np.uint8)[0].tolist() == [2 + 1 * 3 + 0 * 9 + 2 * 27 + 2 * 81, 0, 0, 0]
