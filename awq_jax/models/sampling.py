# SPDX-License-Identifier: Apache-2.0
"""From logits to the next token."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

__all__ = ["sample"]


def sample(
    logits: Float[Array, "b v"],
    key: Array | None,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Int[Array, " b"]:
    """One token per row: the likeliest at temperature 0, else drawn from the truncated distribution.

    Args:
      logits: float32.
      key: random key; unused at temperature 0.
      temperature: divides the logits.
      top_k: keep the k likeliest tokens.
      top_p: keep the smallest set of tokens whose probability reaches p; the likeliest always stays.

    Raises:
      ValueError: a parameter is out of its range, or sampling without a key.
    """
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; it must be 0 (greedy) or a positive number.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must lie in (0, 1].")
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if key is None:
        raise ValueError("sampling at a temperature above 0 needs a random key.")
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = jnp.where(logits < jax.lax.top_k(logits, top_k)[0][:, -1:], -jnp.inf, logits)
    if top_p is not None and top_p < 1:
        ranked = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ranked), axis=-1) - jax.nn.softmax(ranked)
        last = jnp.min(jnp.where(before < top_p, ranked, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < last, -jnp.inf, logits)
    return jax.random.categorical(key, logits).astype(jnp.int32)
