# SPDX-License-Identifier: Apache-2.0
"""The definition, in plain jax; what runs where there is no kernel."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

__all__ = ["add_norm", "norm"]


def norm(s: Array, weight: Array, eps: float, offset: float) -> Array:
    """``s / sqrt(mean(s**2) + eps) * (offset + weight)`` of float32."""
    return s * jax.lax.rsqrt(jnp.mean(s * s, axis=-1, keepdims=True) + eps) * (offset + weight)


def add_norm(h: Array, delta: Array | None, weight: Array, *, eps: float, offset: float) -> tuple[Array, Array]:
    """See `awq_jax_kernels.add_norm.add_norm`."""
    total = h if delta is None else (h + delta).astype(h.dtype)
    return total, norm(total.astype(jnp.float32), weight, eps, offset).astype(h.dtype)
