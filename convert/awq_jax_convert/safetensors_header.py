# SPDX-License-Identifier: Apache-2.0
"""The safetensors header: eight bytes of length, JSON, then the tensors' bytes without overlap or hole.

Written out here because everything that follows trusts it: nothing is allocated and nothing computed before every
header of a checkpoint has passed.
"""

import dataclasses
import math
import os
from typing import Any

import ml_dtypes
import numpy as np

from awq_jax._files import MAX_JSON_BYTES, parse_json

__all__ = ["DTYPES", "FLOATS", "TensorInfo", "dtype_name", "read_header"]

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
}
FLOATS = ("F32", "BF16", "F16")
_OTHER_BYTES = {"BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "U32": 4, "U64": 8, "F64": 8}
_MAX_TENSORS = 1_000_000
_MAX_RANK = 16


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies in a file.

    Attributes:
      dtype: the safetensors name, for example ``BF16``.
      shape: Python ints.
      start: offset of its first byte from the beginning of the file.
      nbytes: its length.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def dtype_name(dtype: np.dtype) -> str | None:
    """The safetensors name of a numpy dtype, None for one that is not read or written here.

    >>> dtype_name(np.dtype("float16")), dtype_name(np.dtype("float64"))
    ('F16', None)
    """
    return next((name for name, known in DTYPES.items() if known == dtype), None)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _entry(name: str, entry: Any, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or (dtype not in DTYPES and dtype not in _OTHER_BYTES):
        raise ValueError(f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or len(shape) > _MAX_RANK or not all(map(_is_count, shape)):
        raise ValueError(f"tensor {name!r} has no valid shape: {str(shape)[:80]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise ValueError(f"tensor {name!r} has no valid data_offsets: {str(offsets)[:80]}")
    begin, end = offsets
    itemsize = DTYPES[dtype].itemsize if dtype in DTYPES else _OTHER_BYTES[dtype]
    needed = math.prod(shape) * itemsize
    if end - begin != needed:
        raise ValueError(f"tensor {name!r} of shape {shape} and dtype {dtype} needs {needed} bytes, has {end - begin}")
    return TensorInfo(dtype, tuple(shape), data_start + begin, needed)


def _check_cover(tensors: dict[str, TensorInfo], data_start: int, size: int) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    at = data_start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if info.start != at:
            raise ValueError(
                f"the bytes of tensor {name!r} {'overlap' if info.start < at else 'leave a hole before'} it"
            )
        at = info.start + info.nbytes
    if at != size:
        kind = "truncated" if size < at else "longer than its header says"
        raise ValueError(f"it is {kind}: {size} bytes, the header describes {at}")


def _parse(fd: int, source: object) -> dict[str, TensorInfo]:
    size = os.fstat(fd).st_size
    if size < 8:
        raise ValueError(f"it has {size} bytes, too few for a header")
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if length > MAX_JSON_BYTES:
        raise ValueError(f"its header claims {length} bytes; the limit is {MAX_JSON_BYTES}")
    if 8 + length > size:
        raise ValueError(f"it is truncated: {size} bytes, the header alone needs {8 + length}")
    raw = os.pread(fd, length, 8)
    if raw[:1] != b"{" or len(raw) != length:
        raise ValueError("its header does not begin with '{'")
    header = parse_json(raw, "its header")
    header.pop("__metadata__", None)
    if len(header) > _MAX_TENSORS:
        raise ValueError(f"it lists {len(header)} tensors; the limit is {_MAX_TENSORS}")
    tensors = {name: _entry(name, entry, 8 + length) for name, entry in header.items()}
    _check_cover(tensors, 8 + length, size)
    return tensors


def read_header(fd: int, source: object) -> dict[str, TensorInfo]:
    """Parse and check the header of an open safetensors file.

    Args:
      fd: open for reading.
      source: the path, for errors.

    Returns:
      name -> place. Every shape and offset agrees with the file's real size.

    Raises:
      ValueError: truncated, with extra bytes, empty, over a limit, or not safetensors at all.
    """
    try:
        return _parse(fd, source)
    except ValueError as error:
        raise ValueError(f"{source} is not a valid safetensors file: {error}. Re-download it.") from error
