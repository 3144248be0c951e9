# SPDX-License-Identifier: Apache-2.0
"""`int8_matmul` in XLA, without a dense weight: a product per group, or on a CPU a block of rows at a time."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, UInt8

from awq_jax_kernels import blocks
from awq_jax_kernels.int8_matmul.reference import dequantize

__all__ = ["blockwise", "grouped", "input_cotangent", "int8_matmul"]

_BLOCK_BYTES = 1 << 22  # of the weight at a time, 16 MiB of float32


def int8_matmul(
    x: Float[Array, "m k"],
    packed: Int8[Array, "k n"],
    scale: Float[Array, "groups n"],
    zero: UInt8[Array, "groups n"] | None = None,
) -> Float[Array, "m n"]:
    """``y = x @ ((q - zero) * scale)``: `grouped` on accelerators, `blockwise` on a CPU."""
    return jax.lax.platform_dependent(x, packed, scale, zero, cpu=blockwise, default=grouped)


def grouped(
    x: Float[Array, "m k"],
    packed: Int8[Array, "k n"],
    scale: Float[Array, "groups n"],
    zero: UInt8[Array, "groups n"] | None = None,
) -> Float[Array, "m n"]:
    """One product per group with an int8 operand, scaled after; zeros are a correction on each group's sum of x."""
    m, k = x.shape
    groups, n = scale.shape
    parts, scale = x.reshape(m, groups, k // groups), scale.astype(jnp.float32)
    partial = jax.lax.dot_general(
        parts,
        packed.reshape(groups, -1, n),
        (((2,), (1,)), ((1,), (0,))),
        precision="highest",
        preferred_element_type=jnp.float32,
    )  # [groups, m, n]
    y = jnp.sum(partial * scale[:, None, :], axis=0)
    if zero is not None:
        sums = jnp.sum(parts.astype(jnp.float32), axis=-1)
        y -= jnp.matmul(sums, (zero.astype(jnp.float32) - 128) * scale, precision="highest")
    return y.astype(x.dtype)


def blockwise(
    x: Float[Array, "m k"],
    packed: Int8[Array, "k n"],
    scale: Float[Array, "groups n"],
    zero: UInt8[Array, "groups n"] | None = None,
) -> Float[Array, "m n"]:
    """Dequantize a block of rows to float32, multiply, add up: at most 16 MiB of the weight is dense at a time."""
    weight = blocks.row_blocks(packed, scale, zero, _BLOCK_BYTES)
    count, rows, _ = weight[0].shape
    xs = jnp.moveaxis(x.astype(jnp.float32).reshape(-1, count, rows), 1, 0)
    product = lambda x, *block: jnp.matmul(x, dequantize(*block), precision="highest")
    return blocks.sum_of_blocks(product, xs, weight).astype(x.dtype)


def input_cotangent(
    dy: Float[Array, "m n"],
    packed: Int8[Array, "k n"],
    scale: Float[Array, "groups n"],
    zero: UInt8[Array, "groups n"] | None = None,
) -> Float[Array, "m k"]:
    """``dx = dy @ ((q - zero) * scale).T``; see `awq_jax_kernels.blocks.input_cotangent`."""
    return blocks.input_cotangent(dequantize, dy, blocks.row_blocks(packed, scale, zero, _BLOCK_BYTES))
