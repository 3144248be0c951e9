# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters on a frozen base, quantized or dense.

``y = x W + (alpha / rank) (x A) B``: the base is read, only A and B are trained (Hu et al. 2021, section 4.1; on a
quantized base, Dettmers et al. 2023). B starts at zero, so that training starts from the base.
"""

import fnmatch
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from awq_jax._pytree import pytree, static
from awq_jax.adapt.kernel import as_kernel, is_kernel
from awq_jax.adapt.layout import Layout
from awq_jax.adapt.program import flatten, unflatten

__all__ = ["Adapted", "apply_adapters", "init_adapters", "merge_adapters"]

Adapters = dict[str, dict[str, Array]]
"""``{path: {"a": [*lead, k, rank], "b": [*lead, rank, n]}}``: what is trained, a plain tree."""


@pytree
class Adapted:
    """A kernel with an adapter beside it, in the place of a dense leaf; `awq_jax.adapt.serve` runs programs with it.

    Attributes:
      base: a `QKernel`, or a dense array.
      a: ``[*lead, k, rank]``.
      b: ``[*lead, rank, n]``.
      layout: how the matrix lies in the kernel.
      factor: ``alpha / rank``.
    """

    base: Any
    a: Any
    b: Any
    layout: Any = static()
    factor: float = static(default=1.0)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense kernel."""
        return self.layout.shape

    @property
    def dtype(self) -> Any:
        """Of the dense kernel."""
        return self.base.dtype

    def contract(self, x: Array) -> Array:
        """``x @ (W + factor * A B)``, in the order that makes no dense matrix."""
        low = jnp.matmul(jnp.matmul(x, self.a.astype(x.dtype)), self.b.astype(x.dtype))
        if is_kernel(self.base):
            y = self.base.contract(x)
        else:
            y = jnp.matmul(x, self.base.astype(x.dtype))
        return y + jnp.asarray(self.factor, x.dtype) * low

    def dense(self) -> Array:
        """The merged kernel, float32."""
        return _merged(self.base if is_kernel(self.base) else self.layout.kernel(self.base), self)


def _merged(base: Any, adapted: Any) -> Array:
    wide = (base.dense() if is_kernel(base) else base).astype(jnp.float32)
    update = jnp.matmul(adapted.a.astype(jnp.float32), adapted.b.astype(jnp.float32), precision="highest")
    return wide + adapted.factor * adapted.layout.kernel(update)


def _layouts(leaves: Mapping[str, Any], weights: Mapping[str, Layout] | None) -> dict[str, Layout]:
    """Of every kernel that can carry an adapter."""
    quantized = {path: as_kernel(leaf).layout for path, leaf in leaves.items() if is_kernel(leaf)}
    return {**(weights or {}), **quantized}


def init_adapters(
    key: Key[Array, ""],
    params: Any,
    *,
    rank: int = 8,
    match: str | tuple[str, ...] = "*",
    weights: Mapping[str, Layout] | None = None,
    dtype: Any = jnp.float32,
) -> Adapters:
    """New adapters for the kernels of a tree: A is random, B is zero.

    Args:
      key: of the randomness.
      params: with `QKernel` or `QTensor` leaves.
      rank: of the adapters.
      match: globs over the paths of kernels.
      weights: layouts of dense kernels, from `awq_jax.adapt.find_weights`; without it only quantized ones get adapters.
      dtype: of the adapters.

    Raises:
      ValueError: no kernel matches, or the rank is not positive.
    """
    globs = (match,) if isinstance(match, str) else match
    leaves, _ = flatten(params)
    layouts = _layouts(leaves, weights)
    chosen = [p for p in leaves if p in layouts and any(fnmatch.fnmatchcase(p, g) for g in globs)]
    if rank < 1:
        raise ValueError(f"rank is {rank}; an adapter needs at least 1.")
    if not chosen:
        raise ValueError(f"no kernel matches {', '.join(globs)}; kernels are {', '.join(list(layouts)[:4]) or 'none'}.")
    made = {}
    for path, k in zip(chosen, jax.random.split(key, len(chosen)), strict=True):
        layout = layouts[path]
        a = jax.random.normal(k, (*layout.lead, layout.k, rank), dtype) / math.sqrt(layout.k)
        made[path] = {"a": a, "b": jnp.zeros((*layout.lead, rank, layout.n), dtype)}
    return made


def apply_adapters(
    params: Any, adapters: Adapters, *, alpha: float = 16.0, weights: Mapping[str, Layout] | None = None
) -> Any:
    """The tree with adapters beside its kernels, for `awq_jax.adapt.serve`; nothing is computed.

    Gradients with respect to ``adapters`` flow; the base is frozen if you do not differentiate it.

    Args:
      params: as given to `init_adapters`.
      adapters: from it.
      alpha: the adapters' product is multiplied by ``alpha / rank``.
      weights: as given to `init_adapters`.

    Raises:
      ValueError: an adapter's path has no kernel.
    """
    leaves, tree = flatten(params)
    layouts = _layouts(leaves, weights)
    out = dict(leaves)
    for path, adapter in adapters.items():
        if path not in leaves or path not in layouts:
            raise ValueError(f"the adapter {path!r} has no kernel among {', '.join(list(layouts)[:4]) or 'none'}, ….")
        base, layout = as_kernel(leaves[path]), layouts[path]
        out[path] = Adapted(
            base=base if is_kernel(base) else layout.matrix(base),
            a=adapter["a"],
            b=adapter["b"],
            layout=layout,
            factor=alpha / adapter["a"].shape[-1],
        )
    return unflatten(tree, out)


def merge_adapters(
    params: Any, adapters: Adapters, *, alpha: float = 16.0, weights: Mapping[str, Layout] | None = None
) -> Any:
    """A dense tree: every kernel dequantized, adapters added to theirs. Quantize it again with the verbs.

    Other leaves are as they are; kernels have the dtype that their dense leaf had.
    """
    leaves, tree = flatten(apply_adapters(params, adapters, alpha=alpha, weights=weights))
    dense = {path: as_kernel(leaf) for path, leaf in leaves.items()}
    dense = {path: leaf.dense().astype(leaf.dtype) if is_kernel(leaf) else leaf for path, leaf in dense.items()}
    return unflatten(tree, dense)
