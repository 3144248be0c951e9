# SPDX-License-Identifier: Apache-2.0
"""Adding up the results of warpgroups and blocks that split the contraction, and writing them out.

All of them hold the same tile, ``[128, tokens]`` in float32, four channels of one token to a vector. Each owns a share
of the vectors. It sends the others theirs, into shared memory of its own block or (distributed shared memory) of a
peer in the cluster; after one barrier it adds what it was sent and writes its share of y, 32 contiguous bytes for
four lanes. A split costs one barrier: no workspace in device memory, no counter to clear, no second launch.
"""

import dataclasses

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, vector

from awq_jax_kernels.int4_matmul.pallas_gpu.fragment import lane_channel
from awq_jax_kernels.mosaic_gpu.registers import asm, const

__all__ = ["Sharing", "mail_shape", "send", "synchronize", "write"]

VECTORS = 128 * 16  # bytes of one vector of every thread of a warpgroup


@dataclasses.dataclass(frozen=True)
class Sharing:
    """Who shares a tile: `deep` warpgroups in each of `split` blocks, `wide` tiles to a block."""

    tokens: int
    wide: int
    deep: int
    split: int

    @property
    def holders(self) -> int:
        """Warpgroups that hold a part of the same tile."""
        return self.deep * self.split

    @property
    def share(self) -> int:
        """Vectors of a thread that one holder owns, at most."""
        return -(-self.tokens // (4 * self.holders))

    def owned(self, holder: int) -> list[tuple[int, int]]:
        """The vectors of one holder: (block of eight tokens, even or odd)."""
        vectors = [(block, e) for block in range(self.tokens // 8) for e in range(2)]
        return vectors[holder * self.share : (holder + 1) * self.share]


def mail_shape(sharing: Sharing) -> tuple[int, int]:
    """Shared floats for what a block's warpgroups are sent: a row for each owner, sender and vector."""
    rows = sharing.deep * sharing.wide * (sharing.holders - 1) * sharing.share
    return (max(1, rows), VECTORS // 4)


def synchronize(threads: int, cluster: int) -> None:
    """Wait for all threads of the block that multiply, or for all threads of the cluster."""
    if cluster == 1:
        asm(f"bar.sync 15, {threads};", "")
    else:
        asm("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;", "")


def _vector(total: mgpu.FragmentedArray, block: int, e: int) -> ir.Value:
    """Four channels of token ``8 block + 2 c + e``."""
    index = (block, 0, 0)
    values = [
        llvm.extractelement(total.registers[(tile, *index, half, 0, 0, 0, 0)], const(e))
        for tile in range(2)
        for half in range(2)
    ]
    return vector.from_elements(ir.VectorType.get((4,), ir.F32Type.get()), values)


def _holder(sharing: Sharing, turn: ir.Value) -> ir.Value:
    if sharing.split == 1:
        return turn
    rank = arith.index_cast(ir.IntegerType.get_signless(32), gpu.cluster_block_id(gpu.Dimension.x))
    return arith.addi(arith.muli(rank, const(sharing.deep)), turn)


def _mailbox(sharing: Sharing, mail: ir.Value, owner: int, sender: ir.Value, place: ir.Value) -> ir.Value:
    """32-bit shared address of this thread's first vector from a sender to an owner, within the owner's block."""
    others = sharing.holders - 1
    after = arith.cmpi(arith.CmpIPredicate.ugt, sender, const(owner))
    row = arith.select(after, arith.subi(sender, const(1)), sender)  # nobody writes to itself
    box = arith.addi(const(owner % sharing.deep * sharing.wide), place)
    row = arith.addi(arith.muli(box, const(others)), row)
    thread = arith.shli(arith.remui(mgpu.thread_idx(), const(128)), const(4))
    base = llvm.ptrtoint(ir.IntegerType.get_signless(32), mgpu.utils.memref_ptr(mail))
    return arith.addi(base, arith.addi(arith.muli(row, const(sharing.share * VECTORS)), thread))


def send(sharing: Sharing, total: mgpu.FragmentedArray, mail: ir.Value, turn: ir.Value, place: ir.Value) -> None:
    """Send every other holder its vectors of this warpgroup's tile; `place` is the tile's number in the block."""
    me, i32 = _holder(sharing, turn), ir.IntegerType.get_signless(32)
    for owner in range(sharing.holders):
        with mgpu.when(arith.cmpi(arith.CmpIPredicate.ne, me, const(owner))):
            to, space = _mailbox(sharing, mail, owner, me, place), "shared::cta"
            if sharing.split > 1:
                rank, space = const(owner // sharing.deep), "shared::cluster"
                to = asm("mapa.shared::cluster.u32 $0, $1, $2;", "=r,r,r", to, rank, result=i32)
            for i, (block, e) in enumerate(sharing.owned(owner)):
                values = _vector(total, block, e)
                parts = [llvm.extractelement(values, const(j)) for j in range(4)]
                text = f"st.{space}.v4.f32 [$0+{i * VECTORS}], {{$1, $2, $3, $4}};"
                asm(text, "r,f,f,f,f", to, *parts)


def write(
    sharing: Sharing, total: mgpu.FragmentedArray, mail: ir.Value, y: ir.Value, turn: ir.Value, place: ir.Value,
    token: ir.Value, channel: ir.Value,
) -> None:  # fmt: skip
    """Add what was sent to the vectors that this warpgroup owns, round once, and write them to y.

    Args:
      sharing: who holds parts of the tile.
      total: this warpgroup's part.
      mail: shared memory, `mail_shape`.
      y: device memory, ``[m, n]``; tokens past m are not written.
      turn, place: which of the block's warpgroups this is.
      token, channel: of y, where the tile begins.
    """
    me, f32 = _holder(sharing, turn), ir.F32Type.get()
    four = ir.VectorType.get((4,), f32)
    m, n = ir.MemRefType(y.type).shape
    element = ir.MemRefType(y.type).element_type
    rounded = ir.VectorType.get((4,), element)
    column = arith.shli(arith.remui(mgpu.thread_idx(), const(4)), const(1))
    first = arith.addi(token, column)
    out = arith.addi(arith.muli(first, const(n)), arith.addi(channel, lane_channel()))
    base = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(y), [out], element)
    literal = llvm.StructType.get_literal([f32] * 4)
    for owner in range(sharing.holders):
        owned = sharing.owned(owner)
        if not owned:
            continue
        with mgpu.when(arith.cmpi(arith.CmpIPredicate.eq, me, const(owner))):
            values = [_vector(total, block, e) for block, e in owned]
            for sender in range(sharing.holders):
                if sender == owner:
                    continue
                at = _mailbox(sharing, mail, owner, const(sender), place)
                for i in range(len(owned)):
                    text = f"ld.shared::cta.v4.f32 {{$0, $1, $2, $3}}, [$4+{i * VECTORS}];"
                    loaded = asm(text, "=f,=f,=f,=f,r", at, result=literal)
                    parts = [llvm.extractvalue(f32, loaded, [j]) for j in range(4)]
                    values[i] = arith.addf(values[i], vector.from_elements(four, parts))
            for (block, e), value in zip(owned, values, strict=True):
                row = 8 * block + e
                inside = arith.cmpi(arith.CmpIPredicate.slt, arith.addi(first, const(row)), const(m))
                with mgpu.when(inside):
                    to = mgpu.utils.getelementptr(base, [row * n], element)
                    llvm.store(arith.truncf(rounded, value), to, alignment=8)
