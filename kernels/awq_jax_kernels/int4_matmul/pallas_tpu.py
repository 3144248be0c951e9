# SPDX-License-Identifier: Apache-2.0
"""`int4_matmul` as one Mosaic kernel for TPU v4 to v7x.

The grid runs over halves of a megacore, blocks of rows, columns, and k last; x stays in VMEM while weights stream by.
A, B and D multiply the codes as they are and scale each group's partial sum; what their offset and the zero points add
is one thin product per block, ``sum(x of a group) * (zero + offset) * scale``, in full float32. The group sums, and x
permuted for A, are made in the first step of each core by the matrix unit and kept.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int8

from awq_jax_kernels.int4_matmul.config import BlockConfig, choose
from awq_jax_kernels.int4_matmul.unpack import OFFSET, ROWS, permutation, split, unpack_a, unpack_b, unpack_d

__all__ = ["BlockConfig", "fused", "int4_matmul", "supports"]

_PARTS = {"bfloat16": 1, "float16": 2, "float32": 3}  # bfloat16 terms that hold a value exactly


def supports(x: Any, packed: Any, scale: Any, zero: Any = None, *, config: BlockConfig | None = None) -> str | None:
    """Why the kernel can't take these operands, or None if it can; the platform shows when a program is lowered."""
    (m, k), n, groups = x.shape, packed.shape[1], scale.shape[0]
    g = k // groups
    if not m:
        return "x has no rows"
    if k % ROWS or n % 128:
        return f"k={k} and n={n} must be multiples of 128"
    if g % ROWS and (ROWS % g or g < 32):
        return f"groups of {g} rows are neither 32, 64 nor a multiple of 128"
    if str(x.dtype) not in _PARTS:
        return f"x is {x.dtype}, not one of {', '.join(_PARTS)}"
    return None if config is None else _misfit(config, k, n, g, exact=str(x.dtype) != "bfloat16")


def _misfit(config: BlockConfig, k: int, n: int, g: int, *, exact: bool) -> str | None:
    """What is wrong with a config for these sizes."""
    if n % (config.bn * config.cores) or config.bn % 128:
        return f"bn={config.bn} times {config.cores} cores must divide n={n}, in multiples of 128"
    if k % config.bk or config.bk % max(g, ROWS):
        return f"bk={config.bk} must divide k={k}, in multiples of {max(g, ROWS)}"
    if config.variant in "EF" and (config.bk % config.chunk or config.chunk % ROWS):
        return f"chunk={config.chunk} must divide bk={config.bk}, in multiples of {ROWS}"
    if config.variant in "EF" and exact:
        return f"variant {config.variant} rounds weights to bfloat16, x is wider"
    if config.variant not in "EF" and config.bk // g > ROWS:
        return f"bk={config.bk} holds more than {ROWS} groups of {g} rows"
    if config.variant == "A" and g % ROWS:
        return f"variant A needs groups of a multiple of {ROWS} rows, not {g}"
    return None


