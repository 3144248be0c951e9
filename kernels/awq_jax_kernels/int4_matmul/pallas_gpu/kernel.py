# SPDX-License-Identifier: Apache-2.0
"""The fused kernel: one block streams a strip of the weight through shared memory and the tensor cores."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from awq_jax_kernels.int4_matmul.pallas_gpu import combine, fragment
from awq_jax_kernels.int4_matmul.pallas_gpu.fragment import CHANNELS, UNIT


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    tokens: int = 16
    wide: int = 1  # warpgroups side by side over channels
    deep: int = 2  # warpgroups that share channels and take turns over k
    split: int = 1
    step: int = 128
    stages: int = 8
    scale_weight: bool = False
    pdl: bool = False


def _tiled(shape, dtype):
    bits = jnp.dtype(dtype).itemsize * 8
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 1024 // bits)), plgpu.SwizzleTransform(128)))


def fused(x, weight, scale, zero, config: BlockConfig):
    m, k = x.shape
    groups, n = scale.shape
    g = k // groups
    c = config
    prepared = weight.dtype == jnp.int32
    tile_n = CHANNELS * c.wide
    consumers = c.wide * c.deep
    total_steps = k // c.step
    rows = max(1, c.step // g)  # scale rows of a step
    dtype = x.dtype
    chunk = min(c.tokens, 32)
    has_zero = zero is not None
    splat = plgpu.Layout.WG_SPLAT(())
    result = plgpu.ShapeDtypeStruct((CHANNELS, c.tokens), jnp.float32, layout=plgpu.Layout.WGMMA)
    copies = 4 + has_zero if prepared else c.wide + 2 + has_zero

    def kernel(x_ref, w_ref, s_ref, *rest):
        if has_zero:
            z_ref, y_ref, *_ = rest
        else:
            z_ref, (y_ref, *_) = None, rest
        xs, ws, ss, zs, parts, full, free = rest[has_zero + 1 :]
        wg = lax.axis_index("wg")
        block_n, block_m = lax.axis_index("n"), lax.axis_index("m")
        part = lax.axis_index("split")
        base, extra = divmod(total_steps, c.split)
        steps = base + (part < extra).astype(jnp.int32) if extra else base
        first = part * base + jnp.minimum(part, extra)
        if c.pdl:
            plgpu.griddepcontrol_wait()

        @pl.when(wg == consumers)
        def _produce():
            plgpu.set_max_registers(24 if consumers > 1 else 40, action="decrease")

            @pl.loop(0, steps)
            def _(i):
                slot = lax.rem(i, jnp.int32(c.stages))

                @pl.when(i >= c.stages)
                def _():
                    plgpu.barrier_wait(free.at[slot])

                at = (first + i) * c.step
                n0 = block_n * tile_n
                if prepared:
                    plgpu.copy_gmem_to_smem(
                        w_ref.at[pl.ds(block_n * c.wide, c.wide), pl.ds((first + i) * (c.step // UNIT), c.step // UNIT)],
                        ws.at[slot], full.at[slot])
                else:
                    for j in range(c.wide):
                        plgpu.copy_gmem_to_smem(
                            w_ref.at[pl.ds((first + i) * (c.step // 2), c.step // 2), pl.ds(n0 + j * CHANNELS, CHANNELS)],
                            ws.at[slot, j], full.at[slot])
                plgpu.copy_gmem_to_smem(
                    x_ref.at[pl.ds(block_m * c.tokens, c.tokens), pl.ds(at, c.step)], xs.at[slot], full.at[slot])
                row = lax.div(at, jnp.int32(g)) if rows == 1 else (first + i) * rows
                plgpu.copy_gmem_to_smem(s_ref.at[pl.ds(row, rows), pl.ds(n0, tile_n)], ss.at[slot], full.at[slot])
                if has_zero:
                    plgpu.copy_gmem_to_smem(z_ref.at[pl.ds(row, rows), pl.ds(n0, tile_n)], zs.at[slot], full.at[slot])

            for _ in range(0, c.tokens, chunk):
                if c.split > 1:
                    for _ in range(2):
                        plgpu.inline_mgpu()(lambda ctx: combine.synchronize(0, 2))()

        @pl.when(wg < consumers)
        def _consume():
            plgpu.set_max_registers({1: 232, 2: 232, 3: 152, 4: 112}[consumers], action="increase")
            lane_n = lax.rem(wg, jnp.int32(c.wide)) if c.wide > 1 else 0
            lane_k = lax.div(wg, jnp.int32(c.wide)) if c.deep > 1 else 0
            mine = lax.div(steps - lane_k + (c.deep - 1), jnp.int32(c.deep))
            n_at = lane_n * CHANNELS

            @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=splat))
            def opaque(ctx):
                value = fragment.opaque_mask()
                return mgpu.FragmentedArray.splat(value, (), is_signed=True)

            mask = opaque()

            def operand(slot, unit):
                row = pl.ds(unit * UNIT // g if g < c.step else 0, max(1, UNIT // g))
                wr = ws.at[slot, lane_n, unit] if prepared else ws.at[slot, lane_n, pl.ds(unit * (UNIT // 2), UNIT // 2)]
                refs = [mask, wr]
                types = [splat, plgpu.RefType() if prepared else plgpu.RefType((plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128)))]
                if has_zero:
                    refs.append(zs.at[slot, row, pl.ds(n_at, CHANNELS)])
                    types.append(plgpu.RefType())
                if c.scale_weight:
                    refs.append(ss.at[slot, row, pl.ds(n_at, CHANNELS)])
                    types.append(plgpu.RefType())

                @plgpu.inline_mgpu(
                    arg_types=tuple(types),
                    return_type=plgpu.ShapeDtypeStruct((CHANNELS, UNIT), dtype, layout=plgpu.Layout.WGMMA))
                def dequantize(ctx, mask, codes, *rest):
                    rest = list(rest)
                    z = rest.pop(0) if has_zero else None
                    s = rest.pop(0) if c.scale_weight else None
                    return fragment.dequantize(codes, z, s, mask.registers.flat[0], dtype)

                return dequantize(*refs)

            def tokens_of(slot, unit):
                return plgpu.transpose_ref(xs.at[slot, :, pl.ds(unit * UNIT, UNIT)], (1, 0))

            def finish(total):
                for start in range(0, c.tokens, chunk):
                    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()))
                    def store(ctx, total, parts, start=start):
                        combine.store_partial(total, parts, start, chunk)

                    store(total, parts.at[lane_k, :, pl.ds(n_at, CHANNELS)])

                    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), splat, splat))
                    def write(ctx, parts, y, token, channel):
                        combine.synchronize(128 * consumers, c.split)
                        combine.sum_parts(parts, y, token.registers.flat[0], channel.registers.flat[0],
                                          tokens=chunk, threads=128 * consumers, cluster=c.split)
                        if c.split > 1 or c.tokens > chunk:
                            combine.synchronize(128 * consumers, c.split)

                    write(parts, y_ref, block_m * c.tokens + start, block_n * tile_n)

            def by_group(t, total):
                """Sum a group unscaled, then add it scaled: exact codes, one multiplication per result."""
                slot = lax.rem(t * c.deep + lane_k, jnp.int32(c.stages))
                plgpu.barrier_wait(full.at[slot])
                per_group = min(g, c.step) // UNIT
                for r in range(c.step // UNIT // per_group):
                    def scoped(acc, r=r):
                        for unit in range(r * per_group, (r + 1) * per_group):
                            plgpu.wgmma(acc, operand(slot, unit), tokens_of(slot, unit))
                        return acc[...]

                    partial = pl.run_scoped(scoped, plgpu.ACC((CHANNELS, c.tokens)))

                    @plgpu.inline_mgpu(
                        arg_types=(plgpu.Layout.WGMMA, plgpu.Layout.WGMMA, plgpu.RefType()), return_type=result)
                    def add(ctx, total, partial, s):
                        return fragment.add_scaled(total, partial, s)

                    total = add(total, partial, ss.at[slot, r, pl.ds(n_at, CHANNELS)])
                plgpu.barrier_arrive(free.at[slot])
                return total

            if c.scale_weight:
                def scoped(acc):
                    @pl.loop(0, mine)
                    def _(t):
                        slot = lax.rem(t * c.deep + lane_k, jnp.int32(c.stages))
                        plgpu.barrier_wait(full.at[slot])
                        for unit in range(c.step // UNIT):
                            a = operand(slot, unit)
                            plgpu.wgmma(acc, a, tokens_of(slot, unit))
                            plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(free.at[slot])
                    return acc[...]

                finish(pl.run_scoped(scoped, plgpu.ACC((CHANNELS, c.tokens))))
            else:
                zeros = plgpu.layout_cast(jnp.zeros((CHANNELS, c.tokens), jnp.float32), plgpu.Layout.WGMMA)
                finish(lax.fori_loop(0, mine, by_group, zeros))

    if prepared:
        ws_type = plgpu.SMEM((c.stages, c.wide, c.step // UNIT, 4, 256), jnp.int32)
    else:
        ws_type = plgpu.SMEM((c.stages, c.wide, c.step // 2, CHANNELS), jnp.int8,
                             transforms=(plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128)))
    call = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((m, n), dtype),
        grid=(n // tile_n, pl.cdiv(m, c.tokens)),
        grid_names=("n", "m"),
        cluster=(c.split,),
        cluster_names=("split",),
        num_threads=consumers + 1,
        thread_name="wg",
        scratch_types=[
            _tiled((c.stages, c.tokens, c.step), dtype),
            ws_type,
            plgpu.SMEM((c.stages, rows, tile_n), scale.dtype),
            plgpu.SMEM((c.stages, rows, tile_n), jnp.int8),
            plgpu.SMEM((c.deep, chunk, tile_n + combine.PAD), jnp.float32),
            plgpu.Barrier(num_barriers=c.stages, num_arrivals=copies - prepared),
            plgpu.Barrier(num_barriers=c.stages, num_arrivals=c.wide),
        ],
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )
    return call(x, weight, scale, *([zero] if has_zero else []))
