# SPDX-License-Identifier: Apache-2.0
"""The fused kernel: a block streams a strip of the weight through shared memory into the tensor cores.

It computes ``y^T = W^T x^T``: the weight is the operand with 64 rows that comes from registers, so that few tokens fill
the narrow side of the instruction. A block owns ``128 * wide`` channels and `tokens` rows of x; its last warpgroup
fetches, the others multiply. The contraction is split twice: warpgroups of a block take turns over steps (`deep`), and
blocks of a cluster share it (`split`), so that a narrow weight still fills the chip. Of a large product a block
computes one tile after the other (`work`).
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from awq_jax_kernels.int4_matmul.pallas_gpu import combine, pipeline, work
from awq_jax_kernels.int4_matmul.pallas_gpu.config import CHANNELS, BlockConfig
from awq_jax_kernels.int4_matmul.pallas_gpu.ends import ALONE, Ends, Writer
from awq_jax_kernels.int4_matmul.pallas_gpu.fragment import UNIT
from awq_jax_kernels.int4_matmul.pallas_gpu.plan import MATRIX, PLAIN, SCALAR, Plan, swizzled
from awq_jax_kernels.int4_matmul.pallas_gpu.reader import Reader
from awq_jax_kernels.int4_matmul.pallas_gpu.work import Work

__all__ = ["fused"]


def fused(x: Any, weight: Any, scale: Any, zero: Any, config: BlockConfig, ends: Ends = ALONE, *more: Any) -> Any:
    """``x @ ((q - zero) * scale)`` for x ``[m, k]`` with m < 8 or a multiple of 8; the rest as in `int4_matmul`.

    What `ends` reads comes behind it: squares, float32 ``[m, parts]``; the stream ``[m, n]`` and the norm's weight,
    float32 ``[n]``. Where it adds, the results are the sum, the weighted sum and its squares.
    """
    (m, k), (groups, n) = x.shape, scale.shape
    plan = Plan(config, m, k, n, k // groups, x.dtype, scale.dtype, weight.dtype == jnp.int32, zero is not None, ends)
    operands = [x, weight, scale] + ([zero] if plan.zeros else [])
    call = plgpu.kernel(
        functools.partial(_body, plan),
        out_type=plan.out,
        **work.grid(plan),
        num_threads=config.readers + 1,
        thread_name="warpgroup",
        scratch_types=plan.scratch,
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name="int4_matmul",
    )
    return call(*operands, *more)


def _body(plan: Plan, *refs: Any, **scratch: Any) -> None:
    c, loaded = plan.config, 3 + plan.zeros
    sources, around = refs[:loaded], refs[loaded:]
    warpgroup = lax.axis_index("warpgroup")
    initialize = plgpu.inline_mgpu(arg_types=(PLAIN,))(lambda _, barriers: pipeline.initialize(barriers, c.wide))
    initialize(scratch["barriers"])

    @pl.when(warpgroup == c.readers)
    def _() -> None:
        plgpu.set_max_registers(c.registers[1], action="decrease")
        work.each(plan, functools.partial(_fetch, plan, sources, scratch))

    @pl.when(warpgroup < c.readers)
    def _() -> None:
        plgpu.set_max_registers(c.registers[0], action="increase")
        work.each(plan, functools.partial(_multiply, plan, around, scratch, warpgroup))


def _fetch(plan: Plan, sources: Any, scratch: Any, item: Work) -> None:
    """Stage in the copies of a tile's steps."""
    names = ["xs", "ws", "ss"] + (["zs"] if plan.zeros else [])
    swizzles = {"xs": swizzled(16), "ws": () if plan.tiles else swizzled(8), "ss": (), "zs": ()}
    types = [PLAIN] * len(names) + [plgpu.RefType(swizzles[name]) for name in names] + [PLAIN] + [SCALAR] * 5

    @plgpu.inline_mgpu(arg_types=tuple(types))
    def fetch(ctx: Any, *args: Any) -> None:
        source, target = args[: len(names)], args[len(names) : 2 * len(names)]
        barriers, *scalars = args[2 * len(names) :]
        begin, count, before, at_n, at_m = (scalar.registers.flat[0] for scalar in scalars)
        copies = _copies(plan, source, target, at_n, at_m)
        pipeline.fetch(ctx, barriers, copies, begin, count, before)

    numbers = (item.first, item.steps, item.before, item.block_n, item.block_m)
    fetch(*sources, *(scratch[name] for name in names), scratch["barriers"], *numbers)

    def stand_by(sharing: combine.Sharing) -> None:
        for _ in range((1 + plan.mail_in_ring(sharing)) * (sharing.split > 1)):
            plgpu.inline_mgpu()(lambda _: combine.synchronize(0, sharing.split))()

    work.end(item, stand_by)  # a cluster's barrier counts these threads too


