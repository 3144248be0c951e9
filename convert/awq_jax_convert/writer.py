# SPDX-License-Identifier: Apache-2.0
"""The one writer of checkpoint directories."""

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from awq_jax._manifest import MANIFEST, make_manifest
from awq_jax._publish import INCOMPLETE, published, write_bytes
from awq_jax.behind import Behind
from awq_jax_convert.safetensors_dir import INDEX, SINGLE
from awq_jax_convert.safetensors_header import DTYPES, dtype_name
from awq_jax_convert.shard import tensor_digest, workers, write_shard

__all__ = ["SHARDS_BEHIND", "DirectoryWriter"]


SHARDS_BEHIND = 2  # held besides the one that is gathered: a disk's flush is mostly waiting, which two can share


@dataclasses.dataclass
class _Shard:
    """A file of tensors; once it is written, its checksum and theirs."""

    path: Path
    names: list[str]
    digest: str = ""
    digests: dict[str, str] = dataclasses.field(default_factory=dict)

    def write(self, tensors: Mapping[str, np.ndarray]) -> None:
        with workers() as pool:
            digests = pool.map(tensor_digest, tensors.values())  # while the disk is busy
            self.digest = write_shard(self.path, tensors)
            self.digests = dict(zip(tensors, digests, strict=True))


class DirectoryWriter:
    """Writes safetensors shards and the files beside them; everything or nothing.

    A context manager: ``out`` appears when the block ends normally, with the shards, their index and a manifest of
    checksums. An exception leaves nothing behind (`awq_jax._publish.published` says how).

    Args:
      out: the directory to create.
      overwrite: replace ``out`` if awq-jax wrote it.
      max_shard_bytes: tensors held in memory before `flush_if_full` writes them; as much again for each shard that is
        being written, `SHARDS_BEHIND` at most.
      expected_bytes: refuse at once if the disk has less room.

    Attributes:
      recipe: JSON values that the manifest keeps; set it at any time.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        max_shard_bytes: int = 256 << 20,
        expected_bytes: int = 0,
    ) -> None:
        self.recipe: dict[str, Any] | None = None
        self._directory = published(out, overwrite=overwrite, expected_bytes=expected_bytes)
        self._work = Path()
        self._stack = contextlib.ExitStack()
        self._max_shard_bytes = max_shard_bytes
        self._pending: dict[str, np.ndarray] = {}
        self._behind = Behind(SHARDS_BEHIND)
        self._shards: list[_Shard] = []
        self._names: set[str] = set()
        self._files: dict[str, str] = {}
        self._total = 0

    def __enter__(self) -> "DirectoryWriter":
        self._work = self._stack.enter_context(self._directory)
        self._stack.enter_context(self._behind)  # before the directory is removed, nobody writes to it any more
        self._stack.push(self._complete)  # unwound first, so that a failure in it removes the directory too
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._stack.__exit__(kind, error, trace)

    def add(self, name: str, array: np.ndarray) -> None:
        """Hold a tensor until its shard is written.

        Args:
          name: unique in the checkpoint.
          array: float32, bfloat16, float16 or integers from int64 to uint8, any strides; must not change afterwards.

        Raises:
          ValueError: the name was used, or the dtype is not one of these.
        """
        if name in self._names:
            raise ValueError(f"tensor {name!r} was already written.")
        if dtype_name(array.dtype) is None:
            raise ValueError(f"tensor {name!r} is {array.dtype}; files hold {', '.join(map(str, DTYPES.values()))}.")
        self._names.add(name)
        self._pending[name] = array
        self._total += array.nbytes

    def flush_if_full(self) -> None:
        """Write the held tensors if they fill a shard; called where a layer ends, so that layers stay whole.

        The writing goes on behind the caller; what goes wrong in it is raised by a later call, or where the block ends.
        """
        if sum(array.nbytes for array in self._pending.values()) >= self._max_shard_bytes:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            shard = _Shard(self._work / f"shard-{len(self._shards):05d}", list(self._pending))
            self._behind.do(functools.partial(shard.write, self._pending))
            self._shards.append(shard)
            self._pending = {}

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file beside the shards.

        Raises:
          ValueError: the name is a path, reserved or used.
          OSError: the disk is full.
        """
        reserved = ("", ".", "..", MANIFEST, INDEX, INCOMPLETE, *self._files)
        if name != os.path.basename(name) or name in reserved or name.endswith(".safetensors"):
            raise ValueError(f"cannot write a file {name!r}: not a plain, unused file name.")
        self._files[name] = write_bytes(self._work / name, content)

    def write_text(self, name: str, text: str) -> None:
        """`write_bytes` of UTF-8 text."""
        self.write_bytes(name, text.encode())

    def write_json(self, name: str, content: Any) -> None:
        """`write_bytes` of indented JSON."""
        self.write_text(name, _json(content))

    def _complete(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            return
        self._flush()
        self._behind.wait()
        self._name_shards()
        tensors = {name: digest for shard in self._shards for name, digest in shard.digests.items()}
        text = _json(make_manifest(self._files, tensors, self.recipe)).encode()
        write_bytes(self._work / MANIFEST, text)

    def _name_shards(self) -> None:
        """Shards get their final names last, because these hold the count."""
        count = len(self._shards)
        placed: dict[str, str] = {}
        for i, shard in enumerate(self._shards):
            name = SINGLE if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            os.rename(shard.path, self._work / name)
            self._files[name] = shard.digest
            placed |= dict.fromkeys(shard.names, name)
        if count > 1:
            text = _json({"metadata": {"total_size": self._total}, "weight_map": dict(sorted(placed.items()))}).encode()
            self._files[INDEX] = write_bytes(self._work / INDEX, text)


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
