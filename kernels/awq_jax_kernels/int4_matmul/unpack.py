# SPDX-License-Identifier: Apache-2.0
"""From packed bytes to operands of a TPU's matrix unit, inside a kernel. All of it is exact.

``B`` is one bitcast and one conversion, ``q - 8`` in order. Before v6e that conversion takes many instructions, so
``A`` writes the nibble into the mantissa of a bfloat16: with 0x4300 = 128, whose last place is worth 1, the bits
``0x4300 | q`` are 128 + q. A 32-bit word holds eight neighbours of a column, row ``8r + 4h + s`` in nibble s of half h,
so that one shift, mask and xor make two of them, and rows come out in the order ``(s, r, h)``. x is permuted to match,
by a product with a permutation matrix, once. ``D`` is B in float8, which holds -8..7 and takes half the room.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, BFloat16, Float, Float32, Int8

__all__ = ["OFFSET", "ROWS", "permutation", "split", "unpack_a", "unpack_b", "unpack_d"]

ROWS = 128  # that A permutes among themselves
OFFSET = {"A": 128, "B": -8, "D": -8, "E": -8, "F": -8, "G": -8}  # an unpacked value is code + offset


def unpack_a(packed: Int8[Array, "k2 n"]) -> BFloat16[Array, "k n"]:
    """``128 + q`` with the rows of each 128 in the order of `permutation`."""
    words = pltpu.bitcast(packed, jnp.int32)
    # The stored nibble is q ^ 8, which the xor undoes. The mask comes after the shift, so its sign does not matter.
    pair = lambda s: (jax.lax.shift_right_arithmetic(words, jnp.int32(4 * s)) & 0x000F000F) ^ 0x43084308
    return jnp.concatenate([pltpu.bitcast(pair(s), jnp.bfloat16) for s in range(4)], axis=0)


def permutation() -> BFloat16[Array, "128 128"]:
    """The matrix P for which ``x @ P`` has the columns of x in the order of `unpack_a`'s rows."""
    source = jax.lax.broadcasted_iota(jnp.int32, (ROWS, ROWS), 0)
    place = jax.lax.broadcasted_iota(jnp.int32, (ROWS, ROWS), 1)  # s * 32 + (2r + h)
    return jnp.where(source == 4 * (place & 31) + (place >> 5), 1.0, 0.0).astype(jnp.bfloat16)


def unpack_b(packed: Int8[Array, "k2 n"]) -> BFloat16[Array, "k n"]:
    """``q - 8``."""
    return pltpu.bitcast(packed, jnp.int4).astype(jnp.bfloat16)


def unpack_d(packed: Int8[Array, "k2 n"]) -> Float[Array, "k n"]:
    """``q - 8`` in float8."""
    return pltpu.bitcast(packed, jnp.int4).astype(jnp.float8_e4m3fn)


def split(value: Float32[Array, "*shape"], terms: int) -> list[Float32[Array, "*shape"]]:
    """Terms of eight significant bits each, exact in bfloat16, that add up to a float32; three are all of it.

    The bits are cut, not rounded, so that no conversion back is needed to find what is left.
    """
    heads = []
    for _ in range(terms):
        head = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(value, jnp.int32) & -65536, jnp.float32)
        heads.append(head)
        value = value - head
    return heads
