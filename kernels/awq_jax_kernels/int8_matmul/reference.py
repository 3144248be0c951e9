# SPDX-License-Identifier: Apache-2.0
"""The definition of `int8_matmul`, in plain jnp; every other implementation is held to it."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, UInt8

__all__ = ["dequantize", "int8_matmul"]


def dequantize(
    packed: Int8[Array, "*b k n"],
    scale: Float[Array, "*b groups n"],
    zero: UInt8[Array, "*b groups n"] | None = None,
) -> Float[Array, "*b k n"]:
    """The dense weight in float32: ``(q - zero) * scale`` with one scale and zero per group of rows.

    Args:
      packed: int8 ``q - 128``, ``[*b, k, n]``; see `awq_jax_kernels.layout`.
      scale: floating ``[*b, k/g, n]``.
      zero: uint8 codes 0..255 ``[*b, k/g, n]``; None means 128 everywhere (symmetric).

    Returns:
      float32 ``[*b, k, n]``.
    """
    *b, k, n = packed.shape
    groups = scale.shape[-2]
    grouped = packed.astype(jnp.float32).reshape(*b, groups, k // groups, n)
    if zero is not None:
        grouped = grouped - (zero.astype(jnp.float32) - 128)[..., None, :]
    return (grouped * scale.astype(jnp.float32)[..., None, :]).reshape(*b, k, n)


def int8_matmul(
    x: Float[Array, "*b m k"],
    packed: Int8[Array, "*b k n"],
    scale: Float[Array, "*b groups n"],
    zero: UInt8[Array, "*b groups n"] | None = None,
) -> Float[Array, "*b m n"]:
    """``y = x @ ((q - zero) * scale)``: dequantize in float32, multiply in float32, round once to ``x.dtype``."""
    dense = dequantize(packed, scale, zero)
    return jnp.matmul(x.astype(jnp.float32), dense, precision="highest").astype(x.dtype)
