# SPDX-License-Identifier: Apache-2.0
"""From INT4 codes in shared memory to the register operand of a tensor-core instruction.

A Hopper warpgroup multiplies ``A[64, 16] @ B[16, m]`` with A in registers: thread ``32 w + 4 r + c`` holds rows
``16 w + r`` and ``16 w + r + 8``, columns ``2 c``, ``2 c + 1``, ``2 c + 8`` and ``2 c + 9``. Here A is the weight,
transposed. Which output channel a row stands for is ours to choose, and two such tiles are filled together so that
each thread owns four neighbouring channels (`lane_channel`). One 4-byte load of packed bytes then holds the codes of
one column pair of all four, and scales, zeros and results move in vectors of four.

A code becomes a float without a conversion. ``0x4300`` is 128 in bfloat16 with a last place of 1, so
``0x4300 | q`` is ``128 + q``; subtracting ``128 + zero`` is exact. (float16: ``0x6400`` is 1024.) Two codes are done
at once, half a shift, one logical operation and one subtraction for the pair.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from awq_jax_kernels.int4_matmul.pallas_gpu.config import CHANNELS
from awq_jax_kernels.mosaic_gpu.registers import asm, const, element_pointer, load_words, pure

__all__ = ["UNIT", "add_scaled", "dequantize", "lane_channel", "opaque_mask", "splats"]

UNIT = 64  # contraction steps dequantized at once
MAGIC = {jnp.dtype(jnp.bfloat16): 0x4300, jnp.dtype(jnp.float16): 0x6400}


def lane_channel() -> ir.Value:
    """The first of this thread's four channels, 0..124.

    Lane bit 4 chooses the half of the 128 channels and not a neighbour, so that the four lanes that share it but
    read different rows hit different banks of the swizzled tile.
    """
    thread = arith.remui(mgpu.thread_idx(), const(128))
    warp, lane = arith.shrui(thread, const(5)), arith.remui(thread, const(32))
    chunk = arith.addi(arith.shli(arith.shrui(lane, const(4)), const(2)), warp)
    within = arith.remui(arith.shrui(lane, const(2)), const(4))
    return arith.addi(arith.shli(chunk, const(4)), arith.shli(within, const(2)))


def _advance(ref: ir.Value, byte: ir.Value) -> ir.Value:
    return element_pointer(ref, byte, ir.IntegerType.get_signless(8))


def _packed_pairs(ref: ir.Value) -> Any:
    """Pairs of raw codes, one per 32-bit word in bits 0..3 and 16..19, from bytes ``[k/2, 128]`` (128-byte swizzle)."""
    lane = arith.remui(mgpu.thread_idx(), const(32))
    column = arith.remui(lane, const(4))
    channel = lane_channel()
    chunk = arith.xori(arith.shrui(channel, const(4)), column)
    near = arith.addi(arith.shli(chunk, const(4)), arith.remui(channel, const(16)))
    row = arith.shli(column, const(7))
    # Row c + 4 flips bit 2 of the chunk in the swizzle, and lies 512 bytes on.
    far = arith.addi(arith.xori(near, const(64)), const(512))
    bases = [_advance(ref, arith.addi(row, offset)) for offset in (near, far)]
    for step in range(UNIT // 16):
        for half, base in enumerate(bases):
            (word,) = load_words(base, 1024 * step, 1)
            high = arith.shrui(word, const(4))
            for i in range(4):
                yield step, half, i, pure("prmt.b32", word, high, const(0x4400 + 0x1111 * i))


def _tiled_pairs(ref: ir.Value) -> Any:
    """The same from the order that `tiles.prepare` writes: 16-byte loads, and shifts alone to reach a pair."""
    thread = arith.remui(mgpu.thread_idx(), const(128))
    base = _advance(ref, arith.shli(thread, const(4)))
    for quarter in range(UNIT // 32):
        for j, word in enumerate(load_words(base, 2048 * quarter, 4)):
            step, tile = 2 * quarter + j // 2, j % 2
            for s in range(4):
                yield step, s // 2, 2 * tile + s % 2, arith.shrui(word, const(4 * s)) if s else word


def splats(zero: ir.Value | None, scale: ir.Value | None, dtype: Any) -> list[Any]:
    """What a group does to this thread's four channels, each twice in a word: ``magic + zero``, then scales if given.

    Args:
      zero: shared memory, int8 ``[128]``, or None for 8.
      scale: shared memory, floating ``[128]``, rounded to `dtype` if it is wider; or None.
      dtype: bfloat16 or float16.
    """
    magic = MAGIC[jnp.dtype(dtype)]
    if zero is None:
        zeros = [const((magic + 8) * 0x10001)] * 4
    else:
        (word,) = load_words(_advance(zero, lane_channel()), 0, 1)
        zeros = [pure("prmt.b32", word, const(magic >> 8), const(0x4040 + 0x0101 * i)) for i in range(4)]
    return zeros if scale is None else zeros + _splat_scales(scale, dtype)


def _scales(ref: ir.Value) -> list[Any]:
    """The four channels' scales in float32."""
    element, f32 = ir.MemRefType(ref.type).element_type, ir.F32Type.get()
    size = mgpu.bytewidth(element)
    base = _advance(ref, arith.muli(lane_channel(), const(size)))
    loaded = llvm.load(ir.VectorType.get((4,), element), base, alignment=4 * size)
    values = [llvm.extractelement(loaded, const(i)) for i in range(4)]
    return values if element == f32 else [arith.extf(f32, v) for v in values]


