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
from awq_jax._round import Ends, fake_quantize
from awq_jax._spec import GPTQSpec, QuantSpec

__all__ = ["clip_for", "search_clip", "settle_clip"]


class _Found(NamedTuple):
    """The best thresholds so far, what they lose and the error of the weight that they leave."""

    loss: Float[Array, "*groups n"]
    ends: Ends
    error: Float[Array, "*groups g n"]


def _best(
    start: _Found,
    rows: Float[Array, "*groups g n"],
    spec: QuantSpec,
    ratios: tuple[float, ...],
    loss: Callable[[Array], Array],
    moved: tuple[bool | Bool[Array, ""], bool | Bool[Array, ""]] = (True, True),
    *,
    unrolled: bool = False,
) -> _Found:
    """Try every ratio at the ends that are moved; what comes first wins ties, and what is not finite never wins."""
    n = rows.shape[-1]

    def turn(best: _Found, ratio: Array) -> tuple[_Found, None]:
        ends = Ends(*(jnp.where(moves, ratio, end) for moves, end in zip(moved, start.ends, strict=True)))
        flat = jax.tree.map(lambda end: end.reshape(-1, n), ends)
        error = rows - fake_quantize(rows.reshape(-1, n), spec, flat).reshape(rows.shape)
        tried = _Found(loss(error), ends, error)
        better = jnp.isfinite(tried.loss) & (tried.loss < best.loss)
        spread = lambda leaf: better if leaf.ndim == better.ndim else better[..., None, :]
        return jax.tree.map(lambda new, old: jnp.where(spread(new), new, old), tried, best), None

    tried = jnp.array((1.0, *(r for r in ratios if r != 1.0)), jnp.float32)
    return jax.lax.scan(turn, start, tried, unroll=unrolled)[0]


def _each_by_itself(
    gram: Float[Array, "..."], weight: Float[Array, "k n"], spec: QuantSpec, ratios: tuple[float, ...]
) -> _Found:
    """`search_clip`, and what it leaves."""
    k, n = weight.shape
    g = spec.rows_per_group(k)
    diagonal, rows = diagonal_blocks(gram, g), weight.reshape(k // g, g, n)
    whole = jnp.ones((k // g, n))
    start = _Found(jnp.full_like(whole, jnp.inf), Ends(whole, whole), jnp.zeros_like(rows))
    loss = lambda error: jnp.sum(error * jnp.matmul(diagonal, error, precision=PRECISION), axis=1)
    return _best(start, rows, spec, ratios, loss)


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
    """
    return _each_by_itself(gram, weight, spec, ratios).ends.high


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
    """
    found = _each_by_itself(gram, weight, spec, ratios)
    if gram.ndim == 2:
        return _settle(gram, weight.reshape(found.error.shape), spec, ratios, found)
    parts = len(gram)
    cut = lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:])
    each = jax.tree.map(cut, (weight.reshape(found.error.shape), found))
    ends = jax.lax.map(lambda one: _settle(one[0], one[1][0], spec, ratios, one[1][1]), (gram, each))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, weight.shape[1]), ends)


def _settle(gram: Array, rows: Array, spec: QuantSpec, ratios: tuple[float, ...], found: _Found) -> Ends:
    """The sweeps of `settle_clip` over the groups ``[groups, g, n]`` of one Gram matrix."""
    groups, g, n = rows.shape
    strips, diagonal = gram.reshape(groups, g, -1), diagonal_blocks(gram, g)
    # On a GPU a turn of a loop costs as much as the work on one group; a whole column is work enough.
    unrolled = jax.default_backend() == "gpu" and g <= 256

    def sweep(state: tuple[Array, Ends], moved: tuple[Array, Array]) -> tuple[tuple[Array, Ends], None]:
        def visit(errors: Array, group: tuple[Array, Array, Array, Array, Ends]) -> tuple[Array, Ends]:
            index, strip, inner, part, ends = group
            old = errors[index]
            others = jnp.matmul(strip, errors.reshape(-1, n), precision=PRECISION)
            others -= jnp.matmul(inner, old, precision=PRECISION)
            product = lambda error: jnp.matmul(inner, error, precision=PRECISION)
            loss = lambda error: jnp.sum(error * (product(error) + 2 * others), axis=0)
            start = _Found(loss(old), ends, old)
            best = _best(start, part, spec, ratios, loss, moved, unrolled=unrolled)
            return jax.lax.dynamic_update_index_in_dim(errors, best.error, index, 0), best.ends

        errors, ends = state
        return jax.lax.scan(visit, errors, (jnp.arange(groups), strips, diagonal, rows, ends)), None

    low, high = ([True], [True]) if spec.symmetric else ([True, False], [False, True])
    (_, ends), _ = jax.lax.scan(sweep, (found.error, found.ends), (jnp.array(low), jnp.array(high)))
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
