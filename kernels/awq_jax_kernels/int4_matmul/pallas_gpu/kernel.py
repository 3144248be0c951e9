# SPDX-License-Identifier: Apache-2.0
"""The fused kernel: a block streams a strip of the weight through shared memory into the tensor cores.

It computes ``y^T = W^T x^T``: the weight is the operand with 64 rows that comes from registers, so that few tokens fill
the narrow side of the instruction. A block owns ``128 * wide`` channels and `tokens` rows of x; its last warpgroup
fetches, the others multiply. The contraction is split twice: warpgroups of a block take turns over steps (`deep`), and
blocks of a cluster share it (`split`), so that a narrow weight still fills the chip.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from awq_jax_kernels.int4_matmul.pallas_gpu import combine, fragment, pipeline
from awq_jax_kernels.int4_matmul.pallas_gpu.config import CHANNELS, BlockConfig
from awq_jax_kernels.int4_matmul.pallas_gpu.fragment import UNIT

__all__ = ["fused"]

SCALAR = plgpu.Layout.WG_SPLAT(())
MATRIX = plgpu.Layout.WGMMA
PLAIN = plgpu.RefType()


def _swizzled(bits: int) -> tuple[Any, ...]:
    """The 128-byte swizzle over tiles of eight rows."""
    return (plgpu.TilingTransform((8, 1024 // bits)), plgpu.SwizzleTransform(128))


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Static facts of one call."""

    config: BlockConfig
    m: int
    k: int
    n: int
    g: int
    dtype: Any
    scale_dtype: Any
    tiles: bool  # the weight is in tile order
    zeros: bool

    @property
    def strip(self) -> int:
        """Channels of a block."""
        return CHANNELS * self.config.wide

    @property
    def rows(self) -> int:
        """Rows of scales in a step."""
        return max(1, self.config.step // self.g)

    @property
    def sharing(self) -> combine.Sharing:
        """Who holds parts of one tile."""
        return combine.Sharing(self.config.tokens, self.config.wide, self.config.deep, self.config.split)

    @property
    def mail_in_ring(self) -> bool:
        """Whether partial results travel through the drained ring: for many tokens there is no room beside it."""
        c = self.config
        return c.tokens >= 64 and 4 * math.prod(combine.mail_shape(self.sharing)) <= 2 * c.stages * c.tokens * c.step

    @property
    def scratch(self) -> dict[str, Any]:
        """Shared memory: the ring, its barriers, and the partial results."""
        c = self.config
        if self.tiles:
            codes = plgpu.SMEM((c.stages, c.wide, c.step // UNIT, 4, 256), jnp.int32)
        else:
            codes = plgpu.SMEM((c.stages, c.wide, c.step // 2, CHANNELS), jnp.int8, transforms=_swizzled(8))
        scratch = {
            "xs": plgpu.SMEM((c.stages, c.tokens, c.step), self.dtype, transforms=_swizzled(16)),
            "ws": codes,
            "ss": plgpu.SMEM((c.stages, self.rows, self.strip), self.scale_dtype),
            "barriers": plgpu.SMEM((2 * c.stages, 2), jnp.int32),
        }
        if self.zeros:
            scratch["zs"] = plgpu.SMEM((c.stages, self.rows, self.strip), jnp.int8)
        if not self.mail_in_ring:
            scratch["mail"] = plgpu.SMEM(combine.mail_shape(self.sharing), jnp.float32)
        return scratch


def fused(x: Any, weight: Any, scale: Any, zero: Any, config: BlockConfig) -> Any:
    """``x @ ((q - zero) * scale)`` for x ``[m, k]`` with m < 8 or a multiple of 8; the rest as in `int4_matmul`."""
    (m, k), (groups, n) = x.shape, scale.shape
    plan = _Plan(config, m, k, n, k // groups, x.dtype, scale.dtype, weight.dtype == jnp.int32, zero is not None)
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


def _body(plan: _Plan, *refs: Any, **scratch: Any) -> None:
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
    if c.dependent_launch:
        plgpu.griddepcontrol_wait()

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
        reader = _Reader(plan, scratch, place, turn)
        count = lax.div(steps - turn + (c.deep - 1), jnp.int32(c.deep))
        total = reader.scaled_weight(count) if c.scale_weight else reader.scaled_result(count)
        _finish(plan, total, scratch, y, place, turn, block_n, block_m)


def _fetch(plan: _Plan, sources: Any, scratch: Any, first: Any, steps: Any, block_n: Any, block_m: Any) -> None:
    """Stage in the copies of this block's steps."""
    c = plan.config
    names = ["xs", "ws", "ss"] + (["zs"] if plan.zeros else [])
    swizzles = {"xs": _swizzled(16), "ws": () if plan.tiles else _swizzled(8), "ss": (), "zs": ()}
    types = [PLAIN] * len(names) + [plgpu.RefType(swizzles[name]) for name in names] + [PLAIN] + [SCALAR] * 4

    @plgpu.inline_mgpu(arg_types=tuple(types))
    def fetch(ctx: Any, *args: Any) -> None:
        source, target = args[: len(names)], args[len(names) : 2 * len(names)]
        barriers, *scalars = args[2 * len(names) :]
        begin, count, at_n, at_m = (scalar.registers.flat[0] for scalar in scalars)
        index = ir.IndexType.get()
        column, token = (arith.index_cast(index, v) for v in (at_n, at_m))

        def times(value: ir.Value, factor: int) -> ir.Value:
            return arith.muli(value, mgpu.c(factor, index))

        def group(step: ir.Value) -> ir.Value:
            return times(step, plan.rows) if plan.g < c.step else arith.divui(step, mgpu.c(plan.g // c.step, index))

        def per_group(step: ir.Value) -> Any:
            return (group(step), plan.rows), (times(column, plan.strip), plan.strip)

        def rows_of_x(step: ir.Value) -> Any:
            return (times(token, c.tokens), c.tokens), (times(step, c.step), c.step)

        def tiles(step: ir.Value) -> Any:
            units = c.step // UNIT
            return (times(column, c.wide), c.wide), (times(step, units), units), (0, 4), (0, 256)

        def packed(j: int) -> Any:
            at = lambda: arith.addi(times(column, plan.strip), mgpu.c(j * CHANNELS, index))
            return lambda step: ((times(step, c.step // 2), c.step // 2), (at(), CHANNELS))

        if plan.tiles:
            copies = [pipeline.Copy(source[1], target[1], tiles)]
        else:
            copies = [pipeline.Copy(source[1], target[1], packed(j), (8, 128), j) for j in range(c.wide)]
        copies.append(pipeline.Copy(source[0], target[0], rows_of_x, (8, 64)))
        copies += [pipeline.Copy(s, t, per_group) for s, t in zip(source[2:], target[2:], strict=True)]
        pipeline.fetch(ctx, barriers, copies, begin, count)

    fetch(*sources, *(scratch[name] for name in names), scratch["barriers"], first, steps, block_n, block_m)


class _Reader:
    """One warpgroup that multiplies: 128 channels, every `deep`-th step of the block."""

    def __init__(self, plan: _Plan, scratch: Any, place: Any, turn: Any):
        self.plan, self.scratch, self.place, self.turn = plan, scratch, place, turn
        opaque = plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR))
        self.mask = opaque(lambda _: mgpu.FragmentedArray.splat(fragment.opaque_mask(), (), is_signed=True))()

    def step(self, t: Any) -> Any:
        """The block's step that is this warpgroup's t-th."""
        return t * self.plan.config.deep + self.turn

    def wait(self, t: Any) -> Any:
        """Wait for a step's bytes; its slot."""
        on_barrier = plgpu.inline_mgpu(arg_types=(PLAIN, SCALAR))
        wait = on_barrier(lambda _, barriers, i: pipeline.wait_full(barriers, i.registers.flat[0]))
        wait(self.scratch["barriers"], self.step(t))
        return lax.rem(self.step(t), jnp.int32(self.plan.config.stages))

    def release(self, t: Any) -> None:
        """Let a step's slot be filled again."""
        on_barrier = plgpu.inline_mgpu(arg_types=(PLAIN, SCALAR))
        release = on_barrier(lambda _, barriers, i: pipeline.release(barriers, i.registers.flat[0]))
        release(self.scratch["barriers"], self.step(t))

    def per_group(self, name: str, slot: Any, rows: Any) -> Any:
        """This warpgroup's scales or zeros of some groups."""
        return self.scratch[name].at[slot, rows, pl.ds(self.place * CHANNELS, CHANNELS)]

    def weight(self, slot: Any, unit: int) -> Any:
        """Dequantize 64 steps of the slot into registers."""
        plan, c = self.plan, self.plan.config
        rows = pl.ds(unit * UNIT // plan.g if plan.g < c.step else 0, max(1, UNIT // plan.g))
        if plan.tiles:
            codes, kind = self.scratch["ws"].at[slot, self.place, unit], PLAIN
        else:
            window = pl.ds(unit * (UNIT // 2), UNIT // 2)
            codes, kind = self.scratch["ws"].at[slot, self.place, window], plgpu.RefType(_swizzled(8))
        more = [self.per_group("zs", slot, rows)] if plan.zeros else []
        more += [self.per_group("ss", slot, rows)] if c.scale_weight else []

        @plgpu.inline_mgpu(
            arg_types=(SCALAR, kind, *[PLAIN] * len(more)),
            return_type=plgpu.ShapeDtypeStruct((CHANNELS, UNIT), plan.dtype, layout=MATRIX),
        )
        def dequantize(_: Any, mask: Any, codes: Any, *more: Any) -> Any:
            zero = more[0] if plan.zeros else None
            scale = more[-1] if c.scale_weight else None
            return fragment.dequantize(codes, zero, scale, mask.registers.flat[0], plan.dtype)

        return dequantize(self.mask, codes, *more)

    def multiply(self, acc: Any, slot: Any, unit: int) -> None:
        """Start adding one unit's product to an accumulator."""
        x = self.scratch["xs"].at[slot, :, pl.ds(unit * UNIT, UNIT)]
        plgpu.wgmma(acc, self.weight(slot, unit), plgpu.transpose_ref(x, (1, 0)))

    def scaled_result(self, count: Any) -> Any:
        """Sum each group unscaled and add it scaled: codes stay exact, and one multiplication serves a result."""
        plan, c = self.plan, self.plan.config
        shape = (CHANNELS, c.tokens)
        per_group = min(plan.g, c.step) // UNIT

        @plgpu.inline_mgpu(
            arg_types=(MATRIX, MATRIX, PLAIN),
            return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=MATRIX),
        )
        def add_scaled(_: Any, *operands: Any) -> Any:
            return fragment.add_scaled(*operands)

        def body(t: Any, total: Any) -> Any:
            slot = self.wait(t)
            for row in range(plan.rows):

                def group(acc: Any, row: int = row) -> Any:
                    for unit in range(per_group):
                        self.multiply(acc, slot, row * per_group + unit)
                    return acc[...]

                partial = pl.run_scoped(group, plgpu.WGMMAAccumulatorRef(shape))
                total = add_scaled(total, partial, self.per_group("ss", slot, row))
            self.release(t)
            return total

        zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), MATRIX)
        return lax.fori_loop(0, count, body, zeros)

    def scaled_weight(self, count: Any) -> Any:
        """Scale the codes themselves, and keep one product in flight while the next operand is made.

        A step has an even number of units, so that the operand being made is never the one in flight: registers that
        a product in flight still reads belong to the program, and no compiler checks it.
        """

        def run(acc: Any) -> Any:
            @pl.loop(0, count)
            def _(t: Any) -> None:
                slot = self.wait(t)
                for unit in range(self.plan.config.step // UNIT):
                    self.multiply(acc, slot, unit)
                    plgpu.wgmma_wait(1)
                    if unit == 0:  # the products of the step before are complete
                        pl.when(t > 0)(lambda: self.release(t - 1))

            return acc[...]

        return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef((CHANNELS, self.plan.config.tokens)))


def _finish(plan: _Plan, total: Any, scratch: Any, y: Any, place: Any, turn: Any, block_n: Any, block_m: Any) -> None:
    """Sum over warpgroups and blocks, and write y."""
    c = plan.config
    mail, kind = (scratch["xs"], plgpu.RefType(_swizzled(16))) if plan.mail_in_ring else (scratch["mail"], PLAIN)

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
