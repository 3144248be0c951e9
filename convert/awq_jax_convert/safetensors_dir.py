# SPDX-License-Identifier: Apache-2.0
"""The one reader of checkpoint directories: `model.safetensors`, or an index and its shards."""

import os
import re
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from awq_jax._files import read_json, resolve_inside
from awq_jax_convert.pickles import refuse_pickles
from awq_jax_convert.safetensors_header import DTYPES, TensorInfo, read_header

__all__ = ["INDEX", "SINGLE", "SafetensorsDir", "TensorMeta"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_CHUNK = 1 << 28  # one pread; Linux caps it near 2 GiB


class TensorMeta(NamedTuple):
    """dtype (safetensors name), shape and bytes of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def _weight_map(directory: Path) -> dict[str, str] | None:
    """tensor -> file name, as the index says; None for a checkpoint of one file."""
    single, index = (directory / SINGLE).exists(), (directory / INDEX).exists()
    if not single and not index:
        refuse_pickles(directory)
        raise FileNotFoundError(f"{directory} has neither {SINGLE} nor {INDEX}; download the checkpoint again.")
    if not index:
        return None
    found = read_json(directory, INDEX).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(v, str) for v in found.values()):
        raise ValueError(f"{directory / INDEX} has no 'weight_map' of tensor to file name; download it again.")
    bad = sorted({v for v in found.values() if not v.endswith(".safetensors")})
    if bad:
        raise ValueError(f"{directory / INDEX} names {bad[0]!r}: only .safetensors files are read.")
    if single and SINGLE not in found.values():
        raise ValueError(
            f"{directory} has both {SINGLE} and an {INDEX} that does not mention it: which one is the model is not "
            "clear. Move one of them away."
        )
    return found


def _differences(
    index: dict[str, str], shards: dict[str, dict[str, TensorInfo]], missing: Iterable[str], stray: Iterable[str]
) -> list[str]:
    """Everything in which an index and its shards disagree."""
    said = [f"shard {name!r} is missing" for name in missing]
    said += [f"shard {name!r} is in the directory but not in the index" for name in stray]
    holders: dict[str, list[str]] = {}
    for shard, tensors in shards.items():
        for name in tensors:
            holders.setdefault(name, []).append(shard)
    for name, shard in index.items():
        if shard in shards and name not in shards[shard]:
            said.append(f"tensor {name!r} is not in {shard!r}, where the index has it")
    for name, found in holders.items():
        if len(found) > 1:
            said.append(f"tensor {name!r} is in {' and '.join(map(repr, found))}")
        elif name not in index:
            said.append(f"tensor {name!r} of {found[0]!r} is not in the index")
    return said


class SafetensorsDir:
    """A checkpoint directory, opened and checked whole before the first tensor is read.

    Every header is validated here; tensors are read with ``pread`` into fresh arrays. Nothing is memory-mapped: a
    mapped file that shrinks kills the process.

    Attributes:
      path: of the directory.
      nbytes: of all tensors.

    Raises:
      FileNotFoundError: the directory or its files are missing.
      ValueError: a header is invalid, the index and the shards disagree, a file lies outside, or a tensor has a dtype
        that is not read. Each message lists all it found.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"{self.path} is not a directory; give the path of a local checkpoint.")
        index = _weight_map(self.path)
        self._fds: dict[str, int] = {}
        # Descriptors stay open, so that what was validated is what is read even if a file is replaced meanwhile.
        self._close = weakref.finalize(self, _close_all, self._fds)
        try:
            self._tensors = self._open(index)
        except BaseException:
            self.close()
            raise
        self.nbytes = sum(info.nbytes for _, info in self._tensors.values())

    def _open(self, index: dict[str, str] | None) -> dict[str, tuple[str, TensorInfo]]:
        wanted = [SINGLE] if index is None else sorted(set(index.values()))
        shards: dict[str, dict[str, TensorInfo]] = {}
        missing = []
        for shard in wanted:
            try:
                file = resolve_inside(self.path, shard)
            except FileNotFoundError:
                missing.append(shard)
                continue
            self._fds[shard] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            shards[shard] = read_header(self._fds[shard], self.path / shard)
        if index is not None:
            present = {p.name for p in self.path.iterdir() if _SHARD.fullmatch(p.name)}
            said = _differences(index, shards, missing, sorted(present - set(wanted)))
            if said:
                raise ValueError(
                    f"{self.path / INDEX} and the shards disagree; download them again.\n  " + "\n  ".join(said)
                )
        found = {name: (shard, info) for shard, tensors in shards.items() for name, info in tensors.items()}
        self._refuse_dtypes(found)
        return found

    def _refuse_dtypes(self, found: dict[str, tuple[str, TensorInfo]]) -> None:
        odd = [(name, info.dtype) for name, (_, info) in found.items() if info.dtype not in DTYPES]
        if odd:
            raise ValueError(
                f"{len(odd)} tensors of {self.path} have a dtype that is not read, e.g. {odd[0][0]!r} is {odd[0][1]}; "
                f"read are {', '.join(DTYPES)}. Convert the checkpoint to BF16 or F32 first."
            )

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def info(self, name: str) -> TensorMeta:
        """dtype, shape and bytes of a tensor, without reading it.

        Raises:
          KeyError: there is no such tensor.
        """
        _, info = self._place(name)
        return TensorMeta(info.dtype, info.shape, info.nbytes)

    def _place(self, name: str) -> tuple[str, TensorInfo]:
        if name not in self._tensors:
            raise KeyError(f"{self.path} has no tensor {name!r}; it has {len(self._tensors)} others.")
        return self._tensors[name]

    def read(self, name: str) -> np.ndarray:
        """A tensor as a fresh C-contiguous array; BF16 as ``ml_dtypes.bfloat16``.

        Raises:
          KeyError: there is no such tensor.
          OSError: the file became shorter since it was opened, or could not be read.
        """
        shard, info = self._place(name)
        out = np.empty(info.shape, DTYPES[info.dtype])
        view = out.reshape(-1).view(np.uint8).data
        at = 0
        while at < info.nbytes:
            got = os.preadv(self._fds[shard], [view[at : at + _CHUNK]], info.start + at)
            if got == 0:
                raise OSError(
                    f"{self.path / shard} ended inside tensor {name!r} ({at} of {info.nbytes} bytes): the file was "
                    "truncated while it was read. Re-download it."
                )
            at += got
        return out

    def close(self) -> None:
        """Close the files; also done when the object goes away."""
        self._close()

    def __enter__(self) -> "SafetensorsDir":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _close_all(fds: dict[str, int]) -> None:
    for fd in fds.values():
        os.close(fd)
    fds.clear()
