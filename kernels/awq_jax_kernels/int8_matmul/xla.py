# SPDX-License-Identifier: Apache-2.0
"""`int8_matmul` in XLA, without a dense weight: a product per group, or on a CPU a block of rows at a time."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, UInt8

from awq_jax_kernels.int4_matmul.blocks import row_blocks
from awq_jax_kernels.int8_matmul.reference import dequantize

__all__ = ["blockwise", "grouped", "input_cotangent", "int8_matmul"]

_BLOCK_ELEMENTS = 1 << 22  # of the weight in float32 at a time, 16 MiB


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
    blocks = _blocks(packed, scale, zero)
    count, rows, _ = blocks[0].shape
    xs = jnp.moveaxis(x.astype(jnp.float32).reshape(-1, count, rows), 1, 0)

    def product(operands: Any) -> Array:
        part, *weight = operands
        return jnp.matmul(part, dequantize(*weight), precision="highest")

    # The first block stands for zeros that would have to know over which mesh axes they vary.
    first, rest = (jax.tree.map(lambda leaf, cut=cut: leaf[cut], (xs, *blocks)) for cut in (0, slice(1, None)))
    if count == 1:
        return product(first).astype(x.dtype)
    y, _ = jax.lax.scan(lambda y, block: (y + product(block), None), product(first), rest)
    return y.astype(x.dtype)


def input_cotangent(
    dy: Float[Array, "m n"],
    packed: Int8[Array, "k n"],
    scale: Float[Array, "groups n"],
    zero: UInt8[Array, "groups n"] | None,
) -> Float[Array, "m k"]:
    """``dx = dy @ ((q - zero) * scale).T``, a block of k at a time, so that the dense weight never exists whole."""

    def cotangent(block: Any) -> Array:
        dense = dequantize(*block).astype(dy.dtype)
        dx = jax.lax.dot_general(
            dy, dense, (((1,), (1,)), ((), ())), precision="highest", preferred_element_type=jnp.float32
        )
        return dx.astype(dy.dtype)

    dx = jax.lax.map(cotangent, _blocks(packed, scale, zero))  # [blocks, m, k/blocks]
    return jnp.moveaxis(dx, 0, 1).reshape(dy.shape[0], -1)


def _blocks(packed: Any, scale: Any, zero: Any) -> Any:
    return row_blocks(packed, scale, zero, 2 * _BLOCK_ELEMENTS)  # which counts two codes to a byte
