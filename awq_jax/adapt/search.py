# SPDX-License-Identifier: Apache-2.0
"""One group of any layout: search, clip and round. Pure; groups of equal shapes share a compilation."""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from awq_jax._clip import clip_for
from awq_jax._gram import rescaled
from awq_jax._round import quantize
from awq_jax._search import ScaleResult, gram_loss, search_scale
from awq_jax._spec import GPTQSpec, QuantSpec, SearchSpec
from awq_jax._stats import ActStats, merge
from awq_jax._tie import Tie
from awq_jax.adapt.record import pool_stats
from awq_jax.methods import round_by

__all__ = ["round_matrix", "search_group"]


def over_lead(function: Callable[..., Any], depth: int) -> Callable[..., Any]:
    """Map a function over leading axes one by one, so that memory is that of one layer."""
    for _ in range(depth):
        function = partial(lambda inner, *args: jax.lax.map(lambda a: inner(*a), args), function)
    return function


def _flat(stats: ActStats, depth: int) -> ActStats:
    """Statistics with their leading axes as one."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[depth:]), stats)


@partial(jax.jit, static_argnames=("specs", "search", "tie", "lead"))
def search_group(
    stats: list[ActStats],
    matrices: list[Array],
    *,
    specs: tuple[QuantSpec, ...],
    search: SearchSpec,
    tie: Tie | None,
    lead: int,
) -> ScaleResult:
    """The scale of one group, for every layer of a stack.

    The objective is the exact output error of all its weights. Experts that share a scale each have their own Gram
    matrix: theirs are added up.

    Args:
      stats: of each matrix's input, leading axes as the matrix.
      matrices: ``[*lead, *experts, k, n]``.
      specs: number format of each.
      search: rules and grid.
      tie: where the producer's channels are fewer.
      lead: how many leading axes have scales of their own.
    """
    # Channels of leading axes come first in every leaf; what is left of them shares the scale.
    extra = [m.ndim - 2 - lead for m in matrices]

    def one(stats: list[ActStats], matrices: list[Array]) -> ScaleResult:
        each = [_flat(s, e) for s, e in zip(stats, extra, strict=True)]
        wide = [m.reshape(-1, *m.shape[-2:]) for m in matrices]
        columns = [jnp.moveaxis(w, 0, 1).reshape(w.shape[1], -1) for w in wide]
        pooled = [pool_stats(s) for s in each]
        total = functools.reduce(merge, pooled)

        def loss(candidates: list[Array]) -> Array:
            error = jnp.float32(0)
            for candidate, w, s in zip(candidates, wide, each, strict=True):
                rounded = jnp.moveaxis(candidate.reshape(w.shape[1], w.shape[0], -1), 1, 0)
                error += jax.vmap(gram_loss)(w - rounded, s).sum()
            return error

        return search_scale(total, columns, search, specs, tie=tie, loss=loss)

    return over_lead(one, lead)(stats, [m.astype(jnp.float32) for m in matrices])


@partial(jax.jit, static_argnames=("spec", "ratios", "feedback"))
def round_matrix(
    matrix: Array,
    rows: Array | None,
    stats: ActStats | None,
    *,
    spec: QuantSpec,
    ratios: tuple[float, ...],
    feedback: GPTQSpec | None = None,
) -> Any:
    """A `QTensor` of a matrix ``[*lead, k, n]`` with its rows multiplied, clipped where a Gram matrix tells how.

    Args:
      matrix: of any leading axes.
      rows: t, ``[*lead, k]``.
      stats: of its input before it was divided by t.
      spec: number format.
      ratios: clipping thresholds to try; none if empty.
      feedback: how GPTQ rounds; None rounds to nearest.
    """
    wide = matrix.astype(jnp.float32)

    def one(w: Array, t: Array, gram: Array | None) -> Any:
        w = w * t[:, None]
        if gram is None:
            return quantize(w, spec)
        gram = rescaled(gram, t)
        ratio = clip_for(feedback, gram, w, spec, ratios) if ratios else None
        return round_by(w, gram, spec, feedback, ratio)

    t = jnp.ones(wide.shape[:-1]) if rows is None else jnp.broadcast_to(rows, wide.shape[:-1])
    gram = stats.gram if stats is not None and (ratios or feedback is not None) else None
    if gram is None:
        return over_lead(lambda w, t: one(w, t, None), wide.ndim - 2)(wide, t)
    return over_lead(one, wide.ndim - 2)(wide, t, gram)
