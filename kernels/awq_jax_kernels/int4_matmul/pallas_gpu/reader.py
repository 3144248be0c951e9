# SPDX-License-Identifier: Apache-2.0
"""A warpgroup that multiplies: it waits for a step, makes operands of its codes and feeds the tensor cores."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from awq_jax_kernels.int4_matmul.pallas_gpu import fragment, pipeline
from awq_jax_kernels.int4_matmul.pallas_gpu.config import CHANNELS
from awq_jax_kernels.int4_matmul.pallas_gpu.fragment import UNIT
from awq_jax_kernels.int4_matmul.pallas_gpu.plan import MATRIX, PLAIN, SCALAR, Plan, swizzled

__all__ = ["Reader"]


class Reader:
    """One warpgroup that multiplies: 128 channels, every `deep`-th step of the block."""

    def __init__(self, plan: Plan, scratch: Any, place: Any, turn: Any):
        self.plan, self.scratch, self.place, self.turn = plan, scratch, place, turn
        opaque = plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR))
        self.mask = opaque(lambda _: mgpu.FragmentedArray.splat(fragment.opaque_mask(), (), is_signed=True))()

    def step(self, t: Any) -> Any:
        """The block's step that is this warpgroup's t-th."""
        return t * self.plan.config.deep + self.turn

    def wait(self, t: Any) -> Any:
        """Wait for a step's bytes; its slot."""
        on_barrier = plgpu.inline_mgpu(arg_types=(PLAIN, SCALAR))
        deep = self.plan.config.deep
        wait = on_barrier(lambda _, barriers, i: pipeline.wait_full(barriers, i.registers.flat[0], deep))
        wait(self.scratch["barriers"], self.step(t))
        return lax.rem(self.step(t), jnp.int32(self.plan.config.stages))

    def release(self, t: Any) -> None:
        """Let a step's slot be filled again."""
        on_barrier = plgpu.inline_mgpu(arg_types=(PLAIN, SCALAR))
        release = on_barrier(lambda _, barriers, i: pipeline.release(barriers, i.registers.flat[0]))
        release(self.scratch["barriers"], self.step(t))

    def per_group(self, name: str, slot: Any, rows: Any) -> Any:
        """This warpgroup's scales or zeros of some groups."""
        return self.scratch[name].at[slot, self.place, rows]

    def weight(self, slot: Any, unit: int) -> Any:
        """Dequantize 64 steps of the slot into registers."""
        plan, c = self.plan, self.plan.config
        rows = pl.ds(unit * UNIT // plan.g if plan.g < c.step else 0, max(1, UNIT // plan.g))
        if plan.tiles:
            codes, kind = self.scratch["ws"].at[slot, self.place, unit], PLAIN
        else:
            window = pl.ds(unit * (UNIT // 2), UNIT // 2)
            codes, kind = self.scratch["ws"].at[slot, self.place, window], plgpu.RefType(swizzled(8))
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
        plgpu.wgmma(acc, self.weight(slot, unit), x.transpose((1, 0)))

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
