# SPDX-License-Identifier: Apache-2.0
"""The next token of every row, each by its own rule, on the device."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from awq_jax._pytree import pytree
from awq_jax.models.sampling import truncated

__all__ = ["Sampling", "draw"]


@pytree
class Sampling:
    """How the rows of a batch are drawn; `awq_jax.models.sampling.sample` says what the numbers mean.

    Attributes:
      temperature: float32 ``[b]``; 0 is greedy.
      top_k: int32 ``[b]``; 0 keeps all tokens.
      top_p: float32 ``[b]``; 1 keeps all.
      seed: uint32 ``[b]``. A row's token depends on its seed, its position and its logits, not on its neighbours.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    seed: Any

    @classmethod
    def greedy(cls, batch: int) -> "Sampling":
        """The likeliest token in every row."""
        one = lambda value, dtype: jnp.full((batch,), value, dtype)
        return cls(
            temperature=one(0, jnp.float32), top_k=one(0, jnp.int32), top_p=one(1, jnp.float32), seed=one(0, jnp.uint32)
        )


def draw(
    logits: Float[Array, "b v"], sampling: Sampling, positions: Int[Array, " b"], axis: str | None = None
) -> Int[Array, " b"]:
    """One token for each row.

    Args:
      logits: float32.
      sampling: of each row.
      positions: of the tokens that are drawn.
      axis: mesh axis over which the columns are cut, inside `jax.shard_map`.

    Returns:
      int32 ``[b]``. Batches that are greedy throughout pay for no sort, and send no logits from device to device.
    """
    greedy = _largest(logits, axis)
    whole = lambda: logits if axis is None else jax.lax.all_gather(logits, axis, axis=1, tiled=True)
    drawn = lambda: jnp.where(sampling.temperature > 0, _drawn(whole(), sampling, positions), greedy)
    return jax.lax.cond(jnp.any(sampling.temperature > 0), drawn, lambda: greedy)


def _largest(logits: Array, axis: str | None) -> Array:
    """The first column with the largest logit."""
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if axis is None:
        return best
    values = jax.lax.all_gather(jnp.max(logits, axis=-1), axis)
    columns = jax.lax.all_gather(best + jax.lax.axis_index(axis) * logits.shape[-1], axis)
    return jnp.take_along_axis(columns, jnp.argmax(values, axis=0)[None], axis=0)[0]


def _drawn(logits: Array, sampling: Sampling, positions: Array) -> Array:
    vocab = logits.shape[-1]
    logits = logits / jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)[:, None]
    keep = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, vocab), vocab)
    logits = truncated(logits, keep, sampling.top_p)

    def one(seed: Array, position: Array, row: Array) -> Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), position), row)

    return jax.vmap(one)(sampling.seed, positions, logits).astype(jnp.int32)
