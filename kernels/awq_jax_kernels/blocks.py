# SPDX-License-Identifier: Apache-2.0
"""Loops over a packed weight, cut into blocks of rows of bounded size: one block at a time is dense."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Integer

__all__ = ["input_cotangent", "row_blocks", "sum_of_blocks"]


def row_blocks(
    packed: Int8[Array, "rows n"],
    scale: Float[Array, "groups n"],
    zero: Integer[Array, "groups n"] | None,
    limit: int,
) -> tuple[Int8[Array, "blocks part n"], Float[Array, "blocks parts n"], Integer[Array, "blocks parts n"] | None]:
    """Blocks of at most `limit` bytes of codes, or the least that whole groups, or bytes of one group, allow.

    Args:
      packed: int8 ``[k/2, n]``, or ``[k, n]`` for codes of eight bits.
      scale: ``[k/g, n]``.
      zero: ``[k/g, n]`` or None.
      limit: bytes of codes in a block.

    Returns:
      The same with a leading axis of blocks. Where one group exceeds a block its scale is repeated.

    >>> packed, scale = jnp.zeros((64, 2), jnp.int8), jnp.ones((1, 2))
    >>> [None if leaf is None else leaf.shape for leaf in row_blocks(packed, scale, None, limit=32)]
    [(4, 16, 2), (4, 1, 2), None]
    """
    (rows, n), groups = packed.shape, scale.shape[0]
    blocks = _divisor(groups, rows * n / limit)
    pieces = _divisor(rows // groups, rows // groups * n / limit) if blocks == groups and rows % groups == 0 else 1
    if pieces > 1:
        scale, zero = jax.tree.map(lambda leaf: jnp.repeat(leaf, pieces, axis=0), (scale, zero))
    cut = lambda leaf: leaf.reshape(blocks * pieces, -1, n)
    return cut(packed), cut(scale), None if zero is None else cut(zero)


def sum_of_blocks(product: Callable[..., Any], x: Any, blocks: Any) -> Array:
    """The sum of ``product(x[i], *block[i])`` over blocks.

    A weight of one block needs no loop; XLA for CPU runs the body of one on a single core.
    """
    # The first block stands for zeros that would have to know over which mesh axes they vary.
    first, rest = (jax.tree.map(lambda leaf, cut=cut: leaf[cut], (x, *blocks)) for cut in (0, slice(1, None)))
    if x.shape[0] == 1:
        return product(*first)
    y, _ = jax.lax.scan(lambda y, block: (y + product(*block), None), product(*first), rest)
    return y


def input_cotangent(dequantize: Callable[..., Any], dy: Float[Array, "m n"], blocks: Any) -> Float[Array, "m k"]:
    """``dx = dy @ w.T``, a block of k at a time, so that the dense weight never exists whole.

    A block is rounded to the dtype of dy, products accumulate in float32.

    Args:
      dequantize: the dense weight in float32 from a block.
      dy: ``[m, n]``.
      blocks: of `row_blocks`.

    Returns:
      ``[m, k]`` in the dtype of dy.
    """

    def cotangent(block: Any) -> Any:
        dense = dequantize(*block).astype(dy.dtype)
        # HIGHEST keeps float32 exact on a TPU and changes nothing for bfloat16.
        dx = jax.lax.dot_general(
            dy, dense, (((1,), (1,)), ((), ())), precision="highest", preferred_element_type=jnp.float32
        )
        return dx.astype(dy.dtype)

    dx = jax.lax.map(cotangent, blocks)  # [blocks, m, k/blocks]
    return jnp.moveaxis(dx, 0, 1).reshape(dy.shape[0], -1)


def _divisor(number: int, least: float) -> int:
    """The least divisor of a number that is at least `least`, or the number."""
    return next((d for d in range(1, number) if number % d == 0 and d >= least), number)
