# SPDX-License-Identifier: Apache-2.0
"""A checkpoint directory as serving wants it in memory: one layer read, fused and placed at a time."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax._qtensor import QTensor, dequantize_tree
from awq_jax._round import quantize
from awq_jax._spec import QuantSpec
from awq_jax.models import DecoderConfig
from awq_jax.serving.arrange import arranged
from awq_jax.serving.fuse import fuse_layer
from awq_jax_convert.formats import open_checkpoint
from awq_jax_convert.hf_config import FamilyChoice
from awq_jax_convert.source import Checkpoint

__all__ = ["ServingModel", "int4_head_of", "load", "read_tree", "wide_norms"]

_TOGETHER = 4  # layers that are read side by side

Place = Callable[[str, Any], Any]
"""Puts a subtree where it belongs: called with its name ("stem" or "layer") and the tree on the host."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServingModel:
    """A model ready for `awq_jax.serving.steps`.

    Attributes:
      checkpoint: where it came from.
      params: fused, on the device.
    """

    checkpoint: Checkpoint
    params: Any

    @property
    def config(self) -> DecoderConfig:
        """Of the decoder."""
        return self.checkpoint.config

    @property
    def dtype(self) -> Any:
        """Of activations."""
        return self.params["embed"]["embedding"].dtype


def load(
    path: str | os.PathLike[str],
    *,
    dtype: Any = jnp.float32,
    int4_head: bool = False,
    dense: bool = False,
    family: FamilyChoice = None,
    stored_order: bool = False,
) -> ServingModel:
    """Read a checkpoint for serving on one device.

    Args:
      path: directory, dense or quantized.
      dtype: of dense parameters and of activations; scales keep the dtype they were stored in.
      int4_head: round the output head to INT4 too, in groups of 128 or of what divides its rows. It is a quarter of the
        bytes of a small model's step, and every token's logits depend on it.
      dense: dequantize every weight once, here. Eight times the memory of a packed float32 step, and on a CPU faster.
      family: a table, the name of one or its TOML file, instead of the one that serves config.json's architecture.
      stored_order: leave bytes in the order of the checkpoint, for another device than this one.

    Raises:
      FileNotFoundError, ValueError: as `awq_jax_convert.formats.open_checkpoint`.
    """
    checkpoint = open_checkpoint(path, family)

    def place(_: str, tree: Any) -> Any:
        tree = jax.tree.map(jnp.asarray, tree)
        if dense:
            return dequantize_tree(tree, dtype)
        return tree if stored_order else arranged(tree, dtype)

    return ServingModel(checkpoint=checkpoint, params=read_tree(checkpoint, dtype, place, int4_head=int4_head))


def read_tree(checkpoint: Checkpoint, dtype: Any, place: Place, *, int4_head: bool = False) -> dict[str, Any]:
    """Parameters of a checkpoint, placed layer by layer; the host holds a few layers at a time.

    Args:
      checkpoint: to read.
      dtype: of dense parameters.
      place: what becomes of each part.
      int4_head: as in `load`.
    """
    stem = checkpoint.stem(dtype)
    if int4_head:
        stem["lm_head"] = {"kernel": int4_head_of(checkpoint.config, stem)}
    read = lambda index: wide_norms(fuse_layer(checkpoint.layer(index, dtype)))
    placed = {**place("stem", wide_norms(stem)), "layers": {}}
    del stem
    with ThreadPoolExecutor(_TOGETHER) as pool:
        for first in range(0, checkpoint.num_layers, _TOGETHER):
            some = range(first, min(first + _TOGETHER, checkpoint.num_layers))
            for index, layer in zip(some, pool.map(read, some), strict=True):
                placed["layers"][str(index)] = place("layer", layer)
    return placed


def wide_norms(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with the parameters of norms in float32, which they are computed in: a step has no cast to do."""
    out = {}
    for key, node in tree.items():
        if not isinstance(node, Mapping):
            out[key] = node
        elif key.endswith("norm"):
            out[key] = {name: leaf.astype(np.float32) for name, leaf in node.items()}
        else:
            out[key] = wide_norms(node)
    return out


def int4_head_of(config: DecoderConfig, stem: Mapping[str, Any]) -> QTensor:
    """The head rounded to nearest; of tied embeddings a copy."""
    k = config.hidden_size
    group = next((g for g in (128, 64, 32) if k % g == 0), -1)
    head = stem["lm_head"]["kernel"] if "lm_head" in stem else stem["embed"]["embedding"].T
    if isinstance(head, QTensor):
        return head
    return jax.tree.map(np.asarray, quantize(jnp.asarray(head, jnp.float32), QuantSpec(group_size=group)))
