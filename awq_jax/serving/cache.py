# SPDX-License-Identifier: Apache-2.0
"""The cache of a server: one buffer for each layer that is updated in place, in floating point or in int8."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from awq_jax._pytree import pytree, static
from awq_jax.models import DecoderConfig, KVCache
from awq_jax.models.cache import LayerCache
from awq_jax_kernels.decode_attention.reference import codes_of

__all__ = ["Held", "HeldLayer", "SlotCache", "insert"]


@pytree
class Held:
    """Keys or values of one layer, ``[b, max_len * heads, head_dim]``; row ``i heads + j`` is head j of position i.

    Attributes:
      data: floating, or int8 codes.
      scale: float32 ``[b, 1, max_len * heads]`` of int8 codes, max|x| / 127 of each head and position; else None.
      positions: that it has room for. The rows tell how many heads a share of a mesh has of each.
      span: positions that are read. A decode step of short sequences does not pay for the rest.
    """

    data: Any
    scale: Any = None
    positions: int = static(default=1)
    span: int = static(default=0)

    @property
    def heads(self) -> int:
        """kv heads."""
        return self.data.shape[1] // self.positions

    def written(self, new: Float[Array, "b t h d"], positions: Int[Array, "b t"]) -> "Held":
        """With new positions; those past the end are dropped."""
        row = jnp.arange(new.shape[0])[:, None, None]
        at = positions[..., None] * self.heads + jnp.arange(self.heads)
        if self.scale is None:
            return dataclasses.replace(self, data=self.data.at[row, at].set(new.astype(self.data.dtype), mode="drop"))
        codes, scale = codes_of(new)
        data = self.data.at[row, at].set(codes, mode="drop")
        return dataclasses.replace(self, data=data, scale=self.scale.at[row, 0, at].set(scale[..., 0], mode="drop"))

    def astype(self, dtype: Any) -> Float[Array, "b s h d"]:
        """What attention reads, ``[b, span, kv_heads, head_dim]``."""
        rows = self.span * self.heads
        read = self.data[:, :rows]
        if self.scale is not None:
            read = read.astype(jnp.float32) * self.scale[:, 0, :rows, None]
        return read.astype(dtype).reshape(read.shape[0], self.span, self.heads, -1)


@pytree
class HeldLayer(LayerCache):
    """A layer whose ``k`` and ``v`` are `Held`."""

    def parts(self) -> tuple[Any, Any, Any, Any]:
        """What `awq_jax_kernels.decode_attention` calls a cache."""
        return self.k.data, self.v.data, self.k.scale, self.v.scale

    def of_parts(self, k: Any, v: Any, k_scale: Any, v_scale: Any) -> "HeldLayer":
        """The same with other arrays."""
        put = dataclasses.replace
        return HeldLayer(k=put(self.k, data=k, scale=k_scale), v=put(self.v, data=v, scale=v_scale))

    def write(self, k: Array, v: Array, positions: Array) -> "HeldLayer":
        """Put new keys and values at their positions."""
        return HeldLayer(k=self.k.written(k, positions), v=self.v.written(v, positions))


@pytree
class SlotCache(KVCache):
    """``k`` and ``v`` are tuples of `Held`, one for each layer: a donated cache is written where it lies."""

    @classmethod
    def empty(cls, config: DecoderConfig, batch: int, max_len: int, dtype: Any = jnp.float32) -> "SlotCache":
        """A cache of zeros; ``dtype`` int8 keeps codes and a scale for each head and position."""
        rows = max_len * config.num_kv_heads
        scale = lambda: jnp.zeros((batch, 1, rows), jnp.float32) if jnp.dtype(dtype) == jnp.int8 else None
        data = lambda: jnp.zeros((batch, rows, config.head_dim), dtype)
        held = lambda: Held(data=data(), scale=scale(), positions=max_len, span=max_len)
        layers = range(config.num_layers)
        k, v = (tuple(held() for _ in layers) for _ in "kv")
        return cls(k=k, v=v, lengths=jnp.zeros((batch,), jnp.int32))

    @property
    def max_len(self) -> int:
        """Positions it has room for."""
        return self.k[0].positions

    def layer(self, index: int) -> LayerCache:
        """The cache of one layer."""
        return HeldLayer(k=self.k[index], v=self.v[index])

    def after(self, layers: list[LayerCache], tokens: int) -> "SlotCache":
        """The cache once every layer has written ``tokens`` more positions."""
        k, v = tuple(layer.k for layer in layers), tuple(layer.v for layer in layers)
        return SlotCache(k=k, v=v, lengths=self.lengths + tokens)

    def reading(self, span: int) -> "SlotCache":
        """The same, of which attention reads the first ``span`` slots."""
        narrow = lambda held: dataclasses.replace(held, span=span)
        return SlotCache(k=tuple(map(narrow, self.k)), v=tuple(map(narrow, self.v)), lengths=self.lengths)


def insert(cache: SlotCache, rows: Int[Array, " p"], new: SlotCache, lengths: Int[Array, " p"]) -> SlotCache:
    """The cache with rows replaced by those of a shorter one, such as a prefill's."""

    def put(held: Any, given: Any) -> Any:
        for index in range(given.shape[0]):
            held = jax.lax.dynamic_update_slice(held, given[index : index + 1], (rows[index], 0, 0))
        return held

    held, tree = jax.tree.flatten((cache.k, cache.v))
    k, v = jax.tree.unflatten(tree, map(put, held, jax.tree.leaves((new.k, new.v))))
    return SlotCache(k=k, v=v, lengths=cache.lengths.at[rows].set(lengths))
