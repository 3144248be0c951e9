# SPDX-License-Identifier: Apache-2.0
"""The definition of `w8a8_matmul`, in plain jnp."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from awq_jax_kernels.w8a8_matmul.rounding import round_rows

__all__ = ["w8a8_matmul"]


def w8a8_matmul(
    x: Float[Array, "*b m k"],
    packed: Int8[Array, "*b k n"],
    scale: Float[Array, "*b 1 n"],
    step: Float[Array, ""] | None = None,
) -> Float[Array, "*b m n"]:
    """``y = (round(x / s) @ c) * s * scale``: the sum is exact, what follows is float32, rounded to x's dtype."""
    codes, each = round_rows(x, step)
    total = jnp.matmul(codes.astype(jnp.int32), packed.astype(jnp.int32))
    return (total.astype(jnp.float32) * each * scale.astype(jnp.float32)).astype(x.dtype)
