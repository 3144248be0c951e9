# SPDX-License-Identifier: Apache-2.0
"""The gradient of `int4_matmul` with respect to x; the weight is frozen."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

from awq_jax_kernels.int4_matmul.blocks import row_blocks
from awq_jax_kernels.int4_matmul.reference import dequantize

__all__ = ["frozen", "input_cotangent"]

_BLOCK_ELEMENTS = 1 << 20  # of the weight, dequantized at a time: 4 MiB of float32


def input_cotangent(
    dy: Float[Array, "m n"],
    packed: Int8[Array, "k2 n"],
    scale: Float[Array, "groups n"],
    zero: Int8[Array, "groups n"] | None,
) -> Float[Array, "m k"]:
    """``dx = dy @ ((q - zero) * scale).T``, a block of k at a time, so that the dense weight never exists whole.

    A block holds about a million weights. It is rounded to the dtype of dy, products accumulate in
    float32.

    Args:
      dy: ``[m, n]``.
      packed: int8 ``[k/2, n]``.
      scale: ``[k/g, n]``.
      zero: int8 ``[k/g, n]`` or None.

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

    dx = jax.lax.map(cotangent, row_blocks(packed, scale, zero, _BLOCK_ELEMENTS))  # [blocks, m, k/blocks]
    return jnp.moveaxis(dx, 0, 1).reshape(dy.shape[0], -1)


def frozen(packed: Any, scale: Any, zero: Any) -> tuple[Any, Any, Any]:
    """Cotangents of a frozen weight: float0 for the integers, zero for the scale."""
    float0 = lambda leaf: None if leaf is None else np.zeros(leaf.shape, jax.dtypes.float0)
    return float0(packed), jnp.zeros_like(scale), float0(zero)
