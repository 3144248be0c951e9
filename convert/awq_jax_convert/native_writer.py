# SPDX-License-Identifier: Apache-2.0
"""The native form, written one layer at a time: what `NativeCheckpoint` reads.

Several processes write it at once: each its share of every weight, into a folder that process 0 made. Process 0 alone
gives a layer its place when all shares of it are there, and publishes the whole.
"""

import contextlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from awq_jax._publish import published, working_directory, write_bytes, write_manifest
from awq_jax._qtensor import QTensor
from awq_jax.checkpoint import write_part
from awq_jax.hosts import Hosts
from awq_jax_convert.hf_config import CONFIG
from awq_jax_convert.native import FORMAT, STEM, part_name
from awq_jax_convert.sink import ModelWriter
from awq_jax_convert.source import Checkpoint

__all__ = ["NativeFollower", "NativeWriter"]

_WRITING = "writing-"
_SEEN_S = 5.0  # for a directory that another host made to be seen through a network's file system


class NativeWriter(ModelWriter):
    """Keeps every width, group size and scale dtype as it is in memory.

    Args:
      source: the checkpoint that the new one is made from.
      out: the directory to create.
      dtype: of dense parameters; None keeps each as it is in the source.
      recipe: what decided the quantization, as JSON values; the manifest keeps it.
      overwrite: replace ``out`` if awq-jax wrote it.
      expected_bytes: refuse at once if the disk has less room.
    """

    def __init__(
        self,
        source: Checkpoint,
        out: str | os.PathLike[str],
        *,
        dtype: np.dtype | None = None,
        recipe: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        expected_bytes: int = 0,
    ) -> None:
        super().__init__(source, published(out, overwrite=overwrite, expected_bytes=expected_bytes), dtype)
        self._recipe = recipe
        self._parts: dict[str, Any] = {}
        self._shared: Path | None = None  # folder that all processes write to

    def share(self, hosts: Hosts) -> str:
        """Let every process write its share from here on; see `ModelWriter.share`."""
        token = hosts.share("writing", self._make_shared() if hosts.first else None)
        folder = self._directory / token
        seen = hosts.meet("writing seen", "yes" if _is_seen(folder) else "")
        if all(seen):
            self._shared = folder
            return ""
        blind = ", ".join(str(index) for index, said in enumerate(seen) if not said)
        return (
            f"process 0 wrote the checkpoint alone: processes {blind} do not see its directory, or may not write there "
            "(a file system that all hosts share lets them write their shares at once)"
        )

    def _make_shared(self) -> str:
        """Make the folder; another in every run, for processes of a killed one may still write to theirs."""
        name = f"{_WRITING}{secrets.token_hex(8)}"
        (self._directory / name).mkdir()
        return name

    def _complete(self) -> None:
        for left in self._directory.glob(f"{_WRITING}*"):
            shutil.rmtree(left)
        self.write_text(CONFIG, json.dumps(self._raw_config(), indent=2) + "\n")
        write_manifest(self._directory, self._recipe, format=FORMAT, parts=self._parts)

    def write_stem(self, stem: Mapping[str, Any]) -> None:
        """Take everything outside the layers; see `ModelWriter.write_stem`."""
        self._write(STEM, stem, "")

    def write_layer(self, index: int, layer: Mapping[str, Any]) -> None:
        """Take one layer; see `ModelWriter.write_layer`."""
        self._write(part_name(index), layer, f"layers/{index}/")

    def write_kept(self, index: int, layer: Mapping[str, Any]) -> None:
        """Take a layer that process 0 alone has; see `ModelWriter.write_kept`."""
        self._write(part_name(index), layer, f"layers/{index}/", alone=True)

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file beside the tensors."""
        write_bytes(self._directory / name, content)

    def _write(self, name: str, tree: Mapping[str, Any], prefix: str, *, alone: bool = False) -> None:
        tree = self._tree(tree, prefix)
        if alone or self._shared is None:
            part = self._write_alone(name, tree)
        else:
            part = write_part(self._shared / name, tree, together=f"{self._shared.name}/{name}")
            self._place(name)
        self._parts[name] = part
        self.nbytes += part["nbytes"]

    def _write_alone(self, name: str, tree: Mapping[str, Any]) -> dict[str, Any]:
        return write_part(self._directory / name, tree)

    def _place(self, name: str) -> None:
        """Give a part that all have written its place."""
        assert self._shared is not None
        os.rename(self._shared / name, self._directory / name)

    def _tree(self, tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key, node in tree.items():
            path = f"{prefix}{key}"
            if isinstance(node, Mapping):
                made[key] = self._tree(node, f"{path}/")
            elif isinstance(node, QTensor):
                made[key] = node
            else:
                made[key] = self._narrowed(path, node)
        return made


class NativeFollower(NativeWriter):
    """What the other processes have: their shares of what process 0 writes and publishes.

    Args:
      source: the checkpoint that the new one is made from.
      out: the directory that process 0 creates.
    """

    def __init__(self, source: Checkpoint, out: str | os.PathLike[str]) -> None:
        super().__init__(source, out)
        self._opening = contextlib.nullcontext(working_directory(out))

    def write_bytes(self, name: str, content: bytes) -> None:
        """Process 0 does."""

    def _complete(self) -> None:
        """Process 0 does."""

    def _write_alone(self, name: str, tree: Mapping[str, Any]) -> dict[str, Any]:
        """Process 0 does."""
        return {"nbytes": 0}

    def _place(self, name: str) -> None:
        """Process 0 does."""


def _is_seen(folder: Path) -> bool:
    """Whether a folder that another host has just made may be written to from here."""
    until = time.monotonic() + _SEEN_S
    while not folder.is_dir():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return os.access(folder, os.W_OK | os.X_OK)
