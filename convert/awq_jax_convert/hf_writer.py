# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face directory, dense or quantized, written one layer at a time."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from awq_jax._qtensor import QTensor
from awq_jax._tree import leaves
from awq_jax_convert.codec import WritableCodec
from awq_jax_convert.fit import refuse_unwritable
from awq_jax_convert.fused import Whole, wholes
from awq_jax_convert.hf_config import CONFIG
from awq_jax_convert.keymap import theirs
from awq_jax_convert.scheme import Scheme
from awq_jax_convert.shard import workers
from awq_jax_convert.sink import ModelWriter
from awq_jax_convert.source import Checkpoint
from awq_jax_convert.writer import DirectoryWriter

__all__ = ["HFWriter"]


class HFWriter(ModelWriter):
    """Writes what `HFCheckpoint` reads: Hugging Face's names, the source's dtypes, and a codec's quantized linears.

    Args:
      source: the checkpoint that the new one is made from.
      out: the directory to create.
      codec: of the quantized linears; None writes a dense checkpoint.
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
        codec: WritableCodec | None = None,
        dtype: np.dtype | None = None,
        recipe: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        expected_bytes: int = 0,
    ) -> None:
        self._writer = DirectoryWriter(out, overwrite=overwrite, expected_bytes=expected_bytes)
        super().__init__(source, self._writer, dtype)
        self._codec = codec
        self._writer.recipe = None if recipe is None else dict(recipe)
        self._linears: dict[str, Scheme | None] = {}  # by Hugging Face's module name; None stays dense
        self._layers: dict[str, tuple[Scheme | None, int]] = {}  # by our path, with the rows of the weight

    def _complete(self) -> None:
        self._writer.write_json(CONFIG, self._config())

    def _config(self) -> dict[str, Any]:
        raw = self._raw_config()
        if self._codec is None:
            return raw
        refuse_unwritable(self._codec.name, self.source, self._formats())  # who calls `open_writer` may not have
        quantized = {name: scheme for name, scheme in self._linears.items() if scheme is not None}
        # A head that is the embedding is no tensor of its own, but loaders see a linear.
        head = theirs(self.source.family, "lm_head/kernel")[0].rpartition(".")[0]
        dense = {head, *(name for name, scheme in self._linears.items() if scheme is None)}
        return {**raw, "quantization_config": self._codec.skipping(dense, quantized).to_config()}

    def _formats(self) -> dict[str, Scheme | None]:
        """Of the layers' linears; whole columns are alike whatever their length, and zeros of 8 are no other format."""
        whole = all(found.group_size == rows for found, rows in self._layers.values() if found is not None)
        return {
            path: found and Scheme(found.bits, -1 if whole else found.group_size, False, found.activations)
            for path, (found, _) in self._layers.items()
        }

    def write_stem(self, stem: Mapping[str, Any]) -> None:
        """Take everything outside the layers; see `ModelWriter.write_stem`."""
        self._write(stem, "")

    def write_layer(self, index: int, layer: Mapping[str, Any]) -> None:
        """Take one layer; see `ModelWriter.write_layer`."""
        self._write(layer, f"layers/{index}/")

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file beside the tensors."""
        self._writer.write_bytes(name, content)

    def _write(self, tree: Mapping[str, Any], prefix: str) -> None:
        params = {f"{prefix}{relative}": leaf for relative, leaf in leaves(tree)}
        found = list(wholes(self.source.family, self.source.config, params))
        for whole in found:
            self._note(whole)
        with workers() as pool:  # numpy lets go of the interpreter
            for tensors in pool.map(self._tensors, found):
                for name, array in tensors.items():
                    self._writer.add(name, array)
                    self.nbytes += array.nbytes
        self._writer.flush_if_full()

    def _note(self, whole: Whole) -> None:
        """Remember what a linear became: the config says it of all of them."""
        path, leaf = whole.paths[0], whole.leaf
        if path.endswith("/kernel"):
            self._linears[whole.name.rpartition(".")[0]] = found = Scheme.of(leaf)
            if path.startswith("layers/"):
                self._layers |= dict.fromkeys(whole.paths, (found, leaf.shape[-2]))

    def _tensors(self, whole: Whole) -> dict[str, np.ndarray]:
        name, leaf, path = whole.name, whole.leaf, whole.paths[0]
        if isinstance(leaf, QTensor):
            if self._codec is None:
                raise ValueError(f"{path!r} is quantized, and a dense checkpoint was asked for.")
            return self._codec.encode(name.rpartition(".")[0], leaf)
        array = self._narrowed(path, leaf)
        return {name: array.T if whole.transpose else array}
