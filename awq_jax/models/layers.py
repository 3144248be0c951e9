# SPDX-License-Identifier: Apache-2.0
"""The parts of a decoder layer, as Flax NNX modules whose kernels may be dense or quantized."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from awq_jax._qtensor import matmul
from awq_jax.models.cache import LayerCache
from awq_jax.models.config import DecoderConfig
from awq_jax.models.rope import frequencies, rotate

__all__ = ["Attention", "Block", "Linear", "Mlp", "RMSNorm", "Tap"]

Tap = Callable[[str, Array], None]
"""Called while tracing with a linear's path and its input."""


class Linear(nnx.Module):
    """``x @ kernel + bias``; kernel ``[k, n]`` is an array or a `QTensor`."""

    def __init__(self, k: int, n: int, *, bias: bool, dtype: Any, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (k, n), dtype) * k**-0.5)
        self.bias = nnx.Param(jnp.zeros((n,), dtype)) if bias else None

    def __call__(self, x: Float[Array, "*b k"]) -> Float[Array, "*b n"]:
        """Outputs in the dtype of x."""
        y = matmul(x, self.kernel.get_value())
        return y if self.bias is None else y + self.bias.get_value().astype(x.dtype)


class RMSNorm(nnx.Module):
    """``x / rms(x) * scale`` in float32."""

    def __init__(self, width: int, *, eps: float, dtype: Any) -> None:
        self.scale = nnx.Param(jnp.ones((width,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """The normalised x, in its dtype."""
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (normed * self.scale.get_value().astype(jnp.float32)).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs) -> None:
        c = config
        wide, narrow = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.q = Linear(c.hidden_size, wide, bias=c.qkv_bias, dtype=dtype, rngs=rngs)
        self.k = Linear(c.hidden_size, narrow, bias=c.qkv_bias, dtype=dtype, rngs=rngs)
        self.v = Linear(c.hidden_size, narrow, bias=c.qkv_bias, dtype=dtype, rngs=rngs)
        self.o = Linear(wide, c.hidden_size, bias=c.o_bias, dtype=dtype, rngs=rngs)
        self.q_norm = RMSNorm(c.head_dim, eps=c.norm_eps, dtype=dtype) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, eps=c.norm_eps, dtype=dtype) if c.qk_norm else None
        self.config = config

    def __call__(
        self,
        x: Float[Array, "b t d"],
        positions: Int[Array, "b t"],
        *,
        cache: LayerCache | None = None,
        tap: Tap | None = None,
    ) -> tuple[Float[Array, "b t d"], LayerCache | None]:
        """Attend to earlier positions of x, or of the cache after writing x's keys and values into it."""
        c = self.config
        if tap:
            for name in ("attn/q", "attn/k", "attn/v"):
                tap(name, x)
        q, k, v = (part(x).reshape(*x.shape[:2], -1, c.head_dim) for part in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        freqs = frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
        q, k = rotate(q, positions, freqs), rotate(k, positions, freqs)
        if cache is not None:
            cache = cache.write(k, v, positions)
            k, v = cache.k.astype(q.dtype), cache.v.astype(q.dtype)
        # Slot i of a cache holds position i; without one, keys lie at the queries' own positions.
        held = (positions if cache is None else jnp.arange(k.shape[1])[None])[:, None, :]
        mask = held <= positions[..., None]
        if c.sliding_window is not None:
            mask &= held > positions[..., None] - c.sliding_window
        y = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None]).reshape(*x.shape[:2], -1)
        if tap:
            tap("attn/o", y)
        return self.o(y), cache


class Mlp(nnx.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs) -> None:
        d, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate = Linear(d, inner, bias=bias, dtype=dtype, rngs=rngs)
        self.up = Linear(d, inner, bias=bias, dtype=dtype, rngs=rngs)
        self.down = Linear(inner, d, bias=bias, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b t d"], *, tap: Tap | None = None) -> Float[Array, "b t d"]:
        """What the MLP adds to the stream."""
        if tap:
            tap("mlp/gate", x)
            tap("mlp/up", x)
        y = jax.nn.silu(self.gate(x)) * self.up(x)
        if tap:
            tap("mlp/down", y)
        return self.down(y)


class Block(nnx.Module):
    """One layer: attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs) -> None:
        self.input_norm = RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        self.attn = Attention(config, dtype=dtype, rngs=rngs)
        self.post_norm = RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        self.mlp = Mlp(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        h: Float[Array, "b t d"],
        positions: Int[Array, "b t"],
        *,
        cache: LayerCache | None = None,
        tap: Tap | None = None,
    ) -> tuple[Float[Array, "b t d"], LayerCache | None]:
        """The stream after this layer, and its cache with the new positions."""
        attended, cache = self.attn(self.input_norm(h), positions, cache=cache, tap=tap)
        h = h + attended
        return h + self.mlp(self.post_norm(h), tap=tap), cache
