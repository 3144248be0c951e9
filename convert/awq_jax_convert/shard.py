# SPDX-License-Identifier: Apache-2.0
"""Bytes of one safetensors file: written, flushed to the disk, read back and compared."""

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from awq_jax._publish import digest_of, write_file
from awq_jax_convert.safetensors_header import dtype_name, read_header

__all__ = ["tensor_bytes", "tensor_digest", "workers", "write_shard"]


def tensor_bytes(array: np.ndarray) -> memoryview:
    """The row-major bytes of an array, whatever its strides.

    The one place where arrays become bytes: a transposed array handed on as it lies would be written with its
    elements in the wrong order, which the safetensors library (0.8.0) does without a word.
    """
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def tensor_digest(array: np.ndarray) -> str:
    """sha256 of `tensor_bytes`, in hexadecimal."""
    return hashlib.sha256(tensor_bytes(array)).hexdigest()


def _header(tensors: Mapping[str, np.ndarray], order: list[str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    at = 0
    for name in order:
        array = tensors[name]
        offsets = [at, at + array.nbytes]
        header[name] = {"dtype": dtype_name(array.dtype), "shape": list(array.shape), "data_offsets": offsets}
        at += array.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_shard(path: Path, tensors: Mapping[str, np.ndarray]) -> str:
    """Write tensors as one safetensors file and check what the disk has.

    Args:
      path: must not exist.
      tensors: name -> array of a supported dtype, any strides.

    Returns:
      sha256 of the file.

    Raises:
      OSError: the disk is full, or what was read back differs from what was written.
    """
    # Wider elements first keeps every tensor aligned to its own size.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header = _header(tensors, order)

    def pieces() -> Iterator[bytes | memoryview]:
        yield header
        for name in order:
            yield tensor_bytes(tensors[name])

    with workers() as pool:
        digest = pool.submit(digest_of, pieces())  # what takes longest after the flush, and need not wait for it
        write_file(path, pieces(), len(header) + sum(array.nbytes for array in tensors.values()))
        _compare(path, tensors, pool)
        return digest.result()


def workers() -> ThreadPoolExecutor:
    """Threads for what numpy, hashlib and the system do without the interpreter."""
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1))


def _compare(path: Path, tensors: Mapping[str, np.ndarray], pool: ThreadPoolExecutor) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = read_header(fd, path)

        def same(name: str, array: np.ndarray) -> bool:
            info = found[name]
            alike = info.shape == array.shape and info.dtype == dtype_name(array.dtype)
            return alike and _same_bytes(fd, info.start, tensor_bytes(array))

        alike = list(pool.map(same, tensors, tensors.values()))  # all have ended before the file is closed
    finally:
        os.close(fd)
    for name in (name for name, is_so in zip(tensors, alike, strict=True) if not is_so):
        said = f"tensor {name!r} reads back different from what was written; check the disk"
        raise OSError(errno.EIO, said, str(path))


def _same_bytes(fd: int, start: int, wanted: memoryview, chunk: int = 1 << 20) -> bool:
    def found(at: int) -> np.ndarray:  # an array: views compare byte by byte, and bytes would be one more copy
        return np.frombuffer(os.pread(fd, min(chunk, len(wanted) - at), start + at), np.uint8)

    return all(np.array_equal(found(at), wanted[at : at + chunk]) for at in range(0, len(wanted), chunk))
