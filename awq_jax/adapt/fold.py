# SPDX-License-Identifier: Apache-2.0
"""Folding scales into leaves of any layout: rows of the sinks times t, channels of the producer over t."""

from collections.abc import Iterable, Mapping

import jax.numpy as jnp
from jaxtyping import Array

from awq_jax.adapt.columns import spread
from awq_jax.adapt.layout import Layout
from awq_jax.adapt.table import Instance, Table

__all__ = ["fold_instances", "rows_of", "scale_channels", "scale_rows"]


def rows_of(instance: Instance, t: Array) -> Array:
    """``[*lead, k]``: t as the sinks' rows see it."""
    tie = instance.group.tie
    if tie is None:
        return t
    heads = t.reshape(*t.shape[:-1], tie.kv_heads, 1, -1)
    return jnp.repeat(heads, tie.repeats, axis=-2).reshape(*t.shape[:-1], -1)


def scale_rows(kernel: Array, layout: Layout, rows: Array) -> Array:
    """A kernel with the rows of its matrix multiplied; experts that the scale does not tell apart share it."""
    shared = len(layout.lead) - (rows.ndim - 1)
    spread = rows.reshape(*rows.shape[:-1], *(1,) * shared, rows.shape[-1], 1)
    return layout.kernel(layout.matrix(kernel.astype(jnp.float32)) * spread).astype(kernel.dtype)


def scale_channels(leaf: Array, layout: Layout | None, offset: float | Array, t: Array) -> Array:
    """A producer's leaf with its output channels multiplied by t: a gain or bias, or a kernel's columns.

    Args:
      leaf: of the producer.
      layout: of a kernel; None for a gain or a bias.
      offset: 1 for gains that stand for ``1 + gain``.
      t: ``[*lead, channels]``.
    """
    wide = leaf.astype(jnp.float32)
    if layout is None:
        return ((offset + wide) * t.reshape(leaf.shape) - offset).astype(leaf.dtype)
    columns = t.reshape(*layout.lead, 1, layout.n)  # experts among the outputs may have been leading axes of t
    return layout.kernel(layout.matrix(wide) * columns).astype(leaf.dtype)


def fold_instances(
    leaves: Mapping[str, Array], table: Table, scales: Iterable[tuple[Instance, Array]]
) -> dict[str, Array]:
    """Fold scales into a flat tree; the function that it parametrizes stays the same.

    Args:
      leaves: dense, by path.
      table: layouts.
      scales: each instance with its t, ``[*lead of the producer, channels]``.
    """
    out = dict(leaves)
    for instance, t in scales:
        rows = rows_of(instance, t)
        for sink in instance.sinks:
            out[sink] = scale_rows(out[sink], table.weights[sink], rows)
        absorb, columns = instance.producer, instance.group.columns
        assert absorb is not None
        layout = table.weights.get(absorb)
        wide = 1 / t if layout is None else spread(1 / t, columns, layout)
        out[absorb] = scale_channels(out[absorb], layout, instance.group.offset, wide)
        if instance.bias:
            out[instance.bias] = scale_channels(out[instance.bias], None, 0.0, wide)
    return out
