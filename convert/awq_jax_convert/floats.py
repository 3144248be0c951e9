# SPDX-License-Identifier: Apache-2.0
"""bfloat16 on the host at the speed of its bits: ml_dtypes goes through its values one by one."""

import ml_dtypes
import numpy as np

__all__ = ["nonfinite", "widened"]

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_EXPONENT = np.uint16(0x7F80)  # all ones in NaN and infinities
_BLOCK = 1 << 17  # values: what is made of a block stays in a processor's cache


def nonfinite(array: np.ndarray) -> int:
    """How many values are NaN or infinite.

    >>> nonfinite(np.array([1.0, np.inf, np.nan], ml_dtypes.bfloat16))
    2
    """
    flat = array.ravel(order="K")
    return sum(_nonfinite(flat[start : start + _BLOCK]) for start in range(0, flat.size, _BLOCK))


def _nonfinite(block: np.ndarray) -> int:
    if block.dtype != _BFLOAT16:
        return block.size - int(np.count_nonzero(np.isfinite(block)))
    return int(np.count_nonzero((block.view(np.uint16) & _EXPONENT) == _EXPONENT))


def widened(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """``array.astype(dtype)`` with the strides as they are.

    >>> widened(np.array([[1.5], [-2.0]], ml_dtypes.bfloat16).T, np.dtype(np.float32)).tolist()
    [[1.5, -2.0]]
    """
    if array.dtype == dtype:
        return array
    if array.dtype == _BFLOAT16 and dtype == np.float32:
        return (array.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array.astype(dtype)
