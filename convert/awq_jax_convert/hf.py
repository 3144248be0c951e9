# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face directory, read one layer at a time."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from awq_jax._files import read_json
from awq_jax._qtensor import QTensor
from awq_jax.families import Family, by_architecture
from awq_jax.models import Decoder, DecoderConfig, config_from_hf, param_shapes
from awq_jax_convert.codecs import Codec, codec_of
from awq_jax_convert.keymap import resolve
from awq_jax_convert.safetensors_dir import SafetensorsDir
from awq_jax_convert.safetensors_header import DTYPES, FLOATS

__all__ = ["HFCheckpoint", "load_model", "public_config"]

CONFIG = "config.json"


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where a parameter comes from: one dense tensor, or the parts of a quantized linear."""

    name: str
    transpose: bool
    parts: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]


def public_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json without what could make a loader run code: ``auto_map`` and private attributes.

    >>> public_config({"vocab_size": 8, "auto_map": {}, "_attn_implementation_internal": "someone/code"})
    {'vocab_size': 8}
    """
    return {key: value for key, value in config.items() if key != "auto_map" and not key.startswith("_")}


def _family_of(path: Path, config: dict[str, Any]) -> Family:
    named = config.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
        raise ValueError(f"{path / CONFIG} must name one architecture; 'architectures' is {named!r}.")
    return by_architecture(named[0])


def _sources(tensors: SafetensorsDir, codec: Codec | None) -> dict[str, tuple[str, ...]]:
    """``module.weight`` -> the parts that the codec keeps it in, () for a tensor that is dense."""
    found: dict[str, tuple[str, ...]] = {}
    for name in tensors.names():
        module, _, part = name.rpartition(".")
        if codec is None or part not in codec.parts:
            if name in found:
                raise ValueError(
                    f"{tensors.path} has {module!r} both dense and quantized; which one counts is unclear."
                )
            found[name] = ()
        else:
            weight = f"{module}.weight"
            if found.get(weight) == ():
                raise ValueError(
                    f"{tensors.path} has {module!r} both dense and quantized; which one counts is unclear."
                )
            found[weight] = (*found.get(weight, ()), part)
    return found


