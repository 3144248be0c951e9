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

    def __init__(self, plan: Plan, scratch: Any, place: Any, turn: Any, before: Any):
        """`before` are the steps that the block has taken for other tiles."""
        self.plan, self.scratch, self.place, self.turn, self.before = plan, scratch, place, turn, before
        opaque = plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR))
        self.mask = opaque(lambda _: mgpu.FragmentedArray.splat(fragment.opaque_mask(), (), is_signed=True))()

    def step(self, t: Any) -> Any:
        """The block's step that is this warpgroup's t-th."""
        return self.before + t * self.plan.config.deep + self.turn

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

    def per_group(self, name: str, slot: Any, row: int) -> Any:
        """This warpgroup's scales or zeros of a group."""
        return self.scratch[name].at[slot, self.place, row]

    def splats(self, slot: Any, row: int) -> tuple[Any, ...]:
        """What dequantizing needs of a group, in registers; every thread has its own."""
        plan, scales = self.plan, self.plan.config.scale_weight
        refs = [self.per_group("zs", slot, row)] if plan.zeros else []
        refs += [self.per_group("ss", slot, row)] if scales else []

        @plgpu.inline_mgpu(
            arg_types=(PLAIN,) * len(refs),
            return_type=(plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR),) * (4 + 4 * scales),
        )
        def load(_: Any, *refs: Any) -> Any:
            words = fragment.splats(refs[0] if plan.zeros else None, refs[-1] if scales else None, plan.dtype)
            return tuple(mgpu.FragmentedArray.splat(word, (), is_signed=True) for word in words)

        return load(*refs)

    def weight(self, slot: Any, unit: int, groups: Any) -> Any:
        """Dequantize 64 steps of the slot into registers; `groups` are the splats of those that they lie in."""
        plan, each = self.plan, len(groups[0])
        if plan.tiles:
            codes, kind = self.scratch["ws"].at[slot, self.place, unit], PLAIN
        else:
            window = pl.ds(unit * (UNIT // 2), UNIT // 2)
            codes, kind = self.scratch["ws"].at[slot, self.place, window], plgpu.RefType(swizzled(8))

        @plgpu.inline_mgpu(
            arg_types=(SCALAR, kind, *[SCALAR] * (each * len(groups))),
            return_type=plgpu.ShapeDtypeStruct((CHANNELS, UNIT), plan.dtype, layout=MATRIX),
        )
        def dequantize(_: Any, mask: Any, codes: Any, *words: Any) -> Any:
            values = [word.registers.flat[0] for word in words]
            of_groups = [values[i : i + each] for i in range(0, len(values), each)]
            return fragment.dequantize(codes, of_groups, mask.registers.flat[0], plan.dtype)

        return dequantize(self.mask, codes, *(word for group in groups for word in group))

    def multiply(self, acc: Any, slot: Any, unit: int, groups: Any) -> None:
        """Start adding one unit's product to an accumulator."""
        x = self.scratch["xs"].at[slot, :, pl.ds(unit * UNIT, UNIT)]
        plgpu.wgmma(acc, self.weight(slot, unit, groups), x.transpose((1, 0)))

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
                    splats = self.splats(slot, row)
                    for unit in range(per_group):
                        self.multiply(acc, slot, row * per_group + unit, [splats])
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
        c, g = self.plan.config, self.plan.g

        def run(acc: Any) -> Any:
            @pl.loop(0, count)
            def _(t: Any) -> None:
                slot, groups = self.wait(t), []
                for unit in range(c.step // UNIT):
                    if unit * UNIT % g == 0:
                        row = unit * UNIT // g
                        groups = [self.splats(slot, row + i) for i in range(max(1, UNIT // g))]
                    self.multiply(acc, slot, unit, groups)
                    plgpu.wgmma_wait(1)
                    if unit == 0:  # the products of the step before are complete
                        pl.when(t > 0)(lambda: self.release(t - 1))

            total = acc[...]
            if c.persistent:  # the ring goes on
                self.release(count - 1)
            return total

        return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef((CHANNELS, c.tokens)))
