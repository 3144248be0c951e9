# SPDX-License-Identifier: Apache-2.0
"""`int4_matmul` without a kernel, for shapes and platforms that have none."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from awq_jax_kernels import blocks
from awq_jax_kernels.int4_matmul.reference import dequantize

__all__ = ["blockwise", "grouped", "input_cotangent", "int4_matmul", "supports"]

_BLOCK_BYTES = 1 << 21  # of the weight at a time, 16 MiB of float32
_COTANGENT_BYTES = 1 << 19


def supports(x: Any, packed: Any, scale: Any, zero: Any = None, *, config: Any = None) -> str | None:
    """Why XLA can't take these operands, or None if it can: groups must hold whole bytes."""
    if config is not None:
        return "takes no config"
    g = x.shape[-1] // scale.shape[-2]
    return f"groups of {g} rows cut a byte in two" if g % 2 else None


def int4_matmul(
    x: Float[Array, "m k"],
    packed: Int8[Array, "k2 n"],
    scale: Float[Array, "groups n"],
    zero: Int8[Array, "groups n"] | None = None,
    *,
    config: None = None,
) -> Float[Array, "m n"]:
    """``y = x @ ((q - zero) * scale)``: `grouped` on accelerators, `blockwise` on a CPU."""
    return jax.lax.platform_dependent(x, packed, scale, zero, cpu=blockwise, default=grouped)


def grouped(
    x: Float[Array, "m k"],
    packed: Int8[Array, "k2 n"],
    scale: Float[Array, "groups n"],
    zero: Int8[Array, "groups n"] | None = None,
) -> Float[Array, "m n"]:
    """One product per group and nibble with an int4 operand, scaled after: no dense weight anywhere.

    XLA for TPU and GPU converts int4 on the way to the matrix unit, but writes the two halves of the bytes as int4
    first: shifts fuse into that pass, a bitcast followed by a slice takes ten times as long.
    """
    m, k = x.shape
    groups, n = scale.shape
    pairs = x.reshape(m, groups, k // groups // 2, 2)
    words = packed.reshape(groups, -1, n).astype(jnp.int32)
    scale = scale.astype(jnp.float32)

    def multiply(nibble: int, codes: Array) -> Array:
        return jax.lax.dot_general(
            pairs[..., nibble],
            codes.astype(jnp.int4),
            (((2,), (1,)), ((1,), (0,))),
            precision="highest",
            preferred_element_type=jnp.float32,
        )  # [groups, m, n]

    partial = multiply(0, (words << 28) >> 28) + multiply(1, words >> 4)
    y = jnp.sum(partial * scale[:, None, :], axis=0)
    if zero is not None:
        sums = jnp.sum(pairs.astype(jnp.float32), axis=(-2, -1))
        y -= jnp.matmul(sums, (zero.astype(jnp.float32) - 8) * scale, precision="highest")
    return y.astype(x.dtype)


def blockwise(
    x: Float[Array, "m k"],
    packed: Int8[Array, "k2 n"],
    scale: Float[Array, "groups n"],
    zero: Int8[Array, "groups n"] | None = None,
) -> Float[Array, "m n"]:
    """Dequantize a block of rows to float32, multiply, add up: at most 16 MiB of the weight is dense at a time.

    Low and high nibbles become separate rows and x follows, which spares interleaving the weight.
    """
    weight = blocks.row_blocks(packed, scale, zero, _BLOCK_BYTES)
    (count, rows2, _), parts = weight[0].shape, weight[1].shape[1]
    pairs = x.astype(jnp.float32).reshape(-1, count, parts, rows2 // parts, 2)
    xs = pairs.transpose(1, 0, 2, 4, 3).reshape(count, -1, 2 * rows2)
    return blocks.sum_of_blocks(_block, xs, weight).astype(x.dtype)


def _block(x: Any, packed: Any, scale: Any, zero: Any) -> Any:
    """``[m, rows] @ [rows, n]``; columns of x in the order (part, nibble, byte)."""
    parts, n = scale.shape
    bytes_ = packed.reshape(parts, 1, -1, n).astype(jnp.int32)
    codes = jnp.concatenate([(bytes_ << 28) >> 28, bytes_ >> 4], axis=1).astype(jnp.float32)
    if zero is not None:
        codes = codes - (zero.astype(jnp.float32) - 8)[:, None, None, :]
    dense = (codes * scale.astype(jnp.float32)[:, None, None, :]).reshape(-1, n)
    return jnp.matmul(x, dense, precision="highest")


def input_cotangent(
    dy: Float[Array, "m n"],
    packed: Int8[Array, "k2 n"],
    scale: Float[Array, "groups n"],
    zero: Int8[Array, "groups n"] | None = None,
) -> Float[Array, "m k"]:
    """``dx = dy @ ((q - zero) * scale).T``; see `awq_jax_kernels.blocks.input_cotangent`."""
    return blocks.input_cotangent(dequantize, dy, blocks.row_blocks(packed, scale, zero, _COTANGENT_BYTES))
