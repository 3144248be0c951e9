# SPDX-License-Identifier: Apache-2.0
"""Grouped-query attention: one scale per kv channel, shared by the query heads that read it."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["Tie"]


@dataclasses.dataclass(frozen=True)
class Tie:
    """How the channels of v spread over the channels that o reads.

    Attention mixes tokens, never channels: channel ``d`` of kv head ``h`` reaches o as channel ``d`` of query heads
    ``h*repeats ... (h+1)*repeats - 1``. A scale on v is exact when those copies share it.

    Attributes:
      kv_heads: number of kv heads.
      repeats: query heads per kv head.
    """

    kv_heads: int
    repeats: int

    def pool(self, wide: Float[Array, " k"]) -> Float[Array, " c"]:
        """Mean over the copies: ``[heads * d]`` of o to ``[kv_heads * d]`` of v."""
        return wide.reshape(self.kv_heads, self.repeats, -1).mean(1).reshape(-1)

    def spread(self, narrow: Float[Array, " c"]) -> Float[Array, " k"]:
        """Copy to every query head: ``[kv_heads * d]`` of v to ``[heads * d]`` of o."""
        return jnp.repeat(narrow.reshape(self.kv_heads, 1, -1), self.repeats, axis=1).reshape(-1)
