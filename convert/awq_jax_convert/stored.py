# SPDX-License-Identifier: Apache-2.0
"""Weights from words along the contraction axis, which compressed-tensors, GPTQ and AutoAWQ's gemv share, and back to
floats."""

import numpy as np

from awq_jax._qtensor import QTensor
from awq_jax_convert.words import nibble_bytes, unpack_words
from awq_jax_kernels.nibbles import pack_numpy, unpack_numpy

__all__ = ["dequantized", "weight_of"]


def weight_of(
    words: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, *, bits: int, k: int
) -> QTensor | np.ndarray:
    """A weight ``[k, n]`` with numpy leaves; codes wider than four bits become the float32 values they stand for.

    Args:
      words: int32 ``[n, w]``, codes ``0 .. 2**bits - 1`` along k.
      scale: ``[k/g, n]``.
      zero: codes ``[k/g, n]``; None is ``2**(bits-1)`` everywhere.
      bits: of a code.
      k: rows of the weight.

    Raises:
      ValueError: the words don't hold k codes of a row.
    """
    scale = np.ascontiguousarray(scale)
    if bits > 4:
        return _dense(unpack_words(words, bits, k).T, scale, zero, 2 ** (bits - 1))
    if bits == 4 and k % 8 == 0:
        packed = np.ascontiguousarray(nibble_bytes(words).T ^ 0x88).view(np.int8)
    else:
        codes = np.ascontiguousarray(unpack_words(words, bits, k).T)
        # Ours lie around 8 where there is no zero, whatever their width.
        packed = pack_numpy(codes + np.uint8(8 - 2 ** (bits - 1)) if zero is None else codes)
    zero = None if zero is None else np.ascontiguousarray(zero).astype(np.int8)
    return QTensor(packed=packed, scale=scale, zero=zero, bits=bits)


def _dense(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, half: int) -> np.ndarray:
    """float32 ``[k, n]``, which holds a code times a scale of 16 bits exactly."""
    offset = np.float32(half) if zero is None else zero.astype(np.float32)[:, None]
    grouped = codes.astype(np.float32).reshape(len(scale), -1, codes.shape[1])
    return ((grouped - offset) * scale.astype(np.float32)[:, None]).reshape(codes.shape)


def dequantized(weight: QTensor) -> np.ndarray:
    """The float32 values that a weight stands for, ``[*b, k, n]``, on the host."""
    scale = np.asarray(weight.scale).astype(np.float32)
    zero = np.float32(8) if weight.zero is None else np.asarray(weight.zero).astype(np.float32)[..., None, :]
    codes = unpack_numpy(np.asarray(weight.packed)).astype(np.float32)
    grouped = codes.reshape(*scale.shape[:-1], weight.group_size, scale.shape[-1])
    return ((grouped - zero) * scale[..., None, :]).reshape(weight.shape)
