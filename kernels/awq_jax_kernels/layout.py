# SPDX-License-Identifier: Apache-2.0
"""Packed weights of any width: nibbles up to four bits (`nibbles`), and a byte for each code of eight.

Codes of eight bits ``q`` in 0..255, shape ``[*b, k, n]``, are kept as ``packed: int8[*b, k, n]``::

    packed[k, n] = q[k, n] ^ 0x80

which is the signed value ``q - 128`` in two's complement: what nibbles are to ``q - 8``. An int8 product reads it as it
is, and so does the ``weight`` of compressed-tensors' ``int-quantized``, up to a transpose.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int8, UInt8

from awq_jax_kernels import nibbles
from awq_jax_kernels.codes import per_byte

__all__ = ["pack", "pack_numpy", "unpack", "unpack_numpy"]


def pack(codes: UInt8[Array, "*b k n"], bits: int) -> Int8[Array, "*b rows n"]:
    """Codes of ``bits`` bits to int8: ``rows`` is k/2 up to four bits, k for eight."""
    if per_byte(bits) == 2:
        return nibbles.pack(codes)
    return jax.lax.bitcast_convert_type(codes ^ jnp.uint8(0x80), jnp.int8)


def unpack(packed: Int8[Array, "*b rows n"], bits: int) -> UInt8[Array, "*b k n"]:
    """Inverse of `pack`."""
    if per_byte(bits) == 2:
        return nibbles.unpack(packed)
    return jax.lax.bitcast_convert_type(packed, jnp.uint8) ^ jnp.uint8(0x80)


def pack_numpy(codes: UInt8[np.ndarray, "*b k n"], bits: int) -> Int8[np.ndarray, "*b rows n"]:
    """`pack` on the host.

    >>> pack_numpy(np.array([[0], [255]], np.uint8), 8).ravel().tolist()
    [-128, 127]
    """
    return nibbles.pack_numpy(codes) if per_byte(bits) == 2 else (codes ^ np.uint8(0x80)).view(np.int8)


def unpack_numpy(packed: Int8[np.ndarray, "*b rows n"], bits: int) -> UInt8[np.ndarray, "*b k n"]:
    """Inverse of `pack_numpy`."""
    return nibbles.unpack_numpy(packed) if per_byte(bits) == 2 else packed.view(np.uint8) ^ np.uint8(0x80)
