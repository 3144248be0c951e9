# SPDX-License-Identifier: Apache-2.0
"""What a block computes: which tiles of y, and of each which part of the contraction.

Mostly a block has one tile, or shares one with its cluster. Where there are more tiles than multiprocessors, blocks
stay (`BlockConfig.persistent`): pairs of them take tiles in turn, one each, and an odd tile that a pair has left is
cut in two over k. So the last round costs half where it is less than half full, and a tile's first copies travel while
the one before is written.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from awq_jax_kernels.int4_matmul.pallas_gpu.combine import Sharing
from awq_jax_kernels.int4_matmul.pallas_gpu.config import MULTIPROCESSORS
from awq_jax_kernels.int4_matmul.pallas_gpu.plan import PAIR, Plan

__all__ = ["Work", "each", "end", "grid", "of_round", "rounds"]

TOGETHER = 8  # tiles of rows that are done for all channels before the next: what these read stays in the cache


@dataclasses.dataclass(frozen=True)
class Work:
    """One tile, or a part of its contraction; numbers are traced.

    Attributes:
      block_m, block_n: the tile.
      first, steps: of the contraction, in steps of `BlockConfig.step`.
      before: steps that this block has taken for other tiles, since the ring goes on.
      ends: how sums become results; of several ways the one whose condition holds, None for the only one.
    """

    block_m: Any
    block_n: Any
    first: Any
    steps: Any
    before: Any
    ends: tuple[tuple[Any, Sharing], ...]


def grid(plan: Plan) -> dict[str, Any]:
    """Arguments of the launch: the grid of clusters, and a cluster's blocks."""
    if plan.config.persistent:
        return {"grid": (_pairs(plan),), "grid_names": ("pair",), "cluster": (PAIR,), "cluster_names": ("split",)}
    split = plan.config.split
    return {"grid": plan.tiles_of_y, "grid_names": ("m", "n"), "cluster": (split,), "cluster_names": ("split",)}


def each(plan: Plan, do: Callable[[Work], None]) -> None:
    """Call `do` with everything this block has to compute, in order."""
    part = lax.axis_index("split")
    if plan.config.persistent:
        pair = lax.axis_index("pair")
        pl.loop(0, rounds(plan, pair))(lambda i: do(of_round(plan, pair, part, i)))
    else:
        first, steps = _share(plan, part, plan.config.split)
        do(Work(lax.axis_index("m"), lax.axis_index("n"), first, steps, jnp.int32(0), ((None, plan.sharing),)))


def end(item: Work, do: Callable[[Sharing], None]) -> None:
    """Call `do` with who shares the tile."""
    for condition, sharing in item.ends:
        run = functools.partial(do, sharing)
        run() if condition is None else pl.when(condition)(run)


def _pairs(plan: Plan) -> int:
    rows, columns = plan.tiles_of_y
    return min(MULTIPROCESSORS // PAIR, rows * columns)


def _share(plan: Plan, part: Any, parts: int) -> tuple[Any, Any]:
    """Where a part of the contraction begins, and how many steps it has."""
    steps, extra = divmod(plan.k // plan.config.step, parts)
    return part * steps + jnp.minimum(part, extra), steps + (part < extra).astype(jnp.int32)


def _of_pair(plan: Plan, pair: Any) -> Any:
    """Tiles that a pair computes; they lie as far apart as there are pairs."""
    rows, columns = plan.tiles_of_y
    return lax.div(rows * columns - 1 - pair, jnp.int32(_pairs(plan))) + 1


def rounds(plan: Plan, pair: Any) -> Any:
    """How often each of a pair computes."""
    return lax.div(_of_pair(plan, pair) + 1, jnp.int32(PAIR))


def of_round(plan: Plan, pair: Any, member: Any, i: Any) -> Work:
    """A tile of its own for each of a pair, or half of the last one."""
    (rows, columns), whole = plan.tiles_of_y, plan.k // plan.config.step
    shared = PAIR * i + 1 == _of_pair(plan, pair)
    tile = pair + _pairs(plan) * (PAIR * i + jnp.where(shared, 0, member))
    first, steps = _share(plan, member, PAIR)
    first, steps = jnp.where(shared, first, 0), jnp.where(shared, steps, whole)
    ends = ((jnp.logical_not(shared), plan.sharing), (shared, plan.halves))
    return Work(*_place(tile, rows, columns), first, steps, whole * i, ends)


def _place(tile: Any, rows: int, columns: int) -> tuple[Any, Any]:
    """Row and column of a tile: some rows of tiles at a time, column by column."""
    together = min(TOGETHER, rows)
    before = lax.div(tile, jnp.int32(together * columns)) * together
    within = lax.rem(tile, jnp.int32(together * columns))
    there = jnp.minimum(together, rows - before)
    return before + lax.rem(within, there), lax.div(within, there)
