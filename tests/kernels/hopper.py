# SPDX-License-Identifier: Apache-2.0
"""A warpgroup in numpy: which bytes each thread of the Hopper kernel loads, and what it makes of them.

The register operand of the tensor cores can't be run without a GPU, and JAX's interpreter has no inline device code. So
the address and bit arithmetic of `fragment` is stated here a second time, for all 128 threads at once.
"""

import ml_dtypes
import numpy as np

__all__ = ["THREADS", "a_operand", "bank_passes", "first_channel", "from_bytes", "from_tiles", "swizzle"]

THREADS = np.arange(128)
WARP, LANE = THREADS // 32, THREADS % 32
R, C = LANE // 4, LANE % 4


def first_channel() -> np.ndarray:
    """The first of each thread's four channels."""
    return 16 * (4 * (R // 4) + WARP) + 4 * (R % 4)


def swizzle(rows: np.ndarray) -> np.ndarray:
    """Shared memory after a bulk copy of uint8 ``[rows, 128]`` with the 128-byte swizzle, as flat bytes."""
    chunks = rows.reshape(len(rows), 8, 16)
    moved = np.empty_like(chunks)
    for r in range(len(rows)):
        moved[r, np.arange(8) ^ r % 8] = chunks[r]
    return moved.reshape(-1)


def from_bytes(memory: np.ndarray) -> tuple[dict, list[np.ndarray]]:
    """Pairs of codes by (16-step, half, channel) from packed bytes ``[32, 128]``, and the addresses of every load."""
    chunk = first_channel() // 16
    pairs, loads = {}, []
    for step in range(4):
        for half in range(2):
            row = 8 * step + C + 4 * half
            address = 128 * row + 16 * (chunk ^ row % 8) + first_channel() % 16
            word = memory[address[:, None] + np.arange(4)].view("<u4")[:, 0]
            loads.append(address)
            high = word >> 4
            for i in range(4):  # prmt: byte i of the word below, byte i of the shifted word above
                low, up = word >> (8 * i) & 0xFF, high >> (8 * i) & 0xFF
                pairs[step, half, i] = low | low << 8 | up << 16 | up << 24
    return pairs, loads


def from_tiles(memory: np.ndarray) -> tuple[dict, list[np.ndarray]]:
    """The same from one tile of `prepare`, int32 ``[4, 256]``."""
    words = memory.reshape(-1).view("<u4")
    pairs, loads = {}, []
    for quarter in range(2):
        address = 2048 * quarter + 16 * THREADS
        loads.append(address)
        for j in range(4):
            word = words[address // 4 + j]
            for s in range(4):
                pairs[2 * quarter + j // 2, s // 2, 2 * (j % 2) + s % 2] = word >> (4 * s)
    return pairs, loads


def a_operand(pairs: dict, zero: np.ndarray) -> np.ndarray:
    """Float32 ``[128 channels, 64 steps]`` as the tensor cores see it, after the bfloat16 arithmetic of the kernel."""
    operand = np.full((128, 64), np.nan, np.float32)
    for (step, half, i), pair in pairs.items():
        word = ((pair & 0x000F000F) ^ 0x43084308).astype("<u4")
        values = word[:, None].view(ml_dtypes.bfloat16)  # [128, 2]
        channel = first_channel() + i
        values = (values - (128 + zero[channel])[:, None].astype(ml_dtypes.bfloat16)).astype(np.float32)
        k = 16 * step + 8 * half + 2 * C
        operand[channel, k], operand[channel, k + 1] = values[:, 0], values[:, 1]
    return operand


def bank_passes(address: np.ndarray, width: int) -> int:
    """The most passes over the 32 banks that a warp's load takes: 1 if no two threads of a pass collide.

    Loads wider than four bytes go by quarter-warps (16 bytes) or half-warps (8 bytes).
    """
    worst = 1
    for warp in address.reshape(4, 32):
        for group in warp.reshape(width // 4, -1):
            words = {int(a) // 4 + j for a in group for j in range(width // 4)}
            worst = max(worst, int(np.bincount(np.array(sorted(words)) % 32).max()))
    return worst
