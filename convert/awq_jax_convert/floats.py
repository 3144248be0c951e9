# SPDX-License-Identifier: Apache-2.0
"""bfloat16 on the host at the speed of its bits: ml_dtypes goes through its values one by one."""

import ml_dtypes
import numpy as np

__all__ = ["nonfinite", "widened"]

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_EXPONENT = np.uint16(0x7F80)  # all ones in NaN and infinities


def nonfinite(array: np.ndarray) -> int:
    """How many values are NaN or infinite.

    >>> nonfinite(np.array([1.0, np.inf, np.nan], ml_dtypes.bfloat16))
    2
    """
    if array.dtype != _BFLOAT16:
        return array.size - int(np.isfinite(array).sum())
    return int(((array.view(np.uint16) & _EXPONENT) == _EXPONENT).sum())


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
