# SPDX-License-Identifier: Apache-2.0
"""The one writer of checkpoint directories: everything or nothing."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from awq_jax_convert.local_files import resolve_inside
from awq_jax_convert.manifest import MANIFEST, make_manifest
from awq_jax_convert.safetensors_dir import INDEX, SINGLE
from awq_jax_convert.safetensors_header import DTYPES, dtype_name
from awq_jax_convert.shard import tensor_digest, write_bytes, write_shard

__all__ = ["INCOMPLETE", "DirectoryWriter"]

INCOMPLETE = "_INCOMPLETE"


class DirectoryWriter:
    """Writes a checkpoint beside its destination and moves it there whole.

    Inside the ``with`` block tensors and files go to ``.NAME.incomplete``, a hidden directory beside ``out``, marked
    by a file ``_INCOMPLETE`` and locked against other writers. Leaving the block normally completes the shards,
    writes the index and the manifest, and renames the directory to ``out``. Leaving it by an exception removes it.
    What a killed process left is removed by the next writer of the same name.

    Args:
      out: the directory to create.
      overwrite: replace ``out`` if it is a directory that this class wrote.
      max_shard_bytes: tensors held in memory before `flush_if_full` writes them.
      expected_bytes: refuse at once if the disk has less room.
      recipe: JSON values that the manifest keeps.

    Raises (on entering):
      FileExistsError: ``out`` exists.
      BlockingIOError: another process is writing ``out``.
      OSError: not enough room.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        max_shard_bytes: int = 256 << 20,
        expected_bytes: int = 0,
        recipe: dict[str, Any] | None = None,
    ) -> None:
        self.out = Path(os.path.abspath(out))
        self.recipe = recipe
        self._overwrite, self._max, self._expected = overwrite, max_shard_bytes, expected_bytes
        self._work = self.out.with_name(f".{self.out.name}.incomplete")
        self._pending: dict[str, np.ndarray] = {}
        self._shards: list[list[str]] = []
        self._shard_digests: list[str] = []
        self._tensors: dict[str, str] = {}
        self._files: dict[str, str] = {}
        self._total = 0
        self._lock = -1

    # Entering and leaving.

    def __enter__(self) -> "DirectoryWriter":
        self._refuse_existing()
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self._check_room()
        self._lock = _claim(self._work, self.out)
        write_bytes(self._work / INCOMPLETE, iter(()), 0)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is not None:
                shutil.rmtree(self._work, ignore_errors=True)
            else:
                self._publish()
        except BaseException:
            shutil.rmtree(self._work, ignore_errors=True)  # before the lock goes, so that it is surely ours
            raise
        finally:
            os.close(self._lock)

    def _refuse_existing(self) -> None:
        if not self.out.exists() and not self.out.is_symlink():
            return
        if not self._overwrite:
            raise FileExistsError(
                errno.EEXIST,
                "the output exists; choose another name, or pass overwrite=True (--overwrite)",
                str(self.out),
            )
        ours = self.out.is_dir() and not self.out.is_symlink()
        if not ours or (any(self.out.iterdir()) and not (self.out / MANIFEST).is_file()):
            raise FileExistsError(
                errno.EEXIST, f"not overwritten, because no {MANIFEST} says that awq-jax wrote it", str(self.out)
            )

    def _check_room(self) -> None:
        free = shutil.disk_usage(self.out.parent).free
        if free < self._expected:
            raise OSError(
                errno.ENOSPC,
                f"{self._expected} bytes are needed and {free} are free; nothing was written. Make room, or choose "
                "another disk",
                str(self.out.parent),
            )

    # Tensors.

    def add(self, name: str, array: np.ndarray) -> None:
        """Hold a tensor until its shard is written.

        Args:
          name: unique in the checkpoint.
          array: float32, bfloat16, float16, int64, int32, int16 or uint8, any strides; must not change afterwards.

        Raises:
          ValueError: the name was used, or the dtype is not one of these.
        """
        array = np.asarray(array)
        if name in self._tensors:
            raise ValueError(f"tensor {name!r} was already written.")
        if dtype_name(array.dtype) is None:
            raise ValueError(
                f"tensor {name!r} is {array.dtype}; files hold {', '.join(str(d) for d in DTYPES.values())}."
            )
        self._tensors[name] = tensor_digest(array)
        self._pending[name] = array
        self._total += array.nbytes

    def flush_if_full(self) -> None:
        """Write the held tensors if they fill a shard; called where a layer ends, so that layers stay whole."""
        if sum(array.nbytes for array in self._pending.values()) >= self._max:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        path = self._work / f"shard-{len(self._shards):05d}"
        self._shard_digests.append(write_shard(path, self._pending))
        self._shards.append(list(self._pending))
        self._pending = {}

    # Other files.

    def _refuse_name(self, name: str) -> None:
        reserved = ("", ".", "..", MANIFEST, INDEX, INCOMPLETE, *self._files)
        if name != os.path.basename(name) or name in reserved or name.endswith(".safetensors"):
            raise ValueError(f"cannot write a file {name!r}: not a plain, unused file name.")

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file beside the shards.

        Raises:
          ValueError: the name is a path, reserved or used.
          OSError: the disk is full.
        """
        self._refuse_name(name)
        self._files[name] = write_bytes(self._work / name, iter((content,)), len(content))

    def write_text(self, name: str, text: str) -> None:
        """`write_bytes` of UTF-8 text."""
        self.write_bytes(name, text.encode())

    def write_json(self, name: str, content: Any) -> None:
        """`write_bytes` of JSON, as Hugging Face indents it."""
        self.write_text(name, _json(content))

    def copy_file(self, directory: str | os.PathLike[str], name: str) -> None:
        """Copy a file of another checkpoint, under its own name.

        Raises:
          ValueError: it lies outside that directory, or see `write_bytes`.
          FileNotFoundError: there is none.
        """
        self._refuse_name(name)
        source = resolve_inside(Path(directory), name)
        with open(source, "rb") as file:
            pieces: Iterator[bytes] = iter(lambda: file.read(1 << 24), b"")
            self._files[name] = write_bytes(self._work / name, pieces, source.stat().st_size)

    # Completion.

    def _name_shards(self) -> None:
        count = len(self._shards)
        names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for i, name in enumerate(names):
            os.rename(self._work / f"shard-{i:05d}", self._work / name)
            self._files[name] = self._shard_digests[i]
        if count > 1:
            placed = {tensor: name for name, held in zip(names, self._shards, strict=True) for tensor in held}
            content = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(placed.items()))}
            text = _json(content).encode()
            self._files[INDEX] = write_bytes(self._work / INDEX, iter((text,)), len(text))

    def _publish(self) -> None:
        self._flush()
        self._name_shards()
        text = _json(make_manifest(self._files, self._tensors, self.recipe)).encode()
        write_bytes(self._work / MANIFEST, iter((text,)), len(text))
        os.unlink(self._work / INCOMPLETE)
        _sync(self._work)
        self._refuse_existing()
        replaced = self.out.with_name(f".{self.out.name}.replaced")
        if self.out.exists():
            os.rename(self.out, replaced)
        os.rename(self._work, self.out)
        _sync(self.out.parent)
        shutil.rmtree(replaced, ignore_errors=True)


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _claim(work: Path, out: Path) -> int:
    """Create and lock the working directory, empty; the lock ends with the process, whatever ends it."""
    busy = BlockingIOError(
        errno.EWOULDBLOCK, "another process is writing this output; wait, or choose another", str(out)
    )
    work.mkdir(exist_ok=True)
    fd = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        here = os.stat(work)
    except (BlockingIOError, FileNotFoundError) as error:
        os.close(fd)
        raise busy from error
    # Between open and lock the other writer may have finished and renamed the very directory that is now locked.
    if (here.st_dev, here.st_ino) != (os.fstat(fd).st_dev, os.fstat(fd).st_ino):
        os.close(fd)
        raise busy
    for left in work.iterdir():
        left.unlink() if not left.is_dir() else shutil.rmtree(left)
    return fd
