# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from awq_jax_convert.words import pack_words, unpack_words, widths


def stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """One row as a number of Python's, cut into words: code i stands at bit ``i * bits``."""
    number = sum(int(code) << (i * bits) for i, code in enumerate(codes))
    count = -(-len(codes) * bits // 32)
    return np.frombuffer(number.to_bytes(4 * count, "little"), "<i4")[None]


def whole(codes: np.ndarray, bits: int) -> np.ndarray:
    """One row with ``32 // bits`` codes in each word."""
    each = 32 // bits
    parts = [codes[at : at + each] for at in range(0, len(codes), each)]
    return np.concatenate([stream(np.append(part, 0 * part[:0]), bits)[:, :1] for part in parts], axis=1)


def some(count: int, bits: int) -> np.ndarray:
    return np.random.default_rng(count * 8 + bits).integers(0, 2**bits, count).astype(np.uint8)


@given(st.sampled_from([2, 4, 8]), st.integers(1, 70))
def test_packing_is_the_bit_stream_and_unpacks(bits, count):
    codes = some(count, bits)
    words = pack_words(codes[None], bits)
    np.testing.assert_array_equal(words, stream(codes, bits))
    np.testing.assert_array_equal(unpack_words(words, bits, count)[0], codes)


@given(st.integers(1, 8), st.integers(1, 70))
def test_both_layouts_of_every_width_are_read(bits, count):
    codes = some(count, bits)
    both = stream(codes, bits), whole(codes, bits)
    assert tuple(words.shape[1] for words in both) == widths(count, bits)
    for words in both:
        if both[0].shape == both[1].shape and not np.array_equal(*both):
            with pytest.raises(ValueError, match="words in two layouts"):
                unpack_words(words, bits, count)
            continue
        np.testing.assert_array_equal(unpack_words(words, bits, count)[0], codes)


def test_rows_are_apart():
    codes = np.stack([some(20, 4), some(21, 4)[:20]])
    words = pack_words(codes, 4)
    np.testing.assert_array_equal(unpack_words(words, 4, 20), codes)
    np.testing.assert_array_equal(unpack_words(np.asfortranarray(words), 4, 20), codes)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"64 codes of 3 bits take 6 or 7 words, not 8"):
        unpack_words(np.zeros((1, 8), np.int32), 3, 64)
    with pytest.raises(ValueError, match="codes of 3 bits are packed in more than one way"):
        pack_words(np.zeros((1, 8), np.uint8), 3)
