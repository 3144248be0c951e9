# SPDX-License-Identifier: Apache-2.0
"""Weights in the order of bytes that the device at hand reads fastest, once, when a model is loaded."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from awq_jax._qtensor import QTensor, in_tiles
from awq_jax_kernels.codes import per_byte
from awq_jax_kernels.int4_matmul import refusal

__all__ = ["arranged"]


def arranged(tree: Any, dtype: Any, platform: str | None = None) -> Any:
    """The tree with every INT4 weight that a Hopper GPU's kernel will multiply in tile order; elsewhere the tree.

    Args:
      tree: arrays and `QTensor` leaves.
      dtype: of activations.
      platform: that will multiply, as `jax.default_backend` names it; None is this process's.
    """
    if (platform or jax.default_backend()) != "gpu":
        return tree
    is_weight = lambda leaf: isinstance(leaf, QTensor)
    return jax.tree.map(functools.partial(_arranged, jnp.dtype(dtype)), tree, is_leaf=is_weight)


def _arranged(dtype: Any, leaf: Any) -> Any:
    if not isinstance(leaf, QTensor) or leaf.ndim != 2 or per_byte(leaf.bits) != 2 or leaf.activations != "float":
        return leaf
    x = jax.ShapeDtypeStruct((1, leaf.shape[0]), dtype)
    return leaf if refusal("gpu", x, leaf.packed, leaf.scale, leaf.zero) else _in_tiles(leaf)


_in_tiles = jax.jit(in_tiles)
