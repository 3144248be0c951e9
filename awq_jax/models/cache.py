# SPDX-License-Identifier: Apache-2.0
"""Keys and values of earlier positions, in arrays of a fixed size."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from awq_jax._pytree import pytree
from awq_jax.models.config import DecoderConfig

__all__ = ["KVCache", "LayerCache"]


@pytree
class LayerCache:
    """One layer: ``k`` and ``v`` are ``[b, max_len, kv_heads, head_dim]``; slot i holds position i."""

    k: Any
    v: Any

    def write(
        self, k: Float[Array, "b t h d"], v: Float[Array, "b t h d"], positions: Int[Array, "b t"]
    ) -> "LayerCache":
        """Put new keys and values at their positions; those past the end are dropped."""
        row = jnp.arange(k.shape[0])[:, None]
        put = lambda held, new: held.at[row, positions].set(new.astype(held.dtype), mode="drop")
        return LayerCache(k=put(self.k, k), v=put(self.v, v))


@pytree
class KVCache:
    """All layers, and how many positions of each sequence are filled.

    Attributes:
      k: ``[layers, b, max_len, kv_heads, head_dim]``.
      v: the same.
      lengths: int32 ``[b]``.
    """

    k: Any
    v: Any
    lengths: Any

    @classmethod
    def empty(cls, config: DecoderConfig, batch: int, max_len: int, dtype: Any = jnp.float32) -> "KVCache":
        """A cache of zeros."""
        shape = (config.num_layers, batch, max_len, config.num_kv_heads, config.head_dim)
        return cls(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype), lengths=jnp.zeros((batch,), jnp.int32))

    @property
    def max_len(self) -> int:
        """Positions it has room for."""
        return self.k.shape[2]

    def layer(self, index: int) -> LayerCache:
        """The cache of one layer."""
        return LayerCache(k=self.k[index], v=self.v[index])

    def after(self, layers: list[LayerCache], tokens: int) -> "KVCache":
        """The cache once every layer has written ``tokens`` more positions."""
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
        return KVCache(k=stacked.k, v=stacked.v, lengths=self.lengths + tokens)
