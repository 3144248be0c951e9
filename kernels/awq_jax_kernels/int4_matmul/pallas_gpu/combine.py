# SPDX-License-Identifier: Apache-2.0
"""Adding up the results of warpgroups and blocks that split the contraction.

All of them hold the same tile, ``[128, tokens]`` in float32, four channels of one token to a vector. Each owns a share
of the vectors. It sends the others theirs, into shared memory of its own block or (distributed shared memory) of a
peer in the cluster; after one barrier it adds what it was sent, and `ends` writes the share. A split costs one barrier:
no workspace in device memory, no counter to clear, no second launch. Mosaic's prologue has waited until all blocks
of the cluster have begun and have memory to be sent to; behind the barrier none is sent anything, so each may leave.
"""

import dataclasses
from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, scf, vector

from awq_jax_kernels.mosaic_gpu.registers import asm, const, element_pointer

__all__ = ["Sharing", "collect", "exchange", "holder", "mail_shape", "send", "synchronize"]

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


def holder(sharing: Sharing, turn: ir.Value) -> ir.Value:
    """The number of a warpgroup among those that hold parts of the same tile."""
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
    me, i32 = holder(sharing, turn), ir.IntegerType.get_signless(32)
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


def collect(
    sharing: Sharing, total: mgpu.FragmentedArray, mail: ir.Value, turn: ir.Value, place: ir.Value
) -> list[ir.Value]:
    """Add what was sent to the vectors that this warpgroup owns; `share` of them, of which the last may be nobody's."""
    me, f32 = holder(sharing, turn), ir.F32Type.get()
    four = ir.VectorType.get((4,), f32)
    literal = llvm.StructType.get_literal([f32] * 4)
    nothing = arith.constant(four, ir.DenseElementsAttr.get_splat(four, ir.FloatAttr.get(f32, 0.0)))

    def sums(owner: int) -> list[ir.Value]:
        values = [_vector(total, block, e) for block, e in sharing.owned(owner)]
        for sender in (s for s in range(sharing.holders) if s != owner):
            at = _mailbox(sharing, mail, owner, const(sender), place)
            for i, value in enumerate(values):
                text = f"ld.shared::cta.v4.f32 {{$0, $1, $2, $3}}, [$4+{i * VECTORS}];"
                loaded = asm(text, "=f,=f,=f,=f,r", at, result=literal)
                parts = [llvm.extractvalue(f32, loaded, [j]) for j in range(4)]
                values[i] = arith.addf(value, vector.from_elements(four, parts))
        return values + [nothing] * (sharing.share - len(values))

    if sharing.holders == 1:
        return sums(0)
    mine: Any = [nothing] * sharing.share
    for owner in range(sharing.holders):
        chosen = scf.IfOp(arith.cmpi(arith.CmpIPredicate.eq, me, const(owner)), [four] * sharing.share, has_else=True)
        with ir.InsertionPoint(chosen.then_block):
            scf.yield_(sums(owner))
        with ir.InsertionPoint(chosen.else_block):  # pyright: ignore[reportCallIssue, reportArgumentType]  # it has one
            scf.yield_(mine)
        mine = list(chosen.results_)
    return mine


def exchange(
    sharing: Sharing, values: list[ir.Value], mail: ir.Value, turn: ir.Value, place: ir.Value
) -> list[ir.Value]:
    """What the warpgroup one place on owns of the same tokens, for those of place 0; within one block of two places."""
    four, others = ir.VectorType.get((4,), ir.F32Type.get()), sharing.holders - 1
    box = arith.muli(arith.addi(arith.muli(turn, const(sharing.wide)), const(1)), const(others * sharing.share))
    at = arith.addi(
        arith.muli(box, const(VECTORS // 4)), arith.shli(arith.remui(mgpu.thread_idx(), const(128)), const(2))
    )
    where = [arith.addi(at, const(i * VECTORS // 4)) for i in range(len(values))]
    pointers = [element_pointer(mail, offset, ir.F32Type.get()) for offset in where]
    with mgpu.when(arith.cmpi(arith.CmpIPredicate.eq, place, const(1))):  # into what it was sent and has read
        for pointer, value in zip(pointers, values, strict=True):
            llvm.store(value, pointer, alignment=16)
    synchronize(128 * sharing.deep * sharing.wide, 1)
    return [llvm.load(four, pointer, alignment=16) for pointer in pointers]
