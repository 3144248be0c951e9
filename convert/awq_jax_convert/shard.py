# SPDX-License-Identifier: Apache-2.0
"""Bytes of one safetensors file: written, flushed to the disk, read back and compared."""

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from awq_jax_convert.safetensors_header import dtype_name, read_header

__all__ = ["tensor_bytes", "tensor_digest", "write_bytes", "write_shard"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def tensor_bytes(array: np.ndarray) -> memoryview:
    """The row-major bytes of an array, whatever its strides.

    The one place where arrays become bytes: a transposed array handed on as it lies would be written with its
    elements in the wrong order, which the safetensors library (0.8.0) does without a word.
    """
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def tensor_digest(array: np.ndarray) -> str:
    """sha256 of `tensor_bytes`, in hexadecimal."""
    return hashlib.sha256(tensor_bytes(array)).hexdigest()


def write_bytes(path: Path, pieces: Iterator[bytes | memoryview], nbytes: int) -> str:
    """Create a file with the umask's mode, and wait until the disk has it.

    Args:
      path: must not exist.
      pieces: the content.
      nbytes: its length, for the message when the disk is full.

    Returns:
      sha256 of the content.

    Raises:
      OSError: the disk is full (says how much is needed), or another error of the system.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "xb", buffering=0) as file:
            for piece in pieces:
                digest.update(piece)
                rest = memoryview(piece)
                while rest:
                    rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise OSError(
            error.errno, f"{os.strerror(error.errno)}: the disk has no room for {nbytes} bytes of", str(path.name)
        ) from error
    return digest.hexdigest()


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
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    at = 0
    for name in order:
        array = tensors[name]
        end = at + array.nbytes
        header[name] = {"dtype": dtype_name(array.dtype), "shape": list(array.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def pieces() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for name in order:
            yield tensor_bytes(tensors[name])

    digest = write_bytes(path, pieces(), 8 + len(text) + at)
    _compare(path, tensors)
    return digest


def _compare(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = read_header(fd, path)
        for name, array in tensors.items():
            info = found[name]
            same = info.shape == array.shape and info.dtype == dtype_name(array.dtype)
            if not same or not _same_bytes(fd, info.start, tensor_bytes(array)):
                raise OSError(
                    errno.EIO, f"tensor {name!r} reads back different from what was written; check the disk", str(path)
                )
    finally:
        os.close(fd)


def _same_bytes(fd: int, start: int, wanted: memoryview, chunk: int = 1 << 24) -> bool:
    return all(
        os.pread(fd, min(chunk, len(wanted) - at), start + at) == wanted[at : at + chunk]
        for at in range(0, len(wanted), chunk)
    )
