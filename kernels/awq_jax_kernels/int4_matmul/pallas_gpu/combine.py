# SPDX-License-Identifier: Apache-2.0
"""Adding up the partial results of warpgroups and blocks that split the contraction, and writing them out.

Every warpgroup leaves its float32 partial in the shared memory of its block, ``[token, channel]``. After one barrier
each block of the cluster sums a share of the tile over all parts, its own and (through distributed shared memory)
those of its peers, rounds once and writes rows of y. So a split costs no workspace in device memory, no zeroed
counter and no second launch.
"""

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, vector

from awq_jax_kernels.int4_matmul.pallas_gpu.fragment import CHANNELS, const, lane_channel

__all__ = ["PAD", "store_partial", "sum_parts", "synchronize"]

PAD = 4  # floats after each row: the rows that one store touches then start 8 banks apart


def _asm(text: str, constraints: str, *operands: ir.Value, result: ir.Type | None = None) -> ir.Value | None:
    kind = ir.Type.parse("!llvm.void") if result is None else result
    return llvm.inline_asm(kind, list(operands), text, constraints, has_side_effects=True)


def synchronize(threads: int, cluster: int) -> None:
    """Wait for all threads of the block that compute, or for all threads of the cluster."""
    if cluster == 1:
        _asm(f"bar.sync 15, {threads};", "")
    else:
        _asm("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;", "")


def store_partial(total: mgpu.FragmentedArray, parts: ir.Value, first: int, count: int) -> None:
    """Write tokens ``first .. first + count`` of a warpgroup's float32 ``[128, m]`` to shared ``[count, 128 (+ …)]``.

    `parts` starts at the warpgroup's own channels; its row pitch is that of the whole tile.
    """
    (pitch, _), _ = ir.MemRefType(parts.type).get_strides_and_offset()
    column = arith.remui(mgpu.thread_idx(), const(4))
    at = arith.addi(arith.muli(arith.shli(column, const(1)), const(pitch)), lane_channel())
    base = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(parts), [at], ir.F32Type.get())
    four = ir.VectorType.get((4,), ir.F32Type.get())
    for block in range(first // 8, (first + count) // 8):
        for e in range(2):
            values = [
                llvm.extractelement(total.registers[tile, block, 0, 0, half, 0, 0, 0, 0], const(e))
                for tile in range(2)
                for half in range(2)
            ]
            offset = 4 * pitch * (8 * block - first + e)
            to = mgpu.utils.getelementptr(base, [offset], ir.IntegerType.get_signless(8))
            llvm.store(vector.from_elements(four, values), to, alignment=16)


def sum_parts(
    parts: ir.Value, y: ir.Value, token: ir.Value, channel: ir.Value, *, tokens: int, threads: int, cluster: int
) -> None:
    """Sum shared float32 ``[parts, tokens, channels]`` over parts and the cluster's blocks into rows of y.

    Args:
      parts: the block's partial results; the other blocks' lie at the same address.
      y: device memory, ``[m, n]``.
      token, channel: of y, where the tile begins.
      tokens: rows of the tile; those past m are not written.
      threads: that call this, per block.
      cluster: blocks that split the contraction.
    """
    count, _, width = ir.MemRefType(parts.type).shape
    channels = width - PAD
    m, n = ir.MemRefType(y.type).shape
    i32 = ir.IntegerType.get_signless(32)
    bases = [mgpu.utils.memref_ptr(parts)]
    rank = const(0)
    if cluster > 1:
        rank = arith.index_cast(i32, gpu.cluster_block_id(gpu.Dimension.x))
        own = llvm.ptrtoint(i32, bases[0])
        bases = [_asm("mapa.shared::cluster.u32 $0, $1, $2;", "=r,r,r", own, const(r), result=i32) for r in range(cluster)]
    thread = arith.addi(mgpu.thread_idx(), arith.muli(rank, const(threads)))
    for i in range(-(-tokens * channels // (4 * threads * cluster))):
        unit = arith.addi(thread, const(i * threads * cluster))
        row = arith.divui(unit, const(channels // 4))
        column = arith.shli(arith.remui(unit, const(channels // 4)), const(2))
        to_row = arith.addi(row, token)
        inside = arith.andi(
            arith.cmpi(arith.CmpIPredicate.slt, row, const(tokens)),
            arith.cmpi(arith.CmpIPredicate.slt, to_row, const(m)),
        )
        with mgpu.when(inside):
            offset = arith.addi(arith.muli(row, const(width)), column)
            values = None
            for base in bases:
                for part in range(count):
                    where = arith.addi(offset, const(part * tokens * width))
                    loaded = _load4(base, where, cluster > 1)
                    values = loaded if values is None else arith.addf(values, loaded)
            element = ir.MemRefType(y.type).element_type
            rounded = arith.truncf(ir.VectorType.get((4,), element), values)
            at = arith.addi(arith.muli(to_row, const(n)), arith.addi(column, channel))
            llvm.store(rounded, mgpu.utils.getelementptr(mgpu.utils.memref_ptr(y), [at], element), alignment=8)


def _load4(base: ir.Value, offset: ir.Value, remote: bool) -> ir.Value:
    """Four floats from this block's shared memory, or from any block's of the cluster."""
    f32 = ir.F32Type.get()
    four = ir.VectorType.get((4,), f32)
    if not remote:
        return llvm.load(four, mgpu.utils.getelementptr(base, [offset], f32), alignment=16)
    address = arith.addi(base, arith.shli(offset, const(2)))
    struct = llvm.StructType.get_literal([f32] * 4)
    loaded = _asm("ld.shared::cluster.v4.f32 {$0,$1,$2,$3}, [$4];", "=f,=f,=f,=f,r", address, result=struct)
    return vector.from_elements(four, [llvm.extractvalue(f32, loaded, [i]) for i in range(4)])
