# SPDX-License-Identifier: Apache-2.0
"""Cut a packed weight into blocks of rows of bounded size, for loops that dequantize one at a time."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Integer

__all__ = ["row_blocks"]


def row_blocks(
    packed: Int8[Array, "k2 n"],
    scale: Float[Array, "groups n"],
    zero: Integer[Array, "groups n"] | None,
    limit: int,
) -> tuple[Int8[Array, "blocks rows2 n"], Float[Array, "blocks parts n"], Integer[Array, "blocks parts n"] | None]:
    """Blocks of at most `limit` weights, or the least that whole groups, or bytes of one group, allow.

    Args:
      packed: int8 ``[k/2, n]``.
      scale: ``[k/g, n]``.
      zero: ``[k/g, n]`` or None.
      limit: weights in a block, two to a byte.

    Returns:
      The same with a leading axis of blocks. Where one group exceeds a block its scale is repeated.

    >>> packed, scale = jnp.zeros((64, 2), jnp.int8), jnp.ones((1, 2))
    >>> [None if leaf is None else leaf.shape for leaf in row_blocks(packed, scale, None, limit=64)]
    [(4, 16, 2), (4, 1, 2), None]
    """
    (k2, n), groups = packed.shape, scale.shape[0]
    blocks = _divisor(groups, k2 * 2 * n / limit)
    pieces = _divisor(k2 // groups, k2 // groups * 2 * n / limit) if blocks == groups and k2 % groups == 0 else 1
    if pieces > 1:
        scale, zero = jax.tree.map(lambda leaf: jnp.repeat(leaf, pieces, axis=0), (scale, zero))
    cut = lambda leaf: leaf.reshape(blocks * pieces, -1, n)
    return cut(packed), cut(scale), None if zero is None else cut(zero)


def _divisor(number: int, least: float) -> int:
    """The least divisor of a number that is at least `least`, or the number."""
    return next((d for d in range(1, number) if number % d == 0 and d >= least), number)
