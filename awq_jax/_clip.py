# SPDX-License-Identifier: Apache-2.0
"""Clip search: shrinking a group's range trades a few large errors for many small ones.

Two steps. `search_clip` looks at each group of rows by itself and shrinks both ends of its range alike; `settle_clip`
goes through the groups once more for either end, and looks at what all groups together leave in the output. Both only
choose where a group's grid lies: codes are the nearest ones on it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from awq_jax._gram import PRECISION, diagonal_blocks
from awq_jax._operands import refuse_gram, refuse_weight
from awq_jax._round import Ends, fake_quantize
from awq_jax._spec import GPTQSpec, QuantSpec

__all__ = ["clip_for", "search_clip", "settle_clip"]


class _Found(NamedTuple):
    """The best thresholds of one group so far, what they lose and the error of the weight that they leave."""

    loss: Float[Array, " n"]
    ends: Ends
    error: Float[Array, "g n"]


def _best(
    start: _Found,
    rows: Float[Array, "g n"],
    spec: QuantSpec,
    ratios: tuple[float, ...],
    loss: Callable[[Array], Array],
    moved: tuple[Bool[Array, ""], Bool[Array, ""]],
    *,
    unrolled: bool,
) -> _Found:
    """Try every ratio at the ends that are moved; what comes first wins ties, and what is not finite never wins."""

    def turn(best: _Found, ratio: Array) -> tuple[_Found, None]:
        ends = Ends(*(jnp.where(moves, ratio, end) for moves, end in zip(moved, start.ends, strict=True)))
        error = rows - fake_quantize(rows, spec, jax.tree.map(lambda end: end[None], ends))
        tried = _Found(loss(error), ends, error)
        better = jnp.isfinite(tried.loss) & (tried.loss < best.loss)
        return jax.tree.map(lambda new, old: jnp.where(better, new, old), tried, best), None

    return jax.lax.scan(turn, start, _with_whole(ratios), unroll=unrolled)[0]


def _with_whole(ratios: tuple[float, ...]) -> Float[Array, " ratios"]:
    """The whole range first, so that it wins ties."""
    return jnp.array((1.0, *(r for r in ratios if r != 1.0)), jnp.float32)


def search_clip(
    gram: Float[Array, "..."],
    weight: Float[Array, "k n"],
    spec: QuantSpec,
    ratios: tuple[float, ...],
) -> Float[Array, "groups n"]:
    """The threshold of every (group, output) that minimises its own output error.

    For group rows ``i`` the error is ``d_i' G_ii d_i``, exact for that group alone: only the diagonal blocks of the
    Gram matrix enter. Ratio 1 always competes and wins ties.

    Args:
      gram: ``X'X`` of the weight's input, ``[k, k]``, or its diagonal blocks ``[k/b, b, b]`` with whole groups in each.
      weight: ``[k, n]``, already scaled.
      spec: the number format.
      ratios: thresholds to try, as fractions of the group's range.

    Returns:
      ratios, float32 ``[k/g, n]``.

    Raises:
      TypeError, ValueError: an operand of another shape or kind.
    """
    refuse_weight(weight, leading=False)
    k, n = weight.shape
    g = spec.rows_per_group(k)
    refuse_gram(gram, k, g)
    groups = k // g
    diagonal = diagonal_blocks(gram, g)
    tried = _with_whole(ratios)

    def evaluate(r: Array) -> Array:
        error = (weight - fake_quantize(weight, spec, jnp.full((groups, n), r))).reshape(groups, g, n)
        return jnp.sum(error * jnp.matmul(diagonal, error, precision=PRECISION), axis=1)

    losses = jax.lax.map(evaluate, tried)  # [ratios, groups, n]
    losses = jnp.where(jnp.isfinite(losses), losses, jnp.inf)
    return tried[jnp.argmin(losses, axis=0)]


def settle_clip(
    gram: Float[Array, "..."],
    weight: Float[Array, "k n"],
    spec: QuantSpec,
    ratios: tuple[float, ...],
) -> Ends:
    """Thresholds for the output error of the whole weight, ``tr(D' G D)``, by coordinate descent from `search_clip`.

    With the other groups held, an output's error depends on the errors ``d`` of group ``i`` as ``d' (G_ii d + 2 c)``,
    where ``c = sum_{j != i} G_ij d_j`` is what the others leave in its inputs' directions: errors of different groups
    that cancel in the output are better than those that add up. Group after group takes the threshold of its low end
    with the lowest such sum, then in a second sweep that of its high end. One end of a range may so be cut where the
    other is kept. A threshold moves only where the error falls, so no output's error grows.

    The descent is that of `gptq`'s sweeps (after Frantar et al. 2022), with the groups' grids in place of the rows'
    codes. A symmetric grid has one threshold and gets one sweep.

    Args:
      gram: as for `search_clip`; inputs of different blocks count as uncorrelated.
      weight: ``[k, n]``, already scaled.
      spec: the number format.
      ratios: thresholds to try; 1 is always among them.

    Returns:
      ratios, float32 ``[k/g, n]`` of each end; those of `search_clip` where the Gram matrix is not finite.

    Raises:
      TypeError, ValueError: as `search_clip`.

    >>> weight = jax.random.normal(jax.random.key(0), (256, 8)) ** 3
    >>> ends = settle_clip(jnp.eye(256), weight, QuantSpec(), (0.9, 0.8, 0.7))
    >>> ends.low.shape, bool((ends.low != ends.high).any())
    ((2, 8), True)
    """
    found = search_clip(gram, weight, spec, ratios)
    n = weight.shape[1]
    shape = (len(found), -1, n)
    error = (weight - fake_quantize(weight, spec, found)).reshape(shape)
    each = (weight.reshape(shape), error, found)
    if gram.ndim == 2:
        return _settle(gram, each, spec, ratios)
    parts = len(gram)
    of_blocks = jax.tree.map(lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:]), each)
    ends = jax.lax.map(lambda one: _settle(one[0], one[1], spec, ratios), (gram, of_blocks))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, n), ends)


def _settle(gram: Array, found: tuple[Array, Array, Array], spec: QuantSpec, ratios: tuple[float, ...]) -> Ends:
    """The sweeps of `settle_clip` over the groups of one Gram matrix.

    Args:
      gram, spec, ratios: as there.
      found: rows and their errors, ``[groups, g, n]``, and thresholds, ``[groups, n]``.
    """
    rows, error, ratio = found
    groups, g, n = rows.shape
    strips, diagonal = gram.reshape(groups, g, -1), diagonal_blocks(gram, g)
    # On a GPU a turn of a loop costs as much as the work on one group; a whole column is work enough.
    unrolled = jax.default_backend() == "gpu" and g <= 256

    def sweep(state: tuple[Array, Ends], moved: tuple[Array, Array]) -> tuple[tuple[Array, Ends], None]:
        def visit(errors: Array, group: tuple[Array, Array, Array, Array, Ends]) -> tuple[Array, Ends]:
            index, strip, inner, part, ends = group
            old = errors[index]
            product = lambda error: jnp.matmul(inner, error, precision=PRECISION)
            others = jnp.matmul(strip, errors.reshape(-1, n), precision=PRECISION) - product(old)
            loss = lambda error: jnp.sum(error * (product(error) + 2 * others), axis=0)
            start = _Found(loss(old), ends, old)
            best = _best(start, part, spec, ratios, loss, moved, unrolled=unrolled)
            return jax.lax.dynamic_update_index_in_dim(errors, best.error, index, 0), best.ends

        errors, ends = state
        return jax.lax.scan(visit, errors, (jnp.arange(groups), strips, diagonal, rows, ends)), None

    low, high = ([True], [True]) if spec.symmetric else ([True, False], [False, True])
    (_, ends), _ = jax.lax.scan(sweep, (error, Ends(ratio, ratio)), (jnp.array(low), jnp.array(high)))
    return ends


def clip_for(
    feedback: GPTQSpec | None,
    gram: Float[Array, "..."],
    weight: Float[Array, "k n"],
    spec: QuantSpec,
    ratios: tuple[float, ...],
) -> Ends:
    """Thresholds for the way to round: nearest codes need them settled, feedback makes up itself for what groups leave.

    Args:
      feedback: how GPTQ rounds; None rounds to nearest.
      gram, weight, spec, ratios: as for `search_clip`.
    """
    if feedback is None:
        return settle_clip(gram, weight, spec, ratios)
    found = search_clip(gram, weight, spec, ratios)
    return Ends(found, found)
