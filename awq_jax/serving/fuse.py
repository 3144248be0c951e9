# SPDX-License-Identifier: Apache-2.0
"""Linears that read one input become one product: q, k, v and gate, up, side by side along n."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["FUSED", "fuse", "fuse_layer"]

FUSED = (("attn", "qkv", ("q", "k", "v")), ("mlp", "gate_up", ("gate", "up")))
"""(module, name of the product, its parts in order)."""


def fuse(params: Mapping[str, Any]) -> dict[str, Any]:
    """A model's parameters with every layer fused; see `fuse_layer`."""
    layers = {index: fuse_layer(layer) for index, layer in params["layers"].items()}
    return {**params, "layers": layers}


def fuse_layer(layer: Mapping[str, Any]) -> dict[str, Any]:
    """One layer's parameters with the linears of `FUSED` concatenated along n.

    Parts that differ in form (one dense, other groups, other bits) and those of a mixture of experts stay as they are.

    Args:
      layer: nested dict; kernels are arrays or `QTensor`, on the host or on a device.
    """
    layer = dict(layer)
    for module, name, parts in FUSED:
        given = layer.get(module)
        if not isinstance(given, Mapping) or not all(_is_linear(given.get(part)) for part in parts):
            continue
        linears = [given[part] for part in parts]
        if len({_form(linear) for linear in linears}) == 1:
            rest = {key: value for key, value in given.items() if key not in parts}
            layer[module] = {**rest, name: _side_by_side(linears)}
    return layer


def _is_linear(node: Any) -> bool:
    return isinstance(node, Mapping) and "kernel" in node and node["kernel"].ndim == 2


def _form(linear: Mapping[str, Any]) -> Any:
    """What must be equal: the tree, and of each leaf its dtype and all axes but the last."""
    leaves, tree = jax.tree.flatten(dict(linear), is_leaf=lambda x: x is None)
    return tree, tuple(None if x is None else (str(x.dtype), x.shape[:-1]) for x in leaves)


def _side_by_side(linears: Sequence[Any]) -> Any:
    def join(*leaves: Any) -> Any:
        host = all(isinstance(leaf, np.ndarray) for leaf in leaves)
        return (np if host else jnp).concatenate(leaves, axis=-1)

    return jax.tree.map(join, *linears)
