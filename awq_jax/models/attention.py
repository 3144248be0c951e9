# SPDX-License-Identifier: Apache-2.0
"""Grouped-query attention, and how far it sees."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from awq_jax.models.alibi import alibi
from awq_jax.models.cache import LayerCache
from awq_jax.models.config import DecoderConfig
from awq_jax.models.linear import Linear, Tap
from awq_jax.models.norm import Norm
from awq_jax.models.rope import rotate, turns

__all__ = ["Attention"]


class Attention(nnx.Module):
    """``o(softmax(q k') v)``: each kv head serves num_heads / num_kv_heads query heads."""

    def __init__(self, config: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs) -> None:
        c = config
        wide, narrow = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.q = Linear(c.hidden_size, wide, bias=c.qkv_bias, dtype=dtype, rngs=rngs)
        self.k = Linear(c.hidden_size, narrow, bias=c.qkv_bias, dtype=dtype, rngs=rngs)
        self.v = Linear(c.hidden_size, narrow, bias=c.qkv_bias, dtype=dtype, rngs=rngs)
        self.o = Linear(wide, c.hidden_size, bias=c.o_bias, dtype=dtype, rngs=rngs)
        widths = {None: (), "head": (c.head_dim, c.head_dim), "all": (wide, narrow)}[c.qk_norm]
        self.q_norm, self.k_norm = [Norm(c, width, dtype=dtype) for width in widths] or (None, None)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "b t d"],
        positions: Int[Array, "b t"],
        *,
        cache: LayerCache | None = None,
        tap: Tap | None = None,
    ) -> tuple[Float[Array, "b t d"], LayerCache | None]:
        """What attention adds to the stream, and the cache with the new positions."""
        c = self.config
        if tap:
            for name in ("attn/q", "attn/k", "attn/v"):
                tap(name, x)
        q, k, v = self._heads(x, positions)
        if cache is not None:
            cache = cache.write(k, v, positions)
            k, v = cache.k.astype(q.dtype), cache.v.astype(q.dtype)
        # Slot i of a cache holds position i; without one, keys lie at the queries' own positions.
        held = (positions if cache is None else jnp.arange(k.shape[1])[None])[:, None, :]
        mask = held <= positions[..., None]
        if c.sliding_window is not None:
            mask &= held > positions[..., None] - c.sliding_window
        bias = alibi(c.num_heads, held) if c.positions == "alibi" else None
        y = attend(c, q, k, v, mask[:, None], bias).reshape(*x.shape[:2], -1)
        if tap:
            tap("attn/o", y)
        return self.o(y), cache

    def _heads(self, x: Float[Array, "b t d"], positions: Int[Array, "b t"]) -> tuple[Array, Array, Array]:
        """q, k and v as ``[b, t, heads, head_dim]``, normed and turned as the config says."""
        q, k, v = self.projected(x)
        if self.config.positions == "rotary":
            by = turns(self.config, positions)
            q, k = rotate(q, by), rotate(k, by)
        return q, k, v

    def projected(self, x: Float[Array, "b t d"]) -> tuple[Array, Array, Array]:
        """q, k and v as ``[b, t, heads, head_dim]``, normed as the config says."""
        c = self.config
        q, k, v = (part(x) for part in (self.q, self.k, self.v))
        split = lambda y: y.reshape(*x.shape[:2], -1, c.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            if c.qk_norm == "head":
                q, k = self.q_norm(split(q)), self.k_norm(split(k))
            else:
                q, k = self.q_norm(q), self.k_norm(k)
        return split(q), split(k), split(v)


def attend(
    config: DecoderConfig,
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s kv d"],
    v: Float[Array, "b s kv d"],
    mask: Bool[Array, "b 1 t s"],
    bias: Float[Array, "_ h 1 s"] | None,  # one row for all of a batch where a cache holds the keys
) -> Float[Array, "b t h d"]:
    """``softmax(cap(q k' scale) + bias) v`` over what the mask allows."""
    scale = (config.query_scalar or config.head_dim) ** -0.5
    cap = config.attn_softcap
    if cap is None:
        bias = None if bias is None else bias.astype(q.dtype)
        return jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask, scale=scale)
    b, t, h, d = q.shape
    kv = k.shape[2]
    grouped = q.reshape(b, t, kv, h // kv, d)
    scores = jnp.einsum("btkrd,bskd->bkrts", grouped, k, preferred_element_type=jnp.float32) * scale
    scores = cap * jnp.tanh(scores / cap)
    if bias is not None:
        scores = scores + bias.reshape(bias.shape[0], kv, h // kv, *bias.shape[2:])
    weights = jax.nn.softmax(jnp.where(mask[:, :, None], scores, -jnp.inf), axis=-1).astype(v.dtype)
    return jnp.einsum("bkrts,bskd->btkrd", weights, v).reshape(b, t, h, d)
