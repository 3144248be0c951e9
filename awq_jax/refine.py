# SPDX-License-Identifier: Apache-2.0
"""Learned refinement: codes and scales of a quantized layer, trained on the layer's output error.

A weight ``(q - z) * s`` becomes ``(round(u) - z) * s * exp(r)``: u starts inside the interval that rounds to its code,
as near as it can to where the float weight lies, so that the start is the layer as it was, bit for bit, and weights
near the middle between two codes turn first. Rounding passes gradients straight through (Bengio et al. 2013). What is
learned of u is the rounding offset of SignRound (Cheng et al. 2023); r moves the range that the codes span, which is
what clipping does.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from awq_jax._qtensor import QTensor, codes_of, dequantize_tree
from awq_jax._round import Grid, code_range, packed_on, smallest_scale
from awq_jax._spec import QuantSpec, RefineSpec
from awq_jax._tree import get, leaves, put

__all__ = ["Batch", "draw", "refine"]

Params = Mapping[str, Any]
Latents = dict[str, dict[str, Array]]
Batch = tuple[Array, Array, Array]
"""Inputs of the layer ``[..., t, k]``, the outputs that are wanted ``[..., t, n]``, which tokens count ``[..., t]``."""

_INSIDE = 0.49  # how far from its code a start may lie: half would round to either side
_SCALE_RATE = 0.1  # step of log-scales over that of codes: a scale moves its whole group
_JUDGED = 8  # times that the held-back samples are looked at


def _spec_of(weight: QTensor) -> QuantSpec:
    """The format, as far as rounding knows it."""
    return QuantSpec(bits=weight.bits, symmetric=weight.zero is None, scale_dtype=str(weight.scale.dtype))


def _zero(weight: QTensor) -> Array:
    """Zero codes, float32, of every group."""
    symmetric = weight.zero is None
    return jnp.full(weight.scale.shape, float(weight.middle)) if symmetric else weight.zero.astype(jnp.float32)


def _rows(per_group: Array, weight: QTensor) -> Array:
    return jnp.repeat(per_group, weight.group_size, axis=-2)


def _start(weight: QTensor, wanted: Array) -> dict[str, Array]:
    """Where training begins: it rounds to the weight's own codes and scales."""
    codes = codes_of(weight).astype(jnp.float32)
    place = wanted / _rows(weight.scale.astype(jnp.float32), weight) + _rows(_zero(weight), weight)
    place = jnp.where(jnp.isfinite(place), place, codes)
    return {"code": jnp.clip(place, codes - _INSIDE, codes + _INSIDE), "log_scale": jnp.zeros(weight.scale.shape)}


def _straight_through(x: Array, y: Array) -> Array:
    """The value of y with the gradient of x."""
    return x + jax.lax.stop_gradient(y - x)


def _codes(latent: Mapping[str, Array], weight: QTensor) -> Array:
    """Codes as float32; the gradient ends where a code would leave its range."""
    low, high = code_range(_spec_of(weight))
    return jnp.clip(_straight_through(latent["code"], jnp.round(latent["code"])), low, high)


def _scale(latent: Mapping[str, Array], weight: QTensor) -> Array:
    """Scales in their storage dtype."""
    dtype = weight.scale.dtype
    moved = weight.scale.astype(jnp.float32) * jnp.exp(latent["log_scale"])
    return jnp.clip(moved, smallest_scale(dtype), float(jnp.finfo(dtype).max)).astype(dtype)


def _value(latent: Mapping[str, Array], weight: QTensor) -> Array:
    """The dense weight that a latent stands for."""
    smooth = weight.scale.astype(jnp.float32) * jnp.exp(latent["log_scale"])
    scale = _straight_through(smooth, _scale(latent, weight).astype(jnp.float32))
    return (_codes(latent, weight) - _rows(_zero(weight), weight)) * _rows(scale, weight)


def _packed(latent: Mapping[str, Array], weight: QTensor) -> QTensor:
    codes = jnp.round(_codes(latent, weight)).astype(jnp.uint8)
    return packed_on(codes, Grid(_scale(latent, weight), _zero(weight)), _spec_of(weight))


