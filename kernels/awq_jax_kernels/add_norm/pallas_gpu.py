# SPDX-License-Identifier: Apache-2.0
"""`add_norm` on Hopper GPUs, one launch: a block to each row, and blocks that ask for the next weight meanwhile."""

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
from jaxtyping import Array

from awq_jax_kernels.mosaic_gpu import ahead as cache
from awq_jax_kernels.mosaic_gpu import lanes
from awq_jax_kernels.mosaic_gpu.device import unsuitable
from awq_jax_kernels.mosaic_gpu.registers import const

__all__ = ["add_norm", "refusal"]

VECTOR = 4  # channels that a thread loads at once
MOST = 1024  # threads of a block


def refusal(h: Any) -> str | None:
    """Why the kernel can't take a stream of this shape and dtype, or None if it can."""
    if str(h.dtype) not in ("bfloat16", "float16"):
        return f"h is {h.dtype}, not bfloat16 or float16"
    if h.shape[-1] % (128 * VECTOR) or h.shape[-1] > 32768:
        return f"{h.shape[-1]} channels are no multiple of {128 * VECTOR} up to 32768"
    return unsuitable()


@functools.partial(jax.jit, static_argnames=("eps", "offset"))  # one lowering for all layers
def add_norm(
    h: Array, delta: Array | None, weight: Array, *ahead: Array, eps: float, offset: float
) -> tuple[Array, Array]:
    """See `awq_jax_kernels.add_norm.add_norm`."""
    m, d = h.shape
    warpgroups = max(w for w in range(1, MOST // 128 + 1) if d % (128 * VECTOR * w) == 0)
    out = jax.ShapeDtypeStruct(h.shape, h.dtype)

    def body(*refs: Any, scratch: Any) -> None:
        block = lax.axis_index("block")
        run = _Row(m, d, 128 * warpgroups, delta is not None, eps, offset)
        lanes.call(run, (*refs, scratch), block)

    call = plgpu.kernel(
        body,
        out_type=(out, out),
        grid=(m + (cache.BLOCKS if ahead else 0),),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        scratch_types={"scratch": plgpu.SMEM((4 * warpgroups,), jnp.float32)},
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name="add_norm",
    )
    summed, normed = call(h, *(() if delta is None else (delta,)), weight, *ahead)
    return summed, normed


class _Row:
    """What one block does, for static sizes."""

    def __init__(self, m: int, d: int, threads: int, adds: bool, eps: float, offset: float):
        self.m, self.d, self.threads, self.adds = m, d, threads, adds
        self.eps, self.offset = eps, offset

    def __call__(self, *args: ir.Value) -> None:
        h, *rest = args
        delta, rest = (rest[0], rest[1:]) if self.adds else (None, rest)
        weight, *ahead, summed, normed, scratch, block = rest
        is_row = arith.cmpi(arith.CmpIPredicate.ult, block, const(self.m))
        with mgpu.when(is_row):
            self._row(h, delta, weight, summed, normed, scratch, block)
        if ahead:
            with mgpu.when(arith.cmpi(arith.CmpIPredicate.uge, block, const(self.m))):
                worker = arith.subi(block, const(self.m))
                cache.fetch_ahead(ahead, cache.LIMIT, worker, cache.BLOCKS, self.threads)

    def _row(self, h: Any, delta: Any, weight: Any, summed: Any, normed: Any, scratch: Any, row: ir.Value) -> None:
        start = arith.muli(row, const(self.d))
        mine = arith.muli(mgpu.thread_idx(), const(VECTOR))
        columns = [arith.addi(mine, const(i)) for i in range(0, self.d, VECTOR * self.threads)]
        at = [arith.addi(start, column) for column in columns]
        parts = [lanes.read(h, i, VECTOR) for i in at]
        if delta is not None:
            more = [lanes.read(delta, i, VECTOR) for i in at]
            parts = [lanes.rounded(lanes.add(a, b), summed) for a, b in zip(parts, more, strict=True)]
        gains = [lanes.read(weight, column, VECTOR) for column in columns]
        squares = lanes.splat(lanes.value(0.0), VECTOR)
        for i, part in zip(at, parts, strict=True):
            lanes.write(summed, i, part)
            squares = lanes.fma(part, part, squares)
        mean = lanes.multiply(lanes.block_sum(lanes.total(squares), scratch), lanes.value(1.0 / self.d))
        factor = lanes.float_instruction("rsqrt.approx.f32", lanes.add(mean, lanes.value(self.eps)))
        for i, part, gain in zip(at, parts, gains, strict=True):
            if self.offset:
                gain = lanes.add(gain, lanes.splat(lanes.value(self.offset), VECTOR))
            lanes.write(normed, i, lanes.multiply(lanes.multiply(part, lanes.splat(factor, VECTOR)), gain))
