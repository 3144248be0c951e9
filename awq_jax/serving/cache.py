# SPDX-License-Identifier: Apache-2.0
"""The cache of a server: one buffer for each layer that is updated in place, in floating point or in int8."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from awq_jax._pytree import pytree, static
from awq_jax.models import DecoderConfig, KVCache
from awq_jax.models.cache import LayerCache

__all__ = ["Held", "SlotCache", "insert"]


@pytree
class Held:
    """Keys or values of one layer, ``[b, kv_heads, max_len, head_dim]``; slot i holds position i.

    Attributes:
      data: floating, or int8 codes.
      scale: float32 ``[b, kv_heads, max_len, 1]`` of int8 codes, max|x| / 127 of each head and position; else None.
      span: slots that are read. A decode step of short sequences does not pay for the rest.
    """

    data: Any
    scale: Any = None
    span: int = static(default=0)

    def written(self, new: Float[Array, "b t h d"], positions: Int[Array, "b t"]) -> "Held":
        """With new positions; those past the end are dropped."""
        row = jnp.arange(new.shape[0])[:, None]
        put = lambda held, x: held.at[row, :, positions].set(x.astype(held.dtype), mode="drop")
        if self.scale is None:
            return Held(data=put(self.data, new), span=self.span)
        codes, scale = _quantized(new)
        return Held(data=put(self.data, codes), scale=put(self.scale, scale), span=self.span)

    def astype(self, dtype: Any) -> Float[Array, "b s h d"]:
        """What attention reads, ``[b, span, kv_heads, head_dim]``."""
        take = lambda held: jnp.swapaxes(held[:, :, : self.span], 1, 2)
        if self.scale is None:
            return take(self.data).astype(dtype)
        return (take(self.data).astype(jnp.float32) * take(self.scale)).astype(dtype)


def _quantized(x: Array) -> tuple[Array, Array]:
    wide = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(wide), axis=-1, keepdims=True), 1e-30) / 127
    return jnp.round(wide / scale).astype(jnp.int8), scale


@pytree
class _Layer(LayerCache):
    """A layer whose ``k`` and ``v`` are `Held`."""

    def write(self, k: Array, v: Array, positions: Array) -> "_Layer":
        """Put new keys and values at their positions."""
        return _Layer(k=self.k.written(k, positions), v=self.v.written(v, positions))


@pytree
class SlotCache(KVCache):
    """``k`` and ``v`` are tuples of `Held`, one for each layer: a donated cache is written where it lies."""

    @classmethod
    def empty(cls, config: DecoderConfig, batch: int, max_len: int, dtype: Any = jnp.float32) -> "SlotCache":
        """A cache of zeros; ``dtype`` int8 keeps codes and a scale for each head and position."""
        shape = (batch, config.num_kv_heads, max_len, config.head_dim)
        scale = lambda: jnp.zeros((*shape[:3], 1), jnp.float32) if jnp.dtype(dtype) == jnp.int8 else None
        held = lambda: Held(data=jnp.zeros(shape, dtype), scale=scale(), span=max_len)
        layers = range(config.num_layers)
        k, v = (tuple(held() for _ in layers) for _ in "kv")
        return cls(k=k, v=v, lengths=jnp.zeros((batch,), jnp.int32))

    @property
    def max_len(self) -> int:
        """Positions it has room for."""
        return self.k[0].data.shape[2]

    def layer(self, index: int) -> LayerCache:
        """The cache of one layer."""
        return _Layer(k=self.k[index], v=self.v[index])

    def after(self, layers: list[LayerCache], tokens: int) -> "SlotCache":
        """The cache once every layer has written ``tokens`` more positions."""
        k, v = tuple(layer.k for layer in layers), tuple(layer.v for layer in layers)
        return SlotCache(k=k, v=v, lengths=self.lengths + tokens)

    def reading(self, span: int) -> "SlotCache":
        """The same, of which attention reads the first ``span`` slots."""
        narrow = lambda held: Held(data=held.data, scale=held.scale, span=span)
        return SlotCache(k=tuple(map(narrow, self.k)), v=tuple(map(narrow, self.v)), lengths=self.lengths)


def insert(cache: SlotCache, rows: Int[Array, " p"], new: SlotCache, lengths: Int[Array, " p"]) -> SlotCache:
    """The cache with rows replaced by those of a shorter one, such as a prefill's."""

    def put(held: Any, given: Any) -> Any:
        for index in range(given.shape[0]):
            held = jax.lax.dynamic_update_slice(held, given[index : index + 1], (rows[index], 0, 0, 0))
        return held

    k, v = jax.tree.map(put, (cache.reading(0).k, cache.reading(0).v), (new.reading(0).k, new.reading(0).v))
    filled = SlotCache(k=k, v=v, lengths=cache.lengths.at[rows].set(lengths))
    return filled.reading(cache.k[0].span)
