# SPDX-License-Identifier: Apache-2.0
"""Attention as serving runs it: one new token for each row is one operation."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from awq_jax.models import DecoderConfig
from awq_jax.models.attention import Attention
from awq_jax.models.rope import rotate, turns
from awq_jax.serving.cache import HeldLayer
from awq_jax_kernels.decode_attention import decode_attention

__all__ = ["CachedAttention"]


class CachedAttention(Attention):
    """`Attention`, but for single tokens rotation, cache and attention are `decode_attention`, a kernel on a TPU."""

    def __call__(self, x: Array, positions: Array, *, cache: Any = None, tap: Any = None) -> tuple[Array, Any]:
        """As `Attention`."""
        c = self.config
        if not isinstance(cache, HeldLayer) or x.shape[1] > 1 or c.positions == "alibi":
            return super().__call__(x, positions, cache=cache, tap=tap)
        qkv, by = self._projected_once(x, positions)
        y, cache = self.attended(qkv, positions, by, cache)
        return self.o(y[:, None]), cache

    def attended(self, qkv: Array, positions: Array, by: Any, cache: HeldLayer) -> tuple[Array, HeldLayer]:
        """What o reads, ``[b, w]``, of q, k, v side by side and what still turns them; and the cache with k and v."""
        c = self.config
        y, parts = decode_attention(
            qkv,
            cache.parts(),
            positions[:, 0],
            by,
            heads=c.num_heads,
            scale=(c.query_scalar or c.head_dim) ** -0.5,
            window=c.sliding_window,
            softcap=c.attn_softcap,
            span=cache.k.span,
        )
        return y, cache.of_parts(*parts)

    def reads_as_it_is(self) -> bool:
        """Whether attention reads the product ``qkv`` and nothing lies between."""
        c = self.config
        turned = c.positions != "rotary" or c.rotary_dim == c.head_dim
        return hasattr(self, "qkv") and self.q_norm is None and turned and c.positions != "alibi"

    def turned_by(self, positions: Array) -> Any:
        """What turns q and k in attention, or None where nothing does."""
        c = self.config
        return _turns(c, positions) if c.positions == "rotary" and c.rotary_dim == c.head_dim else None

    def _projected_once(self, x: Array, positions: Array) -> tuple[Array, Any]:
        """q, k and v side by side, ``[b, w]``, and what turns q and k where that is still to do."""
        c, by = self.config, self.turned_by(positions)
        product = getattr(self, "qkv", None)
        if product is not None and self.reads_as_it_is():
            return product(x)[:, 0], by
        q, k, v = self.projected(x)
        if c.positions == "rotary" and by is None:
            part = turns(c, positions)
            q, k = rotate(q, part), rotate(k, part)
        return jnp.concatenate([y.reshape(x.shape[0], -1) for y in (q, k, v)], axis=1), by


def _turns(config: DecoderConfig, positions: Int[Array, "b 1"]) -> tuple[Array, Array]:
    """Cosine and signed sine for all channels, ``[b, head_dim]``."""
    cosine, sine = (part[:, 0, 0] for part in turns(config, positions))
    return jnp.concatenate([cosine, cosine], axis=-1), jnp.concatenate([-sine, sine], axis=-1)
