# SPDX-License-Identifier: Apache-2.0
"""Text generation: prefill, then decode in one compiled loop."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from awq_jax.models.cache import KVCache
from awq_jax.models.decoder import Decoder
from awq_jax.models.sampling import refuse_sampling, sample

__all__ = ["generate"]


def generate(
    model: Decoder,
    prompt: Int[Array, "b t"],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: Array | None = None,
    stop_tokens: tuple[int, ...] = (),
) -> Int[Array, "b new"]:
    """Continue prompts of equal length.

    Args:
      model: dense or quantized.
      prompt: int32 ``[b, t]``, t at least 1.
      max_new_tokens: how many to add.
      temperature: 0 is greedy; otherwise ``key`` is needed.
      top_k: sample from the k likeliest tokens.
      top_p: sample from the smallest set of probability p.
      key: random key.
      stop_tokens: a sequence that produced one repeats it to the end; the loop ends when all have.

    Returns:
      int32 ``[b, max_new_tokens]``.

    Raises:
      ValueError: an empty prompt, no tokens asked for, or a sampling parameter out of its range.
    """
    if prompt.shape[1] < 1 or max_new_tokens < 1:
        raise ValueError(f"need a prompt and max_new_tokens of at least 1, got {prompt.shape[1]} and {max_new_tokens}.")
    refuse_sampling(temperature, top_k, top_p)  # here, not while the program is traced
    graph, state = nnx.split(model)
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    return _run(graph, state, prompt, key, max_new_tokens, tuple(stop_tokens), tuple(options.items()))


@partial(jax.jit, static_argnums=(0, 4, 5, 6))
def _run(
    graph: Any, state: Any, prompt: Array, key: Array | None, new: int, stop: tuple[int, ...], options: Any
) -> Array:
    model: Decoder = nnx.merge(graph, state)
    batch, length = prompt.shape
    stops = jnp.array(stop, jnp.int32)

    def draw(logits: Array, step: Array) -> Array:
        return sample(logits, None if key is None else jax.random.fold_in(key, step), **dict(options))

    cache = KVCache.empty(model.config, batch, length + new, model.embed.embedding.get_value().dtype)
    logits, cache = model(prompt, cache=cache)
    first = draw(logits[:, -1], jnp.int32(0))
    out = jnp.zeros((batch, new), jnp.int32).at[:, 0].set(first)

    def going(carry: Any) -> Array:
        step, _, done, _, _ = carry
        return (step < new) & ~done.all()

    def advance(carry: Any) -> Any:
        step, token, done, out, cache = carry
        logits, cache = model(token[:, None], cache=cache)
        token = jnp.where(done, token, draw(logits[:, 0], step))
        return step + 1, token, done | jnp.isin(token, stops), out.at[:, step].set(token), cache

    start = (jnp.int32(1), first, jnp.isin(first, stops), out, cache)
    step, token, _, out, _ = jax.lax.while_loop(going, advance, start)
    return jnp.where(jnp.arange(new) < step, out, token[:, None])
