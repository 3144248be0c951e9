# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning that sees the rounding: straight-through estimators (Bengio et al. 2013) and learned scales.

Forward, a kernel is what its codes stand for; backward, rounding counts as the identity.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from awq_jax._operands import refuse_shape
from awq_jax._round import fake_quantize
from awq_jax._spec import QuantSpec
from awq_jax.adapt.kernel import QKernel, as_kernel, is_kernel
from awq_jax.adapt.layout import Layout
from awq_jax.adapt.program import flatten, unflatten

__all__ = ["fake_quantized", "learned", "learned_scales"]


def _straight_through(matrix: Array, spec: QuantSpec) -> Array:
    return matrix + jax.lax.stop_gradient(fake_quantize(matrix, spec) - matrix)


def fake_quantized(params: Any, weights: Mapping[str, Layout], spec: QuantSpec = QuantSpec()) -> Any:  # noqa: B008
    """Dense parameters with every kernel rounded to its grid and gradients that pass through the rounding.

    ``apply(fake_quantized(params, weights, spec), x)`` is the loss of what `quantize` will write: train ``params``
    through it, then quantize them.

    Args:
      params: dense, trained.
      weights: layouts of the kernels to round, from `awq_jax.adapt.find_weights` or a `Table`.
      spec: number format.

    Raises:
      ValueError: a layout's path is none of the parameters, or the group size does not divide its contraction.
    """
    leaves, tree = flatten(params)
    out = dict(leaves)
    for path, layout in weights.items():
        if path not in leaves:
            raise ValueError(f"{path!r} is not among the parameters {', '.join(list(leaves)[:4])}, ….")
        spec.rows_per_group(layout.k, path)
        matrix = layout.matrix(leaves[path].astype(jnp.float32))
        out[path] = layout.kernel(_straight_through(matrix, spec)).astype(leaves[path].dtype)
    return unflatten(tree, out)


def learned_scales(params: Any) -> dict[str, Array]:
    """The scales of every quantized kernel in float32, ``{path: [*lead, k/g, n]}``: what `learned` trains.

    Raises:
      ValueError: a kernel has an adapter beside it.
    """
    leaves, _ = flatten(params)
    kernels = {path: _kernel(path, leaf) for path, leaf in leaves.items() if is_kernel(leaf)}
    return {path: kernel.weight.scale.astype(jnp.float32) for path, kernel in kernels.items()}


def learned(params: Any, scales: Mapping[str, Array], *, store: bool = False) -> Any:
    """The tree with other scales on the same codes.

    Args:
      params: with `QKernel` or `QTensor` leaves.
      scales: from `learned_scales`, trained.
      store: put the scales into the kernels, in the dtype they had. Otherwise kernels become dense, made from the codes
        and the scales in a way that gradients with respect to the scales flow through: `awq_jax.matmul` gives them
        none. That makes dense kernels; put a layer under `jax.checkpoint` to keep one at a time.

    Raises:
      ValueError: a path is none of a quantized kernel, or its scales have another shape.
    """
    leaves, tree = flatten(params)
    out = dict(leaves)
    for path, scale in scales.items():
        kernel = _kernel(path, leaves.get(path))
        refuse_shape(f"the scale of {path!r}", scale, kernel.weight.scale.shape, "as learned_scales gives it")
        if store:
            kept = _replace(kernel.weight, scale.astype(kernel.weight.scale.dtype))
            leaf = leaves[path]
            out[path] = _with_weight(leaf, kept) if isinstance(leaf, QKernel) else kept
        else:
            out[path] = _with_weight(kernel, _replace(kernel.weight, scale)).dense()
    return unflatten(tree, out)


def _kernel(path: str, leaf: Any) -> QKernel:
    """A leaf that is a quantized kernel."""
    kernel = as_kernel(leaf)
    if not isinstance(kernel, QKernel):
        found = "not among the parameters" if leaf is None else f"of type {type(leaf).__name__}"
        raise ValueError(f"{path!r} is {found}; scales are learned of quantized kernels, without adapters beside them.")
    return kernel


def _replace(weight: Any, scale: Array) -> Any:
    return dataclasses.replace(weight, scale=scale)


def _with_weight(kernel: QKernel, weight: Any) -> QKernel:
    return QKernel(weight=weight, inverse=kernel.inverse, layout=kernel.layout, dtype=kernel.dtype)
