# SPDX-License-Identifier: Apache-2.0
"""Activation functions of vectors."""

import math

from jaxlib.mlir import ir

from awq_jax_kernels.mosaic_gpu import lanes

__all__ = ["activated"]


def activated(x: ir.Value, name: str) -> ir.Value:
    """``x sigmoid(z)``: z is x for "silu", and ``2 sqrt(2 / pi) (x + 0.044715 x^3)`` for "gelu_tanh"."""
    splat = lambda number: lanes.splat(lanes.value(number), ir.VectorType(x.type).shape[0])
    z = x
    if name == "gelu_tanh":
        cubic = lanes.multiply(lanes.multiply(x, x), splat(2 * math.sqrt(2 / math.pi) * 0.044715))
        z = lanes.multiply(x, lanes.add(cubic, splat(2 * math.sqrt(2 / math.pi))))
    power = lanes.each(lanes.exp2, lanes.multiply(z, splat(-math.log2(math.e))))
    reciprocal = lambda value: lanes.float_instruction("rcp.approx.ftz.f32", value)
    return lanes.multiply(x, lanes.each(reciprocal, lanes.add(power, splat(1.0))))
