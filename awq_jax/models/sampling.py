# SPDX-License-Identifier: Apache-2.0
"""From logits to the next token."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

__all__ = ["refuse_sampling", "sample", "truncated"]


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
    refuse_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if key is None:
        raise ValueError("sampling at a temperature above 0 needs a random key.")
    logits = logits / temperature
    if top_k is not None or top_p is not None:
        every = lambda value, dtype: jnp.full(logits.shape[:1], value, dtype)
        keep = min(top_k or logits.shape[-1], logits.shape[-1])
        logits = truncated(logits, every(keep, jnp.int32), every(1.0 if top_p is None else top_p, jnp.float32))
    return jax.random.categorical(key, logits).astype(jnp.int32)


def refuse_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Refuse numbers out of their range.

    Raises:
      ValueError: naming the number.
    """
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; it must be 0 (greedy) or a positive number.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must lie in (0, 1].")


def truncated(logits: Float[Array, "b v"], top_k: Int[Array, " b"], top_p: Float[Array, " b"]) -> Float[Array, "b v"]:
    """Logits with -inf for the tokens that a row's rule leaves out: first all but k, then what p does not reach.

    Args:
      logits: float32, already divided by the temperature.
      top_k: 1 .. v; v keeps all.
      top_p: in (0, 1]; 1 keeps all.
    """
    ranked = jnp.sort(logits, axis=-1, descending=True)
    kth = jnp.take_along_axis(ranked, top_k[:, None] - 1, axis=-1)
    logits = jnp.where(logits < kth, -jnp.inf, logits)
    ranked = jnp.where(ranked < kth, -jnp.inf, ranked)
    share = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(share, axis=-1) - share
    wanted = (before < top_p[:, None]) | (top_p[:, None] >= 1)
    last = jnp.min(jnp.where(wanted, ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < last, -jnp.inf, logits)
