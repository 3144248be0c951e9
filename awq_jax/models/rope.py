# SPDX-License-Identifier: Apache-2.0
"""Rotary position embeddings."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from awq_jax.models.config import DecoderConfig
from awq_jax.models.rope_scaling import frequencies

__all__ = ["rotate", "turns"]

Turns = tuple[Float[Array, "b t 1 p"], Float[Array, "b t 1 p"]]


def turns(config: DecoderConfig, positions: Int[Array, "b t"]) -> Turns:
    """Cosine and sine of position times frequency for each of p pairs of channels, float32."""
    freqs = jnp.asarray(frequencies(config.rotary_dim, config.rope_theta, config.rope_scaling))
    scaling = config.rope_scaling
    if freqs.ndim == 2 and scaling is not None:  # as in PyTorch, the longest text of a batch decides for all of it
        freqs = jnp.where(jnp.max(positions) >= scaling.original, freqs[1], freqs[0])
    angle = positions[..., None, None].astype(jnp.float32) * freqs
    size = 1.0 if scaling is None else scaling.attention_factor
    return jnp.cos(angle) * size, jnp.sin(angle) * size


def rotate(x: Float[Array, "b t h d"], by: Turns) -> Float[Array, "b t h d"]:
    """Turn channel pairs (i, i + p) of the first 2p channels of each head, in float32; the rest stays."""
    cos, sin = by
    pairs = cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), [pairs, 2 * pairs], axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
    return turned.astype(x.dtype)
