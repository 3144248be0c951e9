# SPDX-License-Identifier: Apache-2.0
"""The two steps of serving, as pure functions of (parameters, slots, tokens): `prefill` and `decode`.

All shapes are static, so each pair of (bucket, batch) compiles once. Slots are meant to be donated.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from awq_jax._pytree import pytree
from awq_jax.models import DecoderConfig
from awq_jax.serving.cache import SlotCache, insert
from awq_jax.serving.model import last_logits, serving_decoder
from awq_jax.serving.sampling import Sampling, draw

__all__ = ["NOTHING", "Slots", "Start", "advance", "decode", "empty_slots", "prefill"]

NOTHING = -1
"""In place of a token: the row was idle."""


@pytree
class Start:
    """What is known of new sequences; rows as in the prefill.

    Attributes:
      budget: int32 ``[p]``, tokens that may be drawn, at least 1.
      stops: int32 ``[p, s]``, tokens that end the sequence; `NOTHING` fills up.
      sampling: of each row.
    """

    budget: Any
    stops: Any
    sampling: Any


@pytree
class Slots:
    """All sequences that are under way, one for each row of a fixed batch.

    Attributes:
      cache: `SlotCache`.
      token: int32 ``[b]``, drawn but not yet in the cache.
      start: `Start` of each row; ``budget`` counts down, and a row without any is idle.
    """

    cache: Any
    token: Any
    start: Any


def empty_slots(config: DecoderConfig, batch: int, max_len: int, *, dtype: Any, stops: int = 8) -> Slots:
    """Idle slots.

    Args:
      config: of the model.
      batch: how many.
      max_len: positions of each.
      dtype: of the cache; int8 halves it.
      stops: stop tokens that a sequence may have.
    """
    start = Start(
        budget=jnp.zeros((batch,), jnp.int32),
        stops=jnp.full((batch, stops), NOTHING, jnp.int32),
        sampling=Sampling.greedy(batch),
    )
    cache = SlotCache.empty(config, batch, max_len, dtype)
    return Slots(cache=cache, token=jnp.zeros((batch,), jnp.int32), start=start)


def prefill(
    config: DecoderConfig,
    params: Mapping[str, Any],
    slots: Slots,
    tokens: Int[Array, "p t"],
    lengths: Int[Array, " p"],
    rows: Int[Array, " p"],
    start: Start,
    *,
    axis: str | None = None,
) -> tuple[Slots, Int[Array, " p"]]:
    """Begin sequences: read their prompts, draw their first tokens, put both into slots.

    Args:
      config: of the model.
      params: as `awq_jax.serving.fuse.fuse` leaves them.
      slots: to put them into.
      tokens: int32, padded on the right to a bucket of t; t is at most the cache's max_len.
      lengths: tokens of each prompt, at least 1.
      rows: which slot each one takes, all different.
      start: budget, stops and sampling.
      axis: mesh axis, inside `jax.shard_map`.

    Returns:
      The slots and the first token of each row.
    """
    model = serving_decoder(config, params, axis)
    held = slots.cache.k[0].data
    fresh = SlotCache.empty(config, tokens.shape[0], tokens.shape[1], held.dtype)
    logits, read = last_logits(model, tokens, fresh, lengths - 1, axis)
    first = draw(logits, start.sampling, lengths, _head_axis(model, axis))
    begun = Start(budget=_left(first, start), stops=start.stops, sampling=start.sampling)
    return Slots(
        cache=insert(slots.cache, rows, read, lengths),  # pyright: ignore[reportArgumentType]
        token=slots.token.at[rows].set(first),
        start=jax.tree.map(lambda all_rows, new: all_rows.at[rows].set(new), slots.start, begun),
    ), first


def decode(
    config: DecoderConfig,
    params: Mapping[str, Any],
    slots: Slots,
    *,
    steps: int,
    span: int | None = None,
    axis: str | None = None,
) -> tuple[Slots, Int[Array, "b steps"]]:
    """Draw up to ``steps`` tokens for every row that has a budget, in one loop on the device.

    Args:
      config: of the model.
      params: as in `prefill`.
      slots: of which idle rows are left alone.
      steps: at most; the loop ends when all rows are idle.
      span: positions that attention reads, at least ``lengths.max() + steps``; None is all.
      axis: mesh axis, inside `jax.shard_map`.

    Returns:
      The slots, and the tokens drawn; `NOTHING` where a row had ended.
    """
    model = serving_decoder(config, params, axis)
    full = slots.cache.k[0].span
    out = jnp.full((slots.token.shape[0], steps), NOTHING, jnp.int32)
    slots = Slots(cache=slots.cache.reading(span or full), token=slots.token, start=slots.start)

    def going(carry: Any) -> Array:
        step, slots, _ = carry
        return (step < steps) & jnp.any(slots.start.budget > 0)

    def turn(carry: Any) -> Any:
        step, slots, out = carry
        slots, drawn = _advance(model, slots, axis)
        return step + 1, slots, out.at[:, step].set(drawn)

    _, slots, out = jax.lax.while_loop(going, turn, (jnp.int32(0), slots, out))
    return Slots(cache=slots.cache.reading(full), token=slots.token, start=slots.start), out


def advance(
    config: DecoderConfig, params: Mapping[str, Any], slots: Slots, *, axis: str | None = None
) -> tuple[Slots, Int[Array, " b"]]:
    """One turn of the loop of `decode`, for those that look at what it compiles to."""
    return _advance(serving_decoder(config, params, axis), slots, axis)


def _advance(model: Any, slots: Slots, axis: str | None) -> tuple[Slots, Array]:
    """One token more for every row that is under way."""
    start, busy = slots.start, slots.start.budget > 0
    before = slots.cache.lengths
    logits, cache = last_logits(model, slots.token[:, None], slots.cache, jnp.zeros_like(before), axis)
    token = jnp.where(busy, draw(logits, start.sampling, before + 1, _head_axis(model, axis)), slots.token)
    left = jnp.where(busy, _left(token, start), 0)
    lengths = jnp.where(busy, cache.lengths, before)
    held = SlotCache(k=cache.k, v=cache.v, lengths=lengths)
    begun = Start(budget=left, stops=start.stops, sampling=start.sampling)
    return Slots(cache=held, token=token, start=begun), jnp.where(busy, token, NOTHING)


def _head_axis(model: Any, axis: str | None) -> str | None:
    """The axis over which logits are cut: a tied head is whole everywhere."""
    return axis if model.lm_head is not None else None


def _left(token: Array, start: Start) -> Array:
    """The budget after a token was drawn: none after a stop token."""
    stopped = jnp.any(token[:, None] == start.stops, axis=-1)
    return jnp.where(stopped, 0, start.budget - 1)
