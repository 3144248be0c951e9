# SPDX-License-Identifier: Apache-2.0
"""Weights from words along the contraction axis, which compressed-tensors, GPTQ and AutoAWQ's gemv share, and back to
floats."""

import numpy as np

from awq_jax._qtensor import QTensor
from awq_jax_convert.words import nibble_bytes, pack_words, unpack_words, words_of_nibbles
from awq_jax_kernels.codes import middle
from awq_jax_kernels.layout import pack_numpy, unpack_numpy

__all__ = ["dequantized", "weight_of", "words_of"]


def weight_of(words: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, *, bits: int, k: int) -> QTensor:
    """A weight ``[k, n]`` with numpy leaves.

    Args:
      words: int32 ``[n, w]``, codes ``0 .. 2**bits - 1`` along k.
      scale: ``[k/g, n]``.
      zero: codes ``[k/g, n]``; None is ``2**(bits-1)`` everywhere.
      bits: of a code.
      k: rows of the weight.

    Raises:
      ValueError: the words don't hold k codes of a row.
    """
    if bits == 4 and k % 8 == 0:
        packed = np.ascontiguousarray(nibble_bytes(words).T ^ 0x88).view(np.int8)
    else:
        codes = np.ascontiguousarray(unpack_words(words, bits, k).T)
        # Ours lie around the middle where there is no zero, in nibbles 8 whatever their width.
        packed = pack_numpy(codes + np.uint8(middle(bits) - 2 ** (bits - 1)) if zero is None else codes, bits)
    zero = None if zero is None else np.ascontiguousarray(zero).astype(np.int8 if bits <= 4 else np.uint8)
    return QTensor(packed=packed, scale=np.ascontiguousarray(scale), zero=zero, bits=bits)


def words_of(weight: QTensor) -> np.ndarray:
    """Inverse of `weight_of`: int32 ``[n, w]``, codes around ``2**(bits-1)`` where there are no zeros."""
    (k, _), bits, packed = weight.shape, weight.bits, np.asarray(weight.packed)
    if bits == 4 and k % 8 == 0:
        return words_of_nibbles(np.ascontiguousarray(packed.view(np.uint8).T) ^ np.uint8(0x88))
    codes = unpack_numpy(packed, bits).T
    if weight.zero is None:  # symmetric nibbles lie around 8, whatever their width
        codes = codes - np.uint8(weight.middle - 2 ** (bits - 1))
    return pack_words(codes, bits)


def dequantized(weight: QTensor) -> np.ndarray:
    """The float32 values that a weight stands for, ``[*b, k, n]``, on the host."""
    scale = np.asarray(weight.scale).astype(np.float32)
    zero = np.asarray(weight.middle if weight.zero is None else weight.zero[..., None, :], np.float32)
    codes = unpack_numpy(np.asarray(weight.packed), weight.bits).astype(np.float32)
    grouped = codes.reshape(*scale.shape[:-1], weight.group_size, scale.shape[-1])
    return ((grouped - zero) * scale[..., None, :]).reshape(weight.shape)
