# SPDX-License-Identifier: Apache-2.0
"""The tile order: packed bytes rearranged so that each thread of the Hopper kernel finds its codes in 16-byte runs.

The codes, their values and their number stay the same; scale and zero aren't touched. Each block of 128 channels and
64 steps becomes 4 KiB that are contiguous in memory, in the order in which `pallas_gpu.fragment` reads them. Tiles are
int32, packed bytes int8: the dtype tells which of the two an array is.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int8, Int32

from awq_jax_kernels import nibbles

__all__ = ["as_rows", "is_tiled", "prepare", "restore", "rows_shape"]


def is_tiled(packed: Any) -> bool:
    """Whether codes (anything with a dtype) are in tile order."""
    return packed.dtype == jnp.int32


def rows_shape(packed: Any) -> tuple[int, ...]:
    """``(*b, k/2, n)``, the shape of codes (anything with a shape and a dtype) as packed bytes."""
    if not is_tiled(packed):
        return tuple(packed.shape)
    *b, blocks_n, blocks_k, _, _ = packed.shape
    return (*b, 32 * blocks_k, 128 * blocks_n)


def as_rows(packed: Any) -> Any:
    """Codes as packed bytes, whichever order they are in."""
    if not is_tiled(packed):
        return packed
    return restore(packed) if packed.ndim == 4 else jax.vmap(as_rows)(packed)


def _source() -> np.ndarray:
    """``[4096 bytes * 2 nibbles] -> (k, n)`` inside one 64 x 128 block: which code each nibble of a tile holds."""
    quarter, thread, word, bit = np.meshgrid(np.arange(2), np.arange(128), np.arange(4), np.arange(8), indexing="ij")
    warp, lane = thread // 32, thread % 32
    step, tile = 2 * quarter + word // 2, word % 2
    s, odd = bit % 4, bit // 4
    k = 16 * step + 8 * (s // 2) + 2 * (lane % 4) + odd
    channel = 16 * (4 * (lane // 16) + warp) + 4 * (lane // 4 % 4) + 2 * tile + s % 2
    return (k * 128 + channel).reshape(-1)


def prepare(packed: Int8[Array, "k2 n"]) -> Int32[Array, "n128 k64 4 256"]:
    """Rearrange packed bytes into tile order, once, when a weight is loaded.

    Args:
      packed: int8 ``[k/2, n]`` in the layout of `awq_jax_kernels.nibbles`; k a multiple of 64, n of 128.

    Returns:
      int32 ``[n/128, k/64, 4, 256]``: the same codes, eight to a word.

    Raises:
      ValueError: k or n is not a multiple of its block.
    """
    k, n = 2 * packed.shape[0], packed.shape[1]
    if k % 64 or n % 128:
        raise ValueError(f"cannot prepare packed {packed.shape}: k={k} must be a multiple of 64 and n={n} of 128.")
    codes = nibbles.unpack(packed).reshape(k // 64, 64, n // 128, 128)
    blocks = codes.transpose(2, 0, 1, 3).reshape(n // 128, k // 64, 64 * 128)
    ordered = blocks[:, :, _source()].reshape(n // 128, k // 64, 4, 256, 8).astype(jnp.uint32)
    shifts = jnp.arange(8, dtype=jnp.uint32) * 4
    words = jnp.sum((ordered ^ 8) << shifts, axis=-1, dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(words, jnp.int32)


def restore(tiles: Int32[Array, "n128 k64 4 256"]) -> Int8[Array, "k2 n"]:
    """Inverse of `prepare`."""
    blocks_n, blocks_k = tiles.shape[:2]
    words = jax.lax.bitcast_convert_type(tiles, jnp.uint32).reshape(blocks_n, blocks_k, 1024, 1)
    codes = (words >> (jnp.arange(8, dtype=jnp.uint32) * 4)) & 15 ^ 8
    flat = codes.astype(jnp.uint8).reshape(blocks_n, blocks_k, 64 * 128)[:, :, np.argsort(_source())]
    dense = flat.reshape(blocks_n, blocks_k, 64, 128).transpose(1, 2, 0, 3)
    return nibbles.pack(dense.reshape(blocks_k * 64, blocks_n * 128))
