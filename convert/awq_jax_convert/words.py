# SPDX-License-Identifier: Apache-2.0
"""Codes in 32-bit words, first code in the lowest bits: what compressed-tensors, GPTQ and AutoAWQ's gemv share.

Widths that divide 32 fill words exactly. For the others two layouts exist: a bit stream whose codes cross word
boundaries, and words that each hold ``32 // bits`` codes and waste the rest.
"""

import numpy as np
from jaxtyping import Int32, UInt8

__all__ = ["nibble_bytes", "pack_words", "unpack_words", "widths", "words_of_nibbles"]


def widths(count: int, bits: int) -> tuple[int, int]:
    """Words that ``count`` codes take: as a bit stream, and with whole codes in each word.

    >>> widths(64, 4), widths(64, 3)
    ((8, 8), (6, 7))
    """
    return -(-count * bits // 32), -(-count // (32 // bits))


def pack_words(codes: UInt8[np.ndarray, "r c"], bits: int) -> Int32[np.ndarray, "r w"]:
    """Codes of each row to words; the last word is filled with zeros.

    Args:
      codes: ``[r, c]``, each below ``2**bits``.
      bits: 2, 4 or 8, which leave no choice of layout.

    Raises:
      ValueError: another width.

    >>> hex(pack_words(np.arange(8, dtype=np.uint8)[None], 4).view(np.uint32)[0, 0])
    '0x76543210'
    """
    if bits not in (2, 4, 8):
        raise ValueError(f"codes of {bits} bits are packed in more than one way; 2, 4 and 8 are not.")
    rows, count = codes.shape
    padded = np.pad(codes, ((0, 0), (0, -count % (32 // bits))))
    parts = padded.reshape(rows, -1, 8 // bits)
    raw = np.zeros(parts.shape[:2], np.uint8)
    for place in range(8 // bits):
        raw |= parts[..., place] << np.uint8(place * bits)
    return raw.view("<i4")


def unpack_words(words: Int32[np.ndarray, "r w"], bits: int, count: int) -> UInt8[np.ndarray, "r c"]:
    """Inverse of `pack_words`, for every width from 1 to 8 and both layouts; the number of words tells which.

    The two differ, and take as many words, only for a few short rows.

    Args:
      words: ``[r, w]``.
      bits: of a code.
      count: codes of a row.

    Raises:
      ValueError: so many codes don't take so many words, or take as many in both layouts.

    >>> unpack_words(np.array([[0x76543210]], np.int32), 4, 8).tolist()
    [[0, 1, 2, 3, 4, 5, 6, 7]]
    """
    rows, found = words.shape
    stream, whole = widths(count, bits)
    if found not in (stream, whole):
        raise ValueError(f"{count} codes of {bits} bits take {stream} or {whole} words, not {found}.")
    if stream == whole and count > 32 // bits and 32 % bits:
        raise ValueError(f"{count} codes of {bits} bits take {found} words in two layouts; which one is not known.")
    raw = np.ascontiguousarray(words).view(np.uint8).reshape(rows, 4 * found)
    if 8 % bits == 0:
        mask, per_byte = (1 << bits) - 1, 8 // bits
        out = np.empty((rows, 4 * found, per_byte), np.uint8)
        for place in range(per_byte):
            out[..., place] = (raw >> np.uint8(place * bits)) & mask
        return out.reshape(rows, -1)[:, :count]
    each = np.unpackbits(raw, axis=1, bitorder="little")
    if found != stream:
        each = each.reshape(rows, found, 32)[..., : 32 // bits * bits].reshape(rows, -1)
    each = each[:, : count * bits].reshape(rows, count, bits)
    return np.packbits(each, axis=-1, bitorder="little")[..., 0]


def nibble_bytes(words: Int32[np.ndarray, "r w"]) -> UInt8[np.ndarray, "r b"]:
    """Words of 4-bit codes as bytes of two: our layout but for its transpose and the xor."""
    return np.ascontiguousarray(words).view(np.uint8)


def words_of_nibbles(nibbles: UInt8[np.ndarray, "r b"]) -> Int32[np.ndarray, "r w"]:
    """Inverse of `nibble_bytes`."""
    return np.ascontiguousarray(nibbles).view("<i4")
