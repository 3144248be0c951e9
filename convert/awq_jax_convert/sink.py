# SPDX-License-Identifier: Apache-2.0
"""What every writer of a model offers: the parts of a checkpoint, taken one layer at a time, published whole."""

import abc
import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from awq_jax._files import resolve_inside
from awq_jax.hosts import Hosts
from awq_jax_convert.family_file import FAMILY_FILE
from awq_jax_convert.hf_config import CONFIG
from awq_jax_convert.source import Checkpoint

__all__ = ["BESIDE", "ModelWriter", "narrowed", "refuse_overlap"]

# What a tokenizer, a chat template and generation need; copied as they are. No Python file ever is.
BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


class ModelWriter(abc.ABC):
    """A context manager; the directory appears when the block ends normally, an exception leaves nothing behind.

    Attributes:
      source: the checkpoint whose config, tokenizer and dtypes the new one has.
      dtype: of its dense parameters; None keeps each as it is in the source.
      nbytes: of the tensors written so far.
    """

    def __init__(
        self,
        source: Checkpoint,
        directory: contextlib.AbstractContextManager[Any],
        dtype: np.dtype | None = None,
    ) -> None:
        self.source, self.dtype, self.nbytes = source, dtype, 0
        self._opening = directory
        self._directory: Any = None  # what opening gave
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "ModelWriter":
        self._directory = self._stack.enter_context(self._opening)
        self._stack.push(self._end)  # unwound first, so that a failure in it removes the directory too
        self._copy_beside()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._stack.__exit__(kind, error, trace)

    def _end(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None:
            self._complete()

    @abc.abstractmethod
    def _complete(self) -> None:
        """Write what only the whole model decides."""

    @abc.abstractmethod
    def write_stem(self, stem: Mapping[str, Any]) -> None:
        """Take everything outside the layers."""

    @abc.abstractmethod
    def write_layer(self, index: int, layer: Mapping[str, Any]) -> None:
        """Take one layer; kernels are dense or `QTensor`.

        Raises:
          ValueError: a value does not fit the format or its dtype; the message names the parameter.
          OSError: the disk is full.
        """

    def write_kept(self, index: int, layer: Mapping[str, Any]) -> None:
        """Take a layer that an earlier run finished, and that other processes, if there are, don't have."""
        self.write_layer(index, layer)

    def share(self, hosts: Hosts) -> str:
        """Let every process write its share of what follows, where the format can; then each calls `write_stem` and
        `write_layer` with the same values.

        Returns:
          Why process 0 writes alone although the format could; empty where there is nothing to say.
        """
        return ""

    @abc.abstractmethod
    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file beside the tensors."""

    def write_text(self, name: str, text: str) -> None:
        """`write_bytes` of UTF-8 text."""
        self.write_bytes(name, text.encode())

    def _narrowed(self, path: str, array: Any) -> np.ndarray:
        return narrowed(path, array, self.dtype or self.source.stored_dtype(path))

    def _raw_config(self) -> dict[str, Any]:
        """The source's config.json, with the dtype that the parameters now have."""
        raw = self.source.hf.raw
        if self.dtype is None:
            return raw
        named = [key for key in ("dtype", "torch_dtype") if key in raw] or ["torch_dtype"]
        return {**raw, **dict.fromkeys(named, str(self.dtype))}

    def _copy_beside(self) -> None:
        """Copy the source's tokenizer and generation settings, byte for byte: tokenizer.model is not text.

        A user's table goes with what was made by it.
        """
        if self.source.hf.table is not None:
            self.write_text(FAMILY_FILE, self.source.hf.table)
        for name in BESIDE:
            if (self.source.path / name).is_file():
                self.copy_file(name)

    def copy_file(self, name: str) -> None:
        """Copy a small file of the source, byte for byte.

        Raises:
          ValueError: it lies outside the source's directory.
        """
        self.write_bytes(name, resolve_inside(self.source.path, name).read_bytes())


def refuse_overlap(src: Path, out: Path) -> None:
    """Refuse an output whose replacing would take the source away, or whose writing would add to it.

    Raises:
      ValueError: ``out`` is, holds or lies in ``src``.
    """
    source = src.resolve()
    if source in out.resolve().parents:
        raise ValueError(f"the output {out} lies in the source {src}, which is never changed; choose another name.")
    if out.resolve() in (source, *source.parents):
        raise ValueError(f"the output {out} is or holds the source {src}, which is never changed; choose another name.")


def narrowed(path: str, array: Any, dtype: np.dtype) -> np.ndarray:
    """A dense parameter in another dtype.

    Raises:
      ValueError: a value that was finite is not in that dtype.
    """
    wide = np.asarray(array)
    if wide.dtype == dtype:
        return wide
    with np.errstate(over="ignore"):
        narrow = wide.astype(dtype)
    lost = int((~np.isfinite(narrow.astype(np.float32))).sum())
    if lost:
        raise ValueError(
            f"{lost} of {narrow.size} values of {path!r} leave the range of {dtype}, the dtype of the source "
            f"({CONFIG}) or the one asked for; the largest is {np.abs(wide).max():.3g}. Convert the source to bfloat16 "
            "or float32 first."
        )
    return narrow
