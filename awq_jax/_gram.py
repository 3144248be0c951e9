# SPDX-License-Identifier: Apache-2.0
"""Gram matrices ``X'X``, whole or only their diagonal blocks.

A whole one takes ``4 k**2`` bytes, 3.3 GB for the 28,672 inputs of the widest linear of a 70B model. Blocks of B rows
take ``4 k B``: what inputs of different blocks have in common is left out, so that the search scores the output error
as if they were uncorrelated. What a clip search looks at, blocks of single quantization groups, is in them unchanged.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["PRECISION", "block_rows", "diagonal_blocks", "gram_of", "rescaled", "times"]

PRECISION = "high"
"""Of products that make or read a Gram matrix: tf32 on a GPU, three passes of bfloat16 on a TPU, float32 on a CPU.

Rounding x to tf32 keeps ``X'X`` symmetric and positive, of inputs that are off by 3e-4 of themselves, less than
bfloat16 activations are anyway. Full float32 runs past the matrix units, and would take most of the time on a GPU.
"""


def block_rows(k: int, multiple: int, limit: int | None, copies: int = 1) -> int:
    """Rows of the blocks of a Gram matrix that is to take so many bytes.

    Args:
      k: width of the input.
      multiple: rows that must stay in one block, those of a quantization group; divides k.
      limit: in bytes; None does not limit.
      copies: how many such matrices there are: one for each expert.

    Returns:
      k where the whole matrix fits, else the largest divisor of k that is a multiple and fits, at least ``multiple``.

    >>> block_rows(4096, 128, 1 << 30), block_rows(28_672, 128, 1 << 30), block_rows(28_672, 128, 0)
    (4096, 7168, 128)
    """
    if limit is None:
        return k
    fits = (k // parts for parts in range(1, k // multiple + 1) if k % parts == 0 and k // parts % multiple == 0)
    return next((rows for rows in fits if 4 * copies * k * rows <= limit), multiple)


def gram_of(x: Float[Array, "t k"], block: int | None = None) -> Float[Array, "..."]:
    """``X'X`` of float32: ``[k, k]``, or its diagonal blocks ``[k/block, block, block]``."""
    if block is None or block == x.shape[1]:
        return jnp.matmul(x.T, x, precision=PRECISION)
    parts = x.reshape(len(x), -1, block)
    return jnp.einsum("tpi,tpj->pij", parts, parts, precision=PRECISION)


def times(gram: Float[Array, "..."], error: Float[Array, "k n"]) -> Float[Array, "k n"]:
    """``G D`` for a whole or a blocked G.

    >>> times(jnp.array([[[2.0]], [[3.0]]]), jnp.ones((2, 1))).ravel().tolist()
    [2.0, 3.0]
    """
    if gram.ndim == 2:
        return jnp.matmul(gram, error, precision=PRECISION)
    parts, block, _ = gram.shape
    return jnp.matmul(gram, error.reshape(parts, block, -1), precision=PRECISION).reshape(error.shape)


def diagonal_blocks(gram: Float[Array, "..."], rows: int) -> Float[Array, "groups g g"]:
    """The blocks of ``rows`` rows on the diagonal; ``rows`` divides those of a blocked G."""
    if gram.ndim == 2:
        gram = gram[None]
    parts, block, _ = gram.shape
    each = jnp.arange(block // rows)
    inner = gram.reshape(parts, block // rows, rows, block // rows, rows)[:, each, :, each, :]
    return jnp.moveaxis(inner, 0, 1).reshape(-1, rows, rows)


def rescaled(gram: Float[Array, "..."], scale: Float[Array, "*e k"]) -> Float[Array, "..."]:
    """The Gram matrix of inputs that are divided by a scale, with the scale's leading axes."""
    if gram.ndim == scale.ndim + 2:
        scale = scale.reshape(*gram.shape[:-1])
    return gram / (scale[..., :, None] * scale[..., None, :])
