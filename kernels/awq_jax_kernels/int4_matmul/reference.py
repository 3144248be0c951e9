# SPDX-License-Identifier: Apache-2.0
"""The definition of `int4_matmul`, in plain jnp; every other implementation is held to it."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from awq_jax_kernels.nibbles import unpack

__all__ = ["dequantize", "int4_matmul", "supports"]


def supports(x: Any, packed: Any, scale: Any, zero: Any = None, *, config: Any = None) -> str | None:
    """None: the definition takes every operand. A config is refused."""
    return None if config is None else "takes no config"


def dequantize(
    packed: Int8[Array, "*b k2 n"],
    scale: Float[Array, "*b groups n"],
    zero: Int8[Array, "*b groups n"] | None = None,
) -> Float[Array, "*b k n"]:
    """The dense weight in float32: ``(q - zero) * scale`` with one scale and zero per group of rows.

    Args:
      packed: int8 ``[*b, k/2, n]`` in the layout of `awq_jax_kernels.nibbles`.
      scale: floating ``[*b, k/g, n]``.
      zero: int8 codes 0..15 ``[*b, k/g, n]``; None means 8 everywhere (symmetric).

    Returns:
      float32 ``[*b, k, n]``.
    """
    codes = unpack(packed).astype(jnp.float32)
    *b, k, n = codes.shape
    groups = scale.shape[-2]
    grouped = codes.reshape(*b, groups, k // groups, n)
    offset = jnp.float32(8) if zero is None else zero.astype(jnp.float32)[..., None, :]
    return ((grouped - offset) * scale.astype(jnp.float32)[..., None, :]).reshape(*b, k, n)


def int4_matmul(
    x: Float[Array, "*b m k"],
    packed: Int8[Array, "*b k2 n"],
    scale: Float[Array, "*b groups n"],
    zero: Int8[Array, "*b groups n"] | None = None,
    *,
    config: None = None,
) -> Float[Array, "*b m n"]:
    """``y = x @ ((q - zero) * scale)``: dequantize in float32, multiply in float32, round once to ``x.dtype``.

    Args:
      x: activations ``[*b, m, k]``, float32, bfloat16 or float16.
      packed: int8 ``[*b, k/2, n]``.
      scale: floating ``[*b, k/g, n]``; the group size g is ``k // scale.shape[-2]``.
      zero: int8 codes 0..15 ``[*b, k/g, n]``, or None for 8 everywhere.

    Returns:
      ``[*b, m, n]`` in the dtype of x.
    """
    dense = dequantize(packed, scale, zero)
    return jnp.matmul(x.astype(jnp.float32), dense, precision="highest").astype(x.dtype)
