# SPDX-License-Identifier: Apache-2.0
"""The definition, in plain jax; what runs where there is no kernel."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from awq_jax_kernels.gated.api import gated
from awq_jax_kernels.int4_matmul import int4_matmul
from awq_jax_kernels.int4_matmul.pallas_gpu.ends import PART

__all__ = ["Stream", "add_product", "normed", "product", "start"]


class Stream(NamedTuple):
    """A residual stream, and its norm but for the division of each row by its root mean square.

    Attributes:
      total: ``[m, d]``, the stream.
      weighted: ``[m, d]``, ``total * (offset + weight)`` for the weight of the norm that reads it next.
      squares: float32 ``[m, d/32]``, which add up to the sum of a row's squares, in an order that is the kernel's;
        ``[m, 1]`` where 32 does not divide d.
    """

    total: Float[Array, "m d"]
    weighted: Float[Array, "m d"]
    squares: Float32[Array, "m parts"]


def start(total: Array, weight: Array, *, offset: float) -> Stream:
    """See `awq_jax_kernels.stream.api.start`."""
    wide = total.astype(jnp.float32)
    weighted = (wide * (offset + weight.astype(jnp.float32))).astype(total.dtype)
    m, d = total.shape
    parts = jnp.reshape(wide * wide, (m, d // PART if d % PART == 0 else 1, -1))
    return Stream(total, weighted, jnp.sum(parts, axis=-1))


def normed(stream: Stream, *, eps: float) -> Float[Array, "m d"]:
    """The norm of the stream, ``total / sqrt(mean(total**2) + eps) * (offset + weight)``, in its dtype."""
    mean = jnp.sum(stream.squares, axis=-1, keepdims=True) / stream.total.shape[-1]
    return (stream.weighted.astype(jnp.float32) * jax.lax.rsqrt(mean + eps)).astype(stream.total.dtype)


def product(stream: Stream, *weight: Any, eps: float, activation: str | None) -> Array:
    """See `awq_jax_kernels.stream.api.product`."""
    y = int4_matmul(normed(stream, eps=eps), *weight)
    return y if activation is None else gated(y, activation=activation)


def add_product(stream: Stream, x: Array, norm_weight: Array, *weight: Any, offset: float) -> Stream:
    """See `awq_jax_kernels.stream.api.add_product`."""
    return start(stream.total + int4_matmul(x, *weight), norm_weight, offset=offset)
