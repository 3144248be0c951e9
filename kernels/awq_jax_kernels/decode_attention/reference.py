# SPDX-License-Identifier: Apache-2.0
"""The definition, in plain jax; what runs where there is no kernel."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from awq_jax_kernels.decode_attention.form import Cache, Form

__all__ = ["attend", "codes_of", "decode_attention", "turn", "written"]


def decode_attention(form: Form, qkv: Array, cache: Cache, lengths: Array, turns: Any) -> tuple[Array, Cache]:
    """See `awq_jax_kernels.decode_attention.decode_attention`."""
    q, cache = written(form, qkv, cache, lengths, turns)
    k, v = (_read(form, held, scale, qkv.dtype) for held, scale in zip(cache[:2], cache[2:], strict=True))
    at = jnp.arange(k.shape[1])
    seen = at <= lengths[:, None]
    if form.window is not None:
        seen &= at > lengths[:, None] - form.window
    return attend(form, q, k, v, seen).reshape(form.batch, -1), cache


def written(form: Form, qkv: Array, cache: Cache, lengths: Array, turns: Any) -> tuple[Array, Cache]:
    """The queries ``[b, heads, d]``, turned, and the cache with the new keys and values."""
    split = qkv.reshape(form.batch, -1, form.d)
    q, k, v = jnp.split(split, [form.heads, form.heads + form.kv], axis=1)
    if turns is not None:
        q, k = turn(q, turns), turn(k, turns)
    return q, _written(form, cache, k, v, lengths)


def turn(x: Array, turns: tuple[Array, Array]) -> Array:
    """``x * cosine + (x with its halves exchanged) * signed sine``, in float32 and back; x is ``[b, heads, d]``."""
    cosine, sine = (part[:, None] for part in turns)
    wide = x.astype(jnp.float32)
    return (wide * cosine + jnp.roll(wide, x.shape[-1] // 2, axis=-1) * sine).astype(x.dtype)


def codes_of(x: Array) -> tuple[Array, Array]:
    """int8 codes and their float32 scale, ``max|x| / 127`` along the last axis, which the scale keeps with size 1."""
    wide = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(wide), axis=-1, keepdims=True), 1e-30) / 127
    return jnp.round(wide / scale).astype(jnp.int8), scale


def attend(form: Form, q: Array, k: Array, v: Array, seen: Array) -> Array:
    """q ``[b, heads, d]`` over k and v ``[b, s, kv, d]`` where ``seen`` ``[b, s]``."""
    grouped = q.reshape(form.batch, form.kv, -1, form.d)
    scores = jnp.einsum("bkrd,bskd->bkrs", grouped, k, preferred_element_type=jnp.float32) * form.scale
    if form.softcap is not None:
        scores = form.softcap * jnp.tanh(scores / form.softcap)
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bkrs,bskd->bkrd", weights.astype(v.dtype), v)


def _written(form: Form, cache: Cache, k: Array, v: Array, lengths: Array) -> Cache:
    row = jnp.arange(form.batch)[:, None]
    at = lengths[:, None] * form.kv + jnp.arange(form.kv)
    put = lambda held, new: held.at[row, at].set(new.astype(held.dtype), mode="drop")
    if cache[2] is None:
        return put(cache[0], k), put(cache[1], v), None, None
    (k, k_scale), (v, v_scale) = codes_of(k), codes_of(v)
    mark = lambda held, new: held.at[row, 0, at].set(new[..., 0], mode="drop")
    return put(cache[0], k), put(cache[1], v), mark(cache[2], k_scale), mark(cache[3], v_scale)


def _read(form: Form, held: Array, scale: Any, dtype: Any) -> Array:
    """The first ``span`` positions as ``[b, span, kv, d]``."""
    rows = form.span * form.kv
    x = held[:, :rows]
    if scale is not None:
        x = x.astype(jnp.float32) * scale[:, 0, :rows, None]
    return x.astype(dtype).reshape(form.batch, form.span, form.kv, form.d)
