# SPDX-License-Identifier: Apache-2.0
"""`add_norm` on Hopper GPUs, one launch: a block to each row."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from jaxtyping import Array

from awq_jax_kernels.mosaic_gpu import lanes, launch
from awq_jax_kernels.mosaic_gpu.device import unsuitable
from awq_jax_kernels.mosaic_gpu.registers import const

__all__ = ["add_norm", "refusal"]

VECTOR = 4  # channels that a thread loads at once
MOST = 8  # warpgroups of a block
MOST_ELEMENTS = 1 << 31


def refusal(h: Any) -> str | None:
    """Why the kernel can't take a stream of this shape and dtype, or None if it can."""
    if str(h.dtype) not in ("bfloat16", "float16"):
        return f"h is {h.dtype}, not bfloat16 or float16"
    if h.shape[-1] % (128 * VECTOR) or h.shape[-1] > 32768:
        return f"{h.shape[-1]} channels are no multiple of {128 * VECTOR} up to 32768"
    if not 0 < math.prod(h.shape) < MOST_ELEMENTS:
        return f"{math.prod(h.shape)} elements are none, or more than 32-bit offsets reach"
    return unsuitable()


@functools.partial(jax.jit, static_argnames=("eps", "offset"))  # one lowering for all layers
def add_norm(h: Array, delta: Array | None, weight: Array, *, eps: float, offset: float) -> tuple[Array, Array]:
    """See `awq_jax_kernels.add_norm.add_norm`."""
    m, d = h.shape
    warpgroups = max(w for w in range(1, MOST + 1) if d % (128 * VECTOR * w) == 0)
    row = _Row(d, 128 * warpgroups, eps, offset)
    inputs = [h, weight] if delta is None else [h, weight, delta]

    def body(*refs: Any) -> None:
        lanes.call(row, refs, lax.axis_index("row"))

    call = launch.kernel(
        body,
        name="add_norm",
        out=(jax.ShapeDtypeStruct(h.shape, h.dtype),) * 2,
        scratch=(plgpu.SMEM((4 * warpgroups,), jnp.float32),),
        grid=(m,),
        grid_names=("row",),
        num_threads=warpgroups,
        thread_name="warpgroup",
    )
    summed, normed = call(*inputs)
    return summed, normed


class _Row:
    """What one block does, for static sizes."""

    def __init__(self, d: int, threads: int, eps: float, offset: float):
        self.d, self.threads, self.eps, self.offset = d, threads, eps, offset

    def __call__(self, h: ir.Value, weight: ir.Value, *rest: ir.Value) -> None:
        *delta, summed, normed, scratch, row = rest
        start = arith.muli(row, const(self.d))
        mine = arith.muli(mgpu.thread_idx(), const(VECTOR))
        columns = [arith.addi(mine, const(i)) for i in range(0, self.d, VECTOR * self.threads)]
        at = [arith.addi(start, column) for column in columns]
        parts = [lanes.read(h, i, VECTOR) for i in at]
        for ref in delta:
            more = [lanes.read(ref, i, VECTOR) for i in at]
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
            lanes.write(normed, i, lanes.multiply(lanes.scaled(part, factor), gain))
