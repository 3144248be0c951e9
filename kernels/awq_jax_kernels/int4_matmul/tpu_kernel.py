# SPDX-License-Identifier: Apache-2.0
"""The Mosaic kernel behind `pallas_tpu`.

A program instance holds a block of x in VMEM and walks over its share of the weight's columns; of few rows there is one
instance, and all of x and y lie in VMEM (`config.resident`). Blocks of whole columns, codes with their scales and zero
points, come through a ring of buffers that the kernel fills itself: with three or more of them a copy is always under
way, which the two of a Pallas grid can't promise, and x is made ready while the first block travels.

A, B and D multiply the codes as they are and scale each group's partial sum. What zero points and the offset of the
codes add is one thin product per block, ``sums of x over groups @ ((zero + offset) * scale)``. E and F scale a chunk of
the weight to bfloat16 and multiply that; G does so without its zero points, which are a thin product again.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, BFloat16, Float, Int8, Int32

from awq_jax_kernels.int4_matmul.config import BlockConfig, resident
from awq_jax_kernels.int4_matmul.ring import Ring
from awq_jax_kernels.int4_matmul.unpack import OFFSET, ROWS, permutation, split, unpack_a, unpack_b, unpack_d

__all__ = ["OfHalves", "fused"]

OfHalves = Callable[[Array, Array], Array]
"""Makes columns of x, elementwise, from two arrays of their shape."""


def fused(
    x: BFloat16[Array, "b m k"],
    packed: Int8[Array, "e k2 n"],
    scale: Float[Array, "e groups n"],
    zero: Int8[Array, "e groups n"] | None,
    experts: Int32[Array, " b"] | None = None,
    *,
    config: BlockConfig,
    out_dtype: str | None = None,
    of_halves: OfHalves | None = None,
    still: bool = False,
) -> Float[Array, "b m n"]:
    """``y[b] = x[b] @ ((q[e] - zero[e]) * scale[e])``, where e is ``experts[b]``, or b itself.

    Args:
      x: bfloat16 ``[b, m, k]``; ``[1, m, 2k]`` with `of_halves`.
      packed: int8 ``[e, k/2, n]``.
      scale: bfloat16 or float32 ``[e, k/g, n]``.
      zero: int8 ``[e, k/g, n]`` or None.
      experts: int32 ``[b]``, which weight each block of x takes.
      config: block sizes, already checked.
      out_dtype: of the result; None is bfloat16. "float32" also keeps the zero points' share exact to 24 bits.
      of_halves: x is given as two arrays side by side, and this makes it of them while the first block travels; for
        operands that are `resident`.
      still: copy no weights. The result is then meaningless, and the program costs what the core's own work does.

    Returns:
      ``[b, m, n]``.
    """
    (b, m, _), (k, n) = x.shape, (2 * packed.shape[1], packed.shape[2])
    groups, bm = scale.shape[1], -(-min(config.bm, m) // 16) * 16
    weights = (packed, scale) if zero is None else (packed, scale, zero)
    # Terms of eight bits in the zero points' share. A's carries its offset of 128, which must cancel.
    order = 3 if out_dtype or config.variant == "A" else 2
    scratch = _scratch(config, bm, k, groups, order, symmetric=zero is None)
    dtype = jnp.dtype(out_dtype or x.dtype)
    rings = [pltpu.VMEM((config.buffers, w.shape[1], config.bn), w.dtype) for w in weights]
    arrived = pltpu.SemaphoreType.DMA((config.buffers, config.bn // config.tile, len(weights)))
    everything = [rings, arrived, list(scratch.values())]
    kernel = functools.partial(_kernel, config=config, names=tuple(scratch), order=order, still=still)
    options: dict[str, Any] = {
        "interpret": pltpu.InterpretParams() if config.interpret is True else config.interpret,
        "name": "int4_matmul",
    }
    in_hbm = [pl.BlockSpec(memory_space=pl.ANY) for _ in weights]
    if b == 1 and experts is None and resident(config, m, k, n):
        pieces = config.bn // config.tile if config.by_tile else 1
        in_vmem = pl.BlockSpec(memory_space=pltpu.VMEM)
        made = [] if m == bm and of_halves is None else [pltpu.VMEM((bm, k), x.dtype)]
        y = pl.pallas_call(
            functools.partial(_alone, functools.partial(kernel, pieces=pieces), len(made), of_halves),
            in_specs=[in_vmem, in_hbm],
            out_specs=in_vmem,
            scratch_shapes=[*made, *everything],
            out_shape=_like((m, n), dtype, x, *weights),
            compiler_params=pltpu.CompilerParams(vmem_limit_bytes=config.vmem_mib << 20),
            **options,
        )(x[0], list(weights))
        return y[None]
    prefetched = [] if experts is None else [experts]
    return pl.pallas_call(
        functools.partial(_in_grid, kernel, len(prefetched)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(config.cores, b, pl.cdiv(m, bm), config.splits),
            in_specs=[pl.BlockSpec((None, bm, k), lambda core, e, i, split, *_: (e, i, 0)), in_hbm],
            out_specs=pl.BlockSpec(
                (None, bm, n // config.cores // config.splits),
                lambda core, e, i, split, *_: (e, i, core * config.splits + split),
            ),
            scratch_shapes=everything,
        ),
        out_shape=_like((b, m, n), dtype, x, *weights),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(
                "parallel" if config.cores > 1 else "arbitrary",
                "arbitrary",
                "arbitrary",
                "arbitrary",
            ),
            vmem_limit_bytes=config.vmem_mib << 20,
        ),
        **options,
    )(*prefetched, x, list(weights))


def _like(shape: tuple[int, ...], dtype: Any, *operands: Any) -> jax.ShapeDtypeStruct:
    """A result that varies over the mesh axes that any operand varies over, as `jax.shard_map` wants to know."""
    kinds = [jax.typeof(operand).manual_axis_type for operand in operands]
    varying = frozenset().union(*(kind.varying for kind in kinds))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=type(kinds[0])(varying=varying))


def _scratch(config: BlockConfig, bm: int, k: int, groups: int, order: int, *, symmetric: bool) -> dict[str, Any]:
    """What a variant makes of x and keeps."""
    kept = {}
    if config.variant == "A":
        kept["permuted"] = pltpu.VMEM((k // ROWS, bm, ROWS), jnp.bfloat16)
    if config.variant == "A" or (config.variant in "BDG" and not symmetric):
        sections = pl.cdiv(groups, ROWS)
        kept["group_sums"] = pltpu.VMEM((sections, bm, len(_pairs(order)) * min(groups, ROWS)), jnp.bfloat16)
    return kept


def _in_grid(kernel: Any, prefetched: int, *refs: Any) -> None:
    """One instance of a grid over cores, weights, blocks of rows and shares of columns."""
    expert = refs[0][pl.program_id(1)] if prefetched else pl.program_id(1)
    kernel(expert, pl.program_id(0), pl.program_id(3), *refs[prefetched:])


def _alone(kernel: Any, made: int, of_halves: Any, x_ref: Any, weights: Any, out_ref: Any, *refs: Any) -> None:
    """The one instance there is; it makes x, whole tiles of rows of which the last are anything."""
    if not made:
        return kernel(0, 0, 0, x_ref, weights, out_ref, *refs)
    make = functools.partial(_rows_of_x, x_ref, refs[0], of_halves)
    return kernel(0, 0, 0, refs[0], weights, out_ref, *refs[1:], make=make)


def _rows_of_x(given: Any, x_ref: Any, of_halves: OfHalves | None) -> None:
    m, k = given.shape[0], x_ref.shape[1]
    if of_halves is None:  # a matrix unit takes 16 rows or more
        x_ref[:m] = given[...]
        return
    width = next(w for w in (1024, 512, 256, 128) if k % w == 0)

    @pl.loop(0, k // width)
    def _(i: Any) -> None:
        first, second = (pl.ds(pl.multiple_of(i * width + half, 128), width) for half in (0, k))
        x_ref[:m, first] = of_halves(given[:, first], given[:, second]).astype(x_ref.dtype)


def _kernel(
    expert: Any,
    core: Any,
    share: Any,
    x_ref: Any,
    weights: Any,
    out_ref: Any,
    rings: Any,
    arrived: Any,
    scratch: Any,
    *,
    config: BlockConfig,
    names: tuple[str, ...],
    order: int,
    still: bool,
    pieces: int = 1,
    make: Callable[[], None] | None = None,
) -> None:
    kept = dict(zip(names, scratch, strict=True))
    groups, tile = weights[1].shape[1], config.tile
    g = x_ref.shape[1] // groups
    here, tiles = out_ref.shape[1] // config.bn, config.bn // tile  # blocks of this share, tiles of a block
    everything = here * config.splits
    base = core * everything * config.bn
    ring = Ring(weights, rings, arrived, expert, base, still)

    def compute(i: Any, piece: int) -> None:
        columns = pl.ds(piece * tile, tile)
        y = _tile(x_ref, ring.at(share * here + i), columns, kept, g=g, config=config, order=order)
        place = pl.ds(pl.multiple_of(i * config.bn + piece * tile, 128), tile)
        out_ref[:, place] = y[: out_ref.shape[0]].astype(out_ref.dtype)

    def take(i: Any, pieces: int) -> None:
        for piece in range(tiles):
            if piece % (tiles // pieces) == 0:
                ring.wait(share * here + i, piece // (tiles // pieces), pieces)
            compute(i, piece)

    def first() -> None:
        """Nothing hides the first bytes, so the first block comes and is computed in pieces."""
        ring.start(0, tiles)
        for block in range(1, min(config.buffers, everything)):
            ring.start(block, pieces)
        if make is not None:
            make()
        if kept:
            _prepare_x(x_ref, kept, g, order)
        take(0, tiles)

    def step(i: Any) -> None:
        ahead = share * here + i + config.buffers - 1
        pl.when(ahead < everything)(lambda: ring.start(ahead, pieces))
        take(i, pieces)

    if config.splits == 1:
        first()
    else:  # the ring goes on turning from share to share
        pl.when(share == 0)(first)
        pl.when(share > 0)(lambda: step(0))
    pl.loop(1, here)(step)


def _dot(a: Any, b: Any) -> Any:
    return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _pairs(order: int) -> list[tuple[int, int]]:
    """Which terms of two split numbers to multiply for a product that is right to eight bits times `order`."""
    return [(i, j) for i in range(order) for j in range(order - i)]


def _prepare_x(x_ref: Any, kept: dict[str, Any], g: int, order: int) -> None:
    """Permute x for A, and add it up over groups, 128 groups at a time.

    Both are products of tiles of 128 columns of x, laid one below the other, with a matrix that stays where it is:
    the permutation, and for the sums one that marks the rows of each group.
    """
    bm, k = x_ref.shape
    for section, begin in enumerate(range(0, k, ROWS * g)):
        tiles = range(begin // ROWS, min(k, begin + ROWS * g) // ROWS)
        x = jnp.concatenate([x_ref[:, i * ROWS : (i + 1) * ROWS] for i in tiles], axis=0)
        if "permuted" in kept:
            permuted = _dot(x, permutation())
            for i, tile in enumerate(tiles):
                kept["permuted"][tile] = permuted[i * bm : (i + 1) * bm].astype(jnp.bfloat16)
        if "group_sums" in kept:
            terms, width = split(_group_sums(x, bm, g), order), len(tiles) * ROWS // g
            for at, (i, _) in enumerate(_pairs(order)):
                lanes = slice(at * width, (at + 1) * width)
                kept["group_sums"][section, :, lanes] = terms[i][:, :width].astype(jnp.bfloat16)


def _group_sums(x: Any, bm: int, g: int) -> Any:
    """``[bm, 128]``: lane j is the sum over group j, of tiles of x ``[tiles * bm, 128]``."""
    share = max(1, ROWS // g)  # groups in a tile
    lane = jax.lax.broadcasted_iota(jnp.int32, (ROWS, ROWS), 1) & (share - 1)
    row = jax.lax.broadcasted_iota(jnp.int32, (ROWS, ROWS), 0) >> (ROWS // share).bit_length() - 1
    sums = _dot(x, jnp.where(row == lane, 1.0, 0.0).astype(jnp.bfloat16))  # lane j: group j % share of its tile
    place = jax.lax.broadcasted_iota(jnp.int32, (bm, ROWS), 1) >> share.bit_length() - 1
    mine = lambda i: jnp.where(place == i * ROWS // max(g, ROWS), sums[i * bm : (i + 1) * bm], 0.0)
    return functools.reduce(jnp.add, [mine(i) for i in range(x.shape[0] // bm)])


def _tile(x_ref: Any, block: Any, columns: Any, kept: Any, *, g: int, config: BlockConfig, order: int) -> Any:
    """The result for a few columns of a block, ``[bm, tile]`` in float32."""
    packed_ref, scale_ref, *zero_ref = block
    scale = scale_ref[:, columns].astype(jnp.float32)
    # An integer stands for all groups of a symmetric weight.
    shift: Any = OFFSET[config.variant] + 8
    if zero_ref:
        shift = zero_ref[0][:, columns].astype(jnp.float32) + OFFSET[config.variant]
    if config.variant in "EFG":
        inside = 0 if config.variant == "G" else shift  # what is subtracted from each code
        y = _scaled_weights(x_ref, packed_ref, columns, scale, inside, g=g, config=config)
    else:
        y = _scaled_sums(x_ref, packed_ref, columns, scale, kept, g=g, config=config)
    return y - _zero_points(kept["group_sums"], shift * scale, order) if "group_sums" in kept else y


def _scaled_sums(x_ref: Any, packed_ref: Any, columns: Any, scale: Any, kept: Any, *, g: int, config: Any) -> Any:
    """A, B and D: multiply codes, scale the partial sum of each group."""
    unpack = {"A": unpack_a, "B": unpack_b, "D": unpack_d}[config.variant]
    size = min(g, ROWS)
    total = jnp.zeros((x_ref.shape[0], scale.shape[1]), jnp.float32)
    for start in range(0, x_ref.shape[1], size):
        x = kept["permuted"][start // ROWS] if "permuted" in kept else x_ref[:, start : start + size]
        codes = unpack(packed_ref[start // 2 : (start + size) // 2, columns])
        total += _dot(x, codes) * scale[start // g : start // g + 1]
    return total


def _zero_points(sums_ref: Any, shifts: Any, order: int) -> Any:
    """``sums @ shifts``, both as bfloat16 terms: the depth of the product holds the pairs of terms that matter."""
    total = 0.0
    for section, start in enumerate(range(0, shifts.shape[0], ROWS)):
        terms = split(shifts[start : start + ROWS], order)
        stacked = jnp.concatenate([terms[j] for _, j in _pairs(order)], axis=0).astype(jnp.bfloat16)
        total += _dot(sums_ref[section][:, : stacked.shape[0]], stacked)
    return total


def _scaled_weights(
    x_ref: Any, packed_ref: Any, columns: Any, scale: Any, shift: Any, *, g: int, config: BlockConfig
) -> Any:
    """E, F and G: a chunk of the weight in bfloat16, never more, then one product."""
    dtype = jnp.float32 if config.variant == "F" else jnp.bfloat16
    size = min(g, ROWS)
    total = jnp.zeros((x_ref.shape[0], scale.shape[1]), jnp.float32)
    spread = lambda v, group: jnp.broadcast_to(v[group : group + 1], (size, v.shape[1])).astype(dtype)
    for chunk in range(0, x_ref.shape[1], config.chunk):
        weights = []
        for start in range(chunk, chunk + config.chunk, size):
            codes = pltpu.bitcast(packed_ref[start // 2 : (start + size) // 2, columns], jnp.int4).astype(dtype)
            if not isinstance(shift, int):
                codes = codes - spread(shift, start // g)
            weights.append(codes * spread(scale, start // g))
        dense = jnp.concatenate(weights, axis=0).astype(jnp.bfloat16)
        total += _dot(x_ref[:, chunk : chunk + config.chunk], dense)
    return total