class HFCheckpoint:
    """A Hugging Face checkpoint directory whose names, shapes and dtypes have all been checked.

    Attributes:
      path: of the directory.
      raw_config: config.json as it is.
      family: the table that maps its names.
      config: of our decoder.
      codec: how its quantized linears are stored, None for a dense checkpoint.
      tensors: the files.
    """

    def __init__(
        self,
        path: Path,
        raw_config: dict[str, Any],
        family: Family,
        config: DecoderConfig,
        codec: Codec | None,
        tensors: SafetensorsDir,
    ) -> None:
        self.path, self.raw_config, self.family = path, raw_config, family
        self.config, self.codec, self.tensors = config, codec, tensors
        parts = _sources(tensors, codec)
        places = resolve(family, config, parts)
        self._sources = {place.path: _Source(name, place.transpose, parts[name]) for name, place in places.items()}
        self._check_shapes()

    @classmethod
    def open(cls, path: str | os.PathLike[str], family: Family | None = None) -> "HFCheckpoint":
        """Open a local directory; reads headers and config, no tensor.

        Args:
          path: holds ``config.json`` and safetensors files.
          family: instead of the one that serves config.json's architecture.

        Raises:
          FileNotFoundError: no such directory, or a file of it is missing.
          ValueError: anything in it that is not understood or does not fit together; each message names it.
        """
        directory = Path(path)
        if not directory.is_dir():
            raise FileNotFoundError(f"{directory} is not a directory; download the checkpoint and give its local path.")
        raw = read_json(directory, CONFIG)
        known = public_config(raw)
        codec = codec_of(known.pop("quantization_config", None))
        family = family or _family_of(directory, known)
        return cls(directory, raw, family, config_from_hf(family, known), codec, SafetensorsDir(directory))

    @property
    def num_layers(self) -> int:
        """How many layers there are."""
        return self.config.num_layers

    def _is_tied_head(self, path: str) -> bool:
        return self.config.tie_embeddings and path.startswith("lm_head/")

    def _check_shapes(self) -> None:
        """Every tensor has the shape that the config implies, before anything is allocated."""
        wanted = param_shapes(self.config)
        wrong = []
        for path, source in self._sources.items():
            found = self._stored_shape(source)
            shape = wanted["embed/embedding"][::-1] if self._is_tied_head(path) else wanted.get(path)
            if found != shape:
                wrong.append(f"{source.name!r} gives {path!r} the shape {found}, the config implies {shape}")
        absent = [path for path in wanted if path not in self._sources]
        wrong += [f"no tensor gives {path!r}, which the config implies" for path in absent]
        if wrong:
            more = f"\n  and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise ValueError(
                f"tensors of {self.path} do not fit its config.json; one of them is of another model.\n  "
                + "\n  ".join(wrong[:5])
                + more
            )

    def _stored_shape(self, source: _Source) -> tuple[int, ...]:
        if source.parts and self.codec is not None:
            metas = {part: self.tensors.info(f"{source.module}.{part}") for part in source.parts}
            return self.codec.shape(source.module, metas)
        meta = self.tensors.info(source.name)
        if meta.dtype not in FLOATS:
            raise ValueError(
                f"weight {source.name!r} of {self.path} is {meta.dtype}; weights are {', '.join(FLOATS)}. The "
                "checkpoint seems quantized in a way that its config.json does not tell: start from the dense one."
            )
        return meta.shape[::-1] if source.transpose else meta.shape

    def paths(self) -> list[str]:
        """All parameter paths, sorted."""
        return sorted(self._sources)

    def stored_dtype(self, path: str) -> np.dtype:
        """The dtype a dense parameter has in the files; for a quantized one, that of its scales."""
        source = self._sources[path]
        part = f"{source.module}.scales" if source.parts else source.name
        return DTYPES[self.tensors.info(part).dtype]

    def _read(self, path: str, dtype: Any) -> np.ndarray | QTensor:
        source = self._sources[path]
        if source.parts and self.codec is not None:
            return self.codec.decode(
                source.module, {part: self.tensors.read(f"{source.module}.{part}") for part in source.parts}
            )
        array = self.tensors.read(source.name)
        bad = int(array.size - np.isfinite(array).sum())
        if bad:
            raise ValueError(
                f"tensor {source.name!r} of {self.path} has {bad} NaN or infinite values of {array.size}: the "
                "checkpoint is damaged. Download it again."
            )
        return np.array(array.T if source.transpose else array, dtype=dtype, order="C")

    def _tree(self, paths: Iterator[tuple[str, str]], dtype: Any) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        for path, relative in paths:
            node = tree
            *parents, leaf = relative.split("/")
            for key in parents:
                node = node.setdefault(key, {})
            node[leaf] = self._read(path, dtype)
        return tree

    def layer(self, index: int, dtype: Any = np.float32) -> dict[str, Any]:
        """The parameters of one layer, ``{"attn": {"q": {"kernel": [in, out], ...}, ...}, ...}``.

        Args:
          index: 0 .. num_layers - 1.
          dtype: of dense arrays; None keeps each as stored. Quantized kernels are `QTensor` with numpy leaves.

        Raises:
          IndexError: there is no such layer.
          ValueError: a weight is not finite.
          OSError: a file changed since it was opened.
        """
        if not 0 <= index < self.num_layers:
            raise IndexError(f"layer {index} of {self.path}: it has layers 0 to {self.num_layers - 1}.")
        prefix = f"layers/{index}/"
        return self._tree(((p, p.removeprefix(prefix)) for p in self._sources if p.startswith(prefix)), dtype)

    def stem(self, dtype: Any = np.float32) -> dict[str, Any]:
        """Everything outside the layers: embedding, final norm, and the output head unless it is tied.

        Args:
          dtype: as in `layer`.

        Raises:
          ValueError: a weight is not finite, or a tied head differs from the embedding.
          OSError: a file changed since it was opened.
        """
        outside = [p for p in self._sources if not p.startswith("layers/")]
        self._refuse_second_head([p for p in outside if self._is_tied_head(p)])
        return self._tree(((p, p) for p in outside if not self._is_tied_head(p)), dtype)

    def _refuse_second_head(self, heads: list[str]) -> None:
        for head in heads:
            source, embedding = self._sources[head], self._sources["embed/embedding"]
            if not np.array_equal(self.tensors.read(source.name), self.tensors.read(embedding.name)):
                raise ValueError(
                    f"{self.path}: config.json says tie_word_embeddings, but {source.name!r} differs from "
                    f"{embedding.name!r}. Set tie_word_embeddings to false if the head is meant to be its own."
                )

    def params(self, dtype: Any = np.float32) -> dict[str, Any]:
        """All parameters: `stem`, and ``layers`` by index as text."""
        layers = {str(index): self.layer(index, dtype) for index in range(self.num_layers)}
        return {**self.stem(dtype), "layers": layers}


def load_model(path: str | os.PathLike[str], dtype: Any = np.float32) -> Decoder:
    """The whole model of a Hugging Face directory, dense or quantized.

    Args:
      path: of the directory.
      dtype: of dense parameters.

    Raises:
      FileNotFoundError, ValueError, OSError: as `HFCheckpoint.open` and `HFCheckpoint.layer`.
    """
    checkpoint = HFCheckpoint.open(path)
    return Decoder.from_params(checkpoint.config, checkpoint.params(dtype))