def _splat_scales(ref: ir.Value, dtype: Any) -> list[Any]:
    """Each of the four channels' scales twice in a word."""
    if ir.MemRefType(ref.type).element_type == mgpu.utils.dtype_to_ir_type(dtype):
        words = load_words(_advance(ref, arith.shli(lane_channel(), const(1))), 0, 2)
        return [pure("prmt.b32", word, word, const(half)) for word in words for half in (0x1010, 0x3232)]
    name = "bf16" if jnp.dtype(dtype) == jnp.bfloat16 else "f16"
    i32 = ir.IntegerType.get_signless(32)
    return [
        llvm.inline_asm(i32, [s], f"cvt.rn.{name}x2.f32 $0, $1, $1;", "=r,f", has_side_effects=False)
        for s in _scales(ref)
    ]


def opaque_mask() -> ir.Value:
    """``0x000F000F`` in a register. The assembler would otherwise move the constant again for every use."""
    i32 = ir.IntegerType.get_signless(32)
    text = "{ .reg .u32 size; .reg .pred p; mov.u32 size, %dynamic_smem_size; setp.ne.u32 p, size, 0;"
    text += " selp.b32 $0, 0x000F000F, 0, p; }"
    return asm(text, "=r", result=i32)


def dequantize(codes: ir.Value, groups: list[list[ir.Value]], mask: ir.Value, dtype: Any) -> mgpu.FragmentedArray:
    """``q - zero``, times the scale if given, for 128 channels and 64 steps: a ``[128, 64]`` register operand.

    Args:
      codes: shared memory, int8 ``[32, 128]`` packed bytes with the 128-byte swizzle, or one int32 tile.
      groups: `splats` of the groups that the steps lie in, one or more.
      mask: see `opaque_mask`.
      dtype: bfloat16 or float16.
    """
    name = "bf16x2" if jnp.dtype(dtype) == jnp.bfloat16 else "f16x2"
    flavour = ".rn" if name == "bf16x2" else ""
    element = mgpu.utils.dtype_to_ir_type(dtype)
    packed = ir.MemRefType(codes.type).element_type == ir.IntegerType.get_signless(8)
    magic = const((MAGIC[jnp.dtype(dtype)] | 8) * 0x10001)  # the xor of the layout comes free
    registers = np.empty(mgpu.WGMMA_LAYOUT.registers_shape((CHANNELS, UNIT)), dtype=object)
    for step, half, i, pair in (_packed_pairs if packed else _tiled_pairs)(codes):
        factors = groups[16 * step * len(groups) // UNIT]
        value = arith.xori(arith.andi(pair, mask), magic)
        value = pure(f"sub{flavour}.{name}", value, factors[i])
        if len(factors) > 4:
            value = pure(f"mul{flavour}.{name}", value, factors[4 + i])
        one = vector.broadcast(ir.VectorType.get((1,), value.type), value)
        registers[i // 2, 2 * step + half, 0, 0, i % 2] = vector.bitcast(ir.VectorType.get((2,), element), one)
    return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)


def add_scaled(total: mgpu.FragmentedArray, partial: mgpu.FragmentedArray, scale: ir.Value) -> mgpu.FragmentedArray:
    """``total + partial * scale`` for float32 ``[128, m]`` results of one group, one scale per row."""
    scales = _scales(scale)
    registers: Any = total.registers.copy()
    more: Any = partial.registers
    pair = ir.VectorType.get((2,), ir.F32Type.get())
    for index in np.ndindex(registers.shape):
        factor = vector.broadcast(pair, scales[2 * index[0] + index[4]])
        registers[index] = llvm.intr_fma(more[index], factor, registers[index])
    return mgpu.FragmentedArray(_registers=registers, _layout=total.layout, _is_signed=None)
