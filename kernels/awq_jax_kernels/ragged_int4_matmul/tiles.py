# SPDX-License-Identifier: Apache-2.0
"""Lay rows out in tiles of which each belongs to one expert, and back."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

__all__ = ["in_tiles", "place_rows"]


def place_rows(group_sizes: Int32[Array, " e"], m: int, tile: int) -> tuple[Int32[Array, " m"], Int32[Array, " tiles"]]:
    """Where each row goes, and whose each tile is.

    Every expert's share starts a new tile, so m rows need at most ``m // tile + e`` tiles, a number known when the
    program is compiled.

    Args:
      group_sizes: int32 ``[e]``, rows of each expert, in order. They may add up to less than m.
      m: rows.
      tile: rows of a tile.

    Returns:
      int32 ``[m]``, the place of a row among all tiles' rows, past the end for rows that belong to nobody, and int32
      ``[tiles]``, the expert of each tile; unused tiles repeat the last one.

    >>> rows, experts = place_rows(jnp.array([3, 0, 2], jnp.int32), m=5, tile=2)
    >>> rows.tolist(), experts.tolist()
    ([0, 1, 2, 4, 5], [0, 0, 2, 2, 2])
    """
    count, ends = group_sizes.shape[0], jnp.cumsum(group_sizes)
    tiles_of = -(-group_sizes // tile)
    last_tile = jnp.cumsum(tiles_of)
    total = m // tile + count
    row = jnp.arange(m, dtype=jnp.int32)
    expert = jnp.searchsorted(ends, row, side="right")
    safe = jnp.minimum(expert, count - 1)
    place = (last_tile - tiles_of)[safe] * tile + row - (ends - group_sizes)[safe]
    owner = jnp.searchsorted(last_tile, jnp.arange(total), side="right")
    last_used = jnp.searchsorted(last_tile, last_tile[-1] - 1, side="right")
    place = jnp.where(expert < count, place, total * tile)
    return place.astype(jnp.int32), jnp.minimum(owner, last_used).astype(jnp.int32)


def in_tiles(
    x: Float[Array, "m k"], group_sizes: Int32[Array, " e"], tile: int
) -> tuple[Float[Array, "tiles tile k"], Int32[Array, " tiles"], Int32[Array, " m"]]:
    """Rows in tiles of one expert each, filled up with zeros; whose each tile is; and where each row went.

    Args:
      x: ``[m, k]``, the rows of expert 0 first.
      group_sizes: int32 ``[e]``, rows of each expert.
      tile: rows of a tile.
    """
    place, experts = place_rows(group_sizes, x.shape[0], tile)
    rows = jnp.zeros((experts.shape[0] * tile, x.shape[1]), x.dtype).at[place].set(x, mode="drop")
    return rows.reshape(-1, tile, x.shape[1]), experts, place
