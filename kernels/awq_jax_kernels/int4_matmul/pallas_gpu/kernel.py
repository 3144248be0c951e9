# SPDX-License-Identifier: Apache-2.0
"""The fused kernel: a block streams a strip of the weight through shared memory into the tensor cores.

It computes ``y^T = W^T x^T``: the weight is the operand with 64 rows that comes from registers, so that few tokens fill
the narrow side of the instruction. A block owns ``128 * wide`` channels and `tokens` rows of x; its last warpgroup
fetches, the others multiply. The contraction is split twice: warpgroups of a block take turns over steps (`deep`), and
blocks of a cluster share it (`split`), so that a narrow weight still fills the chip.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from awq_jax_kernels.int4_matmul.pallas_gpu import combine, pipeline
from awq_jax_kernels.int4_matmul.pallas_gpu.config import CHANNELS, BlockConfig
from awq_jax_kernels.int4_matmul.pallas_gpu.fragment import UNIT
from awq_jax_kernels.int4_matmul.pallas_gpu.plan import MATRIX, PLAIN, SCALAR, Plan, swizzled
from awq_jax_kernels.int4_matmul.pallas_gpu.reader import Reader

__all__ = ["fused"]


def fused(x: Any, weight: Any, scale: Any, zero: Any, config: BlockConfig) -> Any:
    """``x @ ((q - zero) * scale)`` for x ``[m, k]`` with m < 8 or a multiple of 8; the rest as in `int4_matmul`."""
    (m, k), (groups, n) = x.shape, scale.shape
    plan = Plan(config, m, k, n, k // groups, x.dtype, scale.dtype, weight.dtype == jnp.int32, zero is not None)
    operands = [x, weight, scale] + ([zero] if plan.zeros else [])
    call = plgpu.kernel(
        functools.partial(_body, plan),
        out_type=jax.ShapeDtypeStruct((m, n), x.dtype),
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
    return call(*operands)


def _body(plan: Plan, *refs: Any, **scratch: Any) -> None:
    *sources, y = refs
    c = plan.config
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
        total = reader.scaled_weight(count) if c.scale_weight else reader.scaled_result(count)
        _finish(plan, total, scratch, y, place, turn, block_n, block_m)


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

    def tiles(step: ir.Value) -> Any:
        units = c.step // UNIT
        return (times(column, c.wide), c.wide), (times(step, units), units), (0, 4), (0, 256)

    def packed(j: int, step: ir.Value) -> Any:
        channel = arith.addi(times(column, plan.strip), mgpu.c(j * CHANNELS, index))
        return (times(step, c.step // 2), c.step // 2), (channel, CHANNELS)

    def rows_of_x(step: ir.Value) -> Any:
        return (times(token, c.tokens), c.tokens), (times(step, c.step), c.step)

    def per_group(step: ir.Value) -> Any:
        many = plan.g >= c.step  # steps to a group
        row = arith.divui(step, mgpu.c(plan.g // c.step, index)) if many else times(step, plan.rows)
        return (row, plan.rows), (times(column, plan.strip), plan.strip)

    if plan.tiles:
        copies = [pipeline.Copy(source[1], target[1], tiles)]
    else:
        of = lambda j: functools.partial(packed, j)
        copies = [pipeline.Copy(source[1], target[1], of(j), (8, 128), j) for j in range(c.wide)]
    copies.append(pipeline.Copy(source[0], target[0], rows_of_x, (8, 64)))
    return copies + [pipeline.Copy(s, t, per_group) for s, t in zip(source[2:], target[2:], strict=True)]


def _finish(plan: Plan, total: Any, scratch: Any, y: Any, place: Any, turn: Any, block_n: Any, block_m: Any) -> None:
    """Sum over warpgroups and blocks, and write y."""
    c = plan.config
    mail, kind = (scratch["xs"], plgpu.RefType(swizzled(16))) if plan.mail_in_ring else (scratch["mail"], PLAIN)

    @plgpu.inline_mgpu(arg_types=(MATRIX, kind, PLAIN, *[SCALAR] * 4))
    def finish(_: Any, total: Any, mail: Any, y: Any, *scalars: Any) -> None:
        turn, place, token, channel = (scalar.registers.flat[0] for scalar in scalars)
        if plan.sharing.holders > 1:
            if plan.mail_in_ring:
                combine.synchronize(128 * c.readers, c.split)
            combine.send(plan.sharing, total, mail, turn, place)
            combine.synchronize(128 * c.readers, c.split)
        combine.write(plan.sharing, total, mail, y, turn, place, token, channel)

    finish(total, mail, y, turn, place, block_m * c.tokens, block_n * plan.strip + place * CHANNELS)