def _multiply(plan: Plan, around: Any, scratch: Any, warpgroup: Any, item: Work) -> None:
    """Multiply a tile's steps, and write what comes out."""
    c = plan.config
    place = lax.rem(warpgroup, jnp.int32(c.wide))
    turn = lax.div(warpgroup, jnp.int32(c.wide)) if c.deep > 1 else jnp.int32(0)
    reader = Reader(plan, scratch, place, turn, item.before)
    count = lax.div(item.steps - turn + (c.deep - 1), jnp.int32(c.deep))
    gated = plan.ends.activation is not None  # places are a gate and what it gates: one column of y
    where = (turn, item.block_m * c.tokens, item.block_n * plan.each + (0 if gated else place * CHANNELS))
    room = plan.sharing.share <= 2 and not c.persistent  # in registers
    kept = _read_ahead(plan, plan.sharing, around, where) if room else ()
    total = reader.scaled_weight(count) if c.scale_weight else reader.scaled_result(count)

    def finish(sharing: combine.Sharing) -> None:
        met = kept if room else _read_ahead(plan, sharing, around, where)
        _finish(plan, sharing, total, scratch, around, met, where, place)

    work.end(item, finish)


def _copies(plan: Plan, source: Any, target: Any, block_n: ir.Value, block_m: ir.Value) -> list[pipeline.Copy]:
    """The copies of one step, codes first: they come from device memory, x mostly from the second-level cache."""
    c, index = plan.config, ir.IndexType.get()
    column, token = (arith.index_cast(index, v) for v in (block_n, block_m))

    def times(value: ir.Value, factor: int) -> ir.Value:
        return arith.muli(value, mgpu.c(factor, index))

    def strip(j: int, channels: int) -> ir.Value:
        """Where the channels of a place begin, counted in so many."""
        return arith.addi(times(column, plan.each // channels), mgpu.c(j * plan.apart // channels, index))

    def tiles(j: int, step: ir.Value) -> Any:
        units = c.step // UNIT
        return strip(j, CHANNELS), (times(step, units), units), (0, 4), (0, 256)

    def packed(j: int, step: ir.Value) -> Any:
        return (times(step, c.step // 2), c.step // 2), (strip(j, 1), CHANNELS)

    def rows_of_x(step: ir.Value) -> Any:
        return (times(token, c.tokens), c.tokens), (times(step, c.step), c.step)

    def per_group(j: int, step: ir.Value) -> Any:
        many = plan.g >= c.step  # steps to a group
        row = arith.divui(step, mgpu.c(plan.g // c.step, index)) if many else times(step, plan.rows)
        return (row, plan.rows), (strip(j, 1), CHANNELS)

    window, tile = (tiles, None) if plan.tiles else (packed, (8, 128))
    of_places = [(1, window, tile)] + [(i, per_group, None) for i in range(2, len(source))]
    copies = [
        pipeline.Copy(source[i], target[i], functools.partial(window, j), tile, j)
        for i, window, tile in of_places
        for j in range(c.wide)
    ]
    return [*copies[: c.wide], pipeline.Copy(source[0], target[0], rows_of_x, (8, 64)), *copies[c.wide :]]


def _read_ahead(plan: Plan, sharing: combine.Sharing, around: Any, where: Any) -> Any:
    """What the results will meet, in registers."""
    count = Writer.kept(plan.ends, sharing)
    if not count:
        return ()

    @plgpu.inline_mgpu(
        arg_types=(*[PLAIN] * len(around), *[SCALAR] * 3),
        return_type=(plgpu.ShapeDtypeStruct((), jnp.float32, layout=SCALAR),) * count,
    )
    def read(_: Any, *rest: Any) -> Any:
        kept = _writer(plan, sharing, rest).read_ahead()
        return tuple(mgpu.FragmentedArray.splat(value, ()) for value in kept)

    return read(*around, *where)


def _finish(
    plan: Plan, sharing: combine.Sharing, total: Any, scratch: Any, around: Any, kept: Any, where: Any, place: Any
) -> None:
    """Sum over warpgroups and blocks, and write the results."""
    readers = 128 * plan.config.readers
    drained = sharing.holders > 1 and plan.mail_in_ring(sharing)
    mail, kind = (scratch["mail"], PLAIN) if "mail" in scratch else (scratch["xs"], plgpu.RefType(swizzled(16)))

    @plgpu.inline_mgpu(arg_types=(MATRIX, kind, SCALAR, *[SCALAR] * len(kept), *[PLAIN] * len(around), *[SCALAR] * 3))
    def finish(_: Any, total: Any, mail: Any, *rest: Any) -> None:
        place, *kept_floats = (scalar.registers.flat[0] for scalar in rest[: 1 + len(kept)])
        turn = rest[-3].registers.flat[0]
        if sharing.holders > 1:
            if drained:
                combine.synchronize(readers, sharing.split)
            combine.send(sharing, total, mail, turn, place)
            combine.synchronize(readers, sharing.split)
        sums = combine.collect(sharing, total, mail, turn, place)
        _writer(plan, sharing, rest[1 + len(kept) :]).write(sums, kept_floats, mail, turn, place)

    finish(total, mail, place, *kept, *around, *where)


def _writer(plan: Plan, sharing: combine.Sharing, rest: Any) -> Writer:
    *refs, turn, token, channel = rest
    where = (scalar.registers.flat[0] for scalar in (turn, token, channel))
    return Writer(plan.ends, sharing, plan.k, refs, *where)
