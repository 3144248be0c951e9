# SPDX-License-Identifier: Apache-2.0
"""The definition of `ragged_int4_matmul`, in plain jnp."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Int32

from awq_jax_kernels.int4_matmul.reference import dequantize

__all__ = ["ragged_int4_matmul"]


def ragged_int4_matmul(
    x: Float[Array, "m k"],
    packed: Int8[Array, "e k2 n"],
    scale: Float[Array, "e groups n"],
    zero: Int8[Array, "e groups n"] | None,
    group_sizes: Int32[Array, " e"],
) -> Float[Array, "m n"]:
    """``y[i] = x[i] @ w[e]`` for the expert e whose share holds row i, in float32; zero past the last share."""
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(x.shape[0])[:, None]
    mine = (row >= ends - group_sizes) & (row < ends)  # [m, e]
    dense = dequantize(packed, scale, zero)
    y = jnp.einsum("me,mk,ekn->mn", mine.astype(jnp.float32), x.astype(jnp.float32), dense, precision="highest")
    return y.astype(x.dtype)
