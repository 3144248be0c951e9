# SPDX-License-Identifier: Apache-2.0
"""What calibration remembers of activations: sums, so that merging is addition and all-reduce is `psum`."""

from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from awq_jax._gram import gram_of
from awq_jax._operands import refuse_activations, refuse_shape
from awq_jax._pytree import pytree

__all__ = ["BINS", "ActStats", "all_reduce", "bin_of", "calibrate", "merge", "observe", "percentile"]

_OCTAVES = (-24, 16)  # |x| from 2**-24 to 2**16
_BINS_PER_OCTAVE = 8
BINS = (_OCTAVES[1] - _OCTAVES[0]) * _BINS_PER_OCTAVE


@pytree
class ActStats:
    """Statistics of the input of a linear, over tokens.

    Attributes:
      count: tokens seen, float32 (exact below 2**24).
      abs_sum: sum of |x|, float32 ``[k]``.
      abs_max: maximum of |x|, float32 ``[k]``.
      gram: ``X' X``, float32 ``[k, k]``, or its diagonal blocks ``[k/b, b, b]``, or None. With the whole of it
        ``||X D||^2 = tr(D' X'X D)`` is exact for any error D.
      histogram: tokens per bin of log2|x|, float32 ``[bins, k]``, or None; only percentiles need it.
    """

    count: Any
    abs_sum: Any
    abs_max: Any
    gram: Any = None
    histogram: Any = None

    @property
    def abs_mean(self) -> Array:
        """Mean of |x|, ``[*e, k]``; 0 where no token was seen."""
        return self.abs_sum / jnp.maximum(self.count, 1.0)[..., None]


def bin_of(magnitude: Array) -> Array:
    """Bin index of |x|; zeros fall into bin 0."""
    octave = jnp.log2(jnp.maximum(magnitude, 2.0 ** _OCTAVES[0])) - _OCTAVES[0]
    return jnp.clip((octave * _BINS_PER_OCTAVE).astype(jnp.int32), 0, BINS - 1)


def _gram(x: Float[Array, "t k"], keep: Bool[Array, " t"], stride: int, block: int | None) -> Array:
    if stride > 1:
        # Padding goes last, so that it does not take the place of tokens: a short document's would all be skipped.
        x = x[jnp.argsort(~keep, stable=True)[::stride]]
    return stride * gram_of(x, block)


def observe(
    x: Float[Array, "*t k"],
    mask: Bool[Array, "*t"] | None = None,
    *,
    gram: bool = True,
    block: int | None = None,
    stride: int = 1,
    histogram: bool = False,
) -> ActStats:
    """Statistics of one batch of activations.

    Args:
      x: ``[..., k]``; sums are taken in float32.
      mask: tokens to count, ``[...]``; padding is False.
      gram: keep ``X' X``, ``4 k**2`` bytes.
      block: keep only its diagonal blocks of so many rows, a divisor of k.
      stride: take every stride-th of the tokens that count for the Gram matrix, and weigh it stride times.
      histogram: keep what `percentile` needs.

    Raises:
      TypeError: x is no array.
      ValueError: x is not ``[..., k]`` floats, the mask is not of its tokens or not of booleans, or stride is below 1.

    >>> observe(jnp.array([[1.0, -2.0], [3.0, 0.0]])).abs_sum.tolist()
    [4.0, 2.0]
    """
    refuse_activations(x)
    if mask is not None:
        refuse_shape("mask", mask, x.shape[:-1], "one for each token of x")
        if mask.dtype != bool:
            raise ValueError(f"mask is {mask.dtype}; it must be boolean, True where a token counts: mask.astype(bool).")
    if stride < 1:
        raise ValueError(f"stride is {stride}; it must be at least 1.")
    if block is not None and (block < 1 or x.shape[-1] % block):
        raise ValueError(f"block is {block}; it must divide the {x.shape[-1]} channels of x.")
    x = x.astype(jnp.float32)
    keep = jnp.ones(x.shape[:-1], bool) if mask is None else mask
    x = jnp.where(keep[..., None], x, 0.0).reshape(-1, x.shape[-1])
    magnitude = jnp.abs(x)
    counted = keep.reshape(-1).astype(jnp.float32)
    bins = None
    if histogram:
        channel = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape)
        bins = jnp.zeros((BINS, x.shape[1])).at[bin_of(magnitude), channel].add(counted[:, None])
    return ActStats(
        count=counted.sum(),
        abs_sum=magnitude.sum(0),
        abs_max=magnitude.max(0, initial=0.0),
        gram=_gram(x, keep.reshape(-1), stride, block) if gram else None,
        histogram=bins,
    )


