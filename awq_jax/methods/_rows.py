# SPDX-License-Identifier: Apache-2.0
"""A grid spread over the rows of a weight, and what codes on it are worth: what rounding one row at a time needs."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from awq_jax._round import Grid, code_range
from awq_jax._spec import QuantSpec

__all__ = ["RowGrid", "block_of", "column_loss", "spread"]

_BLOCK = 128  # rows that are rounded one by one before the rest of the weight hears of it


class RowGrid(NamedTuple):
    """Scale and zero of every weight, ``[k, n]`` float32; a NamedTuple, so that indexing its leaves is a `tree.map`."""

    scale: Float[Array, "k n"]
    zero: Float[Array, "k n"]


def spread(grid: Grid, k: int) -> RowGrid:
    """From groups to rows."""
    g = k // grid.scale.shape[0]
    return RowGrid(jnp.repeat(grid.scale.astype(jnp.float32), g, axis=0), jnp.repeat(grid.zero, g, axis=0))


def to_codes(w: Array, grid: RowGrid, spec: QuantSpec) -> Array:
    """Nearest codes, as float32."""
    low, high = code_range(spec)
    return jnp.clip(jnp.round(w / grid.scale) + grid.zero, low, high)


def to_values(codes: Array, grid: RowGrid) -> Array:
    """What codes stand for."""
    return (codes - grid.zero) * grid.scale


def block_of(k: int) -> int:
    """The largest number of rows up to 128 that divides k."""
    return max(size for size in range(1, _BLOCK + 1) if k % size == 0)


def column_loss(error: Float[Array, "k n"], gram: Float[Array, "k k"]) -> Float[Array, " n"]:
    """``d_n' G d_n``: squared output error of every output."""
    return jnp.sum(error * jnp.matmul(gram, error, precision="highest"), axis=0)
