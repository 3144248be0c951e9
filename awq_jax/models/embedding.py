# SPDX-License-Identifier: Apache-2.0
"""From tokens to the stream."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from awq_jax.models.config import DecoderConfig
from awq_jax.models.norm import Norm

__all__ = ["Embedding"]


class Embedding(nnx.Module):
    """``embedding[token]``, with what a config adds: a factor, learned positions, a norm."""

    def __init__(self, config: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs) -> None:
        c, d = config, config.hidden_size
        table = lambda rows: nnx.Param(jax.random.normal(rngs.params(), (rows, d), dtype) * d**-0.5)
        self.embedding = table(c.vocab_size)
        learned = c.positions == "learned"
        self.positions = table(c.max_position_embeddings + c.position_offset) if learned else None
        self.norm = Norm(c, d, dtype=dtype) if c.embed_norm else None
        self.config = config

    def __call__(self, tokens: Int[Array, "*b t"], positions: Int[Array, "*b t"]) -> Float[Array, "*b t d"]:
        """The input of the first layer."""
        h = jnp.take(self.embedding.get_value(), tokens, axis=0)
        if self.config.scale_embedding:
            h = h * jnp.asarray(self.config.hidden_size**0.5, h.dtype)
        if self.positions is not None:
            h = h + jnp.take(self.positions.get_value(), positions + self.config.position_offset, axis=0)
        return h if self.norm is None else self.norm(h)

    def attend(self, h: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """Logits of a tied head."""
        return jnp.matmul(h, self.embedding.get_value().T.astype(h.dtype))