def merge(a: ActStats, b: ActStats) -> ActStats:
    """Statistics of the union of two batches; associative and commutative up to float32 rounding.

    Raises:
      ValueError: they are of inputs of different widths, or one has a Gram matrix or a histogram that the other lacks.
    """
    shapes = [{name: getattr(leaf, "shape", None) for name, leaf in vars(stats).items()} for stats in (a, b)]
    if shapes[0] != shapes[1]:
        odd = [
            f"{name} {shapes[0][name]} and {shapes[1][name]}"
            for name in shapes[0]
            if shapes[0][name] != shapes[1][name]
        ]
        raise ValueError(f"statistics of different kinds do not merge: {'; '.join(odd)}. Observe the same input alike.")
    summed = jax.tree.map(jnp.add, a, b)
    return ActStats(
        count=summed.count,
        abs_sum=summed.abs_sum,
        abs_max=jnp.maximum(a.abs_max, b.abs_max),
        gram=summed.gram,
        histogram=summed.histogram,
    )


def all_reduce(stats: ActStats, axis_name: Hashable) -> ActStats:
    """`merge` over the devices of a mapped axis, inside `jax.pmap` or `jax.shard_map`."""
    summed = jax.lax.psum(stats, axis_name)
    return ActStats(
        count=summed.count,
        abs_sum=summed.abs_sum,
        abs_max=jax.lax.pmax(stats.abs_max, axis_name),
        gram=summed.gram,
        histogram=summed.histogram,
    )


def percentile(stats: ActStats, q: float) -> Float[Array, " k"]:
    """The q-th percentile of |x| per channel, to the width of a bin (9 %), never above the maximum.

    Raises:
      ValueError: the statistics hold no histogram.
    """
    if stats.histogram is None:
        raise ValueError("a percentile needs a histogram: observe(..., histogram=True).")
    below = jnp.cumsum(stats.histogram, axis=0)
    reached = below >= stats.count * (q / 100.0)
    edge = (jnp.argmax(reached, axis=0) + 1).astype(jnp.float32)
    return jnp.minimum(jnp.exp2(edge / _BINS_PER_OCTAVE + _OCTAVES[0]), stats.abs_max)


def calibrate(
    observer: Callable[[Any, Any], Any], params: Any, batches: Any, *, has_aux: bool = False, in_place: bool = False
) -> Any:
    """Merge what an observer reports over batches, in one compiled scan.

    Args:
      observer: ``(params, batch) -> tree of ActStats``, or ``(tree, aux)`` with ``has_aux``; pure.
      params: passed through.
      batches: a tree of arrays whose leading axis counts batches.
      has_aux: also collect a second result of the observer, stacked over batches.
      in_place: that result has the shape of the first of the tuple ``batches`` and takes its place, batch by batch, so
        that inputs and outputs are never held both.

    Returns:
      The tree of merged `ActStats`; with ``has_aux`` the pair (tree, stacked aux).

    Raises:
      ValueError: there are no batches.

    >>> xs = jnp.arange(12.0).reshape(3, 2, 2)
    >>> float(calibrate(lambda _, x: observe(x), None, xs).count)
    6.0
    """
    if not all(len(leaf) for leaf in jax.tree.leaves(batches)) or not jax.tree.leaves(batches):
        raise ValueError("there are no batches to observe: the leading axis of batches counts them.")
    with_aux = observer if has_aux else lambda p, batch: (observer(p, batch), None)

    def step(total: Any, batch: Any) -> tuple[Any, Any]:
        stats, aux = with_aux(params, batch)
        return jax.tree.map(merge, total, stats, is_leaf=lambda node: isinstance(node, ActStats)), aux

    # Zeros are the neutral element of `merge`, the maximum of magnitudes included.
    shapes, _ = jax.eval_shape(with_aux, params, jax.tree.map(lambda leaf: leaf[0], batches))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    if not in_place:
        stats, aux = jax.lax.scan(step, zeros, batches)
        return (stats, aux) if has_aux else stats
    first, *others = batches

    def replace(index: Array, carry: tuple[Any, Array]) -> tuple[Any, Array]:
        total, held = carry
        total, aux = step(total, (held[index], *(other[index] for other in others)))
        return total, jax.lax.dynamic_update_index_in_dim(held, aux, index, 0)

    return jax.lax.fori_loop(0, len(first), replace, (zeros, first))