def draw(key: Key[Array, ""], batches: Batch, skip: int, samples: int) -> Batch:
    """Samples at random, each with equal chance, from the chunks after the first ``skip``, or from all if none is left.

    Args:
      key: of the choice.
      batches: ``[chunks, b, t, ...]`` each.
      skip: chunks that are held back.
      samples: how many; all there are, if fewer.
    """
    chunks, b = batches[2].shape[:2]
    first = skip if skip < chunks else 0
    count = (chunks - first) * b
    chosen = jax.random.choice(key, count, (min(samples, count),), replace=False)
    return jax.tree.map(lambda leaf: leaf[first + chosen // b, chosen % b], batches)


def refine(
    params: Params,
    wanted: Params,
    error: Callable[[Params, Batch], Array],
    batches: Batch,
    how: RefineSpec,
    *,
    held: int = 1,
) -> Params:
    """Train the codes and scales of a layer's quantized weights.

    Of the start and of eight looks on the way the one with the smallest error on the held-back samples is kept: the
    result is never worse than the start there. Everything but `QTensor` leaves stays as it is.

    Args:
      params: nested dict of one layer with `QTensor` kernels.
      wanted: the same with the float kernels that were rounded.
      error: ``(params, batch) -> squared output error``, summed over tokens; params are dense.
      batches: ``[chunks, b, t, ...]`` each.
      how: steps, step size, samples of a step and seed.
      held: chunks, the first ones, that are judged on and not trained on.
    """
    weights = {path: leaf for path, leaf in leaves(params) if isinstance(leaf, QTensor)}
    start: Latents = {path: _start(weight, get(wanted, path)) for path, weight in weights.items()}
    if not weights:
        return params

    def placed(latents: Latents, build: Callable[..., Any]) -> Params:
        out = params
        for path, weight in weights.items():
            out = put(out, path, build(latents[path], weight))
        return out

    judged = jax.tree.map(lambda leaf: leaf[:held], batches)

    def judge(quantized: Params) -> Array:
        dense = dequantize_tree(quantized)
        return jax.lax.map(lambda batch: error(dense, batch), judged).sum()

    def better(latents: Latents, best: Params, least: Array) -> tuple[Params, Array]:
        new = placed(latents, _packed)
        found = judge(new)
        lower = found < least  # False where it is NaN
        return jax.tree.map(lambda a, b: jnp.where(lower, a, b), new, best), jnp.where(lower, found, least)

    begun = judge(params)
    unit = jnp.where(begun > 0, begun, 1.0)  # Adam's epsilon is absolute
    loss = lambda latents, batch: error(placed(latents, _value), batch) / unit
    rates = optax.warmup_cosine_decay_schedule(0.0, how.rate, how.steps // 10, how.steps)
    scale_rates = lambda count: _SCALE_RATE * rates(count)
    optimizer = optax.multi_transform(
        {"code": optax.adam(rates), "log_scale": optax.adam(scale_rates)},
        {path: {name: name for name in latent} for path, latent in start.items()},
    )
    every = max(1, how.steps // _JUDGED)
    key = jax.random.key(how.seed)

    def step(carry: Any, i: Array) -> tuple[Any, None]:
        latents, state, best, least = carry
        gradient = jax.grad(loss)(latents, draw(jax.random.fold_in(key, i), batches, held, how.samples))
        update, state = optimizer.update(gradient, state)
        latents = optax.apply_updates(latents, update)
        due = ((i + 1) % every == 0) | (i + 1 == how.steps)
        best, least = jax.lax.cond(due, better, lambda _, best, least: (best, least), latents, best, least)
        return (latents, state, best, least), None

    with jax.numpy_dtype_promotion("standard"):  # optax counts on it
        carry = (start, optimizer.init(start), params, begun)
        (_, _, best, _), _ = jax.lax.scan(step, carry, jnp.arange(how.steps))
    return best
