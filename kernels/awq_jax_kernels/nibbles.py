# SPDX-License-Identifier: Apache-2.0
"""THE bit layout: two INT4 codes to a byte, neighbours along the contraction axis.

A weight has codes ``q`` in 0..15, shape ``[*b, k, n]``. It is kept as ``packed: int8[*b, k/2, n]``::

    packed[k2, n] = (q[2*k2, n] | q[2*k2 + 1, n] << 4) ^ 0x88

Even rows lie in the low nibble, odd rows in the high one, and the ``^ 0x88`` turns each nibble into the
signed value ``q - 8`` in two's complement. Four things follow, and they are why there is no other layout:

* a TPU reads it with one ``pltpu.bitcast(int8[r, n] -> int4[2r, n])``, no shift and no mask;
* a GPU reads the byte-transpose ``int8[n, k/2]`` as k-major int4 by a pure ``bitcast_convert_type``;
* any even row is a legal place to cut, so it shards along k at group boundaries and along n anywhere;
* compressed-tensors, GPTQ and AutoAWQ-gemv bytes are this layout up to a transpose and the xor.

Fewer bits use the same nibbles: a symmetric b-bit code is stored so that its zero point is 8, an asymmetric one
as it is (0..2**b - 1).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int4, Int8, UInt8

__all__ = ["pack", "pack_numpy", "unpack", "unpack_numpy", "unpack_signed"]


def pack_numpy(codes: UInt8[np.ndarray, "*b k n"]) -> Int8[np.ndarray, "*b k2 n"]:
    """Pack codes 0..15 on the host.

    Args:
      codes: uint8 ``[*b, k, n]``, each 0..15; k even.

    Returns:
      int8 ``[*b, k/2, n]``.

    Raises:
      ValueError: k is odd, or a code exceeds 15.

    >>> pack_numpy(np.array([[0], [15]], np.uint8))  # nibbles -8 and 7
    array([[120]], dtype=int8)
    """
    if codes.shape[-2] % 2:
        raise ValueError(f"cannot pack codes of shape {codes.shape}: axis -2 (k={codes.shape[-2]}) is odd.")
    if codes.size and codes.max() > 15:
        raise ValueError(f"cannot pack codes into nibbles: found {codes.max()}, the largest is 15.")
    return ((codes[..., 0::2, :] | (codes[..., 1::2, :] << 4)) ^ 0x88).view(np.int8)


def unpack_numpy(packed: Int8[np.ndarray, "*b k2 n"]) -> UInt8[np.ndarray, "*b k n"]:
    """Inverse of `pack_numpy`: int8 ``[*b, k/2, n]`` to uint8 codes ``[*b, k, n]``.

    >>> unpack_numpy(np.array([[120]], np.int8)).ravel().tolist()
    [0, 15]
    """
    *b, k2, n = packed.shape
    raw = packed.view(np.uint8) ^ 0x88
    out = np.empty((*b, 2 * k2, n), np.uint8)
    out[..., 0::2, :] = raw & 15
    out[..., 1::2, :] = raw >> 4
    return out


def pack(codes: UInt8[Array, "*b k n"]) -> Int8[Array, "*b k2 n"]:
    """`pack_numpy` on the device, for use under jit; codes must already be 0..15.

    The shift is a multiplication in int32: an int8 ``<< 4`` saturates on TPU and would corrupt the nibble.

    Raises:
      ValueError: k is odd.
    """
    if codes.shape[-2] % 2:
        raise ValueError(f"cannot pack codes of shape {codes.shape}: axis -2 (k={codes.shape[-2]}) is odd.")
    wide = codes.astype(jnp.int32)
    byte = (wide[..., 0::2, :] + 16 * wide[..., 1::2, :]) ^ 0x88
    return jax.lax.bitcast_convert_type(byte.astype(jnp.uint8), jnp.int8)


def unpack_signed(packed: Int8[Array, "*b k2 n"]) -> Int4[Array, "*b k n"]:
    """int8 ``[*b, k/2, n]`` to int4 ``q - 8``, ``[*b, k, n]``: a bitcast and a move of the nibble axis."""
    # A weight that a program closes over is a constant to XLA, whose constant folding gets this bitcast wrong (jax 0.10
    # to 0.11): the barrier keeps it from being folded.
    packed = jax.lax.optimization_barrier(packed)
    pairs = jax.lax.bitcast_convert_type(packed, jnp.int4)  # [*b, k2, n, 2], low nibble first
    *b, k2, n, _ = pairs.shape
    return jnp.moveaxis(pairs, -1, -2).reshape(*b, 2 * k2, n)


def unpack(packed: Int8[Array, "*b k2 n"]) -> UInt8[Array, "*b k n"]:
    """Inverse of `pack`: codes 0..15, uint8 ``[*b, k, n]``."""
    return (unpack_signed(packed).astype(jnp.int8) + jnp.int8(8)).astype(jnp.uint8)
