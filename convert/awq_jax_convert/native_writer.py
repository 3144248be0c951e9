# SPDX-License-Identifier: Apache-2.0
"""The native form, written one layer at a time: what `NativeCheckpoint` reads."""

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from awq_jax._manifest import MANIFEST, make_manifest, tree_digests
from awq_jax._publish import INCOMPLETE, published, write_bytes
from awq_jax._qtensor import QTensor
from awq_jax.checkpoint import write_part
from awq_jax_convert.hf_config import CONFIG
from awq_jax_convert.native import FORMAT, STEM, part_name
from awq_jax_convert.sink import ModelWriter
from awq_jax_convert.source import Checkpoint

__all__ = ["NativeWriter"]


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

    def _complete(self) -> None:
        self.write_text(CONFIG, json.dumps(self._raw_config(), indent=2) + "\n")
        files = tree_digests(self._directory, skip=(INCOMPLETE,))
        manifest = make_manifest(files, {}, self._recipe, format=FORMAT, parts=self._parts)
        self.write_text(MANIFEST, json.dumps(manifest, indent=2) + "\n")

    def write_stem(self, stem: Mapping[str, Any]) -> None:
        """Take everything outside the layers; see `ModelWriter.write_stem`."""
        self._write(STEM, stem, "")

    def write_layer(self, index: int, layer: Mapping[str, Any]) -> None:
        """Take one layer; see `ModelWriter.write_layer`."""
        self._write(part_name(index), layer, f"layers/{index}/")

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file beside the tensors."""
        write_bytes(self._directory / name, content)

    def _write(self, name: str, tree: Mapping[str, Any], prefix: str) -> None:
        self._parts[name] = write_part(self._directory / name, self._tree(tree, prefix))
        self.nbytes += self._parts[name]["nbytes"]

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
