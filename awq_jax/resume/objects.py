# SPDX-License-Identifier: Apache-2.0
"""Files named by the sha256 of their content: what is read is what was written, or an error."""

import hashlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401 - registers bfloat16 with numpy
import numpy as np

from awq_jax._publish import rename, sync_directory, write_bytes
from awq_jax_convert.safetensors_header import DTYPES, dtype_name, read_header
from awq_jax_convert.shard import write_shard

__all__ = ["Objects"]


class Objects:
    """A folder of immutable files. A name appears only when the disk has all of its content.

    Args:
      folder: created if it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self._temporary = folder / "writing"

    def put_bytes(self, content: bytes) -> str:
        """Keep bytes; returns their digest."""
        return self._place(write_bytes(self._fresh(), content))

    def put_tensors(self, tensors: Mapping[str, np.ndarray]) -> str:
        """Keep arrays as one safetensors file that was read back; returns the file's digest.

        Raises:
          OSError: the disk is full, or gave back something else.
        """
        return self._place(write_shard(self._fresh(), {name: _storable(array) for name, array in tensors.items()}))

    def get_bytes(self, digest: str) -> bytes:
        """Content by its digest.

        Raises:
          ValueError: the file is missing or is not what was written.
        """
        try:
            content = (self.folder / digest).read_bytes()
        except FileNotFoundError:
            raise ValueError(f"{self.folder / digest} is missing.") from None
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError(f"{self.folder / digest} is not what was written: its checksum differs.")
        return content

    def get_tensors(self, digest: str) -> dict[str, np.ndarray]:
        """Arrays by the digest of their file; int8 comes back as uint8.

        Raises:
          ValueError: the file is missing or is not what was written.
        """
        path = self.folder / digest
        if not path.is_file():
            raise ValueError(f"{path} is missing.")
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise ValueError(f"{path} is not what was written: its checksum differs.")
            places = read_header(file.fileno(), path)
            found: dict[str, np.ndarray] = {}
            for name, info in places.items():
                found[name] = np.empty(info.shape, DTYPES[info.dtype])
                file.seek(info.start)
                view = found[name].reshape(-1).view(np.uint8).data
                while view and (got := file.readinto(view)):
                    view = view[got:]
        return found

    def keep_only(self, digests: Collection[str]) -> None:
        """Remove every other file, and what a killed writer left."""
        for path in self.folder.iterdir():
            if path.name not in digests:
                os.unlink(path)

    def _fresh(self) -> Path:
        self._temporary.unlink(missing_ok=True)
        return self._temporary

    def _place(self, digest: str) -> str:
        rename(self._temporary, self.folder / digest)
        sync_directory(self.folder)
        return digest


def _storable(array: np.ndarray) -> np.ndarray:
    """The array, int8 and bool as the bytes they are: files of weights hold neither."""
    array = np.asarray(array)
    return array if dtype_name(array.dtype) else np.ascontiguousarray(array).view(np.uint8)