def int4_matmul(
    x: Float[Array, "m k"],
    packed: Int8[Array, "k2 n"],
    scale: Float[Array, "groups n"],
    zero: Int8[Array, "groups n"] | None = None,
    *,
    config: BlockConfig | None = None,
) -> Float[Array, "m n"]:
    """``y = x @ ((q - zero) * scale)`` without the dense weight.

    float32 and float16 activations are split into bfloat16 terms, one set of rows each, so that their product is as
    exact as in float32 while the weight is fetched and unpacked once.

    Raises:
      ValueError: a config that does not fit the operands.
    """
    (m, k), n = x.shape, packed.shape[1]
    parts = _PARTS[str(x.dtype)]
    if config is None:
        config = choose(parts * m, k, n, k // scale.shape[0], zeros=zero is not None, exact=parts > 1)
        if config.variant == "A" and supports(x, packed, scale, zero, config=config):
            config = BlockConfig(**{**vars(config), "variant": "B"})
    if reason := supports(x, packed, scale, zero, config=config):
        raise ValueError(f"{config} does not fit x {x.shape} and packed {packed.shape}: {reason}.")
    if scale.dtype == jnp.float16:
        scale = scale.astype(jnp.float32)  # Mosaic has no float16
    if parts == 1:
        return fused(x, packed, scale, zero, config=config)
    rows = jnp.concatenate(split(x.astype(jnp.float32), parts))
    y = fused(rows, packed, scale, zero, config=config, out_dtype=jnp.float32)
    return y.reshape(parts, m, n).sum(0).astype(x.dtype)


def fused(
    x: Any, packed: Any, scale: Any, zero: Any, *, config: BlockConfig, out_dtype: Any = None, still: bool = False
) -> Any:
    """The kernel itself, for x in bfloat16.

    `still` keeps the first block of the weight where it is: the result is wrong, and what the program costs is the
    core's work without its copies, which is what the performance model wants to know.
    """
    (m, k), n = x.shape, packed.shape[1]
    groups, bm, bn, bk = scale.shape[0], -(-min(config.bm, m) // 16) * 16, config.bn, config.bk
    columns, steps = n // bn // config.cores, k // bk
    spec = functools.partial(pl.BlockSpec, memory_space=pltpu.VMEM)
    move = (lambda c, i, j, s: (0, 0)) if still else None
    column = spec((groups, bn), move or (lambda c, i, j, s: (0, c * columns + j)))
    scratch = {
        "sums": pltpu.VMEM((bm, bn), jnp.float32),
        "permuted": pltpu.VMEM((k // ROWS, bm, ROWS), jnp.bfloat16),
        "group_sums": pltpu.VMEM((steps, 3 * bm, ROWS), jnp.bfloat16),
        "scales": pltpu.VMEM((steps, groups // steps, bn), jnp.float32),
        "offsets": pltpu.VMEM((steps, groups // steps, bn), jnp.float32),
    }
    needed = _scratch(config, symmetric=zero is None, steps=steps)
    body = functools.partial(_kernel, config=config, groups=groups, names=needed, symmetric=zero is None)
    return pl.pallas_call(
        body,
        grid=(config.cores, pl.cdiv(m, bm), columns, steps),
        in_specs=[
            spec((bm, k), lambda c, i, j, s: (i, 0)),
            spec((bk // 2, bn), move or (lambda c, i, j, s: (s, c * columns + j))),
            column,
            *([] if zero is None else [column]),
        ],
        out_specs=spec((bm, bn), lambda c, i, j, s: (i, c * columns + j)),
        out_shape=_like((m, n), out_dtype or x.dtype, x, packed, scale),
        scratch_shapes=[scratch[name] for name in needed],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel" if config.cores > 1 else "arbitrary", *["arbitrary"] * 3),
            vmem_limit_bytes=config.vmem_mib << 20,
        ),
        interpret=pltpu.InterpretParams() if config.interpret is True else config.interpret,
        name="int4_matmul",
    )(x, packed, scale, *([] if zero is None else [zero]))


def _like(shape: tuple[int, ...], dtype: Any, *operands: Any) -> jax.ShapeDtypeStruct:
    """A result that varies over the mesh axes that any operand varies over, as `jax.shard_map` wants to know."""
    axes = [getattr(jax.typeof(o), "vma", frozenset()) for o in operands]
    varying = frozenset().union(*axes)
    return jax.ShapeDtypeStruct(shape, dtype, vma=varying) if varying else jax.ShapeDtypeStruct(shape, dtype)


def _scratch(config: BlockConfig, *, symmetric: bool, steps: int) -> tuple[str, ...]:
    """What a variant keeps between grid steps."""
    scaled = config.variant in "EF"
    keeps = {
        "sums": steps > 1,
        "permuted": config.variant == "A",
        "group_sums": not scaled and not (symmetric and config.variant != "A"),
        "scales": steps > 1,
        "offsets": steps > 1 and not symmetric,
    }
    return tuple(name for name, kept in keeps.items() if kept)


def _dot(a: Any, b: Any) -> Any:
    return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _kernel(*refs: Any, config: BlockConfig, groups: int, names: tuple[str, ...], symmetric: bool) -> None:
    x_ref, packed_ref, scale_ref, *rest = refs
    zero_ref = None if symmetric else rest.pop(0)
    out_ref, *scratch = rest
    kept = dict(zip(names, scratch, strict=True))
    step, steps = pl.program_id(3), x_ref.shape[1] // config.bk
    g = x_ref.shape[1] // groups

    if "permuted" in kept or "group_sums" in kept:
        first = lambda: _prepare_x(x_ref, kept, g, config.bk)
        pl.when(pl.program_id(2) == 0)(first if steps == 1 else lambda: pl.when(step == 0)(first))
    scale, offset = _scales(scale_ref, zero_ref, kept, step, steps, OFFSET[config.variant])
    # A code plus an offset below 256, times a bfloat16 scale, has sixteen bits: two terms.
    terms = 2 if scale_ref.dtype == jnp.bfloat16 else 3
    sums_of = functools.partial(_scaled_sums, terms=terms)
    block = _scaled_weights if config.variant in "EF" else sums_of
    acc = block(x_ref, packed_ref, scale, offset, kept, step=step, g=g, config=config)
    if steps == 1:
        out_ref[...] = acc.astype(out_ref.dtype)
        return
    sums = kept["sums"]
    pl.when(step == 0)(lambda: sums.__setitem__(..., jnp.zeros(sums.shape, sums.dtype)))
    sums[...] += acc
    pl.when(step == steps - 1)(lambda: out_ref.__setitem__(..., sums[...].astype(out_ref.dtype)))


def _prepare_x(x_ref: Any, kept: dict[str, Any], g: int, bk: int) -> None:
    """Permute x for A, and add it up over groups.

    Both are products of all of x, its tiles of 128 columns laid one below the other, with a matrix that stays where
    it is: the permutation, and for the sums one that marks the rows of each group.
    """
    bm, k = x_ref.shape
    for step in range(k // bk):
        tiles = range(step * bk // ROWS, (step + 1) * bk // ROWS)
        x = jnp.concatenate([x_ref[:, i * ROWS : (i + 1) * ROWS] for i in tiles], axis=0)
        if "permuted" in kept:
            permuted = _dot(x, permutation()).astype(jnp.bfloat16)
            kept["permuted"][tiles.start : tiles.stop] = permuted.reshape(len(tiles), bm, ROWS)
        if "group_sums" in kept:
            kept["group_sums"][step] = jnp.concatenate(split(_group_sums(x, bm, g), 3), axis=0)


def _group_sums(x: Any, bm: int, g: int) -> Any:
    """``[bm, 128]``: lane j is the sum over group j, of tiles of x ``[tiles * bm, 128]``."""
    share = max(1, ROWS // g)  # groups that share a tile
    lane = jax.lax.broadcasted_iota(jnp.int32, (ROWS, ROWS), 1) & (share - 1)
    row = jax.lax.broadcasted_iota(jnp.int32, (ROWS, ROWS), 0) >> (ROWS // share).bit_length() - 1
    sums = _dot(x, jnp.where(row == lane, 1.0, 0.0).astype(jnp.bfloat16))  # lane j: group j % share of its tile
    place = jax.lax.broadcasted_iota(jnp.int32, (bm, ROWS), 1) >> share.bit_length() - 1
    mine = lambda i: jnp.where(place == i * ROWS // max(g, ROWS), sums[i * bm : (i + 1) * bm], 0.0)
    return functools.reduce(jnp.add, [mine(i) for i in range(x.shape[0] // bm)])


def _scales(scale_ref: Any, zero_ref: Any, kept: dict[str, Any], step: Any, steps: int, offset: int) -> tuple[Any, Any]:
    """Scale and ``zero + offset`` of this block's groups in float32; an integer stands for all of a symmetric weight.

    Both come in whole columns, because rows of an int8 block must be a multiple of 32, and are cut in scratch.
    """
    constant = 8 + offset if zero_ref is None else None
    scale = lambda: scale_ref[...].astype(jnp.float32)
    zeros = lambda: zero_ref[...].astype(jnp.float32) + offset
    if steps == 1:
        return scale(), zeros() if constant is None else constant

    @pl.when(step == 0)
    def _() -> None:
        for name, value in (("scales", scale()), *([("offsets", zeros())] if constant is None else [])):
            rows = kept[name].shape[1]
            for s in range(steps):
                kept[name][s] = value[s * rows : (s + 1) * rows]

    return kept["scales"][step], kept["offsets"][step] if constant is None else constant


def _x_block(x_ref: Any, kept: dict[str, Any], step: Any, start: int, size: int, bk: int) -> Any:
    """Columns of x that meet rows ``start : start + size`` of this block of the weight."""
    if "permuted" in kept:
        return kept["permuted"][step * (bk // ROWS) + start // ROWS]
    if bk == x_ref.shape[1]:
        return x_ref[:, start : start + size]
    base = pl.multiple_of(step * bk + start // ROWS * ROWS, ROWS)
    wide = x_ref[:, pl.ds(base, max(size, ROWS))]
    return wide if size >= ROWS else wide[:, start % ROWS : start % ROWS + size]


def _scaled_sums(
    x_ref: Any, packed_ref: Any, scale: Any, offset: Any, kept: Any, *, step: Any, g: int, config: Any, terms: int
):
    """A, B and D: multiply codes, scale partial sums, and take off the zero points at the end."""
    unpack = {"A": unpack_a, "B": unpack_b, "D": unpack_d}[config.variant]
    size = min(g, ROWS)
    acc = jnp.zeros((x_ref.shape[0], config.bn), jnp.float32)
    for start in range(0, config.bk, size):
        x = _x_block(x_ref, kept, step, start, size, config.bk)
        codes = unpack(packed_ref[start // 2 : (start + size) // 2, :])
        acc += _dot(x, codes) * scale[start // g : start // g + 1]
    if "group_sums" in kept:
        sums = kept["group_sums"][step][:, : config.bk // g]
        bias = functools.reduce(jnp.add, [_dot(sums, term) for term in split(offset * scale, terms)])
        acc -= functools.reduce(jnp.add, jnp.split(bias, 3))
    return acc


def _scaled_weights(x_ref: Any, packed_ref: Any, scale: Any, offset: Any, kept: Any, *, step: Any, g: int, config: Any):
    """E and F: the weight of a few groups in bfloat16, never more, then one product."""
    dtype = jnp.bfloat16 if config.variant == "E" else jnp.float32
    size = min(g, ROWS)
    acc = jnp.zeros((x_ref.shape[0], config.bn), jnp.float32)
    for chunk in range(0, config.bk, config.chunk):
        weights = []
        for start in range(chunk, chunk + config.chunk, size):
            spread = lambda v, row=start // g: jnp.broadcast_to(v[row : row + 1], (size, config.bn)).astype(dtype)
            codes = pltpu.bitcast(packed_ref[start // 2 : (start + size) // 2, :], jnp.int4).astype(dtype)
            if not isinstance(offset, int):
                codes = codes - spread(offset)
            weights.append((codes * spread(scale)).astype(jnp.bfloat16))
        x = _x_block(x_ref, kept, step, chunk, config.chunk, config.bk)
        acc += _dot(x, jnp.concatenate(weights, axis=0))
    return acc
