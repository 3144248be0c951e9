# SPDX-License-Identifier: Apache-2.0
"""A mixture's experts: their weights stacked on a leading axis, and the rows that a router sends to each."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from awq_jax._gram import gram_of
from awq_jax._pytree import pytree
from awq_jax._qtensor import QTensor, matmul
from awq_jax._stats import BINS, ActStats, bin_of
from awq_jax._tree import get, nested
from awq_jax_kernels.ragged_int4_matmul import ragged_int4_matmul
from awq_jax_kernels.ragged_int4_matmul.tiles import in_tiles

__all__ = [
    "ExpertRows",
    "each_expert",
    "flat",
    "observe_experts",
    "ragged_matmul",
    "stacked",
    "without_starved",
]


@pytree
class ExpertRows:
    """The input of a linear that each expert has its own of.

    Attributes:
      rows: ``[r, k]``, those of expert 0 first.
      token: int32 ``[r]``, which token each row comes from, counted over batch and time.
      sizes: int32 ``[e]``, rows of each expert.
    """

    rows: Any
    token: Any
    sizes: Any


def _tile(rows: int, experts: int) -> int:
    """About an expert's share, a power of two from 16 to 256.

    >>> _tile(4096, 8), _tile(64, 64)
    (256, 16)
    """
    return min(256, max(16, 1 << (rows // experts).bit_length() - 1)) if rows >= experts else 16


def ragged_matmul(
    x: Float[Array, "r k"], weight: QTensor | Float[Array, "e k n"], sizes: Int32[Array, " e"]
) -> Float[Array, "r n"]:
    """Each row times the weight of the expert that it belongs to.

    Args:
      x: rows of expert 0 first, then those of expert 1, and so on.
      weight: of all experts, dense or quantized.
      sizes: rows of each expert.

    >>> ragged_matmul(jnp.ones((3, 1)), jnp.array([[[2.0]], [[5.0]]]), jnp.array([1, 2], jnp.int32)).ravel().tolist()
    [2.0, 5.0, 5.0]
    """
    # Each tile fetches its weight: of 4096 rows for 8 experts tiles of 16 took five times as long on a CPU.
    tile = _tile(x.shape[0], sizes.shape[0])
    if isinstance(weight, QTensor) and weight.bits <= 4:
        return ragged_int4_matmul(x, weight.packed, weight.scale, weight.zero, sizes, tile=tile)
    tiles, experts, place = in_tiles(x, sizes, tile)
    y = jax.lax.map(lambda one: matmul(one[0], weight[one[1]]), (tiles, experts))
    return y.reshape(-1, y.shape[-1])[place]


def observe_experts(
    x: ExpertRows, mask: Bool[Array, "*t"] | None = None, *, block: int | None = None, histogram: bool = False
) -> ActStats:
    """`awq_jax.observe` for each expert's rows; every leaf has a leading axis of experts.

    Args:
      x: the rows, by expert.
      mask: tokens to count, ``[...]``; padding is False.
      block: keep only diagonal blocks of so many rows of each Gram matrix.
      histogram: keep what `percentile` needs.
    """
    (r, k), e = x.rows.shape, x.sizes.shape[0]
    expert = jnp.repeat(jnp.arange(e), x.sizes, total_repeat_length=r)
    keep = jnp.ones((r,), bool) if mask is None else mask.reshape(-1)[x.token]
    rows = jnp.where(keep[:, None], x.rows.astype(jnp.float32), 0.0)
    magnitude = jnp.abs(rows)
    tiles, owner, _ = in_tiles(rows, x.sizes, _tile(r, e))

    def add(gram: Array, tile: tuple[Array, Array]) -> tuple[Array, None]:
        return gram.at[tile[1]].add(gram_of(tile[0], block)), None

    bins = None
    if histogram:
        channel = jnp.broadcast_to(jnp.arange(k), rows.shape)
        where = (expert[:, None], bin_of(magnitude), channel)
        bins = jnp.zeros((e, BINS, k)).at[where].add(keep[:, None].astype(jnp.float32))
    return ActStats(
        count=jax.ops.segment_sum(keep.astype(jnp.float32), expert, e),
        abs_sum=jax.ops.segment_sum(magnitude, expert, e),
        abs_max=jnp.maximum(jax.ops.segment_max(magnitude, expert, e), 0.0),
        gram=jax.lax.scan(
            add, jnp.zeros((e, *jax.eval_shape(lambda tile: gram_of(tile, block), tiles[0]).shape)), (tiles, owner)
        )[0],
        histogram=bins,
    )


def without_starved(stats: ActStats, least: int) -> ActStats:
    """The Gram matrix of each expert that fewer than ``least`` tokens reached counts as zero.

    No error is seen on it then, so identity wins, nothing is clipped and the weight is rounded to nearest.
    """
    if stats.count.ndim == 0:
        return stats  # not of experts
    fed = stats.count >= least
    return ActStats(
        count=stats.count,
        abs_sum=stats.abs_sum,
        abs_max=stats.abs_max,
        gram=jnp.where(fed.reshape(-1, *(1,) * (stats.gram.ndim - 1)), stats.gram, 0.0),
        histogram=stats.histogram,
    )


def flat(kernel: Float[Array, "*e k n"]) -> Float[Array, "k _"]:
    """Experts' kernels that read one input, side by side along the outputs; a kernel of one linear as it is."""
    return kernel if kernel.ndim == 2 else jnp.moveaxis(kernel, 0, 1).reshape(kernel.shape[1], -1)


def stacked(weight: Any, like: Array) -> Any:
    """The inverse of `flat` for an array or a `QTensor`."""
    if like.ndim == 2:
        return weight
    split = lambda leaf: jnp.moveaxis(leaf.reshape(leaf.shape[0], like.shape[0], -1), 1, 0)
    return jax.tree.map(split, weight)


def each_expert(run: Callable[..., Any], params: Mapping[str, Any], paths: tuple[str, ...], *trees: Any) -> Any:
    """``run(part, *trees)`` for each expert, one after the other; results are stacked again.

    Args:
      run: takes the modules at ``paths`` of one expert, and its slices of the trees.
      params: nested dict that holds the paths.
      paths: of modules whose leaves have a leading axis of experts.
      *trees: with that leading axis too, or None.
    """
    return jax.lax.map(lambda one: run(*one), (nested((path, get(params, path)) for path in paths), *trees))
