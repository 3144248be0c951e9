# SPDX-License-Identifier: Apache-2.0
"""Normalisation over channels."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from awq_jax.models.config import DecoderConfig

__all__ = ["Norm"]


class Norm(nnx.Module):
    """``x / rms(x) * (offset + scale)`` in float32; "layer" takes the mean out first and adds a bias."""

    def __init__(self, config: DecoderConfig, width: int, *, dtype: Any) -> None:
        self.scale = nnx.Param(jnp.full((width,), 1.0 - config.norm_offset, dtype))
        self.bias = nnx.Param(jnp.zeros((width,), dtype)) if config.norm == "layer" else None
        self.eps, self.offset = config.norm_eps, config.norm_offset

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """The normalised x, in its dtype."""
        wide = x.astype(jnp.float32)
        if self.bias is not None:
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        y = normed * (self.offset + self.scale.get_value().astype(jnp.float32))
        if self.bias is not None:
            y = y + self.bias.get_value().astype(jnp.float32)
        return y.astype(x.dtype)
