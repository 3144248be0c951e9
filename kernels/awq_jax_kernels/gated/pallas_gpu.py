# SPDX-License-Identifier: Apache-2.0
"""`gated` on Hopper GPUs, one launch: a vector to each thread."""

import functools
import math
from typing import Any

import jax
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from jaxtyping import Array

from awq_jax_kernels.mosaic_gpu import lanes, launch
from awq_jax_kernels.mosaic_gpu.activation import activated
from awq_jax_kernels.mosaic_gpu.device import unsuitable
from awq_jax_kernels.mosaic_gpu.registers import const

__all__ = ["gated", "refusal"]

VECTOR = 8  # channels of a thread
THREADS = 128
MOST = 1 << 30  # elements, which 32-bit offsets reach


def refusal(product: Any) -> str | None:
    """Why the kernel can't take a product of this shape and dtype, or None if it can."""
    if str(product.dtype) not in ("bfloat16", "float16"):
        return f"it is {product.dtype}, not bfloat16 or float16"
    if len(product.shape) != 2:
        return f"it has {len(product.shape)} axes, not 2"
    if product.shape[-1] % (2 * VECTOR):
        return f"{product.shape[-1]} columns are no multiple of {2 * VECTOR}"
    if not 0 < math.prod(product.shape) < MOST:
        return f"{math.prod(product.shape)} elements are none, or more than 32-bit offsets reach"
    return unsuitable()


@functools.partial(jax.jit, static_argnames="activation")  # one lowering for all layers
def gated(product: Array, *, activation: str) -> Array:
    """See `awq_jax_kernels.gated.gated`."""
    m, w = product.shape
    vectors = m * w // 2 // VECTOR
    block = _Block(w // 2, vectors, activation)

    def body(*refs: Any) -> None:
        lanes.call(block, refs, lax.axis_index("block"))

    call = launch.kernel(
        body,
        name="gated",
        out=jax.ShapeDtypeStruct((m, w // 2), product.dtype),
        grid=(-(-vectors // THREADS),),
        grid_names=("block",),
        num_threads=1,
        thread_name="warpgroup",
    )
    return call(product)


class _Block:
    """What one block does, for static sizes."""

    def __init__(self, half: int, vectors: int, activation: str):
        self.half, self.vectors, self.activation = half, vectors, activation

    def __call__(self, product: ir.Value, y: ir.Value, block: ir.Value) -> None:
        vector = arith.addi(arith.muli(block, const(THREADS)), mgpu.thread_idx())
        with mgpu.when(arith.cmpi(arith.CmpIPredicate.ult, vector, const(self.vectors))):
            out = arith.muli(vector, const(VECTOR))
            row = arith.divui(out, const(self.half))
            gate_at = arith.addi(out, arith.muli(row, const(self.half)))
            gate = lanes.read(product, gate_at, VECTOR)
            up = lanes.read(product, arith.addi(gate_at, const(self.half)), VECTOR)
            lanes.write(y, out, lanes.multiply(activated(gate, self.activation), up))
