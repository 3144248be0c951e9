# SPDX-License-Identifier: Apache-2.0
"""The fused kernel: a block streams a strip of the weight through shared memory into the tensor cores.

It computes ``y^T = W^T x^T``: the weight is the operand with 64 rows that comes from registers, so that few tokens fill
the narrow side of the instruction. A block owns ``128 * wide`` channels and `tokens` rows of x; its last warpgroup
fetches, the others multiply. The contraction is split twice: warpgroups of a block take turns over steps (`deep`), and
blocks of a cluster share it (`split`), so that a narrow weight still fills the chip.
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

from awq_jax_kernels.int4_matmul.pallas_gpu import combine, pipeline
from awq_jax_kernels.int4_matmul.pallas_gpu.config import CHANNELS, BlockConfig
from awq_jax_kernels.int4_matmul.pallas_gpu.ends import ALONE, Ends, Writer
from awq_jax_kernels.int4_matmul.pallas_gpu.fragment import UNIT
from awq_jax_kernels.int4_matmul.pallas_gpu.plan import MATRIX, PLAIN, SCALAR, Plan, swizzled
from awq_jax_kernels.int4_matmul.pallas_gpu.reader import Reader

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
        grid=(pl.cdiv(m, config.tokens), n // plan.strip),
        grid_names=("m", "n"),
        cluster=(config.split,),
        cluster_names=("split",),
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
    block_n, block_m, part = lax.axis_index("n"), lax.axis_index("m"), lax.axis_index("split")
    each, extra = divmod(plan.k // c.step, c.split)
    steps = each + (part < extra).astype(jnp.int32)
    first = part * each + jnp.minimum(part, extra)

    plgpu.inline_mgpu(arg_types=(PLAIN,))(lambda _, barriers: pipeline.initialize(barriers, c.wide))(
        scratch["barriers"]
    )

    @pl.when(warpgroup == c.readers)
    def _() -> None:
        plgpu.set_max_registers(c.registers[1], action="decrease")
        _fetch(plan, sources, scratch, first, steps, block_n, block_m)
        for _ in range((1 + plan.mail_in_ring) * (c.split > 1)):  # a cluster's barrier counts these threads too
            plgpu.inline_mgpu()(lambda _: combine.synchronize(0, c.split))()

    @pl.when(warpgroup < c.readers)
    def _() -> None:
        plgpu.set_max_registers(c.registers[0], action="increase")
        place, turn = lax.rem(warpgroup, jnp.int32(c.wide)), lax.div(warpgroup, jnp.int32(c.wide))
        reader = Reader(plan, scratch, place, turn)
        count = lax.div(steps - turn + (c.deep - 1), jnp.int32(c.deep))
        gated = plan.ends.activation is not None  # places are a gate and what it gates: one column of y
        where = (turn, block_m * c.tokens, block_n * plan.each + (0 if gated else place * CHANNELS))
        room = plan.sharing.share <= 2  # in registers
        kept = _read_ahead(plan, around, where) if room else ()
        total = reader.scaled_weight(count) if c.scale_weight else reader.scaled_result(count)
        kept = kept if room else _read_ahead(plan, around, where)
        _finish(plan, total, scratch, around, kept, where, place)


def _fetch(plan: Plan, sources: Any, scratch: Any, first: Any, steps: Any, block_n: Any, block_m: Any) -> None:
    """Stage in the copies of this block's steps."""
    names = ["xs", "ws", "ss"] + (["zs"] if plan.zeros else [])
    swizzles = {"xs": swizzled(16), "ws": () if plan.tiles else swizzled(8), "ss": (), "zs": ()}
    types = [PLAIN] * len(names) + [plgpu.RefType(swizzles[name]) for name in names] + [PLAIN] + [SCALAR] * 4

    @plgpu.inline_mgpu(arg_types=tuple(types))
    def fetch(ctx: Any, *args: Any) -> None:
        source, target = args[: len(names)], args[len(names) : 2 * len(names)]
        barriers, *scalars = args[2 * len(names) :]
        begin, count, at_n, at_m = (scalar.registers.flat[0] for scalar in scalars)
        copies = _copies(plan, source, target, at_n, at_m)
        pipeline.fetch(ctx, barriers, copies, begin, count)

    fetch(*sources, *(scratch[name] for name in names), scratch["barriers"], first, steps, block_n, block_m)


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


def _read_ahead(plan: Plan, around: Any, where: Any) -> Any:
    """What the results will meet, in registers."""
    count = Writer.kept(plan.ends, plan.sharing)
    if not count:
        return ()

    @plgpu.inline_mgpu(
        arg_types=(*[PLAIN] * len(around), *[SCALAR] * 3),
        return_type=(plgpu.ShapeDtypeStruct((), jnp.float32, layout=SCALAR),) * count,
    )
    def read(_: Any, *rest: Any) -> Any:
        kept = _writer(plan, rest).read_ahead()
        return tuple(mgpu.FragmentedArray.splat(value, ()) for value in kept)

    return read(*around, *where)


def _finish(plan: Plan, total: Any, scratch: Any, around: Any, kept: Any, where: Any, place: Any) -> None:
    """Sum over warpgroups and blocks, and write the results."""
    c = plan.config
    mail, kind = (scratch["xs"], plgpu.RefType(swizzled(16))) if plan.mail_in_ring else (scratch["mail"], PLAIN)

    @plgpu.inline_mgpu(arg_types=(MATRIX, kind, SCALAR, *[SCALAR] * len(kept), *[PLAIN] * len(around), *[SCALAR] * 3))
    def finish(_: Any, total: Any, mail: Any, *rest: Any) -> None:
        place, *kept_floats = (scalar.registers.flat[0] for scalar in rest[: 1 + len(kept)])
        turn = rest[-3].registers.flat[0]
        if plan.sharing.holders > 1:
            if plan.mail_in_ring:
                combine.synchronize(128 * c.readers, c.split)
            combine.send(plan.sharing, total, mail, turn, place)
            combine.synchronize(128 * c.readers, c.split)
        sums = combine.collect(plan.sharing, total, mail, turn, place)
        _writer(plan, rest[1 + len(kept) :]).write(sums, kept_floats, mail, turn, place)

    finish(total, mail, place, *kept, *around, *where)


def _writer(plan: Plan, rest: Any) -> Writer:
    *refs, turn, token, channel = rest
    where = (scalar.registers.flat[0] for scalar in (turn, token, channel))
    return Writer(plan.ends, plan.sharing, plan.k, refs, *where)
